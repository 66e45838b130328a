"""Relaxation of positions, or of positions and cell, through ASE's optimisers."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from mace_fast.errors import StructureError
from mace_fast.files import published
from mace_fast.md.dynamics import LOG_FILE, PICTURE_FILE
from mace_fast.md.files import locked, open_trajectory, require_directory
from mace_fast.md.restart import RESTART_FILE
from mace_fast.md.settings import TRAJECTORY_FORMATS

OPTIMIZERS: dict[str, type[Optimizer]] = {"lbfgs": LBFGS, "bfgs": BFGS, "fire": FIRE}
CELLS = ("fixed", "isotropic", "full")


@dataclass(frozen=True)
class RelaxSettings:
    """How to relax.

    Attributes:
        fmax: eV/A; done when no force is larger. With a cell that moves, the derivatives by its strain, divided by the
            number of atoms, count as forces.
        steps: at most so many.
        optimizer: "lbfgs", "bfgs" (better steps, but it diagonalises a matrix of 3N rows) or "fire" (slower, and
            robust far from a minimum).
        cell: "fixed", "isotropic" (scaled) or "full" (every length and angle).
        pressure: GPa, outside a cell that moves.
        trajectory: "extxyz" or "traj".

    Raises:
        ValueError: names the setting that makes no sense.
    """

    fmax: float = 0.01
    steps: int = 500
    optimizer: str = "lbfgs"
    cell: str = "fixed"
    pressure: float = 0.0
    trajectory: str = "extxyz"

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("cell", CELLS),
            ("trajectory", TRAJECTORY_FORMATS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, and is {self.steps}")
        if not self.fmax > 0:
            raise ValueError(f"fmax must be positive, and is {self.fmax}")
        for name in ("fmax", "pressure"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, and is {getattr(self, name)}")
        if self.pressure and self.cell == "fixed":
            raise ValueError(f"pressure={self.pressure} does nothing with a fixed cell; set cell to isotropic or full")


@dataclass(frozen=True)
class RelaxRow:
    """One row of the log: eV for the whole structure, eV/A, A^3 (None without a cell)."""

    step: int
    energy: float
    largest_force: float
    volume: float | None


@dataclass(frozen=True)
class RelaxResult:
    """What a relaxation did.

    Attributes:
        rows: the log.
        converged: whether the largest force is below fmax.
        interrupted: whether it was stopped before.
        num_atoms: of the structure.
    """

    rows: tuple[RelaxRow, ...]
    converged: bool
    interrupted: bool
    num_atoms: int
    settings: RelaxSettings

    def summary(self) -> dict[str, object]:
        """The relaxation in numbers that JSON can hold."""
        first, last = self.rows[0], self.rows[-1]
        return {
            "atoms": self.num_atoms,
            "converged": self.converged,
            "interrupted": self.interrupted,
            "steps": last.step,
            "energy": last.energy,
            "energy_gained": first.energy - last.energy,
            "largest_force": last.largest_force,
            "first_volume": first.volume,
            "volume": last.volume,
            "settings": asdict(self.settings),
        }


def relax(
    atoms: Atoms,
    settings: RelaxSettings,
    output: Path,
    *,
    on_row: Callable[[RelaxRow], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RelaxResult:
    """Relax ``atoms`` in place; write a trajectory, ``log.csv`` and the last structure into ``output``.

    The last structure is ``relaxed.extxyz``, and ``relaxed.cif`` where it is periodic in all directions; it is written
    whether or not it is converged. Files of an earlier run in ``output`` are replaced.

    Args:
        atoms: carries its calculator; its constraints hold.
        settings: how to relax.
        output: a directory, made if it is missing.
        on_row: called with each row of the log.
        stop: asked after each step; True ends it after that step.

    Raises:
        StructureError: a cell is to move that is not periodic in all directions; the energy is not finite.
        RestartError: another process is at work in ``output``.
    """
    require_directory(output)
    moves_cell = settings.cell != "fixed"
    if moves_cell and (not all(atoms.pbc) or atoms.cell.rank < 3):
        raise StructureError(
            f"the cell can only be relaxed where it is periodic in all directions, and pbc is {atoms.pbc.tolist()}; "
            "use cell fixed"
        )
    subject = (
        FrechetCellFilter(
            atoms, hydrostatic_strain=settings.cell == "isotropic", scalar_pressure=settings.pressure * units.GPa
        )
        if moves_cell
        else atoms
    )
    # What fails where structure and model do not go together, before anything is written; stress and forces at once.
    if moves_cell:
        atoms.get_stress()
    subject.get_forces()
    output.mkdir(parents=True, exist_ok=True)
    rows: list[RelaxRow] = []
    converged = interrupted = False
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(output))
        path = output / f"trajectory.{settings.trajectory}"
        earlier = (RESTART_FILE, *(f"trajectory.{known}" for known in TRAJECTORY_FORMATS), *_RESULTS, PICTURE_FILE)
        for name in earlier:
            (output / name).unlink(missing_ok=True)
        trajectory = open_trajectory(path)
        stack.callback(trajectory.close)
        log = stack.enter_context((output / LOG_FILE).open("w", newline="", encoding="utf-8"))
        writer = csv.writer(log)
        writer.writerow(field.name for field in fields(RelaxRow))
        optimizer = OPTIMIZERS[settings.optimizer](subject, logfile=None)
        for converged in optimizer.irun(fmax=settings.fmax, steps=settings.steps):
            row = _row(subject, atoms, optimizer.nsteps)
            writer.writerow(astuple(row))
            log.flush()
            trajectory.write(_frame(atoms, row))
            rows.append(row)
            if on_row is not None:
                on_row(row)
            if not converged and stop is not None and stop():
                interrupted = True
                break
        _write_result(atoms, rows[-1], output)
    return RelaxResult(tuple(rows), bool(converged), interrupted, len(atoms), settings)


_RESULTS = ("relaxed.extxyz", "relaxed.cif")


def _row(subject: Atoms | FrechetCellFilter, atoms: Atoms, step: int) -> RelaxRow:
    energy = float(atoms.get_potential_energy())
    largest = float(np.linalg.norm(subject.get_forces(), axis=1).max())
    if not np.isfinite([energy, largest]).all():
        raise StructureError(f"step {step}: energy or forces are not finite; try the optimizer fire")
    return RelaxRow(step, energy, largest, float(atoms.get_volume()) if atoms.cell.rank == 3 else None)


def _frame(atoms: Atoms, row: RelaxRow) -> Atoms:
    frame = atoms.copy()
    frame.info = {**frame.info, "step": row.step}
    frame.calc = SinglePointCalculator(frame, energy=row.energy, forces=atoms.get_forces())
    return frame


def _write_result(atoms: Atoms, row: RelaxRow, output: Path) -> None:
    for name in _RESULTS:
        if name.endswith(".cif") and not (all(atoms.pbc) and atoms.cell.rank == 3):
            continue
        with published(output / name) as temporary:
            ase.io.write(temporary, _frame(atoms, row), format=name.rpartition(".")[2])
