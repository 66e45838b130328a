"""Lists of edges of a fixed length, written over where they lie: those that a static program reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mace_fast.inference.edges import SortedEdges

_OF_EDGES = ("sender", "receiver", "sender_order", "sender_species", "pair")
_ROWS = ("receiver_row", "sender_row")
_PADDED = frozenset({*_OF_EDGES, *_ROWS, "species", "species_order", "species_row"})


def padded_parts(
    atoms: int, capacity: int, num_species: int, *, with_pairs: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of lists of a fixed length, by the names of :class:`SortedEdges`."""
    of_edges = {name: ((capacity,), torch.int32) for name in _OF_EDGES if with_pairs or name != "pair"}
    rows = dict.fromkeys(_ROWS, ((atoms + 2,), torch.int32))
    of_atoms = {"species": atoms, "species_order": atoms, "species_row": num_species + 1}
    return {**{name: ((size,), torch.int64) for name, size in of_atoms.items()}, **rows, **of_edges}


def without_edges(parts: Mapping[str, Tensor]) -> SortedEdges:
    """Padded lists in memory that :func:`padded_parts` describes and that holds zeros, still without edges and atoms'
    species: for :func:`refill`. What is padding belongs to no atom and is summed aside."""
    capacity = parts["sender"].shape[0]
    torch.arange(capacity, out=parts["sender_order"])  # padding stands where it is
    for name in _ROWS:
        parts[name][-1] = capacity
    lists: dict[str, Any] = {"permutation": parts["sender_order"].new_empty(0, dtype=torch.int64), "pair": None}
    return SortedEdges(**{**lists, **{name: parts[name] for name in parts if name in _PADDED}, "present": ()})


def refill(padded: SortedEdges, used: int, edges: SortedEdges) -> SortedEdges:
    """Write other edges into padded lists, which stay where they are.

    Args:
        padded: made by :func:`without_edges`, for as many atoms.
        used: how many of its edges are not padding.
        edges: to take their place.

    Raises:
        ValueError: there are more edges than there is room for.
    """
    count, capacity = edges.sender.shape[0], padded.sender.shape[0]
    if count > capacity:
        raise ValueError(f"{count} edges do not fit into {capacity}")
    for name in _OF_EDGES:
        target, values = getattr(padded, name), getattr(edges, name)
        if target is not None:
            write(target[:count], values)
            if count < used:
                target[count:used] = _places(count, used, target) if name == "sender_order" else 0
    for name in _ROWS:
        write(getattr(padded, name)[:-1], getattr(edges, name))
    for name in ("species", "species_order", "species_row"):
        write(getattr(padded, name), getattr(edges, name))
    return padded._replace(present=edges.present)


def write(target: Tensor, values: Tensor) -> None:
    """Copy values of the same shape and device. On the host not by torch, which wakes threads that may be busy: for an
    array of this size that takes longer than copying."""
    if target.device.type == "cpu":
        target.numpy()[...] = values.detach().numpy()
    else:
        target.copy_(values)


def _places(first: int, end: int, like: Tensor) -> Tensor:
    """In sender_order padding stands where it is."""
    return torch.arange(first, end, dtype=like.dtype, device=like.device)
