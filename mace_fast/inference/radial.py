"""Which functions of the distance a MACE layer uses, read from the live modules and evaluated in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mace_fast.inference.tables import RadialFunction
from mace_fast.patch.blocks.interaction import (
    FastInteraction,
    FastRealAgnosticAttResidualInteraction,
    FastRealAgnosticResidualNonLinearInteraction,
)


def depends_on_species(model: Any) -> bool:
    """Whether the radial functions differ between pairs of species."""
    transformed = "distance_transform" in model.radial_embedding._modules
    return transformed or any(isinstance(b, FastRealAgnosticResidualNonLinearInteraction) for b in model.interactions)


_PROBES = 65
"""Distances at which functions are compared: those of one network with equal inputs are equal to the last bit."""


def shared_functions(functions: Sequence[Sequence[RadialFunction]], cutoff: float) -> tuple[list[int], list[int]]:
    """Which pairs of species have the same radial functions in all layers, as (a, b) and (b, a) have where distances
    are transformed by what the two have in common.

    Args:
        functions: of each pair, one for each layer.
        cutoff: A.

    Returns:
        The pairs that are the first with their functions, and for each pair the place of its own among those.
    """
    distances = torch.linspace(0.3, cutoff, _PROBES + 1, dtype=torch.float64)[:-1]
    firsts: list[int] = []
    known: dict[bytes, int] = {}
    places = []
    for pair, of_layers in enumerate(functions):
        values = hashlib.sha256()
        with torch.no_grad():
            for function in of_layers:
                values.update(function(distances).contiguous().numpy().tobytes())
        place = known.setdefault(values.digest(), len(firsts))
        if place == len(firsts):
            firsts.append(pair)
        places.append(place)
    return firsts, places


def radial_weights(model: Any, layer: int, sender: int, receiver: int) -> RadialFunction:
    """Weights of the tensor product of a layer for a pair of species; the last column is the density, if it has one.

    Args:
        model: a converted model in float64 on the CPU.
        layer: which interaction.
        sender, receiver: positions of the species in the model's ``atomic_numbers``.
    """
    block: FastInteraction = model.interactions[layer]
    assert not isinstance(block, FastRealAgnosticAttResidualInteraction)
    attrs = torch.eye(len(model.atomic_numbers), dtype=torch.float64)[[sender, receiver]]

    def function(r: Tensor) -> Tensor:
        edge_index = torch.tensor([[0], [1]]).expand(2, r.shape[0])
        feats, cutoff = model.radial_embedding(r[:, None], attrs, edge_index, model.atomic_numbers)
        plan: Any = block._plan
        if isinstance(block, FastRealAgnosticResidualNonLinearInteraction):
            ends = [
                _linear_row(module, attrs[end])
                for end, module in enumerate((block.source_embedding, block.target_embedding))
            ]
            inputs = torch.cat([feats, *(end.expand(r.shape[0], -1) for end in ends)], dim=1)
            weights = _network(block.conv_tp_weights, inputs)
            density: Tensor | None = torch.tanh(_network(block.density_fn, inputs) ** 2)
        else:
            weights = plan.radial(block.conv_tp_weights, feats)
            density = torch.tanh(plan.density(block.density_fn, feats) ** 2) if plan.density is not None else None
        columns = weights if density is None else torch.cat([weights, density], dim=1)
        return columns if cutoff is None else columns * cutoff

    return function


def _network(network: Any, x: Tensor) -> Tensor:
    """MACE's ``RadialMLP``, layer norm spelled out: the third derivative of torch's fused one is wrong (torch 2.13)."""
    for layer in network.net:
        if isinstance(layer, torch.nn.LayerNorm):
            centred = x - x.mean(-1, keepdim=True)
            x = centred / ((centred**2).mean(-1, keepdim=True) + layer.eps).sqrt()
            x = x if layer.weight is None else x * layer.weight
            x = x if layer.bias is None else x + layer.bias
        else:
            x = layer(x)
    return x


def _linear_row(module: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(row[None])
    return out
