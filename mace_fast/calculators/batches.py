"""Many structures in few evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from mace_fast.calculators.graph import join
from mace_fast.inference import Stepper, Structures

logger = logging.getLogger(__name__)

_OF_ATOMS = frozenset({"node_energy", "forces"})


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of the structures of each batch: like sizes together, at most ``limit`` atoms or one structure.

    Raises:
        ValueError: a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"atoms_per_batch={limit}: at least 1")
    batches: list[list[int]] = []
    room = 0
    for number in np.argsort(np.asarray(sizes, dtype=np.int64), kind="stable").tolist():
        if not batches or sizes[number] > room:
            batches.append([])
            room = limit
        batches[-1].append(number)
        room -= sizes[number]
    return batches


def evaluate_batch(
    stepper: Stepper, structures: Sequence[Structures], forces: bool, stress: bool
) -> list[list[dict[str, np.ndarray]]]:
    """For each structure, for each model, the outputs of that structure alone.

    Raises:
        torch.cuda.OutOfMemoryError: of a structure that does not fit by itself.
    """
    together = join(structures)
    try:
        found = stepper(together, forces=forces, stress=stress)
    except torch.cuda.OutOfMemoryError:
        if len(structures) == 1:
            raise
        half = len(structures) // 2
        logger.warning("no memory for %d structures at once; trying halves", len(structures))
    else:
        return [
            [
                {
                    name: value[together.ptr[number] : together.ptr[number + 1]]
                    if name in _OF_ATOMS
                    else value[number : number + 1]
                    for name, value in of_model.items()
                }
                for of_model in found
            ]
            for number in range(len(structures))
        ]
    return [
        part
        for some in (structures[:half], structures[half:])
        for part in evaluate_batch(stepper, some, forces, stress)
    ]
