"""Molecular dynamics with the trained model: does it stay a crystal at 1000 K, for long, and hot beyond
that?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.neighborlist import neighbor_list
from mace.calculators import MACECalculator

from .structures import rose_gold

STEP = 5.0
"""Femtoseconds; the lightest atom is copper."""


@dataclass(frozen=True)
class Stability:
    """What a run at constant temperature came to. Energies in eV, lengths in angstrom, forces in
    eV/angstrom."""

    atoms: int
    target_kelvin: float
    picoseconds: float
    mean_kelvin: float
    std_kelvin: float
    highest_kelvin: float
    mean_energy_per_atom: float
    drift_of_energy_per_atom: float
    largest_force: float
    shortest_distance: float
    mean_square_displacement: float
    force_mae_against_emt: float
    energy_error_per_atom_against_emt: float


@dataclass(frozen=True)
class Conservation:
    """Energy conservation of a run without thermostat. Drift is the slope of a straight line through the
    total energy."""

    atoms: int
    kelvin: float
    picoseconds: float
    drift_mev_per_atom_per_ps: float
    fluctuation_mev_per_atom: float


def constant_temperature(
    model: Path,
    *,
    kelvin: float,
    picoseconds: float,
    repeat: tuple[int, int, int],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Langevin dynamics of rose gold with the model, and EMT's opinion of frames that it visits.

    Raises:
        RuntimeError: it blew up: a temperature above three times the target's, or atoms closer than 1.4
            angstrom.
    """
    atoms = rose_gold(repeat, seed)
    atoms.calc = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float32")
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * kelvin, rng=rng)
    dynamics = Langevin(atoms, STEP * units.fs, temperature_K=kelvin, friction=0.01 / units.fs, rng=rng)
    steps = round(picoseconds * 1000 / STEP)
    stride = 50
    between_checks = max(1, steps // stride // 10)
    kelvins, energies, forces, distances, force_errors, energy_errors = [], [], [], [], [], []
    reference: np.ndarray | None = None
    for done in range(0, steps, stride):
        dynamics.run(stride)
        kelvins.append(float(atoms.get_temperature()))
        energies.append(float(atoms.get_potential_energy()) / len(atoms))
        forces.append(float(np.abs(atoms.get_forces()).max()))
        distances.append(_shortest(atoms))
        if kelvins[-1] > 3 * kelvin or distances[-1] < 1.4:
            raise RuntimeError(
                f"dynamics at {kelvin} K blew up after {done + stride} steps: "
                f"{kelvins[-1]:.0f} K, shortest distance {distances[-1]:.2f} A"
            )
        if reference is None and done >= steps // 5:
            reference = atoms.get_positions()
        if (done // stride + 1) % between_checks == 0:
            check = atoms.copy()
            check.calc = EMT()
            force_errors.append(float(np.abs(check.get_forces() - atoms.get_forces()).mean()))
            energy_errors.append(float(check.get_potential_energy() / len(atoms)) - energies[-1])
            picosecond = (done + stride) * STEP / 1000
            progress(
                f"{picosecond:6.1f} ps  {kelvins[-1]:6.0f} K  {energies[-1]:.4f} eV/atom  "
                f"closest {distances[-1]:.2f} A  forces MAE {1000 * force_errors[-1]:.0f} meV/A"
            )
    settled = slice(len(kelvins) // 5, None)
    moved = atoms.get_positions() - reference if reference is not None else np.zeros((1, 3))
    moved -= moved.mean(axis=0)
    result = Stability(
        atoms=len(atoms),
        target_kelvin=kelvin,
        picoseconds=steps * STEP / 1000,
        mean_kelvin=float(np.mean(kelvins[settled])),
        std_kelvin=float(np.std(kelvins[settled])),
        highest_kelvin=max(kelvins[settled]),
        mean_energy_per_atom=float(np.mean(energies[settled])),
        drift_of_energy_per_atom=float(
            np.mean(energies[-len(energies) // 4 :]) - np.mean(energies[settled][: len(energies) // 4])
        ),
        largest_force=max(forces),
        shortest_distance=min(distances),
        mean_square_displacement=float((moved**2).sum(axis=1).mean()),
        force_mae_against_emt=float(np.mean(force_errors)),
        energy_error_per_atom_against_emt=float(np.mean(np.abs(energy_errors))),
    )
    return asdict(result)


def constant_energy(
    model: Path,
    *,
    kelvin: float,
    picoseconds: float,
    repeat: tuple[int, int, int],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Velocity Verlet from an equilibrated start, in float64; the drift of the total energy."""
    atoms = rose_gold(repeat, seed)
    atoms.calc = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float64")
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * kelvin, rng=rng)
    Langevin(atoms, STEP * units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng).run(250)
    dynamics = VelocityVerlet(atoms, STEP * units.fs)
    stride = 10
    times, totals = [], []
    for done in range(0, round(picoseconds * 1000 / STEP), stride):
        dynamics.run(stride)
        times.append((done + stride) * STEP / 1000)
        totals.append(1000 * float(atoms.get_total_energy()) / len(atoms))
    slope, intercept = np.polyfit(times, totals, 1)
    residual = np.asarray(totals) - slope * np.asarray(times) - intercept
    progress(f"drift {slope:+.4f} meV/atom/ps, fluctuation {residual.std():.4f} meV/atom")
    return asdict(
        Conservation(
            atoms=len(atoms),
            kelvin=kelvin,
            picoseconds=times[-1],
            drift_mev_per_atom_per_ps=float(slope),
            fluctuation_mev_per_atom=float(residual.std()),
        )
    )


def _shortest(atoms: Atoms) -> float:
    distances = neighbor_list("d", atoms, 3.2)
    return float(distances.min()) if len(distances) else 3.2
