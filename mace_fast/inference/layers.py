"""One MACE layer of a frozen model: every weight prepared once, the radial network a spline.

The interaction blocks of MACE differ in which of these steps they have; a layer is their common form:

    message = down(conv(up(x)))                      conv: spline weights, summed at receivers
    message = message / normalisation                mean, or a learned density of the edges
    message = last(gate(message + residual))         non-linear blocks
    message = by_species(message)                    blocks without a skip
    x       = product(message) + skip(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mace_fast.inference.edges import SortedEdges
from mace_fast.inference.tables import SplineTable
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, Path
from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.description.polynomial import WeightedPolynomial
from mace_fast.kernels.ops.linear import arrange_indexed_weight, indexed_linear, linear, linear_add
from mace_fast.kernels.ops.normalise import normalise_rows
from mace_fast.kernels.ops.spline_conv import FrozenGraph, RadialSpline, spline_conv
from mace_fast.kernels.ops.symmetric import fold_weights, weighted_polynomial
from mace_fast.patch.blocks.interaction import (
    FastRealAgnosticResidualNonLinearInteraction,
    NonLinearPlan,
)
from mace_fast.patch.blocks.product import FastEquivariantProductBasis, contraction_weights

Map = Callable[[Tensor], Tensor]

_DENSITY = ChannelwiseTensorProduct(((1, 0),), ((1, 0),), ((1, 0),), (Path(0, 0, 0, 1.0),))
"""The density of an atom is a convolution too: of ones, by the last column of the spline."""


@dataclass(frozen=True)
class EdgeInputs:
    """What the edges of one evaluation bring to one user: lengths [E] and spherical harmonics [E, y_dim], sorted.

    ``parts`` takes gradients with respect to both that do not go through autograd; see ``spline_conv``.
    """

    radius: Tensor
    harmonics: Tensor
    edges: SortedEdges
    parts: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """Coefficients of splines on the device of the model."""

    rows: Tensor
    intervals: int
    per_length: float

    @staticmethod
    def of(table: SplineTable, columns: slice, like: Tensor) -> Rows:
        """Some columns of a table in the dtype and on the device that the kernels want."""
        rows = table.rows[:, :, columns].to(like.dtype)
        return Rows(rows.contiguous().to(like.device), table.intervals, table.per_length)

    def spline(self, edges: SortedEdges) -> RadialSpline:
        """The splines for these edges."""
        return RadialSpline(edges.pair, self.rows, self.intervals, self.per_length)


@dataclass(frozen=True)
class FrozenLayer:
    """An interaction and a product with their weights prepared. ``first`` gathers features by species, not by atom."""

    conv: ChannelwiseTensorProduct
    weights: Rows
    density: Rows | None
    up: Map
    first: Tensor | None
    down: Map
    normalise: Callable[[Tensor, Tensor], Tensor] | None
    residual: Map | None
    finish: Map | None
    by_species: Callable[[Tensor, SortedEdges], Tensor] | None
    skip: Callable[[Tensor, SortedEdges], Tensor] | None
    product: Callable[[Tensor, Tensor | None, SortedEdges], Tensor]

    def __call__(self, x: Tensor, inputs: EdgeInputs, skip: Tensor | None = None) -> Tensor:
        """Node features [N, hidden] (mul_ir) of the next layer. ``skip``: :meth:`skipped`, if it is known already."""
        edges = inputs.edges
        if skip is None:
            skip = self.skipped(x, edges)
        if self.first is not None:
            # Nothing flows back into features that are functions of the species, so no sum over senders is needed.
            up, sender = self.first, edges.sender_species
            graph = FrozenGraph(sender, edges.receiver, None, edges.row, None, None)
        else:
            up = self.up(x)
            graph = FrozenGraph(edges.sender, edges.receiver, None, edges.row, edges.sender_order, edges.sender_row)
        spline = self.weights.spline(edges)
        message = spline_conv(self.conv, up, inputs.harmonics, inputs.radius, graph, spline, inputs.parts)
        message = self.down(message)
        if self.density is not None:
            assert self.normalise is not None
            message = self.normalise(message, self._density_of(self.density, inputs))
        if self.residual is not None:
            message = message + self.residual(self.up(x))
        if self.finish is not None:
            message = self.finish(message)
        if self.by_species is not None:
            message = self.by_species(message, edges)
        return self.product(message, skip, edges)

    def skipped(self, x: Tensor, edges: SortedEdges) -> Tensor | None:
        """What passes by the message and is added to the product; None in blocks without it."""
        return self.skip(x, edges) if self.skip is not None else None

    @staticmethod
    def _density_of(rows: Rows, inputs: EdgeInputs) -> Tensor:
        edges, radius = inputs.edges, inputs.radius
        one = radius.new_ones((1, 1))
        graph = FrozenGraph(torch.zeros_like(edges.sender), edges.receiver, None, edges.row, None, None)
        return spline_conv(_DENSITY, one, radius.new_ones((radius.shape[0], 1)), radius, graph, rows.spline(edges))


def freeze_layer(
    interaction: Any,
    product: FastEquivariantProductBasis,
    table: SplineTable,
    embedding: Tensor | None,
) -> FrozenLayer:
    """Prepare one layer.

    Args:
        interaction, product: the fast blocks (a ``FastInteraction`` that is not the attention block), on the device and
            in the dtype of the program.
        table: their radial functions, the density last where there is one.
        embedding: [Z, features] node features of each species, for a first layer that sees nothing else.
    """
    plan: Any = interaction._plan
    numel = plan.conv.weight_numel
    up_weight = interaction.linear_up.weight.detach()
    nonlinear = isinstance(interaction, FastRealAgnosticResidualNonLinearInteraction)
    has_density = interaction.has_density
    down_module: Any = interaction.linear_1 if nonlinear else interaction.linear
    down_weight = down_module.weight.detach()
    if not has_density:
        down_weight = down_weight / interaction.avg_num_neighbors
    normalise: Callable[[Tensor, Tensor], Tensor] | None = None
    residual = finish = None
    if nonlinear:
        normalise = partial(normalise_rows, slope=float(interaction.beta), offset=float(interaction.alpha))
        residual = _linear(interaction.linear_res.weight, plan.residual)
        finish = _gated(plan, interaction)
    elif has_density:
        normalise = normalise_rows
    skip = by_species = None
    if plan.species:
        indexed = _indexed(interaction.skip_tp.weight, plan.skip, plan.species)
        skip, by_species = (None, indexed) if interaction.indexes_message else (indexed, None)
    else:
        plain = _linear(interaction.skip_tp.weight, plan.skip)
        skip = lambda x, edges: plain(x)  # noqa: E731
    return FrozenLayer(
        conv=plan.conv,
        weights=Rows.of(table, slice(0, numel), up_weight),
        density=Rows.of(table, slice(numel, numel + 1), up_weight) if has_density else None,
        up=_linear(up_weight, plan.up),
        first=None if embedding is None else linear(embedding, up_weight, plan.up),
        down=_linear(down_weight, plan.down),
        normalise=normalise,
        residual=residual,
        finish=finish,
        by_species=by_species,
        skip=skip,
        product=_product(product, plan.channels, plan.components),
    )


def _linear(weight: Tensor, description: Linear) -> Map:
    frozen = weight.detach()
    return lambda x: linear(x, frozen, description)


def _indexed(weight: Tensor, description: Linear, species: int) -> Callable[[Tensor, SortedEdges], Tensor]:
    arranged = arrange_indexed_weight(weight.detach(), description, species).contiguous()
    return lambda x, edges: indexed_linear(x, arranged, edges.species, description, edges.groups)


def _gated(plan: NonLinearPlan, block: Any) -> Map:
    last = block.linear_2.weight.detach()
    gate = block.equivariant_nonlin
    return lambda message: linear(plan.gate(gate, message), last, plan.last)


def _product(
    block: FastEquivariantProductBasis, channels: int, components: int
) -> Callable[[Tensor, Tensor | None, SortedEdges], Tensor]:
    plan = block._plan
    weights = torch.cat([w.detach() for w in contraction_weights(block.symmetric_contractions)], dim=1)
    folded = fold_weights(plan.contraction, weights)
    polynomial: WeightedPolynomial = plan.contraction.polynomial
    last = block.linear.weight.detach()
    use_skip = block.use_sc

    def product(message: Tensor, skip: Tensor | None, edges: SortedEdges) -> Tensor:
        x = message.view(-1, components, channels)
        species = torch.zeros_like(edges.species) if plan.agnostic else edges.species
        out = weighted_polynomial(polynomial, x, folded, species).flatten(1)
        if use_skip and skip is not None:
            return linear_add(out, last, plan.last, skip)
        return linear(out, last, plan.last)

    return product
