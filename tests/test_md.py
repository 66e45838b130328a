"""The MD driver: conservation, thermostat, complete files, clean stops."""

from __future__ import annotations

import csv
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from mace_fast import zoo
from mace_fast.calculators import MACEFastCalculator
from mace_fast.errors import StructureError
from mace_fast.md.dynamics import MDResult, run
from mace_fast.md.files import Sample, read_log
from mace_fast.md.integrators import prepare_velocities
from mace_fast.md.picture import draw_run
from mace_fast.md.restart import RESTART_FILE, load_restart
from mace_fast.md.settings import MDSettings
from mace_fast.md.speed import time_steps


def copper(calculator: Calculator | None = None) -> Atoms:
    """32 atoms with ASE's own potential: what is tested here is the driver, not the model."""
    atoms = bulk("Cu", cubic=True).repeat(2)
    atoms.calc = EMT() if calculator is None else calculator
    return atoms


@pytest.fixture(scope="module")
def checkpoint() -> MACEFastCalculator:
    return MACEFastCalculator(zoo.checkpoint_path(), default_dtype="float32", verify=False)


def nve_drift(calculator: Calculator, output: Path, steps: int = 250) -> float:
    atoms = zoo.alloy((2, 2, 2), rattle=0.0, seed=3)
    atoms.calc = calculator
    # Twice the temperature, as half of the kinetic energy goes into the lattice.
    prepare_velocities(atoms, 600.0, seed=11)
    settings = MDSettings(steps, "nve", timestep=2.0, log_interval=1)
    drift = run(atoms, settings, output).drift
    assert drift is not None
    return drift


def test_energy_is_conserved(checkpoint: MACEFastCalculator, tmp_path: Path) -> None:
    """0.5 ps of NVE near 300 K in float32; a force that is off by 1 % drifts by tens of meV/atom/ps."""
    assert abs(nve_drift(checkpoint, tmp_path)) < 0.1


def test_drift_sees_forces_that_are_not_the_derivative(checkpoint: MACEFastCalculator, tmp_path: Path) -> None:
    class Wrong(Calculator):
        implemented_properties = ["energy", "forces"]

        def calculate(self, atoms: Atoms, properties: object = None, system_changes: object = None) -> None:
            super().calculate(atoms)
            checkpoint.calculate(self.atoms, ["forces"])
            forces = checkpoint.results["forces"].copy()
            forces[:, 0] += 0.02 * forces[:, 1]  # a curl: no potential has such forces
            self.results = {"energy": checkpoint.results["energy"], "forces": forces}

    correct = abs(nve_drift(checkpoint, tmp_path / "correct", steps=60))
    assert abs(nve_drift(Wrong(), tmp_path / "wrong", steps=60)) > 3 * correct


def test_files_are_complete(tmp_path: Path) -> None:
    seen: list[Sample] = []
    settings = MDSettings(23, log_interval=10)
    result = run(copper(), settings, tmp_path / "new" / "folder", on_sample=lambda sample, speed: seen.append(sample))
    assert [sample.step for sample in result.samples] == [0, 10, 20, 23]
    assert seen == list(result.samples)
    with (tmp_path / "new/folder/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 23]
    frames = ase.io.read(tmp_path / "new/folder/trajectory.extxyz", index=":")
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 23]
    for frame, sample in zip(frames, result.samples, strict=True):
        assert frame.get_potential_energy() == pytest.approx(sample.potential_energy)
        assert frame.get_forces().shape == (32, 3)
        assert frame.get_temperature() == pytest.approx(sample.temperature, rel=1e-5)
        assert sample.total_energy == sample.potential_energy + sample.kinetic_energy


def test_same_seed_same_trajectory(tmp_path: Path) -> None:
    def positions(seed: int) -> np.ndarray:
        atoms = copper()
        run(atoms, MDSettings(20, seed=seed), tmp_path, existing="replace")
        return atoms.positions

    assert np.array_equal(positions(3), positions(3))
    assert not np.allclose(positions(3), positions(4))


def test_velocities_of_the_structure_are_kept(rng: np.random.Generator) -> None:
    atoms = copper()
    momenta = rng.normal(size=(32, 3))
    atoms.set_momenta(momenta)
    prepare_velocities(atoms, 300, seed=0)
    assert np.array_equal(atoms.get_momenta(), momenta)
    fresh = copper()
    prepare_velocities(fresh, 300, seed=0)
    assert np.abs(fresh.get_momenta().sum(axis=0)).max() < 1e-10


def test_stop_ends_after_the_step_with_a_frame(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    result = run(copper(), MDSettings(1000), tmp_path, stop=lambda: next(asked))
    assert result.interrupted and result.steps_done == 3
    assert [frame.info["step"] for frame in ase.io.read(tmp_path / "trajectory.extxyz", index=":")] == [0, 3]


def test_explosion_is_an_error(tmp_path: Path) -> None:
    class Exploding(Calculator):
        implemented_properties = ["energy", "forces"]

        def calculate(self, atoms: Atoms, properties: object = None, system_changes: object = None) -> None:
            super().calculate(atoms)
            self.results = {"energy": np.nan, "forces": np.zeros((32, 3))}

    with pytest.raises(StructureError, match="step 0: the energy is not finite"):
        run(copper(Exploding()), MDSettings(5), tmp_path)


@pytest.mark.parametrize("trajectory", ["extxyz", "traj"])
def test_blown_up_run_is_stopped(trajectory: str, tmp_path: Path) -> None:
    """Far too long a step: an error with the step; what was written before is whole, and not of the blown-up state."""
    settings = MDSettings(
        500, "nve", timestep=200.0, log_interval=2, restart_interval=3, trajectory=trajectory, temperature=2000.0
    )
    with pytest.raises(StructureError, match=r"step (\d+): .*(blown up|not finite).*try a shorter timestep") as caught:
        run(copper(), settings, tmp_path, restart_seconds=0)
    stopped = int(str(caught.value).split()[1].rstrip(":"))
    rows = read_log(tmp_path / "log.csv")
    frames = ase.io.read(tmp_path / f"trajectory.{trajectory}", index=":")
    assert [row.step for row in rows] == [frame.info["step"] for frame in frames] == list(range(0, stopped, 2))
    assert all(row.temperature < 2e5 for row in rows)
    restart = load_restart(tmp_path / RESTART_FILE)
    assert restart.step < stopped and np.isfinite(restart.momenta).all()


def test_a_step_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    class Refusing(EMT):
        def calculate(self, *arguments: object, **more: object) -> None:
            super().calculate(*arguments, **more)
            if abs(self.atoms.positions).max() > 1e3:
                raise StructureError("no pairs")

    atoms = copper(Refusing())
    atoms.set_velocities(np.full((32, 3), 1e3))
    with pytest.raises(StructureError, match="^step 11: no pairs; try a shorter timestep"):
        run(atoms, MDSettings(50, "nve"), tmp_path)


def test_runs_that_are_meant_to_be_hot_go_on(tmp_path: Path) -> None:
    """A start of 10 keV for one atom, as of a cascade; and a thermostat at 10^5 K."""
    atoms = copper()
    atoms.set_velocities(np.eye(32, 3) * np.sqrt(2 * 10_000 / 63.5))
    result = run(atoms, MDSettings(20, "nve", timestep=0.01, log_interval=1), tmp_path / "cascade")
    assert result.samples[0].temperature > 1e5 and result.steps_done == 20
    hot = MDSettings(20, timestep=0.05, temperature=1.5e5, friction=1.0)
    assert run(copper(), hot, tmp_path / "plasma").samples[-1].temperature > 1e5


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("steps", {"steps": 0}),
        ("log_interval", {"steps": 1, "log_interval": 0}),
        ("restart_interval", {"steps": 1, "restart_interval": 0}),
        ("ensemble='nvp' is none of nve, nvt, npt", {"steps": 1, "ensemble": "nvp"}),
        ("thermostat='berendsen' is none of", {"steps": 1, "thermostat": "berendsen"}),
        ("cell='round' is none of", {"steps": 1, "cell": "round"}),
        ("trajectory='xtc' is none of", {"steps": 1, "trajectory": "xtc"}),
        ("temperature", {"steps": 1, "temperature": -1.0}),
        ("temperature must be above 0", {"steps": 1, "temperature": 0.0, "thermostat": "bussi"}),
        ("temperature must be above 0", {"steps": 1, "temperature": 0.0, "ensemble": "npt"}),
        ("temperature must be finite", {"steps": 1, "temperature": float("inf")}),
        ("pressure must be finite", {"steps": 1, "pressure": float("nan")}),
        ("thermostat_time", {"steps": 1, "thermostat_time": 0.0}),
        ("barostat_time", {"steps": 1, "barostat_time": -5.0}),
        ("pressure=10.0 does nothing with nvt", {"steps": 1, "pressure": 10.0}),
        ("cell=full does nothing with nve: it is of npt", {"steps": 1, "ensemble": "nve", "cell": "full"}),
        ("barostat_time=5.0 does nothing", {"steps": 1, "barostat_time": 5.0}),
        ("thermostat=bussi does nothing with npt", {"steps": 1, "ensemble": "npt", "thermostat": "bussi"}),
        ("thermostat=bussi does nothing with nve", {"steps": 1, "ensemble": "nve", "thermostat": "bussi"}),
        ("friction=3.0 does nothing", {"steps": 1, "thermostat": "nose-hoover", "friction": 3.0}),
        ("thermostat_time=50.0 does nothing", {"steps": 1, "thermostat_time": 50.0}),
        ("seed", {"steps": 1, "seed": -1}),
        ("timestep", {"steps": 1, "timestep": 0.0}),
        ("friction", {"steps": 1, "friction": -1.0}),
        ("temperature", {"steps": 1, "temperature": float("nan")}),
    ],
)
def test_settings_are_checked(said: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=said):
        MDSettings(**settings)  # type: ignore[arg-type]


def test_drift_is_the_slope_of_the_conserved_energy() -> None:
    samples = tuple(Sample(i, 0.1 * i, -10.0, 1.0, -9.0, -9.0 + 0.004 * i, 300.0, None, None) for i in range(6))
    result = MDResult(samples, 5, False, 0.01, num_atoms=4, settings=MDSettings(5, "nve"))
    assert result.drift == pytest.approx(0.04 * 1000 / 4)
    assert result.ns_per_day == pytest.approx(1e-6 * 86400 / 0.01)


@pytest.mark.parametrize(("ensemble", "panels"), [("nvt", 2), ("nve", 3), ("npt", 3)])
def test_picture(ensemble: str, panels: int, tmp_path: Path) -> None:
    """Energy and temperature; drift where something is conserved; speeds where they are given."""
    result = run(copper(), MDSettings(10, ensemble, log_interval=2), tmp_path)
    draw_run(result, tmp_path / "a.png", title="Cu")
    draw_run(result, tmp_path / "b.png", title="Cu", speeds={"mace-torch": 0.5, "mace_fast": 0.05})
    for name, count in (("a.png", panels), ("b.png", panels + 1)):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        width = int.from_bytes((tmp_path / name).read_bytes()[16:20], "big")
        assert width == pytest.approx(count * 4.6 * 150, abs=2)


def test_time_steps_takes_turns_from_the_same_start() -> None:
    turns: list[str] = []
    atoms = copper()
    atoms.calc = None
    before = atoms.copy()
    timings = time_steps(atoms, {"a": EMT(), "b": EMT()}, MDSettings(3), warmup=1, on_step=turns.append)
    assert turns == ["a", "b"] * 4
    assert np.array_equal(atoms.positions, before.positions) and not atoms.get_momenta().any()
    assert len(timings["a"].seconds) == 3 and timings["a"].median > 0
    assert timings["a"].energies == timings["b"].energies
    assert np.array_equal(timings["a"].forces, timings["b"].forces)
