"""Run dynamics through ASE: a trajectory, a log, a restart file, and a clean stop when asked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary

from mace_fast.calculators import MACEFastCalculator
from mace_fast.errors import RestartError, StructureError
from mace_fast.md.files import (
    Log,
    Mark,
    Sample,
    cut,
    locked,
    mark,
    open_trajectory,
    read_log,
    require_directory,
    require_reaches,
)
from mace_fast.md.integrators import (
    conserved_energy,
    integrator,
    integrator_state,
    prepare_velocities,
    restore_integrator,
    temperature,
)
from mace_fast.md.restart import RESTART_FILE, Restart, load_restart, save_restart, structure_identity
from mace_fast.md.settings import TRAJECTORY_FORMATS, MDSettings

EXISTING = ("refuse", "continue", "replace")
LOG_FILE = "log.csv"
PICTURE_FILE = "picture.png"
# A temperature that is above both, in K and as a multiple of the start's and the thermostat's, is an integration that
# diverges: 1e5 K are 13 eV for each atom, more than holds any of them. Shock waves, cascades and plasmas start hot.
_HOTTEST, _HOTTER = 1e5, 100.0
_BLOWN_UP = (
    "try a shorter timestep, relax the structure first, and see that the model was trained on such structures. "
    "What was written before this step is whole"
)
_TRAJECTORIES = tuple(f"trajectory.{name}" for name in TRAJECTORY_FORMATS)


@dataclass(frozen=True)
class MDResult:
    """What a run did.

    Attributes:
        samples: the rows of the log, with those from before a restart.
        steps_done: since the beginning; fewer than asked for if the run was stopped.
        interrupted: whether it was stopped.
        step_seconds: median wall time of a step, with its share of the log; NaN if no step was ever made.
        num_atoms: of the structure.
        steps_before: of the steps, those that an earlier call had made; all where there was nothing left to do.
    """

    samples: tuple[Sample, ...]
    steps_done: int
    interrupted: bool
    step_seconds: float
    num_atoms: int
    settings: MDSettings
    steps_before: int = 0

    @property
    def ns_per_day(self) -> float:
        """Simulated nanoseconds in a day at the median step."""
        return self.settings.timestep * 1e-6 * 86400 / self.step_seconds

    @property
    def drift(self) -> float | None:
        """Slope of the conserved energy by least squares, meV per atom and ps; zero in an exact integration.

        None where nothing is conserved (Langevin), or for fewer than two samples.
        """
        energies = [sample.conserved_energy for sample in self.samples if sample.conserved_energy is not None]
        if len(energies) < 2:
            return None
        slope = np.polyfit([sample.time_ps for sample in self.samples], energies, 1)[0]
        return float(1000 * slope / self.num_atoms)

    def summary(self) -> dict[str, object]:
        """The run in numbers that JSON can hold."""
        temperatures = [sample.temperature for sample in self.samples]
        pressures = [sample.pressure for sample in self.samples if sample.pressure is not None]
        return {
            "atoms": self.num_atoms,
            "steps": self.steps_done,
            "steps_before": self.steps_before,
            "interrupted": self.interrupted,
            "milliseconds_per_step": 1000 * self.step_seconds,
            "ns_per_day": self.ns_per_day,
            "mean_temperature": float(np.mean(temperatures)),
            "final_temperature": temperatures[-1],
            "final_potential_energy": self.samples[-1].potential_energy,
            "mean_pressure_GPa": float(np.mean(pressures)) if pressures else None,
            "final_volume": self.samples[-1].volume,
            "drift_meV_per_atom_ps": self.drift,
            "settings": asdict(self.settings),
        }


def trajectory_name(settings: MDSettings) -> str:
    """The trajectory's file name."""
    return f"trajectory.{settings.trajectory}"


def require_unused(output: Path, *, for_md: bool = True) -> None:
    """Refuse a directory in which a run would overwrite another.

    Args:
        output: the directory; it may be missing.
        for_md: whether dynamics are to run there, which could continue what is there, and not a relaxation.

    Raises:
        RestartError: says what is there and how to continue or replace it.
    """
    require_directory(output)
    restart = output / RESTART_FILE
    if restart.exists():
        saved = load_restart(restart)
        steps = saved.settings["steps"]
        if not for_md:
            raise RestartError(
                f"{output}: holds an MD run (step {saved.step} of {steps}); --output names another directory, "
                "--overwrite replaces it"
            )
        if saved.step < steps:
            raise RestartError(
                f"{output}: holds an unfinished run (step {saved.step} of {steps}); --restart continues it, "
                "--overwrite replaces it, --output names another directory"
            )
        raise RestartError(
            f"{output}: holds a finished run of {steps} steps; --overwrite replaces it, --output names another "
            "directory, --restart with more --steps extends it"
        )
    for name in (LOG_FILE, *_TRAJECTORIES):
        if (output / name).exists() and (output / name).stat().st_size:
            raise RestartError(
                f"{output}: holds {name} of an earlier run that left no restart file; --overwrite replaces it, "
                "--output names another directory"
            )


def run(
    atoms: Atoms,
    settings: MDSettings,
    output: Path,
    *,
    existing: str = "refuse",
    identity: Mapping[str, str] | None = None,
    restart_seconds: float = 5.0,
    on_sample: Callable[[Sample, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> MDResult:
    """Integrate ``atoms`` in place; write trajectory, ``log.csv`` and ``restart.npz`` into ``output`` as the run goes.

    The first row and frame are the start, the last ones the end. The restart file is there before the first row. It
    says how much of log and trajectory belongs to its step, and both are cut to that when the run is continued, which
    then writes what an uninterrupted run would have written: every byte, where the calculator gives the same bits for
    the same structure after its ``reset()``, which is called at each restart point. Only a run that ended between two
    restart points, stopped or finished, and whose calculator keeps a neighbour list between steps, goes on to rounding
    instead. A last frame between two log intervals gives way to the regular ones when the run is continued.

    Args:
        atoms: the start, also for a run that is continued; carries its calculator; velocities are drawn if it has
            none, and a net momentum is removed where the thermostat would scale it.
        settings: what to run; ``steps`` counts from the beginning, and may grow when a run is continued.
        output: a directory, made if it is missing.
        existing: what to do with a run in ``output``: "refuse", "continue" (from the beginning if there is none) or
            "replace".
        identity: what else must be the same when the run is continued, as name and value.
        restart_seconds: the restart file is written at the first restart point after so many seconds.
        on_sample: called with each row of the log, and ns/day so far; first with the last row before a restart.
        stop: asked after each step; True ends the run after that step, with a last row and frame.

    Raises:
        RestartError: see ``existing``; a restart file that is damaged or of another run, files that were changed,
            another process at work in ``output``.
        StructureError: the energy stopped being finite, the temperature rose above 1e5 K and a hundred times the
            highest of the start's and of ``settings.temperature``, or the model refused a step's structure: the message
            has the step, and the files end with the last row before it. A structure that the integrator cannot take.
    """
    if existing not in EXISTING:
        raise ValueError(f"existing={existing!r} is none of {', '.join(EXISTING)}")
    require_directory(output)
    identity = {"structure": structure_identity(atoms), **(identity or {})}
    restart_path = output / RESTART_FILE
    with contextlib.ExitStack() as stack:
        saved = None
        if existing == "continue" and restart_path.exists():
            stack.enter_context(locked(output))
            saved = load_restart(restart_path)
            saved.require_same(settings, identity, restart_path)
            require_reaches(output / LOG_FILE, saved.log)
            if saved.step >= settings.steps:
                return _finished(saved, settings, output)
            require_reaches(output / trajectory_name(settings), saved.trajectory)
            saved.put_into(atoms)
        elif existing != "replace":
            require_unused(output)
        if saved is None:
            prepare_velocities(atoms, settings.temperature, settings.seed)
            if settings.rescales_momenta and len(atoms) > 1 and not atoms.constraints:
                Stationary(atoms, preserve_temperature=False)
        dynamics = integrator(atoms, settings)
        if saved is not None:
            restore_integrator(dynamics, saved.integrator)
        # The first evaluation builds or loads kernels, which is not part of the run's time, and fails where the
        # structure and the model do not go together: before anything is written.
        _forget(atoms.calc)  # as at each restart point
        _evaluate(atoms, settings)
        if saved is None:
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output))
            if existing != "replace":
                require_unused(output)  # another process may have been quicker
        run_ = _Run(atoms, dynamics, settings, output, identity, saved, restart_seconds, on_sample)
        stack.callback(run_.close)
        return run_.go(stop)


class _Run:
    """A run with its files open."""

    def __init__(
        self,
        atoms: Atoms,
        dynamics: MolecularDynamics,
        settings: MDSettings,
        output: Path,
        identity: Mapping[str, str],
        saved: Restart | None,
        restart_seconds: float,
        on_sample: Callable[[Sample, float], None] | None,
    ) -> None:
        self.atoms, self.dynamics, self.settings = atoms, dynamics, settings
        self.identity = identity
        self.restart_path = output / RESTART_FILE
        self.log_path, self.trajectory_path = output / LOG_FILE, output / trajectory_name(settings)
        self.restart_seconds = restart_seconds
        self.on_sample = on_sample
        self.step_times: list[float] = []
        self.first_step = 0 if saved is None else saved.step
        if saved is None:
            # First of all, so that whatever else is in the directory can be continued or is known to be replaced.
            places = (Mark(0), Mark(0))
            self._save(0, places)
        else:
            places = (saved.log, saved.trajectory)
        self.begun = saved is not None and saved.log.size > 0
        if not self.begun:
            for name in (*_TRAJECTORIES, PICTURE_FILE):  # of an earlier run that this one replaces
                (output / name).unlink(missing_ok=True)
        for path, place in zip((self.log_path, self.trajectory_path), places, strict=True):
            cut(path, place)
        for name in (RESTART_FILE, PICTURE_FILE):
            for leftover in output.glob(f".{name}.*.part"):  # of a process that was killed while it wrote
                leftover.unlink()
        self.samples = list(read_log(self.log_path)) if self.begun else []
        self.log, self.trajectory = Log(self.log_path), open_trajectory(self.trajectory_path)
        self.started = self.saved_at = time.perf_counter()

    def close(self) -> None:
        """Close the files."""
        self.log.close()
        self.trajectory.close()

    def go(self, stop: Callable[[], bool] | None) -> MDResult:
        """Step to the end, or until ``stop``."""
        settings, step = self.settings, self.first_step
        if not self.begun:
            self._record(0)
        elif self.on_sample is not None:
            self.on_sample(self.samples[-1], 0.0)
        interrupted = False
        while step < settings.steps and not interrupted:
            before = time.perf_counter()
            step += 1
            try:
                self.dynamics.run(1)
            except StructureError as exc:
                raise StructureError(f"step {step}: {exc}; {_BLOWN_UP}") from exc
            interrupted = stop is not None and stop()
            last = interrupted or step == settings.steps
            regular = step % settings.log_interval == 0
            if regular:
                self._record(step)
            if last:
                places = self._places()
                if not regular:
                    self._record(step)  # beyond these places: a continued run does not keep it
                self._places()  # on disk before the restart file says that the run has come so far
                self._save(step, places)
            elif step % settings.restart_interval == 0:
                self._temperature(step)  # a run that has blown up leaves the restart file of an earlier step
                if time.perf_counter() - self.saved_at >= self.restart_seconds:
                    self._save(step, self._places())
                    self.saved_at = time.perf_counter()
                # Whether or not it was saved: a continued run begins with a calculator that remembers nothing.
                _forget(self.atoms.calc)
                _evaluate(self.atoms, settings)
            self.step_times.append(time.perf_counter() - before)
        return MDResult(
            samples=tuple(self.samples),
            steps_done=step,
            interrupted=interrupted and step < settings.steps,
            step_seconds=float(np.median(self.step_times)),
            num_atoms=len(self.atoms),
            settings=settings,
            steps_before=self.first_step,
        )

    def _record(self, step: int) -> None:
        sample = self._sample(step)
        self.log.write(sample)
        self.trajectory.write(_frame(self.atoms, sample))
        self.samples.append(sample)
        if self.on_sample is not None:
            done = (step - self.first_step) * self.settings.timestep * 1e-6
            self.on_sample(sample, done * 86400 / (time.perf_counter() - self.started))

    def _sample(self, step: int) -> Sample:
        atoms = self.atoms
        potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
        if not np.isfinite([potential, kinetic]).all():
            raise StructureError(f"step {step}: the energy is not finite; {_BLOWN_UP}")
        pressure = None
        if self.settings.ensemble == "npt":
            stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
            pressure = float(-np.trace(stress) / 3 / units.GPa)
        return Sample(
            step=step,
            time_ps=step * self.settings.timestep / 1000,
            potential_energy=potential,
            kinetic_energy=kinetic,
            total_energy=potential + kinetic,
            conserved_energy=conserved_energy(self.dynamics, potential + kinetic),
            temperature=self._temperature(step),
            volume=float(atoms.get_volume()) if atoms.cell.rank == 3 else None,
            pressure=pressure,
        )

    def _temperature(self, step: int) -> float:
        """Of the atoms now, K; refused where no run that was meant to be so hot could be."""
        now = temperature(self.atoms, self.settings)
        if step == 0:
            return now
        start = self.samples[0].temperature
        limit = max(_HOTTEST, _HOTTER * max(start, self.settings.temperature))
        if not now <= limit:  # not finite, too
            raise StructureError(
                f"step {step}: the run has blown up: {now:.3g} K, from {start:.4g} K at its start (the limit is "
                f"{limit:.3g} K); {_BLOWN_UP}"
            )
        return now

    def _places(self) -> tuple[Mark, Mark]:
        return mark(self.log_path), mark(self.trajectory_path)

    def _save(self, step: int, places: tuple[Mark, Mark]) -> None:
        restart = Restart(
            step=step,
            settings=asdict(self.settings),
            identity=self.identity,
            seconds_per_step=float(np.median(self.step_times)) if self.step_times else float("nan"),
            log=places[0],
            trajectory=places[1],
            positions=self.atoms.get_positions(),
            momenta=self.atoms.get_momenta(),
            cell=np.array(self.atoms.cell),
            integrator=integrator_state(self.dynamics),
        )
        save_restart(self.restart_path, restart)


def _finished(saved: Restart, settings: MDSettings, output: Path) -> MDResult:
    """The result of a run that has made its steps already."""
    return MDResult(
        samples=read_log(output / LOG_FILE),
        steps_done=saved.step,
        interrupted=False,
        step_seconds=saved.seconds_per_step,
        num_atoms=len(saved.positions),
        settings=settings,
        steps_before=saved.step,
    )


def _forget(calculator: Calculator) -> None:
    """What comes next depends on nothing that the calculator has seen, as in a run that is continued."""
    calculator.reset()
    if isinstance(calculator, MACEFastCalculator):
        calculator.forget_lists()


def _evaluate(atoms: Atoms, settings: MDSettings) -> None:
    """Have the calculator compute, in one go, what every step needs."""
    if settings.ensemble == "npt":
        atoms.get_stress()
    atoms.get_forces()


def _frame(atoms: Atoms, sample: Sample) -> Atoms:
    """A copy that carries only what both formats keep: species, positions, momenta, forces, energy, and in NPT the
    stress.
    """
    frame = atoms.copy()
    frame.info = {**frame.info, "step": sample.step, "time_ps": sample.time_ps}
    results = {"energy": sample.potential_energy, "forces": atoms.get_forces()}
    if sample.pressure is not None:
        results["stress"] = atoms.get_stress()
    frame.calc = SinglePointCalculator(frame, **results)
    return frame
