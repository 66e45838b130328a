"""From what models compute to the results that ASE knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from mace_fast.calculators.graph import find_edges
from mace_fast.errors import StructureError
from mace_fast.inference.arrays import all_finite


def ase_results(
    outputs: Mapping[str, np.ndarray], isolated: np.ndarray, energy_unit: float, length_unit: float
) -> dict[str, Any]:
    """Names, units and shapes of mace-torch's calculator, means and variances of a committee.

    Args:
        outputs: float64, first axis the model: ``energy``, ``node_energy``, and what else was computed.
        isolated: [N] energies of the isolated atoms, which ``node_energy`` leaves out.
        energy_unit, length_unit: the models' in eV and A.
    """
    units = {
        "energy": ("energy", energy_unit),
        "node_energy": ("energies", energy_unit),
        "forces": ("forces", energy_unit / length_unit),
        "stress": ("stress", energy_unit / length_unit**3),
        "atomic_stresses": ("stresses", energy_unit / length_unit**3),
        "atomic_virials": ("virials", energy_unit / length_unit**3),
    }
    results: dict[str, Any] = {}
    for output, (name, unit) in units.items():
        if output not in outputs:
            continue
        values = outputs[output] * unit
        results[name] = values[0] if len(values) == 1 else values.mean(axis=0)
        if len(values) > 1 and name in ("energy", "forces", "stress"):
            results[f"{name}_comm"] = values
            results[f"{name}_var"] = values.var(axis=0)
    for name in ("energy", "energy_var"):
        if name in results:
            results[name] = float(results[name])
    results["free_energy"] = results["energy"]
    results["node_energy"] = results["energies"] - isolated * energy_unit
    for name in ("stress", "stresses"):
        if name in results:
            results[name] = full_3x3_to_voigt_6_stress(results[name])
    return results


def total_energy(model: Any, energy: np.ndarray, node_energy: np.ndarray) -> np.ndarray:
    """The energy as a float64 sum over atoms: a float32 total of many atoms has too few digits for dynamics.

    Models whose total holds more than their atoms' energies (an embedding's readout) keep their own sum.
    """
    return energy[0] if "embedding_readout" in model._modules else np.add.reduce(node_energy, axis=None)


def require_finite(outputs: Mapping[str, np.ndarray], atoms: Atoms) -> None:
    """Refuse results that are not finite.

    Raises:
        StructureError: names the atoms that are too close, the most common reason.
    """
    for name, values in outputs.items():
        if not all_finite(values):
            raise StructureError(f"the model's {name} is not finite for this structure{_too_close(atoms)}")


def _too_close(atoms: Atoms, limit: float = 0.7) -> str:
    """Two atoms nearer than ``limit`` (A), if there are such."""
    edges = find_edges(atoms.positions, np.array(atoms.cell), np.array(atoms.pbc), limit)
    sender, receiver = edges.index
    vectors = atoms.positions[receiver] - atoms.positions[sender] + edges.shifts @ np.array(atoms.cell)
    lengths = np.linalg.norm(vectors, axis=1)
    if not len(lengths):
        return ""
    pair = int(np.argmin(lengths))
    return f"; atoms {sender[pair]} and {receiver[pair]} are {lengths[pair]:.3g} A apart"
