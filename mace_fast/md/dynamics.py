"""Run NVE or NVT dynamics through ASE, writing a trajectory and a log, and stopping cleanly when asked."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet

from mace_fast.errors import StructureError

ENSEMBLES = ("nvt", "nve")


@dataclass(frozen=True)
class MDSettings:
    """What to run.

    Attributes:
        steps: number of steps.
        ensemble: "nvt" (Langevin) or "nve" (velocity Verlet).
        temperature: K; of the thermostat in NVT, and of the velocities drawn at the start if the structure
            has none.
        timestep: fs.
        friction: 1/fs, of the Langevin thermostat.
        seed: of the initial velocities and of the thermostat.
        log_interval: steps between rows of the log and frames of the trajectory.
    """

    steps: int
    ensemble: str = "nvt"
    temperature: float = 300.0
    timestep: float = 1.0
    friction: float = 0.01
    seed: int = 0
    log_interval: int = 10

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble={self.ensemble!r} is none of {', '.join(ENSEMBLES)}")
        for name in ("steps", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and is {getattr(self, name)}")
        for name in ("timestep", "friction"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, and is {getattr(self, name)}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, and is {self.temperature}")


@dataclass(frozen=True)
class Sample:
    """One row of the log: energies in eV for the whole structure, temperature in K, wall time in s since
    the start.
    """

    step: int
    time_ps: float
    potential_energy: float
    kinetic_energy: float
    total_energy: float
    temperature: float
    wall_time: float


@dataclass(frozen=True)
class MDResult:
    """What a run did.

    Attributes:
        samples: the rows of the log.
        steps_done: fewer than asked for if the run was stopped.
        interrupted: whether it was stopped.
        step_seconds: median wall time of a step, with its share of the log.
        num_atoms: of the structure.
    """

    samples: tuple[Sample, ...]
    steps_done: int
    interrupted: bool
    step_seconds: float
    num_atoms: int
    settings: MDSettings

    @property
    def ns_per_day(self) -> float:
        """Simulated nanoseconds in a day at the median step."""
        return self.settings.timestep * 1e-6 * 86400 / self.step_seconds

    @property
    def drift(self) -> float:
        """Slope of the total energy by least squares, meV per atom and ps; zero in an ideal NVE run."""
        times = [sample.time_ps for sample in self.samples]
        if len(times) < 2:
            return float("nan")
        slope = np.polyfit(times, [sample.total_energy for sample in self.samples], 1)[0]
        return float(1000 * slope / self.num_atoms)

    def summary(self) -> dict[str, object]:
        """The run in numbers that JSON can hold."""
        temperatures = [sample.temperature for sample in self.samples]
        return {
            "atoms": self.num_atoms,
            "steps": self.steps_done,
            "interrupted": self.interrupted,
            "milliseconds_per_step": 1000 * self.step_seconds,
            "ns_per_day": self.ns_per_day,
            "mean_temperature": float(np.mean(temperatures)),
            "final_temperature": temperatures[-1],
            "final_potential_energy": self.samples[-1].potential_energy,
            "total_energy_drift_meV_per_atom_ps": self.drift,
            "settings": asdict(self.settings),
        }


def prepare_velocities(atoms: Atoms, temperature: float, seed: int) -> None:
    """Give ``atoms`` Maxwell-Boltzmann velocities without net momentum, unless they have velocities
    already.
    """
    if np.any(atoms.get_momenta()):
        return
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    if len(atoms) > 1:
        Stationary(atoms)


def integrator(atoms: Atoms, settings: MDSettings) -> MolecularDynamics:
    """The ASE dynamics that ``settings`` names, on ``atoms`` and the calculator that they carry."""
    timestep = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, timestep=timestep)
    return Langevin(
        atoms,
        timestep=timestep,
        temperature_K=settings.temperature,
        friction=settings.friction / units.fs,
        fixcm=False,  # holding the centre of mass samples another distribution; no result here depends on where it is
        rng=np.random.default_rng(settings.seed + 1),  # not the numbers that drew the velocities
    )


def run(
    atoms: Atoms,
    settings: MDSettings,
    output: Path,
    *,
    on_sample: Callable[[Sample], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> MDResult:
    """Integrate ``atoms`` in place; write ``trajectory.extxyz`` and ``log.csv`` into ``output`` as the run
    goes.

    The first row and frame are the start, the last ones the end. Each is complete on disk before the next
    step begins.

    Args:
        atoms: carries its calculator; velocities are drawn if it has none.
        settings: what to run.
        output: a directory, made if it is missing; files of an earlier run in it are replaced.
        on_sample: called with each row of the log.
        stop: asked after each step; True ends the run after that step, with a last row and frame.

    Raises:
        StructureError: energy or temperature stopped being finite.
    """
    prepare_velocities(atoms, settings.temperature, settings.seed)
    dynamics = integrator(atoms, settings)
    # The first evaluation builds or loads kernels, which is not part of the run's time, and fails where the
    # structure and the model do not go together: before anything is written.
    atoms.get_forces()
    output.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    step_times: list[float] = []
    with (
        (output / "log.csv").open("w", newline="", encoding="utf-8") as log,
        (output / "trajectory.extxyz").open("w", encoding="utf-8") as trajectory,
    ):
        writer = csv.writer(log)
        writer.writerow(field.name for field in fields(Sample))
        started = time.perf_counter()

        def record(step: int) -> None:
            sample = _sample(atoms, step, settings.timestep, time.perf_counter() - started)
            writer.writerow(astuple(sample))
            log.flush()
            ase.io.write(trajectory, _frame(atoms, sample), format="extxyz")
            trajectory.flush()
            samples.append(sample)
            if on_sample is not None:
                on_sample(sample)

        record(0)
        interrupted = False
        step = 0
        while step < settings.steps and not interrupted:
            before = time.perf_counter()
            dynamics.run(1)
            step += 1
            interrupted = stop is not None and stop()
            if step % settings.log_interval == 0 or step == settings.steps or interrupted:
                record(step)
            step_times.append(time.perf_counter() - before)
    return MDResult(
        samples=tuple(samples),
        steps_done=step,
        interrupted=interrupted and step < settings.steps,
        step_seconds=float(np.median(step_times)),
        num_atoms=len(atoms),
        settings=settings,
    )


def _sample(atoms: Atoms, step: int, timestep: float, wall_time: float) -> Sample:
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    temperature = float(atoms.get_temperature())
    if not np.isfinite([potential, kinetic]).all():
        raise StructureError(f"step {step}: the energy is not finite; try a shorter timestep")
    return Sample(
        step=step,
        time_ps=step * timestep / 1000,
        potential_energy=potential,
        kinetic_energy=kinetic,
        total_energy=potential + kinetic,
        temperature=temperature,
        wall_time=wall_time,
    )


def _frame(atoms: Atoms, sample: Sample) -> Atoms:
    """A copy that carries only what extxyz keeps in columns: species, positions, momenta, forces, and the
    energy.
    """
    frame = atoms.copy()
    frame.info = {**frame.info, "step": sample.step, "time_ps": sample.time_ps}
    frame.calc = SinglePointCalculator(frame, energy=sample.potential_energy, forces=atoms.get_forces())
    return frame
