"""``evaluate``: energies, forces and stresses of many structures, in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ase import Atoms

from mace_fast.calculators.ase import MACEFastCalculator

Model = str | os.PathLike[str] | torch.nn.Module
"""A file, a public model's name, or a module."""


def evaluate(
    structures: Iterable[Atoms],
    model: MACEFastCalculator | Model | Sequence[Model],
    properties: str | Iterable[str] = ("energy", "forces"),
    *,
    atoms_per_batch: int | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Results of many structures of any sizes, several in one evaluation. Nothing is attached to the atoms.

    The energy of a structure does not depend on which others are in its batch, beyond rounding.

        for atoms, found in zip(frames, evaluate(frames, "medium-mpa-0", device="cuda")):
            print(atoms.get_chemical_formula(), found["energy"])

    Args:
        structures: what to evaluate.
        model: a calculator, which keeps what it has compiled and proven for the next call; or a file, a name, a module,
            or several for a committee, of which a calculator is made for this call.
        properties: which to compute, one name or several; with forces or stress come ``energy``, ``energies``,
            ``node_energy``.
        atoms_per_batch: see :meth:`MACEFastCalculator.evaluate`.
        **settings: of the calculator that is made (``device``, ``default_dtype``, ``head``, ``verify`` ...).

    Returns:
        For each structure, in order, what its calculator's ``results`` would hold, in ASE's units and shapes.

    Raises:
        TypeError: settings beside a calculator; one structure in place of several, or something that is none.
        StructureError: names the number of the structure, from 0.
    """
    if isinstance(model, MACEFastCalculator):
        if settings:
            raise TypeError(f"{', '.join(sorted(settings))}: these were given when the calculator was made")
        calculator = model
    else:
        several = [model] if isinstance(model, (str, os.PathLike, torch.nn.Module)) else list(model)
        modules = [each for each in several if isinstance(each, torch.nn.Module)]
        if modules and len(modules) < len(several):
            raise TypeError("a committee is given as modules or as files, not as both")
        which: Any = several[0] if len(several) == 1 else several
        calculator = MACEFastCalculator(**{"models" if modules else "model_paths": which}, **settings)
    return calculator.evaluate(structures, properties, atoms_per_batch=atoms_per_batch)
