"""Errors of the trained model against EMT's labels, for each part of the data and each kind of structure."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from mace.calculators import MACECalculator


def errors(model: Path, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Mean absolute errors in part -> kind -> quantity, with a kind "all".

    Quantities: structures, energy_mae (meV/atom), forces_mae and forces_rmse (meV/angstrom, over components),
    stress_mae (meV/angstrom^3, only where there are stress labels).
    """
    calculator = MACECalculator(model_paths=str(model), device="cpu", default_dtype="float32")
    report: dict[str, dict[str, dict[str, float]]] = {}
    for part in ("train", "valid", "test"):
        structures = read(folder / f"{part}.xyz", index=":", format="extxyz")
        collected: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for atoms in structures:
            for kind in (str(atoms.info["config_type"]), "all"):
                _collect(collected[kind], atoms, calculator)
        report[part] = {kind: _summary(lists) for kind, lists in sorted(collected.items())}
    return report


def _collect(into: dict[str, list[float]], atoms: Atoms, calculator: MACECalculator) -> None:
    if atoms.calc is not calculator:
        atoms.calc = calculator
    into["energy"].append(1000 * abs(atoms.get_potential_energy() - atoms.info["REF_energy"]) / len(atoms))
    into["forces"].extend(1000 * np.abs(atoms.get_forces() - atoms.arrays["REF_forces"]).ravel())
    if "REF_stress" in atoms.info:
        labels = np.asarray(atoms.info["REF_stress"]).reshape(3, 3)
        into["stress"].extend(1000 * np.abs(atoms.get_stress(voigt=False) - labels).ravel())


def _summary(lists: dict[str, list[float]]) -> dict[str, float]:
    forces = np.asarray(lists["forces"])
    summary = {
        "structures": float(len(lists["energy"])),
        "energy_mae": float(np.mean(lists["energy"])),
        "forces_mae": float(forces.mean()),
        "forces_rmse": float(np.sqrt((forces**2).mean())),
    }
    if lists.get("stress"):
        summary["stress_mae"] = float(np.mean(lists["stress"]))
    return {key: round(value, 4) for key, value in summary.items()}
