"""Energies of a frozen model from the features of its layers.

What depends on the species, the heads and the structures, but not on positions, is made once for a list of atoms
(:class:`NodeInputs`); so are the gradients that the energy has by itself: those of linear readouts are constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mace.modules.blocks import LinearReadoutBlock, NonLinearBiasReadoutBlock, NonLinearReadoutBlock
from torch import Tensor

from mace_fast.inference.edges import SortedEdges
from mace_fast.inference.layers import FrozenLayer
from mace_fast.kernels.ops.readout import MOST_HIDDEN, node_energies
from mace_fast.kernels.ops.segment import Segments, segment_sum, segments
from mace_fast.kernels.ops.totals import structure_energies
from mace_fast.patch.understand import LINEAR, class_name


@dataclass(frozen=True)
class Readout:
    """One readout of a model, for the kernel of all readouts where it has one of that kernel's forms.

    Attributes:
        layer: whose features it reads.
        first: [heads or hidden, width]; None for a readout of another form, which MACE's block evaluates.
        second: [hidden], or None for a linear readout.
    """

    layer: int
    first: Tensor | None
    second: Tensor | None

    @property
    def linear(self) -> bool:
        """Whether the energy is linear in the features."""
        return self.first is not None and self.second is None


class NodeInputs(NamedTuple):
    """What the nodes of a list bring to every evaluation.

    Attributes:
        features: [N, F] before the first layer.
        skip: what passes by the first message; None in blocks without it.
        head: [N] int64.
        base, graph_base: [N], [G] float64, the energies that do not depend on positions.
        scale, shift: [N], of the interaction energy.
        order, row: int64, the nodes by structure.
        seeds: for each readout the derivative of the total energy with respect to the features of a linear readout
            [N, dim], or to the result of a readout without a kernel [N, heads]; otherwise empty.
    """

    features: Tensor
    skip: Tensor | None
    head: Tensor
    base: Tensor
    graph_base: Tensor
    scale: Tensor
    shift: Tensor
    order: Tensor
    row: Tensor
    seeds: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        flat = [t for t in self[:-1] if t is not None]
        return [*flat, *self.seeds]


@dataclass(frozen=True)
class Energies:
    """Of one evaluation, float64, and where the total energy comes from.

    Attributes:
        interaction: [G], the part that depends on positions.
        total: [G].
        of_nodes: [N].
        roots: tensors that the total energy depends on, with its derivatives with respect to them.
    """

    interaction: Tensor
    total: Tensor
    of_nodes: Tensor
    roots: tuple[tuple[Tensor, Tensor], ...]


def freeze_readouts(model: Any) -> tuple[Readout, ...]:
    """The readouts of a model, on its device and in its dtype."""
    layers = len(model.interactions)
    return tuple(
        _freeze_readout(block, layers - 1 if len(model.readouts) == 1 else number)
        for number, block in enumerate(model.readouts)
    )


def _freeze_readout(block: Any, layer: int) -> Readout:
    if type(block) is LinearReadoutBlock and _is_matrix(block.linear):
        return Readout(layer, _used(_matrix(block.linear)), None)
    if type(block) is NonLinearReadoutBlock and _is_matrix(block.linear_1) and _is_matrix(block.linear_2):
        first, second = _matrix(block.linear_1), _matrix(block.linear_2)
        factor = _silu_factor(block.non_linearity, first)
        if factor is not None and first.shape[0] <= MOST_HIDDEN and second.shape[0] == 1:
            return Readout(layer, _used(first), factor * second[0])
    return Readout(layer, None, None)


def _is_matrix(linear: Any) -> bool:
    """Whether a module is e3nn's linear map without biases, and not one of another class that may be none."""
    return class_name(linear) == LINEAR and not linear.bias.numel()


def _matrix(linear: Any) -> Tensor:
    """[out, in] of an e3nn linear map."""
    weight = next(linear.parameters())
    one = torch.eye(linear.irreps_in.dim, dtype=weight.dtype, device=weight.device)
    matrix: Tensor = linear(one).detach().T.contiguous()
    return matrix


def _used(matrix: Tensor) -> Tensor:
    """Without the last columns if they are zero: those of features that are no scalars."""
    columns = torch.nonzero((matrix != 0).any(0)).flatten()
    width = int(columns[-1]) + 1 if columns.numel() else 0
    return matrix[:, :width].contiguous()


def _silu_factor(activation: Any, like: Tensor) -> float | None:
    """The factor if an activation of scalars is silu times that; None if it is another one."""
    hidden = like.shape[0]
    at = torch.linspace(-30.0, 30.0, 61 * hidden, dtype=like.dtype, device=like.device).view(61, hidden)
    found, silu = activation(at).detach(), torch.nn.functional.silu(at)
    if found.shape != at.shape:
        return None
    factor = float((found * silu).sum(dtype=torch.float64) / (silu * silu).sum(dtype=torch.float64))
    error = float((found - factor * silu).abs().max())
    return factor if error <= 8 * torch.finfo(like.dtype).eps * 30.0 * abs(factor) else None


def nodes_can_be_captured(model: Any, readouts: Sequence[Readout]) -> bool:
    """Whether :func:`node_inputs` runs nothing that is not known to run in a CUDA graph: MACE's own blocks do."""
    return "joint_embedding" not in model._modules and all(readout.first is not None for readout in readouts)


def node_inputs(
    model: Any,
    layers: Sequence[FrozenLayer],
    readouts: Sequence[Readout],
    data: Mapping[str, Tensor],
    edges: SortedEdges,
) -> NodeInputs:
    """Everything about nodes that positions do not change; from MACE's input without them."""
    with torch.no_grad():
        batch, graphs = data["batch"], data["ptr"].shape[0] - 1
        head = data["head"][batch] if "head" in data else torch.zeros_like(batch)
        by_graph = segments(batch, graphs)
        assert by_graph.order is not None
        base = _of_head(model.atomic_energies_fn(data["node_attrs"]), head).double()
        of_graphs = base
        features = model.node_embedding(data["node_attrs"])
        if "joint_embedding" in model._modules:
            features = features + model.joint_embedding(batch, {name: data[name] for name in model.embedding_specs})
            if "embedding_readout" in model._modules:
                readout = torch.atleast_1d(_of_head(model.embedding_readout(features, head), head))
                of_graphs = of_graphs + readout.double()
        scale, shift = torch.ones_like(features[:, 0]), torch.zeros_like(features[:, 0])
        if "scale_shift" in model._modules:
            of_heads = model.scale_shift
            scale = torch.atleast_1d(of_heads.scale)[head].to(scale.dtype)
            shift = torch.atleast_1d(of_heads.shift)[head].to(shift.dtype)
        widths = [model.products[readout.layer].linear.irreps_out.dim for readout in readouts]
        return NodeInputs(
            features=features,
            skip=layers[0].skipped(features, edges),
            head=head.to(torch.int64),
            base=base,
            graph_base=segment_sum(of_graphs[:, None], by_graph).squeeze(1),
            scale=scale.contiguous(),
            shift=shift.contiguous(),
            order=by_graph.order,
            row=by_graph.row_ptr,
            seeds=tuple(
                _seed(readout, block, head, scale, width)
                for readout, block, width in zip(readouts, model.readouts, widths, strict=True)
            ),
        )


def _seed(readout: Readout, block: Any, head: Tensor, scale: Tensor, width: int) -> Tensor:
    if readout.first is None:
        outputs = block(scale.new_zeros((1, width)), head[:1]).shape[-1]
        return scale[:, None] * torch.nn.functional.one_hot(head, outputs).to(scale.dtype)
    if readout.second is not None:
        return scale.new_empty(0)
    gradient = scale[:, None] * readout.first[head]
    return torch.nn.functional.pad(gradient, (0, width - gradient.shape[1]))


def energies(
    model: Any,
    readouts: Sequence[Readout],
    nodes: NodeInputs,
    features: Sequence[Tensor],
    pair: Tensor | None,
    *,
    want_gradient: bool,
) -> Energies:
    """Energies of nodes and structures from the features of all layers.

    Args:
        model: whose blocks evaluate readouts that no kernel does.
        readouts: prepared.
        nodes: what does not depend on positions.
        features: [N, dim] of each layer.
        pair: [N], the repulsion of nuclei, or None.
        want_gradient: whether roots are wanted.
    """
    extra = None if pair is None else pair.detach()
    roots = [] if pair is None else [(pair, nodes.scale)]
    kernel = []
    for readout, block, seed in zip(readouts, model.readouts, nodes.seeds, strict=True):
        x = features[readout.layer]
        if readout.first is not None:
            kernel.append(readout)
            if readout.linear:
                roots.append((x, seed))
            continue
        result = _evaluate_readout(block, x, nodes.head)
        roots.append((result, seed))
        value = _of_head(result.detach(), nodes.head)
        extra = value if extra is None else extra + value
    inter, of_nodes, gradients = node_energies(
        [features[readout.layer].detach() for readout in kernel],
        [readout.first for readout in kernel if readout.first is not None],
        [readout.second for readout in kernel],
        extra,
        nodes.head,
        nodes.scale,
        nodes.shift,
        nodes.base,
        want_gradient=want_gradient,
    )
    nonlinear = [features[readout.layer] for readout in kernel if not readout.linear]
    if want_gradient:
        roots += zip(nonlinear, gradients, strict=True)
    interaction, total = structure_energies(inter, nodes.order, nodes.row, nodes.graph_base)
    return Energies(interaction, total, of_nodes, tuple(roots) if want_gradient else ())


def contributions(
    model: Any,
    readouts: Sequence[Readout],
    nodes: NodeInputs,
    features: Sequence[Tensor],
    pair: Tensor | None,
    batch: Tensor,
) -> Tensor:
    """[G, parts] float64 as MACE (without scale and shift) lists them: constant, repulsion, each readout."""
    with torch.no_grad():
        of_nodes = [torch.zeros_like(nodes.scale) if pair is None else pair]
        for readout, block in zip(readouts, model.readouts, strict=True):
            of_nodes.append(_of_head(_evaluate_readout(block, features[readout.layer], nodes.head), nodes.head))
        columns = torch.stack([part.double() for part in of_nodes], dim=1)
        sums = segment_sum(columns, Segments(batch, nodes.order, nodes.row))
        return torch.cat([nodes.graph_base[:, None], sums], dim=1)


def _evaluate_readout(block: Any, x: Tensor, head: Tensor) -> Tensor:
    """[N, heads] as ``block(x, head)``, in a form that a CUDA graph can capture.

    MACE masks the hidden channels of other heads by assigning a number of the CPU, which a capture refuses.
    """
    kind = type(block)
    if kind not in (NonLinearReadoutBlock, NonLinearBiasReadoutBlock) or getattr(block, "num_heads", 1) == 1:
        result: Tensor = block(x, head)
        return result
    hidden = block.non_linearity(block.linear_1(x))
    owner = torch.arange(hidden.shape[1], device=x.device) // (hidden.shape[1] // block.num_heads)
    mine = owner == head[:, None]
    hidden = hidden * mine
    if kind is NonLinearBiasReadoutBlock:
        hidden = block.non_linearity(block.linear_mid(hidden)) * mine
    result = block.linear_2(hidden)
    return result


def _of_head(values: Tensor, head: Tensor) -> Tensor:
    return values.gather(1, head[:, None]).squeeze(1)
