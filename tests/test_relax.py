"""Relaxation of positions and cell."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from md_springs import Springs, crystal

from mace_fast.errors import RestartError, StructureError
from mace_fast.md.dynamics import run
from mace_fast.md.files import locked
from mace_fast.md.picture import draw_relaxation
from mace_fast.md.relax import OPTIMIZERS, RelaxRow, RelaxSettings, relax
from mace_fast.md.restart import RESTART_FILE
from mace_fast.md.settings import MDSettings


def shaken(rng: np.random.Generator, amplitude: float = 0.1) -> Atoms:
    atoms = crystal()
    atoms.positions += amplitude * rng.normal(size=(len(atoms), 3))
    return atoms


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_positions_return_to_the_minimum(optimizer: str, rng: np.random.Generator, tmp_path: Path) -> None:
    atoms = shaken(rng)
    cell = np.array(atoms.cell)
    start = atoms.get_potential_energy()
    seen: list[RelaxRow] = []
    result = relax(atoms, RelaxSettings(fmax=1e-3, optimizer=optimizer), tmp_path / "new/folder", on_row=seen.append)
    assert result.converged and not result.interrupted
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() <= 1e-3
    assert abs(atoms.get_potential_energy()) < 1e-5 < start  # the springs' minimum is 0
    assert np.array_equal(np.array(atoms.cell), cell)
    assert seen == list(result.rows)
    assert result.summary()["energy_gained"] == pytest.approx(start - atoms.get_potential_energy())


@pytest.mark.parametrize("trajectory", ["extxyz", "traj"])
def test_files_tell_the_same(trajectory: str, rng: np.random.Generator, tmp_path: Path) -> None:
    atoms = shaken(rng)
    result = relax(atoms, RelaxSettings(cell="full", trajectory=trajectory), tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    frames = ase.io.read(tmp_path / f"trajectory.{trajectory}", index=":")
    assert len(rows) == len(frames) == len(result.rows) > 3
    for row, frame, known in zip(rows, frames, result.rows, strict=True):
        assert int(row["step"]) == frame.info["step"] == known.step
        assert float(row["energy"]) == known.energy == pytest.approx(frame.get_potential_energy())
        assert float(row["largest_force"]) == known.largest_force
    for name in ("relaxed.extxyz", "relaxed.cif"):
        relaxed = ase.io.read(tmp_path / name)
        assert relaxed.get_distance(0, 1, mic=True) == pytest.approx(atoms.get_distance(0, 1, mic=True), abs=1e-4)
    draw_relaxation(result, tmp_path / "picture.png", title="Cu32")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["isotropic", "full"])
@pytest.mark.parametrize("pressure", [0.0, 5.0])
def test_cell_takes_the_pressure(cell: str, pressure: float, rng: np.random.Generator, tmp_path: Path) -> None:
    atoms = shaken(rng, 0.02)
    rest = np.array(atoms.cell)
    atoms.set_cell(1.03 * rest, scale_atoms=True)
    result = relax(atoms, RelaxSettings(fmax=1e-4, cell=cell, pressure=pressure), tmp_path)
    assert result.converged
    found = -np.trace(atoms.get_stress(voigt=False)) / 3 / units.GPa
    assert found == pytest.approx(pressure, abs=1e-2)
    scale = np.linalg.solve(rest, np.array(atoms.cell))
    assert np.allclose(scale, scale[0, 0] * np.identity(3), atol=1e-3)
    assert (scale[0, 0] < 0.999) == (pressure > 0)


def test_isotropic_keeps_the_shape(tmp_path: Path) -> None:
    for cell in ("isotropic", "full"):
        atoms = crystal()
        sheared = np.array(atoms.cell) @ (1.02 * np.identity(3) + 0.02 * np.eye(3, k=1))
        atoms.set_cell(sheared, scale_atoms=True)
        relax(atoms, RelaxSettings(fmax=1e-3, cell=cell), tmp_path / cell)
        deformation = np.linalg.solve(sheared, np.array(atoms.cell))
        shear = np.abs(deformation - np.diag(np.diag(deformation))).max()
        assert (shear < 1e-6) == (cell == "isotropic")


def test_constraints_hold(rng: np.random.Generator, tmp_path: Path) -> None:
    atoms = shaken(rng)
    atoms.set_constraint(FixAtoms([0, 7]))
    before = atoms.positions.copy()
    assert relax(atoms, RelaxSettings(), tmp_path).converged
    assert np.array_equal(atoms.positions[[0, 7]], before[[0, 7]])


def test_cell_that_cannot_move(tmp_path: Path) -> None:
    atoms = crystal()
    atoms.pbc = (True, True, False)
    with pytest.raises(StructureError, match=r"cell can only be relaxed.*\[True, True, False\]"):
        relax(atoms, RelaxSettings(cell="full"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_molecule(tmp_path: Path) -> None:
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.6]])
    atoms.calc = EMT()
    result = relax(atoms, RelaxSettings(fmax=1e-4), tmp_path)
    assert result.converged and result.rows[-1].volume is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "relaxed.extxyz", "trajectory.extxyz"]


def test_too_few_steps_and_stops(rng: np.random.Generator, tmp_path: Path) -> None:
    few = relax(shaken(rng), RelaxSettings(fmax=1e-6, steps=2), tmp_path / "few")
    assert not few.converged and not few.interrupted and [row.step for row in few.rows] == [0, 1, 2]
    asked: Iterator[bool] = iter([False, True])
    stopped = relax(shaken(rng), RelaxSettings(fmax=1e-6), tmp_path / "stopped", stop=lambda: next(asked))
    assert stopped.interrupted and not stopped.converged and stopped.rows[-1].step == 1
    for name in ("few", "stopped"):
        assert ase.io.read(tmp_path / name / "relaxed.extxyz").get_potential_energy() > 0


def test_relaxed_already(tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True).repeat(2)
    atoms.calc = Springs(atoms)
    result = relax(atoms, RelaxSettings(), tmp_path)
    assert result.converged and [row.step for row in result.rows] == [0]


def test_not_finite(tmp_path: Path) -> None:
    class Exploding(Calculator):
        implemented_properties = ["energy", "forces"]

        def calculate(self, atoms: Atoms, properties: object = None, system_changes: object = None) -> None:
            super().calculate(atoms)
            self.results = {"energy": np.nan, "forces": np.zeros((len(atoms), 3))}

    atoms = crystal()
    atoms.calc = Exploding()
    with pytest.raises(StructureError, match="not finite"):
        relax(atoms, RelaxSettings(), tmp_path)


def test_replaces_all_of_an_earlier_run(rng: np.random.Generator, tmp_path: Path) -> None:
    """A restart file that stayed would belong to another log."""
    run(crystal(), MDSettings(steps=5, trajectory="traj"), tmp_path)
    assert (tmp_path / RESTART_FILE).exists()
    relax(shaken(rng), RelaxSettings(), tmp_path)
    names = ["log.csv", "relaxed.cif", "relaxed.extxyz", "trajectory.extxyz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_directory_in_use(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RestartError, match="another process"):
        relax(crystal(), RelaxSettings(), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RestartError, match="is a file"):
        relax(crystal(), RelaxSettings(), tmp_path / "file")


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("fmax", {"fmax": 0.0}),
        ("fmax", {"fmax": float("nan")}),
        ("fmax", {"fmax": float("inf")}),
        ("steps", {"steps": 0}),
        ("optimizer", {"optimizer": "newton"}),
        ("cell", {"cell": "volume"}),
        ("trajectory", {"trajectory": "xtc"}),
        ("pressure=3.0 does nothing", {"pressure": 3.0}),
        ("pressure", {"pressure": float("nan"), "cell": "full"}),
    ],
)
def test_settings_are_checked(said: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=said):
        RelaxSettings(**settings)  # type: ignore[arg-type]
