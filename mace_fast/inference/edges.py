"""The edges of a structure in the order that the program wants, made once for an edge list and kept while it lasts."""

from __future__ import annotations

import weakref
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mace_fast.kernels.ops.graph import edge_graph
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

    Padded lists (``pad``) hold more edges than the structure has. Both rows then have one entry more: the last segment
    takes the padding, and whoever sums over segments drops it.
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


def sort_edges(
    edge_index: Tensor,
    lengths: Tensor,
    species: Tensor,
    num_species: int,
    *,
    by_species: bool,
    present: tuple[int, ...] | None = None,
) -> SortedEdges:
    """Sort edges and find the species; waits for the device once.

    Args:
        edge_index: [2, E] int64.
        lengths: [E].
        species: [N] int64.
        num_species: how many the model knows.
        by_species: whether tables depend on the two species of an edge.
        present: the species to have tables for, at least those that occur; None for those.

    Raises:
        ValueError: an index names no atom.
    """
    nodes = species.shape[0]
    by_length = torch.argsort(lengths, stable=True)
    permutation = by_length[torch.argsort(edge_index[1][by_length], stable=True)]
    sender, receiver = edge_index[0][permutation], edge_index[1][permutation]
    graph = edge_graph(sender, receiver, nodes, nodes)
    graph.check()
    groups = segments(species, num_species)
    assert groups.order is not None
    pair = None
    if by_species and present is None:
        present = tuple(sorted(set(species.tolist())))
    if by_species:
        assert present is not None
        pair = local_pairs(species, present, num_species, sender, receiver)
    return SortedEdges(
        permutation,
        graph.sender,
        graph.receiver,
        graph.row,
        graph.sender_order,
        graph.sender_row,
        species,
        groups.order,
        groups.row_ptr,
        species[sender].to(torch.int32),
        pair,
        present if by_species and present is not None else (),
    )


def local_pairs(
    species: Tensor, present: tuple[int, ...], num_species: int, sender: Tensor, receiver: Tensor
) -> Tensor:
    """[E] int32, which of the tables of the present species' pairs each edge uses."""
    local = torch.full((num_species,), -1, dtype=torch.int32, device=species.device)
    local[list(present)] = torch.arange(len(present), dtype=torch.int32, device=species.device)
    return local[species[sender]] * len(present) + local[species[receiver]]


def pad(edges: SortedEdges, capacity: int) -> SortedEdges:
    """The same edges in lists of a fixed length; what is added belongs to no atom and is summed aside.

    Raises:
        ValueError: there are more edges than that.
    """
    count = edges.sender.shape[0]
    if count > capacity:
        raise ValueError(f"{count} edges do not fit into {capacity}")

    def filled(values: Tensor, value: int = 0) -> Tensor:
        return torch.nn.functional.pad(values, (0, capacity - count), value=value)

    def with_rest(row: Tensor) -> Tensor:
        return torch.nn.functional.pad(row, (0, 1), value=capacity)

    order = torch.arange(capacity, dtype=edges.sender_order.dtype, device=edges.sender_order.device)
    order[:count] = edges.sender_order
    return edges._replace(
        permutation=filled(edges.permutation),
        sender=filled(edges.sender),
        receiver=filled(edges.receiver),
        receiver_row=with_rest(edges.receiver_row),
        sender_order=order,
        sender_row=with_rest(edges.sender_row),
        sender_species=filled(edges.sender_species),
        pair=None if edges.pair is None else filled(edges.pair),
    )


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
