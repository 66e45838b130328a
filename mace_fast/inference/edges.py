"""The edges of a structure in the order that the program wants, made once for an edge list and kept while it lasts."""

from __future__ import annotations

import weakref
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mace_fast.inference.neighbours import Pairs
from mace_fast.kernels.ops.edge_lists import edge_lists
from mace_fast.kernels.ops.segment import Segments, segments


class SortedEdges(NamedTuple):
    """Edges by receiver, and those of a receiver by length, so that neighbours in the list read the same coefficients.

    Attributes:
        permutation: [E] int64, position in the caller's list of each sorted edge.
        sender, receiver: [E] int32.
        receiver_row: [N + 1] int32, where each receiver's edges begin.
        sender_order, sender_row: the sorted edges by sender.
        species: [N] int64, position in the model's ``atomic_numbers``.
        species_order, species_row: the atoms by species.
        sender_species: [E] int32.
        pair: [E] int32, table of each edge; None where one table serves all.
        present: the species that occur, as the model counts them, if tables depend on them.

    Padded lists (see :mod:`mace_fast.inference.padded`) hold more edges than the structure has. Both rows then have one
    entry more: the last segment takes the padding, and whoever sums over segments drops it.
    """

    permutation: Tensor
    sender: Tensor
    receiver: Tensor
    receiver_row: Tensor
    sender_order: Tensor
    sender_row: Tensor
    species: Tensor
    species_order: Tensor
    species_row: Tensor
    sender_species: Tensor
    pair: Tensor | None
    present: tuple[int, ...]

    @property
    def num_atoms(self) -> int:
        return self.species.shape[0]

    @property
    def row(self) -> Tensor:
        """[N + 1], without the segment of the padding."""
        return self.receiver_row[: self.num_atoms + 1]

    @property
    def groups(self) -> Segments:
        """The atoms of each species."""
        return Segments(self.species, self.species_order, self.species_row)

    @property
    def senders(self) -> Segments:
        """For sums over the edges that leave an atom."""
        return Segments(self.sender, self.sender_order, self.sender_row)

    @property
    def receivers(self) -> Segments:
        """For sums over the edges that enter an atom; they lie in order."""
        return Segments(self.receiver, None, self.receiver_row)


class AtomsBySpecies(NamedTuple):
    """Atoms, grouped once for all lists of them.

    Attributes:
        species: [N] int64, position in the model's ``atomic_numbers``.
        order, row: the atoms by species.
        present: the species to have tables for, at least those that occur; None where one table serves all pairs.
        table: [species that the model knows] int32, of each its place in ``present``; None without that.
    """

    species: Tensor
    order: Tensor
    row: Tensor
    present: tuple[int, ...] | None
    table: Tensor | None


def group_atoms(species: Tensor, num_species: int, present: tuple[int, ...] | None) -> AtomsBySpecies:
    """Group atoms by species.

    Args:
        species: [N] int64.
        num_species: how many the model knows.
        present: those to have tables for, None where one table serves all pairs.
    """
    groups = segments(species, num_species)
    assert groups.order is not None
    table = None
    if present is not None:
        places = torch.full((num_species,), -1, dtype=torch.int32)
        places[list(present)] = torch.arange(len(present), dtype=torch.int32)
        table = places.to(species.device)
    return AtomsBySpecies(species, groups.order, groups.row_ptr, present, table)


def sort_edges(edge_index: Tensor, lengths: Tensor, atoms: AtomsBySpecies) -> SortedEdges:
    """Sort edges by receiver and length, and by sender. Does not wait for the device.

    Edges of one receiver whose lengths are the same in float32 stay in the order that they come in.

    Args:
        edge_index: [2, E] int64; every index names an atom, as the lengths could not be known otherwise.
        lengths: [E], not negative; what is not a number comes last.
        atoms: N of them.
    """
    nodes = atoms.species.shape[0]
    # Floats that are not negative sort as their bits do, so one sort of integers serves both. A NaN may have a sign.
    key = (edge_index[1] << 32) | (lengths.to(torch.float32).view(torch.int32) & 0x7FFFFFFF)
    keys, permutation = torch.sort(key, stable=True)
    to, of = keys >> 32, edge_index[0][permutation]
    sender, receiver = of.to(torch.int32), to.to(torch.int32)
    senders, sender_order = torch.sort(sender, stable=True)
    rows = torch.arange(nodes + 1, dtype=torch.int32, device=sender.device)
    return SortedEdges(
        permutation,
        sender,
        receiver,
        torch.searchsorted(receiver, rows, out_int32=True),
        sender_order.to(torch.int32),
        torch.searchsorted(senders, rows, out_int32=True),
        atoms.species,
        atoms.order,
        atoms.row,
        atoms.species[of].to(torch.int32),
        local_pairs(atoms, of, to),
        atoms.present or (),
    )


def sort_pairs(
    pairs: Pairs, positions: np.ndarray, cells: np.ndarray, graph: np.ndarray | None, atoms: AtomsBySpecies
) -> tuple[SortedEdges, Tensor, Tensor]:
    """The same order from pairs that were found on the CPU; there is no caller's order.

    Edges of one receiver with the same length are in the order of sender and image.

    Args:
        pairs: of the atoms that have positions.
        positions, cells: [M, 3], [G, 3, 3] float64, A, contiguous.
        graph: [M] int64, the cell of each atom; None where there is one.
        atoms: M of them or more, on the CPU.

    Returns:
        The edges, and for each its image [E, 3] int32 and shift [E, 3] float64, A.
    """
    lists = edge_lists(
        torch.from_numpy(pairs.atoms),
        torch.from_numpy(pairs.images),
        torch.from_numpy(positions),
        torch.from_numpy(cells),
        None if graph is None else torch.from_numpy(graph),
        atoms.species,
        atoms.table,
        len(atoms.present or ()),
    )
    edges = SortedEdges(
        torch.empty(0, dtype=torch.int64),
        lists.sender,
        lists.receiver,
        lists.row,
        lists.sender_order,
        lists.row,
        atoms.species,
        atoms.order,
        atoms.row,
        lists.sender_species,
        lists.table,
        atoms.present or (),
    )
    return edges, lists.images, lists.shifts


def local_pairs(atoms: AtomsBySpecies, sender: Tensor, receiver: Tensor) -> Tensor | None:
    """[E] int32, which of the tables of the present species' pairs each edge uses; None where one table serves all.

    ``sender`` and ``receiver`` [E] are int64.
    """
    if atoms.present is None or atoms.table is None:
        return None
    place = atoms.table[atoms.species]
    return place[sender] * len(atoms.present) + place[receiver]


Kept = TypeVar("Kept")


class Memo(Generic[Kept]):
    """What was last made from some tensors. It serves only the very tensors that it was made from, unwritten since."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._sources: tuple[weakref.ReferenceType[Tensor], ...] = ()
        self._value: Kept | None = None

    def __reduce__(self) -> tuple[type[Memo[Kept]], tuple[()]]:
        return type(self), ()

    def get(self, sources: tuple[Tensor, ...]) -> Kept | None:
        """What was made from these tensors, or None."""
        same = len(self._sources) == len(sources) and all(
            source() is tensor for source, tensor in zip(self._sources, sources, strict=True)
        )
        return self._value if same and self._key == _fingerprint(sources) else None

    def put(self, sources: tuple[Tensor, ...], value: Kept) -> None:
        """Keep what was made from these tensors."""
        self._key, self._sources, self._value = _fingerprint(sources), tuple(map(weakref.ref, sources)), value


def _fingerprint(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple((t._version, t.data_ptr(), tuple(t.shape), t.device) for t in tensors)
