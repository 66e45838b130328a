"""Drift of the total energy in NVE dynamics of the shipped checkpoint, mace_fast beside mace-torch from the same start.

    python -m benchmarks.nve --picoseconds 10 --output benchmarks/results/cpu-nve-10ps.json

A crystal of Cu, Ag and Au on its lattice sites, with velocities of twice the temperature: half of the kinetic energy
goes into the lattice. The drift is the slope of the total energy after ``--equilibrate``; its error is the standard
error of the slope through the means of 20 blocks, which are long against the vibrations: 0.5 ps each in a run of 10 ps.
(For noise that is correlated over a quarter of a block or more, that error is about a fifth too small.)

100 ps on a GPU: python -m benchmarks.nve --picoseconds 100 --device cuda --output benchmarks/results/gpu-nve-100ps.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import ase
import mace
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from mace.calculators import MACECalculator

import mace_fast
from benchmarks.timing import device_name
from mace_fast.calculators import MACEFastCalculator
from mace_fast.files import published
from mace_fast.zoo import alloy, checkpoint_path

_BLOCKS = 20


def start(repeats: tuple[int, int, int], temperature: float, seed: int) -> Atoms:
    """The crystal with velocities of ``2 * temperature`` and no net momentum."""
    atoms = alloy(repeats, rattle=0.0, seed=3)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=np.random.default_rng(seed))
    Stationary(atoms)
    return atoms


def slope(times: np.ndarray, energies: np.ndarray, blocks: int = _BLOCKS) -> tuple[float, float]:
    """Slope of the block means by least squares, and its standard error from their scatter about the line."""
    size = len(times) // blocks
    if size < 1:
        raise ValueError(f"{len(times)} energies are too few for {blocks} blocks; run longer")
    t = times[: size * blocks].reshape(blocks, size).mean(axis=1)
    e = energies[: size * blocks].reshape(blocks, size).mean(axis=1)
    (gradient, _), covariance = np.polyfit(t, e, 1, cov=True)
    return float(gradient), float(np.sqrt(covariance[0, 0]))


class Run:
    """NVE dynamics of a copy of ``atoms``, and what is kept of each step."""

    def __init__(self, atoms: Atoms, calculator: Calculator, timestep: float) -> None:
        self.atoms = atoms.copy()
        self.atoms.calc = calculator
        self.dynamics = VelocityVerlet(self.atoms, timestep=timestep * units.fs)
        self.atoms.get_forces()  # loads kernels, which is not the time of a step
        self.energies = [float(self.atoms.get_total_energy())]
        self.temperatures = [float(self.atoms.get_temperature())]
        self.seconds = 0.0

    def step(self) -> None:
        before = time.perf_counter()
        self.dynamics.run(1)
        self.seconds += time.perf_counter() - before
        self.energies.append(float(self.atoms.get_total_energy()))
        self.temperatures.append(float(self.atoms.get_temperature()))

    def summary(self, timestep: float, skip: int) -> dict[str, Any]:
        energies = 1000 * np.array(self.energies[skip:]) / len(self.atoms)
        times = timestep * np.arange(len(energies)) / 1000
        drift, error = slope(times, energies)
        return {
            "drift_meV_per_atom_ps": drift,
            "drift_error": error,
            "total_energy_std_meV_per_atom": float(energies.std()),
            "mean_temperature_K": float(np.mean(self.temperatures[skip:])),
            "ms_per_step": 1000 * self.seconds / (len(self.energies) - 1),
        }


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Both calculators' dynamics, step by step in turns."""
    atoms = start(tuple(options.repeats), options.temperature, options.seed)
    path = checkpoint_path()
    runs = {
        "mace_fast": MACEFastCalculator(path, device=device, default_dtype=options.dtype),
        "mace-torch": MACECalculator(model_paths=str(path), device=str(device), default_dtype=options.dtype),
    }
    dynamics = {name: Run(atoms, calculator, options.timestep) for name, calculator in runs.items()}
    steps = round(1000 * options.picoseconds / options.timestep)
    for step in range(1, steps + 1):
        for run in dynamics.values():
            run.step()
        if step % max(1, steps // 50) == 0:
            speeds = ", ".join(f"{name} {1000 * run.seconds / step:.1f} ms/step" for name, run in dynamics.items())
            print(f"{step}/{steps}: {speeds}", file=sys.stderr, flush=True)
    skip = round(1000 * options.equilibrate / options.timestep)
    results = {name: run.summary(options.timestep, skip) for name, run in dynamics.items()}
    return {"atoms": len(atoms), "formula": atoms.get_chemical_formula(), "steps": steps, "results": results}


def main() -> None:
    """Run, print, and write the results where ``--output`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, nargs=3, default=(2, 2, 2), help="fcc cells; 2 2 2 is 32 atoms")
    parser.add_argument("--picoseconds", type=float, default=10.0)
    parser.add_argument("--equilibrate", type=float, default=0.5, help="ps at the start that the slope leaves out")
    parser.add_argument("--timestep", type=float, default=2.0, help="fs")
    parser.add_argument("--temperature", type=float, default=300.0, help="K, after equilibration")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=11, help="of the velocities")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    result = {
        "command": " ".join(["python -m benchmarks.nve", *sys.argv[1:]]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "mace_fast": mace_fast.__version__,
            "mace-torch": mace.__version__,
            "torch": torch.__version__,
            "ase": ase.__version__,
            "python": platform.python_version(),
        },
        "model": checkpoint_path().name,
        "dtype": options.dtype,
        "timestep_fs": options.timestep,
        "picoseconds": options.picoseconds,
        "equilibrate_ps": options.equilibrate,
        "seed": options.seed,
        **measure(options, device),
    }
    for name, row in result["results"].items():
        print(
            f"{name:<12}drift {row['drift_meV_per_atom_ps']:+.2e} +- {row['drift_error']:.1e} meV/atom/ps, "
            f"{row['mean_temperature_K']:.0f} K, {row['ms_per_step']:.1f} ms/step"
        )
    if options.output is not None:
        with published(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
