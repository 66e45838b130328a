"""The ensembles: what each conserves, and the temperature and pressure that it holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from md_springs import crystal

from mace_fast.errors import StructureError
from mace_fast.md.dynamics import MDResult, run
from mace_fast.md.integrators import conserved_energy, degrees_of_freedom, integrator, prepare_velocities, temperature
from mace_fast.md.settings import MDSettings

ENSEMBLES = {
    "nve": {"ensemble": "nve"},
    "langevin": {"ensemble": "nvt", "thermostat": "langevin", "friction": 0.02},
    "nose-hoover": {"ensemble": "nvt", "thermostat": "nose-hoover"},
    "bussi": {"ensemble": "nvt", "thermostat": "bussi"},
    "npt isotropic": {"ensemble": "npt", "cell": "isotropic", "pressure": 2.0, "barostat_time": 300.0},
    "npt full": {"ensemble": "npt", "cell": "full", "pressure": 2.0, "barostat_time": 300.0},
}
THERMOSTATS = [name for name in ENSEMBLES if name != "nve"]


def ran(name: str, output: Path, seed: int, **options: object) -> MDResult:
    settings = MDSettings(**{"seed": seed, "timestep": 4.0, "log_interval": 10, **ENSEMBLES[name], **options})  # type: ignore[arg-type]
    return run(crystal(), settings, output)


@pytest.mark.parametrize("name", THERMOSTATS)
def test_thermostat_counts_the_momenta_that_move(name: str) -> None:
    """3N - 3 of them, 3N under Langevin's noise; 3 % of the temperature, which a short run's mean would not show."""
    atoms = crystal()
    settings = MDSettings(steps=1, temperature=400.0, **ENSEMBLES[name])  # type: ignore[arg-type]
    prepare_velocities(atoms, 400.0, 0)
    dynamics = integrator(atoms, settings)
    freedom = degrees_of_freedom(atoms, settings)
    assert freedom == (96 if name == "langevin" else 93)
    if name == "bussi":
        assert dynamics.ndof == 93
        assert dynamics.target_kinetic_energy == pytest.approx(0.5 * 93 * units.kB * 400)
    elif name != "langevin":
        # ASE's chains hold the kinetic energy of 3N momenta at their temperature.
        assert 96 * dynamics._thermostat._kT == pytest.approx(93 * units.kB * 400)


@pytest.mark.parametrize("name", THERMOSTATS)
def test_mean_temperature_and_pressure(name: str, seed: int, tmp_path: Path) -> None:
    """Means over 8 ps. From seed to seed they scatter by 10 K and 0.02 GPa; a cell of 32 atoms that moves in full is
    0.08 GPa above, which is 5 kT/V.
    """
    result = ran(name, tmp_path, seed, steps=2500, temperature=400.0)
    samples = result.samples[50:]
    assert abs(np.mean([sample.temperature for sample in samples]) - 400) < 60
    if result.settings.ensemble == "npt":
        assert abs(np.mean([sample.pressure for sample in samples]) - 2.0) < 0.2


def test_cells_change_as_asked(tmp_path: Path, seed: int) -> None:
    shapes = {}
    for name in ("npt isotropic", "npt full"):
        atoms = crystal()
        before = np.array(atoms.cell)
        run(atoms, MDSettings(steps=200, seed=seed, **ENSEMBLES[name]), tmp_path / name)  # type: ignore[arg-type]
        shapes[name] = np.linalg.solve(before, np.array(atoms.cell))
    isotropic, full = shapes["npt isotropic"], shapes["npt full"]
    assert np.allclose(isotropic, isotropic[0, 0] * np.identity(3), rtol=0, atol=1e-12)
    assert abs(isotropic[0, 0] - 1) > 1e-5
    assert np.ptp(np.diag(full)) > 1e-6 and np.abs(full - np.diag(np.diag(full))).max() > 1e-6


@pytest.mark.parametrize("name", [name for name in ENSEMBLES if name != "langevin"])
def test_conserved_energy(name: str, seed: int, tmp_path: Path) -> None:
    """Its drift in 2 ps is far below what the thermostat moves, and its spread shrinks with the step's square."""
    spreads = []
    for timestep in (4.0, 2.0):
        result = ran(
            name,
            tmp_path / str(timestep),
            seed,
            steps=round(2400 / timestep),
            timestep=timestep,
            log_interval=2,
            temperature=300.0,
        )
        assert result.drift is not None and abs(result.drift) < 0.5
        energies = np.array([sample.conserved_energy for sample in result.samples], dtype=float)
        spreads.append(1000 * energies.std() / result.num_atoms)
    # Below the 8 meV/atom by which the total energy fluctuates in NVT; an integrator of second order gains 4.
    assert spreads[0] < 0.8
    assert spreads[1] < spreads[0] / 2.5


def test_langevin_conserves_nothing(tmp_path: Path) -> None:
    result = ran("langevin", tmp_path, 0, steps=20)
    assert result.drift is None
    assert {sample.conserved_energy for sample in result.samples} == {None}


@pytest.mark.parametrize("name", ["nose-hoover", "bussi", "npt isotropic", "npt full"])
def test_net_momentum_of_the_structure_is_removed(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """A thermostat that scales momenta would turn it into the flying ice cube."""
    atoms = crystal()
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) + 5.0)
    run(atoms, MDSettings(steps=20, **ENSEMBLES[name]), tmp_path)  # type: ignore[arg-type]
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-8


def test_initial_temperature_is_that_of_the_momenta_that_move() -> None:
    kinetic = []
    for seed in range(1000):  # whose mean scatters by 0.5 %; a count of 3N would be 3 % off
        atoms = crystal()
        prepare_velocities(atoms, 300.0, seed)
        kinetic.append(atoms.get_kinetic_energy())
    assert np.abs(atoms.get_momenta().sum(axis=0)).max() < 1e-10
    expected = 0.5 * (3 * len(atoms) - 3) * units.kB * 300
    assert abs(np.mean(kinetic) / expected - 1) < 0.02


@pytest.mark.parametrize("name", ["nve", "langevin", "bussi"])
def test_constraints_hold(name: str, tmp_path: Path) -> None:
    atoms = crystal()
    atoms.set_constraint(FixAtoms([0, 5]))
    before = atoms.positions.copy()
    result = run(atoms, MDSettings(steps=50, **ENSEMBLES[name]), tmp_path)  # type: ignore[arg-type]
    assert np.array_equal(atoms.positions[[0, 5]], before[[0, 5]])
    assert not np.allclose(atoms.positions, before)
    assert degrees_of_freedom(atoms, result.settings) == 3 * len(atoms) - 6


@pytest.mark.parametrize("name", ["nose-hoover", "npt isotropic", "npt full"])
def test_constraints_that_an_integrator_ignores_are_refused(name: str, tmp_path: Path) -> None:
    atoms = crystal()
    atoms.set_constraint(FixAtoms([0]))
    with pytest.raises(StructureError, match="cannot hold constraints.*FixAtoms"):
        run(atoms, MDSettings(steps=5, **ENSEMBLES[name]), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_npt_needs_a_cell(tmp_path: Path) -> None:
    atoms = crystal()
    atoms.pbc = (True, True, False)
    with pytest.raises(StructureError, match=r"npt needs a cell.*\[True, True, False\]"):
        run(atoms, MDSettings(steps=5, ensemble="npt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_moving_centre_of_mass_is_not_heat(rng: np.random.Generator, tmp_path: Path) -> None:
    """NVE keeps the net momentum that a Langevin run hands over; the temperature is that of the other momenta."""
    rest = crystal()
    prepare_velocities(rest, 400.0, 0)
    moving = rest.copy()
    moving.calc = rest.calc
    velocity = rng.normal(size=3) * 0.02  # A in ASE's unit of time: hundreds of K, were it heat
    moving.set_velocities(rest.get_velocities() + velocity)
    settings = MDSettings(steps=20, ensemble="nve", log_interval=5)
    still = run(rest, settings, tmp_path / "rest")
    result = run(moving, settings, tmp_path / "moving")
    assert moving.get_velocities().mean(axis=0) == pytest.approx(velocity, rel=1e-6)
    carried = 0.5 * moving.get_masses().sum() * float(velocity @ velocity)
    for here, there in zip(still.samples, result.samples, strict=True):
        assert there.temperature == pytest.approx(here.temperature, rel=1e-6)
        assert there.kinetic_energy == pytest.approx(here.kinetic_energy + carried, rel=1e-6)
        assert there.conserved_energy == there.total_energy
    # Langevin's noise drives the centre of mass as well: all of its momenta count.
    langevin = MDSettings(steps=1)
    assert temperature(moving, langevin) == pytest.approx(
        2 * moving.get_kinetic_energy() / (3 * len(moving) * units.kB)
    )


def test_atoms_that_move_as_one_are_cold() -> None:
    atoms = crystal()
    atoms.set_velocities(np.full((len(atoms), 3), 0.05))
    assert 0 <= temperature(atoms, MDSettings(steps=1, ensemble="nve")) < 1e-9


def test_one_atom(tmp_path: Path) -> None:
    """Its three momenta count, and are not taken for a net momentum."""
    atoms = Atoms("Cu", positions=[[0.0, 0.0, 0.0]])
    atoms.calc = EMT()
    result = run(atoms, MDSettings(steps=5, ensemble="nve", log_interval=1), tmp_path)
    kinetic = result.samples[-1].kinetic_energy
    assert kinetic > 0
    assert result.samples[-1].temperature == pytest.approx(2 * kinetic / (3 * units.kB))


def test_conserved_energy_of_nve_is_the_total() -> None:
    atoms = crystal()
    dynamics = integrator(atoms, MDSettings(steps=1, ensemble="nve"))
    assert conserved_energy(dynamics, -3.5) == -3.5
