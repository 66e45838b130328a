"""mace-fast relax."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mace_fast.cli.console import print_json, progress_bar, say, stdout
from mace_fast.cli.md import TrajectoryFormat
from mace_fast.cli.options import Device, Dtype, Head, Json, ModelOption, NoVerify, read_structure, usage_errors
from mace_fast.cli.running import (
    INTERRUPTED,
    Overwrite,
    Repeat,
    Structure,
    interrupt_flag,
    make_calculator,
    require_own_features,
)
from mace_fast.errors import MaceFastError
from mace_fast.files import published

if TYPE_CHECKING:
    from mace_fast.md.relax import RelaxResult, RelaxRow


class Optimizer(str, Enum):
    """How to walk downhill."""

    lbfgs = "lbfgs"
    bfgs = "bfgs"
    fire = "fire"


class RelaxedCell(str, Enum):
    """What may change of the cell."""

    fixed = "fixed"
    isotropic = "isotropic"
    full = "full"


def relax(
    structure: Structure,
    model: ModelOption,
    fmax: Annotated[float, typer.Option(min=1e-9, help="eV/A; done when no force is larger.")] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 500,
    cell: Annotated[
        RelaxedCell,
        typer.Option(help="fixed relaxes positions alone, isotropic also scales the cell, full moves all of it."),
    ] = RelaxedCell.fixed,
    pressure: Annotated[float, typer.Option(help="GPa, on a cell that moves.")] = 0.0,
    optimizer: Annotated[
        Optimizer, typer.Option(help="lbfgs (fast), bfgs (small structures), fire (far from a minimum).")
    ] = Optimizer.lbfgs,
    trajectory: Annotated[
        TrajectoryFormat, typer.Option(help="extxyz (text) or traj (ASE's binary format, exact).")
    ] = TrajectoryFormat.extxyz,
    repeat: Repeat = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for what the relaxation writes.")] = Path(
        "relax-output"
    ),
    overwrite: Overwrite = False,
    head: Head = None,
    dtype: Dtype = None,
    device: Device = None,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Relax the positions of a structure, or its positions and cell, to a minimum of the energy.

    Writes relaxed.extxyz (and relaxed.cif, if periodic), the trajectory, log.csv and picture.png into a directory.
    Constraints in the file hold. Exit status 1 if it does not converge, 130 if stopped by Ctrl-C; the last structure is
    written either way.

    Charge and spin, for a model that takes them: charge=1 spin=2 among the keys of an extended XYZ file, in e and as
    multiplicity (atoms.info in other formats); else 0 and 1.

    Example: mace-fast relax structure.cif --model my.model --cell full --fmax 0.01

    A molecule or a slab: mace-fast relax slab.xyz -m my.model -o slab

    Under 10 GPa: mace-fast relax structure.cif -m my.model --cell full --pressure 10
    """
    from mace_fast.md.dynamics import PICTURE_FILE, require_unused
    from mace_fast.md.picture import draw_relaxation
    from mace_fast.md.relax import RelaxSettings
    from mace_fast.md.relax import relax as relax_atoms

    with usage_errors():
        settings = RelaxSettings(
            fmax=fmax,
            steps=steps,
            optimizer=optimizer.value,
            cell=cell.value,
            pressure=pressure,
            trajectory=trajectory.value,
        )
    if not overwrite:
        require_unused(output, for_md=False)
    atoms = read_structure(structure).repeat(repeat)
    atoms.calc = make_calculator(model, device, dtype, head, no_verify)
    require_own_features(atoms, atoms.calc, repeat)
    formula = atoms.get_chemical_formula()
    with progress_bar() as progress, interrupt_flag() as interrupted:
        task = progress.add_task(formula, total=steps, status="")

        def show(row: RelaxRow) -> None:
            status = f"{row.energy / len(atoms):10.5f} eV/atom  largest force {row.largest_force:8.4f} eV/A"
            progress.update(task, completed=row.step, status=status)

        result = relax_atoms(atoms, settings, output, on_row=show, stop=interrupted)
    with published(output / PICTURE_FILE) as temporary:
        draw_relaxation(result, temporary, title=f"{formula}, relaxed, {model}")
    if json:
        print_json({"structure": str(structure), "model": model, "output": str(output), **result.summary()})
    else:
        stdout.print(_table(result, output))
    last = result.rows[-1]
    if result.interrupted:
        say(f"stopped after {last.step} steps; the last structure is {output}/relaxed.extxyz")
        raise typer.Exit(INTERRUPTED)
    if not result.converged:
        raise MaceFastError(
            f"not converged after {last.step} steps: the largest force is {last.largest_force:.3g} eV/A, and fmax "
            f"{fmax:g}. Continue from {output}/relaxed.extxyz, with more --steps, or with --optimizer fire"
        )


def _table(result: RelaxResult, output: Path) -> Table:
    first, last = result.rows[0], result.rows[-1]
    table = Table.grid(padding=(0, 2))
    table.add_row("atoms", str(result.num_atoms))
    table.add_row("converged", f"{'yes' if result.converged else 'no'}, {last.step} steps")
    gained = 1000 * (first.energy - last.energy) / result.num_atoms
    table.add_row("energy", f"{last.energy:.6f} eV, {gained:.3f} meV/atom below the start")
    table.add_row("largest force", f"{last.largest_force:.2e} eV/A")
    if first.volume is not None and last.volume is not None and result.settings.cell != "fixed":
        table.add_row("volume", f"{last.volume:.5g} A^3, {100 * (last.volume / first.volume - 1):+.3f} %")
    names = ["relaxed.extxyz", "relaxed.cif", f"trajectory.{result.settings.trajectory}", "log.csv", "picture.png"]
    table.add_row("files", f"{output}: {', '.join(name for name in names if (output / name).exists())}")
    return table
