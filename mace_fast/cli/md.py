"""mace-fast md."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.table import Table

from mace_fast.calculators import MACEFastCalculator
from mace_fast.cli.console import print_json, progress_bar, say, stdout
from mace_fast.cli.options import (
    Device,
    Dtype,
    Force,
    Head,
    Json,
    ModelOption,
    NoVerify,
    choose_device,
    read_structure,
    usage_errors,
)
from mace_fast.errors import MaceFastError
from mace_fast.files import published
from mace_fast.md.dynamics import MDResult, MDSettings, Sample, run
from mace_fast.md.picture import draw_run

INTERRUPTED = 130


class Ensemble(str, Enum):
    """What the dynamics keeps constant."""

    nvt = "nvt"
    nve = "nve"


def md(
    structure: Annotated[
        Path, typer.Argument(help="Any file that ASE reads (cif, xyz, POSCAR ...); its last structure.")
    ],
    model: ModelOption,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 1000,
    temperature: Annotated[
        float, typer.Option(min=0, help="K; also of the initial velocities, if the file has none.")
    ] = 300.0,
    timestep: Annotated[float, typer.Option(min=0.001, help="fs.")] = 1.0,
    ensemble: Annotated[Ensemble, typer.Option(help="nvt (Langevin thermostat) or nve.")] = Ensemble.nvt,
    friction: Annotated[float, typer.Option(min=1e-9, help="1/fs, of the Langevin thermostat.")] = 0.01,
    repeat: Annotated[int, typer.Option(min=1, help="Repeat the cell so many times along each vector.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for what the run writes.")] = Path(
        "md-output"
    ),
    log_interval: Annotated[int, typer.Option(min=1, help="Steps between rows of the log and frames.")] = 10,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.")] = 0,
    head: Head = None,
    dtype: Dtype = None,
    device: Device = None,
    no_verify: NoVerify = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Molecular dynamics of a structure. Writes trajectory.extxyz, log.csv and picture.png; Ctrl-C stops
    after a step.

    Example: mace-fast md structure.cif --model my.model --temperature 300 --steps 1000
    """
    settings = MDSettings(steps, ensemble.value, temperature, timestep, friction, seed, log_interval)
    if (output / "log.csv").exists() and not force:
        raise MaceFastError(f"{output}: holds an earlier run; --force replaces it, --output names another directory")
    atoms = read_structure(structure).repeat(repeat)
    place = choose_device(device)
    say(f"loading and converting {model}" + ("" if no_verify else ", verifying the conversion"))
    with usage_errors():
        atoms.calc = MACEFastCalculator(
            model,
            device=place,
            default_dtype="" if dtype is None else dtype.value,
            head=head,
            verify=not no_verify,
        )
    with progress_bar() as progress, interrupt_flag() as interrupted:
        task = progress.add_task(f"{atoms.get_chemical_formula()}", total=steps, status="")

        def show(sample: Sample) -> None:
            progress.update(task, completed=sample.step, status=status_line(sample, len(atoms)))

        result = run(atoms, settings, output, on_sample=show, stop=interrupted)
    with published(output / "picture.png") as temporary:
        draw_run(result, temporary, title=f"{atoms.get_chemical_formula()}, {ensemble.value.upper()}, {model}")
    if json:
        print_json({"structure": str(structure), "model": model, "output": str(output), **result.summary()})
    else:
        stdout.print(summary_table(result, output))
    if result.interrupted:
        say(f"stopped after {result.steps_done} of {steps} steps; the files in {output} are complete")
        raise typer.Exit(INTERRUPTED)


def status_line(sample: Sample, num_atoms: int) -> str:
    """Temperature, energy and speed, for a progress bar."""
    speed = sample.time_ps * 1e-3 * 86400 / sample.wall_time if sample.step else 0.0
    return f"{sample.temperature:5.0f} K  {sample.total_energy / num_atoms:9.4f} eV/atom  {speed:6.3f} ns/day"


def summary_table(result: MDResult, output: Path) -> Table:
    """A run in a few lines."""
    summary = result.summary()
    table = Table.grid(padding=(0, 2))
    table.add_row("atoms", str(result.num_atoms))
    table.add_row("steps", f"{result.steps_done} of {result.settings.timestep} fs")
    table.add_row("speed", f"{summary['milliseconds_per_step']:.3g} ms/step (median), {result.ns_per_day:.3g} ns/day")
    table.add_row("temperature", f"mean {summary['mean_temperature']:.1f} K")
    if result.settings.ensemble == "nve":
        table.add_row("energy drift", f"{result.drift:+.3g} meV/atom/ps")
    table.add_row("files", f"{output}: trajectory.extxyz, log.csv, picture.png")
    return table


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C sets a flag, which the yielded function reads; a second stops at once."""
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
