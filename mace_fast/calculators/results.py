"""From what models compute to the results that ASE knows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from mace_fast.calculators.graph import find_edges
from mace_fast.inference.arrays import all_finite

OF_ATOMS = frozenset({"node_energy", "forces", "atomic_stresses", "atomic_virials"})
"""Outputs with a row for each atom; the others have one for each structure."""


def ase_results(
    outputs: Mapping[str, np.ndarray],
    isolated: np.ndarray,
    ptr: np.ndarray,
    energy_unit: float,
    length_unit: float,
) -> list[dict[str, Any]]:
    """For each structure of a batch the names, units and shapes of mace-torch's calculator, with means and variances of
    a committee.

    Args:
        outputs: float64, first axis the model, second the atom or structure: ``energy``, ``node_energy``, and what else
            was computed.
        isolated: [N] energies of the isolated atoms, which ``node_energy`` leaves out.
        ptr: [G + 1], where each structure's atoms begin.
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
    of_atoms: dict[str, np.ndarray] = {}
    of_structures: dict[str, np.ndarray] = {}
    of_models: dict[str, tuple[np.ndarray, bool]] = {}
    for output, (name, unit) in units.items():
        if output not in outputs:
            continue
        values = outputs[output] * unit
        rows = of_atoms if output in OF_ATOMS else of_structures
        mean = values[0] if len(values) == 1 else values.mean(axis=0)
        rows[name] = full_3x3_to_voigt_6_stress(mean) if name in ("stress", "stresses") else mean
        if len(values) > 1 and name in ("energy", "forces", "stress"):
            rows[f"{name}_var"] = values.var(axis=0)
            of_models[f"{name}_comm"] = values, output in OF_ATOMS
    of_atoms["node_energy"] = of_atoms["energies"] - isolated * energy_unit
    # Python's floats are taken out of arrays at once.
    numbers: dict[str, list[float]] = {
        name: of_structures.pop(name).tolist() for name in ("energy", "energy_var") if name in of_structures
    }
    numbers["free_energy"] = numbers["energy"]
    return [
        {
            **{name: values[number] for name, values in numbers.items()},
            **{name: values[begin:end] for name, values in of_atoms.items()},
            **{name: values[number] for name, values in of_structures.items()},
            **{
                name: values[:, begin:end] if by_atom else values[:, number]
                for name, (values, by_atom) in of_models.items()
            },
        }
        for number, (begin, end) in enumerate(pairwise(ptr.tolist()))
    ]


def total_energies(model: Any, energy: np.ndarray, node_energy: np.ndarray, ptr: np.ndarray) -> list[float]:
    """[G] energies as float64 sums over atoms: float32 totals of many atoms have too few digits for dynamics.

    Models whose total holds more than their atoms' energies (an embedding's readout) keep their own sum.
    """
    if "embedding_readout" in model._modules:
        return list(energy)
    # Sums of slices, as of one structure by itself: numpy's reduceat adds in another order.
    return [np.add.reduce(node_energy[begin:end]) for begin, end in pairwise(ptr.tolist())]


def find_not_finite(outputs: Mapping[str, np.ndarray], ptr: np.ndarray) -> tuple[int, str] | None:
    """The first structure of a batch with a result that is not finite, and the name of that; None if there is none."""
    for name, values in outputs.items():
        if not all_finite(values):
            row = int(np.argwhere(~np.isfinite(values))[:, 1].min())
            return int(np.searchsorted(ptr, row, side="right")) - 1 if name in OF_ATOMS else row, name
    return None


def not_finite(name: str, atoms: Atoms) -> str:
    """What to say of a structure's result that is not finite: names the atoms that are too close, the most common
    reason."""
    return f"the model's {name} is not finite for this structure{_too_close(atoms)}"


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
