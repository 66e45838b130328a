"""mace-fast bench."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mace_fast.cli.console import print_json, progress_bar, say, stdout
from mace_fast.cli.options import (
    Device,
    Dtype,
    Head,
    Json,
    Model,
    NoVerify,
    choose_device,
    read_structure,
    usage_errors,
)
from mace_fast.md.settings import MDSettings

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

    from mace_fast.md.speed import Timing

_SIZES = (64, 256)
_MOST_ELEMENTS = 4  # of the 89 that a foundation model knows


def bench(
    model: Model,
    atoms: Annotated[
        list[int] | None,
        typer.Option(
            "--atoms",
            "-n",
            min=1,
            help="About so many atoms; may be given several times.  \\[default: 64, 256]",
        ),
    ] = None,
    structure: Annotated[
        Path | None,
        typer.Option("--structure", "-s", help="Time this structure.  \\[default: a crystal of the model's elements]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="MD steps that are timed.")] = 10,
    head: Head = None,
    dtype: Dtype = None,
    device: Device = None,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Time MD steps with mace_fast and with mace-torch, step by step in turns, and compare their forces.

    Example: mace-fast bench medium-mpa-0 --atoms 64 --atoms 256
    """
    from mace_fast.calculators import MACEFastCalculator
    from mace_fast.loading import load_model, model_dtype, require_energy_model

    # After mace_fast, which imports mace quietly.
    from mace.calculators import MACECalculator  # isort: skip

    if atoms and structure:
        raise typer.BadParameter(
            "--atoms does nothing with --structure, which has the atoms that it has; leave one out"
        )
    place = choose_device(device)
    original = require_energy_model(load_model(model, place, dtype))
    precision = str(model_dtype(original)).removeprefix("torch.")
    say("converting" if no_verify else "converting and verifying")
    with usage_errors():
        fast = MACEFastCalculator(models=original, device=place, head=head, verify=not no_verify)
    # MACECalculator changes the module that it is given.
    reference = MACECalculator(
        models=copy.deepcopy(original), device=str(place), default_dtype=precision, head=fast.head
    )
    calculators = {"mace_fast": fast, "mace-torch": reference}
    numbers = [int(z) for z in original.atomic_numbers]
    structures = [read_structure(structure)] if structure else [_crystal(numbers, count) for count in atoms or _SIZES]
    rows = [_row(subject, _timed(subject, calculators, steps)) for subject in structures]
    if json:
        print_json({"model": model, "device": str(place), "dtype": precision, "steps": steps, "results": rows})
    else:
        stdout.print(_table(rows, f"{model}, {precision}, {place}: one MD step (median of {steps})"))


def _timed(atoms: Atoms, calculators: dict[str, Calculator], steps: int) -> dict[str, Timing]:
    from mace_fast.md.speed import time_steps

    settings = MDSettings(steps=steps, ensemble="nve", timestep=1.0)
    with progress_bar() as progress:
        task = progress.add_task(f"{len(atoms)} atoms", total=len(calculators) * (steps + 2), status="")
        return time_steps(atoms, calculators, settings, on_step=lambda name: progress.advance(task))


def _crystal(numbers: list[int], num_atoms: int) -> Atoms:
    """About ``num_atoms`` atoms of elements that the model knows: diamond where it knows carbon, else an
    fcc alloy.
    """
    from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states

    from mace_fast.zoo import alloy, diamond

    if atomic_numbers["C"] in numbers:
        return diamond(8 * max(1, round((num_atoms / 8) ** (1 / 3))) ** 3)
    metals = [z for z in numbers if (reference_states[z] or {}).get("symmetry") == "fcc"]
    chosen = (metals or numbers)[:_MOST_ELEMENTS]
    # In an fcc crystal nearest neighbours are a/sqrt(2) apart: two covalent radii.
    constant = 2 * math.sqrt(2) * statistics.fmean(float(covalent_radii[z]) for z in chosen)
    repeats = max(1, round((num_atoms / 4) ** (1 / 3)))
    return alloy((repeats,) * 3, symbols=[chemical_symbols[z] for z in chosen], constant=constant)


def _row(atoms: Atoms, timings: dict[str, Timing]) -> dict[str, Any]:
    fast, reference = timings["mace_fast"], timings["mace-torch"]
    difference = float(abs(fast.forces - reference.forces).max())
    return {
        "formula": atoms.get_chemical_formula(),
        "atoms": len(atoms),
        "mace_fast_ms": 1000 * fast.median,
        "mace_torch_ms": 1000 * reference.median,
        "speedup": reference.median / fast.median,
        "largest_force_difference": difference,
        "largest_force": float(abs(reference.forces).max()),
    }


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("atoms", "mace-torch", "mace_fast", "speed-up", "largest force difference after it"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["atoms"]),
            f"{row['mace_torch_ms']:.4g} ms",
            f"{row['mace_fast_ms']:.4g} ms",
            f"{row['speedup']:.1f}",
            f"{row['largest_force_difference']:.1e} of {row['largest_force']:.2g} eV/A",
        )
    return table
