"""What the blocks of one model share within a forward: the sorted edges, and the species of the nodes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.ops.graph import EdgeGraph, edge_graph
from mace_fast.kernels.ops.linear import arrange_indexed_weight
from mace_fast.kernels.ops.segment import Segments, segments

Value = TypeVar("Value")


class Topology(NamedTuple):
    """The edges of a structure, sorted: for the convolution, and for sums and gathers at either end."""

    graph: EdgeGraph
    senders: Segments
    receivers: Segments


class Species(NamedTuple):
    """The species that occur, which of them each node is, and the nodes of each.

    Weights are kept for every species of a model, 89 in many, and a structure has a few: what is made of the
    weights in each forward is made for those that occur. (Not kept from one forward to the next: a write
    through ``parameter.data``, as averages of weights are put in place, leaves no trace to notice it by.)

    Attributes:
        of_node: int64 [N], a row of ``present``.
        groups: the nodes of each row of ``present``.
        present: int64 [P], ascending; None where every species is taken, occurring or not: on CUDA, which
            would have to be waited for, and while torch traces, where shapes may not depend on values.
    """

    of_node: torch.Tensor
    groups: Segments
    present: torch.Tensor | None

    def rows_of(self, table: torch.Tensor) -> torch.Tensor:
        """Of a table with a row for each species of the model, the rows that ``of_node`` counts."""
        return table if self.present is None else table.index_select(0, self.present)


@dataclass(frozen=True)
class _Entry(Generic[Value]):
    """A value made from a tensor, and what identifies that tensor and its contents."""

    source: weakref.ReferenceType[torch.Tensor]
    fingerprint: tuple[object, ...]
    value: Value

    def serves(self, tensor: torch.Tensor, *arguments: int) -> bool:
        return self.source() is tensor and self.fingerprint == _fingerprint(tensor, arguments)


def _is_rememberable(tensor: torch.Tensor) -> bool:
    """Not while torch traces, when tensors are stand-ins (of a subclass) for those of later calls."""
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _fingerprint(tensor: torch.Tensor, arguments: tuple[int, ...]) -> tuple[object, ...]:
    # Inference tensors have no version counter: for them it is only the first block of each forward, which
    # makes everything anew, that keeps stale values away.
    version = None if tensor.is_inference() else tensor._version
    return (version, tensor.data_ptr(), tuple(tensor.shape), tensor.device, *arguments)


class TopologyMemo:
    """The last edge graph and the last species that the blocks of one model have made.

    An entry serves only the very tensor object that it was made from, unwritten since. The block that runs
    first in the model (``fresh=True``) always makes a new one, so that nothing outlives a forward, not even
    under writes that torch does not count (through NumPy, say). Entries are immutable and replaced in one
    assignment, so that threads may share a model. Copies and pickles are empty. While torch traces, nothing
    is remembered.
    """

    def __init__(self) -> None:
        self._graph: _Entry[Topology] | None = None
        self._species: _Entry[Species] | None = None
        self._one_hot_checked = False

    def __reduce__(self) -> tuple[type[TopologyMemo], tuple[()]]:
        return TopologyMemo, ()

    def topology(self, edge_index: torch.Tensor, num_nodes: int, *, fresh: bool) -> Topology:
        """The edges of ``edge_index`` [2, E] (senders, receivers), sorted for the kernels.

        ``fresh``: this is the first block of a forward; what is remembered of the last one is forgotten.
        """
        if not _is_rememberable(edge_index):
            return _sorted_edges(edge_index, num_nodes)
        if fresh:
            self._species = None
        entry = self._graph
        if fresh or entry is None or not entry.serves(edge_index, num_nodes):
            topology = _sorted_edges(edge_index, num_nodes)
            entry = _Entry(weakref.ref(edge_index), _fingerprint(edge_index, (num_nodes,)), topology)
            self._graph = entry
        return entry.value

    def species(self, node_attrs: torch.Tensor) -> Species:
        """The species of each node from its one-hot ``node_attrs`` [N, Z].

        Raises:
            ValueError: a row is not one-hot. On CUDA, where looking stops the device, only the first call
                of a memo looks.
        """
        if not _is_rememberable(node_attrs):
            return _every_species(node_attrs)
        entry = self._species
        if entry is None or not entry.serves(node_attrs):
            species = _every_species(node_attrs)
            self._check_one_hot(node_attrs, species.of_node)
            if node_attrs.device.type == "cpu":
                species = _occurring(species)
            entry = _Entry(weakref.ref(node_attrs), _fingerprint(node_attrs, ()), species)
            self._species = entry
        return entry.value

    def _check_one_hot(self, node_attrs: torch.Tensor, species: torch.Tensor) -> None:
        if node_attrs.device.type != "cpu":
            if self._one_hot_checked or torch.cuda.is_current_stream_capturing():
                return
            self._one_hot_checked = True
        hot = node_attrs.gather(1, species[:, None]).squeeze(1)
        wrong = (hot != 1) | (node_attrs.count_nonzero(dim=1) != 1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"node_attrs is not one-hot (row {row} of {node_attrs.shape[0]} is "
                f"{node_attrs[row].tolist()}); mace_fast reads "
                "it as the index of a species. Use the original model (mace_fast.restore) for mixed species"
            )


def indexed_weight(weight: torch.Tensor, linear: Linear, num_species: int, species: Species) -> torch.Tensor:
    """e3nn's flat weight of a product with one-hot attributes, as one flat linear weight for each row of
    ``species.present``; differentiable.

    Args:
        weight: flat; for each path [u, num_species, w].
        linear: the map of one species.
        num_species: how many the model has.
        species: those to take.

    Returns:
        [rows, linear.weight_numel].
    """
    if species.present is not None:
        widths = [(linear.x[path.x][0], linear.z[path.z][0]) for path in linear.paths]
        pieces = weight.split([mul_x * num_species * mul_z for mul_x, mul_z in widths])
        chosen = [
            piece.view(mul_x, num_species, mul_z).index_select(1, species.present).flatten()
            for piece, (mul_x, mul_z) in zip(pieces, widths, strict=True)
        ]
        weight, num_species = torch.cat([weight[:0], *chosen]), len(species.present)
    return arrange_indexed_weight(weight, linear, num_species)


def without_species_gradient(value: torch.Tensor, node_attrs: torch.Tensor) -> torch.Tensor:
    """``value``, whose gradient with respect to ``node_attrs`` is NaN if anybody asks for it.

    mace_fast takes ``node_attrs`` as the index of a species, by which one cannot differentiate.
    mace-torch's dipole models and its calculator ask for that gradient and never use it, so that asking
    cannot be an error.
    """
    if not node_attrs.requires_grad:
        return value
    result: torch.Tensor = _NoSpeciesGradient.apply(value, node_attrs)
    return result


class _NoSpeciesGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, node_attrs: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.shape = inputs[1].shape

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], gradients[0].new_full(ctx.shape, torch.nan)


def _sorted_edges(edge_index: torch.Tensor, num_nodes: int) -> Topology:
    graph = edge_graph(edge_index[0], edge_index[1], num_nodes, num_nodes)
    return Topology(
        graph,
        senders=Segments(graph.sender, graph.sender_order, graph.sender_row),
        receivers=Segments(graph.receiver, graph.order, graph.row),
    )


def _every_species(node_attrs: torch.Tensor) -> Species:
    index = node_attrs.argmax(dim=1)
    return Species(index, segments(index, node_attrs.shape[1]), None)


def _occurring(species: Species) -> Species:
    """The same without the species that no node is of."""
    groups = species.groups
    present = groups.row_ptr.diff().nonzero().flatten()
    if present.shape[0] in (0, groups.num_segments):
        return species
    number = torch.empty(groups.num_segments, dtype=torch.int64).index_copy_(0, present, torch.arange(len(present)))
    of_node = number[species.of_node]
    row_ptr = torch.cat([groups.row_ptr[present], groups.row_ptr[-1:]])
    return Species(of_node, Segments(of_node, groups.order, row_ptr), present)
