"""Candidates on the host, narrowed at each step to the edges within the cutoff: what the CPU evaluates.

Edges beyond the cutoff contribute nothing but cost as much as others, and narrowing a list costs a hundredth of what
it saves: on the CPU the exact list is the fast one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mace_fast.inference.edges import SortedEdges, group_atoms, local_pairs
from mace_fast.inference.neighbours import NeighbourSearch
from mace_fast.inference.verlet import Structures, Verlet


class ExactList:
    """The candidates of structures, sorted by receiver, sender and image.

    That order, unlike one by length, does not depend on when the list was made: results are the same, bit for bit,
    with any skin and any history.

    Args:
        structures: for which candidates are found.
        search: who finds them, on the CPU.
        cutoff, skin: A.
        num_species: how many the model knows.
        present: species that tables of pairs exist for; None where one table serves all pairs.
    """

    def __init__(
        self,
        structures: Structures,
        search: NeighbourSearch,
        cutoff: float,
        skin: float,
        num_species: int,
        present: tuple[int, ...] | None,
    ) -> None:
        self.verlet = Verlet(structures, cutoff, skin)
        self._cutoff = cutoff
        found = search.batch(structures, cutoff + skin)
        (sender, receiver), shifts = found.edge_index.numpy(), found.shifts.numpy().astype(np.float64)
        order = _by_receiver_sender_image(sender, receiver, shifts)
        self._sender, self._receiver, self._unit_shifts = sender[order], receiver[order], shifts[order]
        self._graph = structures.batch[self._receiver] if len(structures.cells) > 1 else None
        self._cells: np.ndarray | None = None
        self._shifts = np.zeros((0, 3))
        count, atoms = len(sender), len(structures.species)
        self._row = np.searchsorted(self._receiver, np.arange(atoms + 1)).astype(np.int32)
        self._sender_order = _stable_order(self._sender, atoms)
        self._sender_row = np.concatenate([[0], np.cumsum(np.bincount(self._sender, minlength=atoms))])
        grouped = group_atoms(torch.from_numpy(structures.species), num_species, present)
        sender_species = structures.species[self._sender].astype(np.int32)
        self._all = SortedEdges(
            permutation=torch.empty(0, dtype=torch.int64),  # there is no caller's order
            sender=torch.from_numpy(self._sender.astype(np.int32)),
            receiver=torch.from_numpy(self._receiver.astype(np.int32)),
            receiver_row=torch.from_numpy(self._row),
            sender_order=torch.from_numpy(self._sender_order),
            sender_row=torch.from_numpy(self._sender_row.astype(np.int32)),
            species=grouped.species,
            species_order=grouped.order,
            species_row=grouped.row,
            sender_species=torch.from_numpy(sender_species),
            pair=local_pairs(grouped, torch.from_numpy(self._sender), torch.from_numpy(self._receiver)),
            present=present or (),
        )
        self._kept = np.ones(count, dtype=bool)
        self._edges = self._all

    def within(self, structures: Structures) -> tuple[SortedEdges, Tensor]:
        """The edges within the cutoff and their vectors [E, 3], float64, for structures for which the list holds."""
        if self._cells is None or not np.array_equal(self._cells, structures.cells):
            cells = structures.cells
            self._shifts = (
                self._unit_shifts @ cells[0]
                if self._graph is None
                else np.einsum("ei,eij->ej", self._unit_shifts, cells[self._graph])
            )
            self._cells = cells.copy()
        positions = structures.positions
        vectors = positions.take(self._receiver, axis=0)
        vectors -= positions.take(self._sender, axis=0)
        vectors += self._shifts
        kept = np.einsum("ei,ei->e", vectors, vectors) < self._cutoff**2
        if not np.array_equal(kept, self._kept):
            self._kept, self._edges = kept, self._narrow(kept)
        if len(vectors) != self._edges.sender.shape[0]:
            vectors = vectors[kept]
        return self._edges, torch.from_numpy(vectors)

    def _narrow(self, kept: np.ndarray) -> SortedEdges:
        if kept.all():
            return self._all
        edges = np.flatnonzero(kept)
        before = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(kept, out=before[1:])
        by_sender = kept[self._sender_order]
        before_by_sender = np.zeros(len(kept) + 1, dtype=np.int32)
        np.cumsum(by_sender, out=before_by_sender[1:])
        chosen = torch.from_numpy(edges)
        whole = self._all
        return whole._replace(
            sender=whole.sender[chosen],
            receiver=whole.receiver[chosen],
            receiver_row=torch.from_numpy(before[self._row]),
            sender_order=torch.from_numpy(before[self._sender_order[by_sender]]),
            sender_row=torch.from_numpy(before_by_sender[self._sender_row]),
            sender_species=whole.sender_species[chosen],
            pair=None if whole.pair is None else whole.pair[chosen],
        )


def _by_receiver_sender_image(sender: np.ndarray, receiver: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The order that sorts by these; as one number where it fits into 63 bits."""
    if not len(sender):
        return np.zeros(0, dtype=np.int64)
    atoms = int(max(sender.max(), receiver.max())) + 1
    images = shifts.astype(np.int64)
    low = images.min(axis=0)
    extent = images.max(axis=0) - low + 1
    if atoms * atoms * int(np.prod(extent, dtype=object)) >= 2**63:
        return np.lexsort((*images.T[::-1], sender, receiver))
    key = receiver * atoms + sender
    for axis in range(3):
        key = key * extent[axis] + (images[:, axis] - low[axis])
    return np.argsort(key)


def _stable_order(index: np.ndarray, count: int) -> np.ndarray:
    """A stable sort; numpy sorts 16 bits by radix, several times faster."""
    small = index.astype(np.uint16) if count <= 2**16 else index
    return np.argsort(small, kind="stable").astype(np.int32)
