"""Candidate pairs of static programs: found on the host or on the device, sorted there, kept while cells change."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from mace_fast.inference.arrays import same
from mace_fast.inference.edges import AtomsBySpecies, SortedEdges, sort_edges, sort_pairs
from mace_fast.inference.neighbours import NeighbourSearch, upload
from mace_fast.inference.packed import bring
from mace_fast.inference.verlet import Structures, Verlet
from mace_fast.kernels.build import cpu_available


class Candidates:
    """Pairs within cutoff + skin, sorted when they are asked for.

    Args:
        structures: for which they are found.
        search: who finds them.
        cutoff, skin: A.
        present: species that tables of pairs exist for; None where one table serves all pairs.

    Attributes:
        verlet: whether the list holds for other structures.
        count: E.
        where: the device on which edges are sorted.
        shifts: [E, 3] float64, A, for the cells that were set last, in sorted order: on ``where``, or on the device of
            the search if other cells were set.
        cells_set: how often cells were set.
    """

    count: int
    where: torch.device
    shifts: Tensor

    def __init__(
        self,
        structures: Structures,
        search: NeighbourSearch,
        cutoff: float,
        skin: float,
        present: tuple[int, ...] | None,
    ) -> None:
        self.verlet = Verlet(structures, cutoff, skin)
        self.present = present
        self.cells_set = 0
        self._device = search.device
        self._cells = structures.cells.copy()
        self._graph = structures.batch if len(structures.cells) > 1 else None
        self._sorted: dict[int, SortedEdges] = {}
        self._on_device: tuple[Tensor, Tensor | None] | None = None
        self._search(structures, search, cutoff + skin)

    @staticmethod
    def find(
        structures: Structures,
        search: NeighbourSearch,
        cutoff: float,
        skin: float,
        present: tuple[int, ...] | None,
    ) -> Candidates:
        """Where it takes less time; a GPU's host may lack the compiler that the other way takes."""
        on_host = _can_sort_on_host() and search.small(structures, cutoff + skin)
        kind = HostCandidates if on_host else DeviceCandidates
        return kind(structures, search, cutoff, skin, present)

    def sorted_for(self, atoms: AtomsBySpecies) -> SortedEdges:
        """Edges for these atoms, of which those beyond the structures' have none."""
        count = atoms.species.shape[0]
        if count not in self._sorted:
            self._sorted[count] = self._sort(atoms)
        return self._sorted[count]

    def set_cells(self, cells: np.ndarray) -> None:
        """Make :attr:`shifts`; edges have been sorted before. Does not wait for the device."""
        if same(self._cells, cells):
            self.cells_set = max(self.cells_set, 1)
            return
        if self._on_device is None:
            edges = next(iter(self._sorted.values()))  # atoms without edges do not change the order
            graph = None
            if self._graph is not None:
                of_atoms, receiver = (bring(t, self._device) for t in (torch.from_numpy(self._graph), edges.receiver))
                graph = of_atoms[receiver.long()]
            self._on_device = bring(self._sorted_images(edges), self._device).to(torch.float64), graph
        (on_device,) = upload(self._device, cells)
        self.shifts = cartesian(self._on_device[0], self._on_device[1], on_device)
        self._cells = cells.copy()
        self.cells_set += 1

    def _search(self, structures: Structures, search: NeighbourSearch, reach: float) -> None:
        """Find the pairs within ``reach``, A; sets :attr:`count` and :attr:`where`."""
        raise NotImplementedError

    def _sort(self, atoms: AtomsBySpecies) -> SortedEdges:
        raise NotImplementedError

    def _sorted_images(self, edges: SortedEdges) -> Tensor:
        raise NotImplementedError


class HostCandidates(Candidates):
    """Of few atoms: found and sorted on the host, in one call each, which take less time than a GPU's launches."""

    def _search(self, structures: Structures, search: NeighbourSearch, reach: float) -> None:
        self.where = torch.device("cpu")
        self._pairs = search.pairs(structures, reach)
        self.count = 2 * len(self._pairs.atoms)
        self._images: Tensor | None = None

    def _sort(self, atoms: AtomsBySpecies) -> SortedEdges:
        # Of the structures that the list was found for: these may have moved since.
        edges, images, shifts = sort_pairs(self._pairs, self.verlet.positions, self.verlet.cells, self._graph, atoms)
        if self._images is None:
            self._images, self.shifts = images, shifts
        return edges

    def _sorted_images(self, edges: SortedEdges) -> Tensor:
        assert self._images is not None
        return self._images


class DeviceCandidates(Candidates):
    """Of many atoms: found and sorted on the device."""

    def _search(self, structures: Structures, search: NeighbourSearch, reach: float) -> None:
        self.where = search.device
        self._index, self._images = search.batch(structures, reach)
        self.count = self._index.shape[1]
        positions, cells = upload(search.device, structures.positions, structures.cells)
        sender, receiver = self._index
        graph = None if self._graph is None else bring(torch.from_numpy(self._graph), search.device)[receiver]
        self.shifts = cartesian(self._images.to(torch.float64), graph, cells)  # sorted with the edges
        self._lengths = (positions[receiver] - positions[sender] + self.shifts).norm(dim=1)

    def _sort(self, atoms: AtomsBySpecies) -> SortedEdges:
        edges = sort_edges(self._index, self._lengths, atoms)
        if not self._sorted:
            self.shifts = self.shifts[edges.permutation]
        return edges

    def _sorted_images(self, edges: SortedEdges) -> Tensor:
        return self._images[edges.permutation]


@cache
def _can_sort_on_host() -> bool:
    return cpu_available()


def cartesian(images: Tensor, graph: Tensor | None, cells: Tensor) -> Tensor:
    """[E, 3] float64, A: images [E, 3] float64 in the cells [G, 3, 3] that ``graph`` [E] names, or in the only one."""
    if graph is None:
        return images @ cells[0]
    return (images[:, :, None] * cells[graph]).sum(dim=1)
