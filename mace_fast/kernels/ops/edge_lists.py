"""Sorted lists of edges from pairs of neighbours that were found on the CPU: not an op, but what makes input of ops."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.build import load_cpu
from mace_fast.kernels.source.edge_lists import EDGE_LISTS, edge_lists_cpu


class EdgeLists(NamedTuple):
    """Both directions of each pair, sorted by receiver, length in float32, sender and image. All on the CPU.

    Attributes:
        sender, receiver: [E] int32.
        row: [N + 1] int32, where the edges begin that enter an atom; as many leave it.
        sender_order: [E] int32, the edges by sender, ascending for each; it begins at ``row`` too.
        sender_species: [E] int32.
        table: [E] int32, of each edge's pair of species; None where one table serves all.
        images: [E, 3] int32.
        shifts: [E, 3] float64, A, ``images @ cell``; vectors are positions[receiver] - positions[sender] + shifts.
    """

    sender: Tensor
    receiver: Tensor
    row: Tensor
    sender_order: Tensor
    sender_species: Tensor
    table: Tensor | None
    images: Tensor
    shifts: Tensor


def edge_lists(
    atoms: Tensor,
    images: Tensor,
    positions: Tensor,
    cells: Tensor,
    graph: Tensor | None,
    species: Tensor,
    place: Tensor | None,
    present: int,
) -> EdgeLists:
    """All lists in one call, which takes some tens of nanoseconds an edge.

    Args:
        atoms: [P, 2] int64, each pair once, in any order; all tensors are contiguous and on the CPU.
        images: [P, 3] int32; the vector of a pair is positions[second] - positions[first] + images @ cell.
        positions, cells: [M, 3], [G, 3, 3] float64, A.
        graph: [M] int64, the cell of each atom; None where there is one.
        species: [N] int64, N at least M: the lists have rows for that many atoms.
        place: [species that there are] int32, of each its place among those that have tables; None where one table
            serves all pairs.
        present: how many species have tables.

    Raises:
        ValueError: a pair names an atom that is not there.
    """
    edges, nodes = 2 * atoms.shape[0], species.shape[0]
    sender, receiver, row, order, of = (
        torch.empty(size, dtype=torch.int32) for size in (edges, edges, nodes + 1, edges, edges)
    )
    table = None if place is None else torch.empty_like(sender)
    edge_images, shifts = (torch.empty((edges, 3), dtype=dtype) for dtype in (torch.int32, torch.float64))
    lists = EdgeLists(sender, receiver, row, order, of, table, edge_images, shifts)
    inputs = (_address(atoms), _address(images), atoms.shape[0], *map(_address, (positions, cells, graph)))
    if not _function()(*inputs, nodes, _address(species), _address(place), present, *map(_address, lists)):
        raise ValueError(f"a pair of neighbours names an atom outside [0, {nodes})")
    return lists


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _function() -> Any:
    function = getattr(load_cpu(edge_lists_cpu()), EDGE_LISTS)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    function.argtypes = [pointer] * 2 + [integer] + [pointer] * 3 + [integer] + [pointer] * 2 + [ctypes.c_int]
    function.argtypes += [pointer] * 8
    function.restype = ctypes.c_int
    return function
