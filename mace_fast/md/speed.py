"""Time calculators against each other on the same structures in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from mace_fast.md.integrators import integrator, prepare_velocities
from mace_fast.md.settings import MDSettings


@dataclass(frozen=True)
class Timing:
    """Wall times of MD steps with one calculator, and the physics they gave.

    Attributes:
        seconds: one for each step, after the warm-up.
        energies: potential energy (eV) after each of these steps.
        forces: [N, 3] eV/A after the last one.
    """

    seconds: tuple[float, ...]
    energies: tuple[float, ...]
    forces: np.ndarray

    @property
    def median(self) -> float:
        """Median wall time of a step in s."""
        return float(np.median(self.seconds))


def time_steps(
    atoms: Atoms,
    calculators: Mapping[str, Calculator],
    settings: MDSettings,
    *,
    warmup: int = 2,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Run ``settings.steps`` MD steps with each calculator, taking turns step by step.

    All start from the same positions and velocities with the same random numbers, so their trajectories
    agree as long as their forces do; taking turns gives each the same share of whatever else the machine is
    doing.

    Args:
        atoms: the start; not changed.
        calculators: by name.
        settings: the dynamics; ``log_interval`` is not used.
        warmup: steps before timing begins.
        on_step: called with the calculator's name after each of its steps, the warm-up's included.
    """
    start = atoms.copy()
    prepare_velocities(start, settings.temperature, settings.seed)
    runs = {}
    for name, calculator in calculators.items():
        own = start.copy()
        own.calc = calculator
        runs[name] = (own, integrator(own, settings))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    energies: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(warmup + settings.steps):
        for name, (own, dynamics) in runs.items():
            before = time.perf_counter()
            dynamics.run(1)
            elapsed = time.perf_counter() - before
            if step >= warmup:
                seconds[name].append(elapsed)
                energies[name].append(float(own.get_potential_energy()))
            if on_step is not None:
                on_step(name)
    return {
        name: Timing(tuple(seconds[name]), tuple(energies[name]), own.get_forces()) for name, (own, _) in runs.items()
    }
