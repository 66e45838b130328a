"""Whether a list of candidate pairs still holds every pair within the cutoff: the Verlet criterion, for any cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ase.geometry import complete_cell

from mace_fast.inference.arrays import fingerprint, same


@dataclass(frozen=True)
class Structures:
    """One or several structures, on the host. Arrays are not copied: whoever keeps them must not write into them.

    Attributes:
        positions: [N, 3] float64, A, of all structures one after the other; atoms may lie outside their cells.
        cells: [G, 3, 3] float64, A, rows are the vectors.
        pbc: [G, 3] bool.
        species: [N] int64, position of each atom's element in the model's ``atomic_numbers``.
        ptr: [G + 1] int64, where each structure begins.
        features: further inputs of the model, [G] or [G, n] for a structure's, [N, n] for an atom's.
        head: index of the model's head.
    """

    positions: np.ndarray
    cells: np.ndarray
    pbc: np.ndarray
    species: np.ndarray
    ptr: np.ndarray
    features: dict[str, np.ndarray]
    head: int = 0

    @property
    def batch(self) -> np.ndarray:
        """[N] int64, the structure of each atom."""
        if len(self.cells) == 1:
            return np.zeros(len(self.species), dtype=np.int64)
        return np.repeat(np.arange(len(self.cells)), np.diff(self.ptr))


class Verlet:
    """The structures for which candidates were found within ``cutoff + skin``, and whether the list serves others.

    A pair that is not in the list was further apart than ``cutoff + skin``. Let a cell go from H to H' and write each
    new position as x' = x H^-1 H' + u, up to a constant. The pair's vector goes from v to v H^-1 H' + u_receiver -
    u_sender, whose length is at least s (cutoff + skin) - 2 max|u|, with s the smallest singular value of H^-1 H'.
    While that is not less than the cutoff, nothing is missing. With a constant cell it is the usual rule: no atom has
    moved by more than half the skin. An atom that is put back into the cell has moved by a lattice vector.

    Args:
        structures: that the list was made for; arrays are copied.
        cutoff, skin: A. A skin of zero holds for the very same structures alone.

    Attributes:
        positions, cells: copies of those structures' arrays.
    """

    def __init__(self, structures: Structures, cutoff: float, skin: float) -> None:
        self._cutoff, self._reach = cutoff, cutoff + skin
        self.positions = structures.positions.copy(order="C")
        self.cells, self._pbc = structures.cells.copy(order="C"), structures.pbc.copy()
        self._ptr, self._atoms = structures.ptr.copy(), _atoms(structures)
        self._batch = structures.batch
        # By coordinate: sums over the three are then sums of long rows, several times as fast.
        self._coordinates = self.positions.T.copy()
        self._moved = np.empty_like(self._coordinates)

    def same_atoms(self, structures: Structures) -> bool:
        """Whether number, order and species of the atoms, and the boundaries that are periodic, are the same."""
        return self._atoms == _atoms(structures)

    def holds(self, structures: Structures) -> bool:
        """Whether every pair within the cutoff is in the list; False where a position is not a number."""
        if not self.same_atoms(structures):
            return False
        stretch, moved = 1.0, self._moved
        if same(self.cells, structures.cells):
            np.subtract(structures.positions.T, self._coordinates, out=moved)
        else:
            stretch = self._moved_with_cells(structures)
        np.multiply(moved, moved, out=moved)
        furthest = math.sqrt(np.add.reduce(moved, axis=0).max(initial=0.0))
        return stretch * self._reach - 2 * furthest >= self._cutoff

    def _moved_with_cells(self, structures: Structures) -> float:
        """Displacements beside those that the cells bring; returns by how much distances may have shrunk."""
        cells = zip(self.cells, structures.cells, self._pbc, strict=True)
        deformations = np.stack([_deformation(*each) for each in cells])
        moved = structures.positions - np.einsum("ni,nij->nj", self.positions, deformations[self._batch])
        # Barostats differ in the point that stays: only differences between atoms of a structure count.
        starts, sizes = self._ptr[:-1], np.diff(self._ptr)[:, None]
        moved -= (np.add.reduceat(moved, starts, axis=0) / sizes)[self._batch]
        self._moved[...] = moved.T
        return float(np.linalg.svd(deformations, compute_uv=False).min())


def _atoms(structures: Structures) -> tuple[object, ...]:
    return fingerprint(structures.ptr, structures.species, structures.pbc)


def _deformation(old: np.ndarray, new: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """H^-1 H' of the periodic vectors; the identity along what is perpendicular to the old ones."""
    if not pbc.any():
        return np.identity(3)
    old, new = (np.where(pbc[:, None], cell, 0.0) for cell in (old, new))
    before = complete_cell(old)
    # The completing vectors belong to no image, so they may stay as they are.
    after = np.where(pbc[:, None], new, before)
    return np.linalg.solve(before, after)
