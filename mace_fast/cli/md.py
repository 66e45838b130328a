"""mace-fast md."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mace_fast.cli.console import print_json, progress_bar, say, stdout
from mace_fast.cli.options import Device, Dtype, Head, Json, ModelOption, NoVerify, read_structure, usage_errors
from mace_fast.cli.running import (
    INTERRUPTED,
    Overwrite,
    Repeat,
    Structure,
    interrupt_flag,
    make_calculator,
    model_identity,
    require_own_features,
)
from mace_fast.files import published
from mace_fast.md.settings import MDSettings

if TYPE_CHECKING:
    from mace_fast.md.dynamics import MDResult
    from mace_fast.md.files import Sample


class Ensemble(str, Enum):
    """What the dynamics keeps constant."""

    nve = "nve"
    nvt = "nvt"
    npt = "npt"


class Thermostat(str, Enum):
    """What holds the temperature of NVT."""

    langevin = "langevin"
    nose_hoover = "nose-hoover"
    bussi = "bussi"


class BarostatCell(str, Enum):
    """What NPT changes of the cell."""

    isotropic = "isotropic"
    full = "full"


class TrajectoryFormat(str, Enum):
    """File formats of a trajectory."""

    extxyz = "extxyz"
    traj = "traj"


_DYNAMICS = "Dynamics"
_FILES = "Files and restarts"


def md(
    context: typer.Context,
    structure: Structure,
    model: ModelOption,
    steps: Annotated[
        int, typer.Option(min=1, help="Number of steps, from the beginning.", rich_help_panel=_DYNAMICS)
    ] = 1000,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="K; also of the initial velocities, if the file has none.", rich_help_panel=_DYNAMICS),
    ] = 300.0,
    timestep: Annotated[
        float,
        typer.Option(min=0.001, help="fs; 0.5 with hydrogen, 2 for metals, 1 in between.", rich_help_panel=_DYNAMICS),
    ] = 1.0,
    ensemble: Annotated[
        Ensemble,
        typer.Option(
            help="nve keeps the energy, nvt the temperature, npt temperature and pressure (Martyna-Tobias-Klein).",
            rich_help_panel=_DYNAMICS,
        ),
    ] = Ensemble.nvt,
    thermostat: Annotated[
        Thermostat,
        typer.Option(
            help="Of nvt: langevin (robust, equilibrates fast), nose-hoover (a chain; deterministic) or bussi "
            "(velocity rescaling); the last two disturb diffusion little.",
            rich_help_panel=_DYNAMICS,
        ),
    ] = Thermostat.langevin,
    friction: Annotated[
        float, typer.Option(min=1e-9, help="1/fs, of the Langevin thermostat.", rich_help_panel=_DYNAMICS)
    ] = 0.01,
    thermostat_time: Annotated[
        float,
        typer.Option(
            min=1e-3,
            help="fs, time constant of nose-hoover, bussi and npt; about 100 steps.",
            rich_help_panel=_DYNAMICS,
        ),
    ] = 100.0,
    pressure: Annotated[float, typer.Option(help="GPa, of npt; 1 bar is 0.0001.", rich_help_panel=_DYNAMICS)] = 1e-4,
    barostat_time: Annotated[
        float,
        typer.Option(min=1e-3, help="fs, time constant of npt's cell; about 1000 steps.", rich_help_panel=_DYNAMICS),
    ] = 1000.0,
    cell: Annotated[
        BarostatCell,
        typer.Option(
            help="Of npt: isotropic scales the cell (liquids, cubic crystals), full moves every length and angle.",
            rich_help_panel=_DYNAMICS,
        ),
    ] = BarostatCell.isotropic,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.", rich_help_panel=_DYNAMICS)] = 0,
    repeat: Repeat = 1,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory for what the run writes.", rich_help_panel=_FILES),
    ] = Path("md-output"),
    log_interval: Annotated[
        int, typer.Option(min=1, help="Steps between rows of the log and frames.", rich_help_panel=_FILES)
    ] = 10,
    trajectory: Annotated[
        TrajectoryFormat,
        typer.Option(help="extxyz (text) or traj (ASE's binary format, exact).", rich_help_panel=_FILES),
    ] = TrajectoryFormat.extxyz,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            "--resume",
            help="Continue the run in the directory, with the same options; begin where there is none. More --steps "
            "extend it.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    restart_interval: Annotated[
        int, typer.Option(min=1, help="Steps between restart points.", rich_help_panel=_FILES)
    ] = 200,
    overwrite: Overwrite = False,
    head: Head = None,
    dtype: Dtype = None,
    device: Device = None,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Molecular dynamics of a structure: NVE, NVT or NPT, with restarts.

    Writes the trajectory, log.csv, picture.png (energy, temperature, drift) and restart.npz into a directory.

    Ctrl-C or SIGTERM stops after the step, with everything written (exit status 130). A stopped or killed run goes on
    with the same command and --restart.

    Charge and spin, for a model that takes them: charge=1 spin=2 among the keys of an extended XYZ file, in e and as
    multiplicity (atoms.info in other formats); else 0 and 1.

    Example: mace-fast md structure.cif --model my.model --temperature 300 --steps 1000

    Equilibrate at 1 bar: mace-fast md liquid.xyz -m my.model --ensemble npt --temperature 350 --steps 50000 -o npt

    Conserve energy: mace-fast md npt/trajectory.extxyz -m my.model --ensemble nve --timestep 0.5 -o nve

    Continue, or extend to 100000 steps: mace-fast md liquid.xyz -m my.model --ensemble npt --temperature 350
    --steps 100000 -o npt --restart
    """
    if restart and overwrite:
        raise typer.BadParameter("--restart and --overwrite contradict each other: continue the run, or replace it?")
    with usage_errors():
        settings = MDSettings(
            steps=steps,
            ensemble=ensemble.value,
            temperature=temperature,
            timestep=timestep,
            friction=friction,
            seed=seed,
            log_interval=log_interval,
            thermostat=thermostat.value,
            thermostat_time=thermostat_time,
            pressure=pressure,
            barostat_time=barostat_time,
            cell=cell.value,
            trajectory=trajectory.value,
            restart_interval=restart_interval,
        )
    # The settings refuse what these dynamics do not read; here also where the default is given.
    for name, where in settings.without_effect().items():
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} does nothing here: it is {where}")

    from mace_fast.md.dynamics import PICTURE_FILE, require_unused, run
    from mace_fast.md.picture import draw_run
    from mace_fast.md.restart import RESTART_FILE

    if not overwrite and not (restart and (output / RESTART_FILE).exists()):
        require_unused(output)
        if restart:
            say(f"{output}: no run to continue; beginning one")
    atoms = read_structure(structure).repeat(repeat)
    atoms.calc = make_calculator(model, device, dtype, head, no_verify)
    require_own_features(atoms, atoms.calc, repeat)
    formula = atoms.get_chemical_formula()
    with progress_bar() as progress, interrupt_flag() as interrupted:
        task = progress.add_task(formula, total=steps, status="")
        started = False

        def show(sample: Sample, ns_per_day: float) -> None:
            nonlocal started
            if not started:
                progress.reset(task, completed=sample.step)  # what was done before a restart says nothing of the speed
                started = True
            progress.update(task, completed=sample.step, status=status_line(sample, len(atoms), ns_per_day))

        result = run(
            atoms,
            settings,
            output,
            existing="replace" if overwrite else "continue" if restart else "refuse",
            identity=model_identity(model, atoms.calc),
            on_sample=show,
            stop=interrupted,
        )
    with published(output / PICTURE_FILE) as temporary:
        draw_run(result, temporary, title=f"{formula}, {ensemble.value.upper()}, {model}")
    if json:
        print_json({"structure": str(structure), "model": model, "output": str(output), **result.summary()})
    else:
        stdout.print(summary_table(result, output))
    if result.steps_before == result.steps_done:
        say(
            f"{output}: no step was made: the run has {result.steps_done} steps, and --steps {steps} counts from its "
            "beginning; more --steps extend it"
        )
    if result.interrupted:
        how = "--restart in place of --overwrite" if overwrite else "--restart"
        say(f"stopped after {result.steps_done} of {steps} steps; the same command with {how} continues")
        raise typer.Exit(INTERRUPTED)


def status_line(sample: Sample, num_atoms: int, ns_per_day: float) -> str:
    """Temperature, energy and speed, for a progress bar."""
    pressure = "" if sample.pressure is None else f" {sample.pressure:.2f} GPa"
    energy = f"{sample.total_energy / num_atoms:.4f} eV/atom"
    return f"{sample.temperature:4.0f} K {energy}{pressure} {ns_per_day:.3g} ns/day"  # short, for 80 columns


def summary_table(result: MDResult, output: Path) -> Table:
    """A run in a few lines."""
    from mace_fast.md.dynamics import LOG_FILE, PICTURE_FILE, trajectory_name
    from mace_fast.md.restart import RESTART_FILE

    summary = result.summary()
    table = Table.grid(padding=(0, 2))
    table.add_row("atoms", str(result.num_atoms))
    table.add_row("steps", f"{result.steps_done} of {result.settings.timestep} fs")
    table.add_row("speed", f"{summary['milliseconds_per_step']:.3g} ms/step (median), {result.ns_per_day:.3g} ns/day")
    table.add_row("temperature", f"mean {summary['mean_temperature']:.1f} K")
    if summary["mean_pressure_GPa"] is not None:
        table.add_row("pressure", f"mean {summary['mean_pressure_GPa']:.3g} GPa")
        table.add_row("volume", f"{summary['final_volume']:.5g} A^3 at the end")
    if result.drift is not None:
        table.add_row("energy drift", f"{result.drift:+.3g} meV/atom/ps")
    names = (trajectory_name(result.settings), LOG_FILE, PICTURE_FILE, RESTART_FILE)
    table.add_row("files", f"{output}: {', '.join(names)}")
    return table
