"""Conventions of mace-torch about cells."""

from __future__ import annotations

import numpy as np


def volume_cell(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> np.ndarray:
    """The cell that mace-torch hands to the model, whose volume divides the virial into a stress.

    Directions that are not periodic get a vector of five times the largest coordinate times the cutoff, along x, y or z
    (mace.data.neighborhood.get_neighborhood). The number has no meaning, and is kept so that stresses agree.

    Args:
        positions: [N, 3] A.
        cell: [3, 3] A.
        pbc: [3] bool.
        cutoff: A.
    """
    result = np.array(cell if cell.any() else np.identity(3), dtype=np.float64)
    length = (np.max(np.abs(positions)) + 1) * 5 * cutoff
    for axis in range(3):
        if not pbc[axis]:
            result[axis] = length * np.identity(3)[axis]
    return result
