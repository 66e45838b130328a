"""Many structures in few evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from mace_fast.calculators.graph import take
from mace_fast.inference import Stepper, Structures

logger = logging.getLogger(__name__)


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


def evaluate_batch(stepper: Stepper, structures: Structures, forces: bool, stress: bool) -> list[dict[str, np.ndarray]]:
    """For each model its outputs for a batch; see :class:`Stepper`.

    Raises:
        torch.cuda.OutOfMemoryError: of a structure that does not fit by itself.
    """
    count = len(structures.cells)
    try:
        return stepper(structures, forces=forces, stress=stress)
    except torch.cuda.OutOfMemoryError:
        if count == 1:
            raise
    logger.warning("no memory for %d structures at once; trying halves", count)
    halves = [
        evaluate_batch(stepper, take(structures, np.arange(*limits)), forces, stress)
        for limits in ((0, count // 2), (count // 2, count))
    ]
    return [
        {name: np.concatenate([first[name], second[name]]) for name in first}
        for first, second in zip(*halves, strict=True)
    ]
