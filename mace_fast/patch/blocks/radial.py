"""The radial networks, from edge features to the weights of the tensor product: 75 % of a MACE model's
arithmetic.

They stay matrix products of torch over the original parameters. Two things are saved: constants of e3nn's
normalisation go into the small weight matrices and not over the edges, and a first layer that acts on [edge,
sender, receiver] features acts on the nodes before it is gathered to the edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mace_fast.kernels.ops.segment import Segments, segment_gather
from mace_fast.patch.understand import require_class, submodule

FULLY_CONNECTED_NET = "e3nn.nn._fc.FullyConnectedNet"
RADIAL_MLP = "mace.modules.radial.RadialMLP"

_LAYER = "e3nn.nn._fc._Layer"
_NORMALIZED = "e3nn.math._normalize_activation.normalize2mom"


@dataclass(frozen=True)
class Layer:
    """One layer of e3nn's network: ``activation(x @ (factor * weight)) * scale``; the scale goes into the
    next factor.
    """

    factor: float
    activation: Callable[[torch.Tensor], torch.Tensor] | None
    scale: float


@dataclass(frozen=True)
class FullyConnectedNet:
    """e3nn's bias-free network with weights scaled by 1/sqrt(h_in) and an activation of unit second moment.

    Attributes:
        layers: in order; the activation of the last is usually None.
    """

    layers: tuple[Layer, ...]

    def __call__(self, network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The network's output for x [E, h_in], reading the live weights of ``network``."""
        scale = 1.0
        for layer, module in zip(self.layers, network._modules.values(), strict=True):
            assert module is not None
            weight: Any = module.weight
            x = x @ (weight * (layer.factor * scale))
            if layer.activation is not None:
                x = layer.activation(x)
            scale = layer.scale
        return x if scale == 1.0 else x * scale


def read_fully_connected(parent: torch.nn.Module, name: str) -> FullyConnectedNet:
    """The e3nn ``FullyConnectedNet`` at ``parent.name``.

    Raises:
        UnsupportedModuleError: it is something else.
    """
    network = submodule(parent, name)
    require_class(name, network, FULLY_CONNECTED_NET)
    return FullyConnectedNet(tuple(_read_layer(f"{name}.{key}", layer) for key, layer in network._modules.items()))


def _read_layer(name: str, layer: Any) -> Layer:
    require_class(name, layer, _LAYER)
    if layer.act is None:
        return Layer((layer.h_in * layer.var_in / layer.var_out) ** -0.5, None, 1.0)
    require_class(f"{name}.act", layer.act, _NORMALIZED)
    moment = 1.0 if layer.act._is_id else layer.act.cst
    return Layer((layer.h_in * layer.var_in) ** -0.5, layer.act.f, moment * layer.var_out**0.5)


def require_radial_mlp(parent: torch.nn.Module, name: str) -> None:
    """``parent.name`` is MACE's ``RadialMLP``: linear, layer norm, SiLU, and so on, ending in a linear.

    Raises:
        UnsupportedModuleError: it is something else.
    """
    network = submodule(parent, name)
    require_class(name, network, RADIAL_MLP)
    sequence = submodule(network, "net")
    require_class(f"{name}.net", sequence, "torch.nn.modules.container.Sequential")
    first = sequence._modules.get("0")
    require_class(f"{name}.net.0", first, "torch.nn.modules.linear.Linear")


def radial_mlps(
    networks: tuple[torch.nn.Module, ...],
    edge_feats: torch.Tensor,
    sender_feats: torch.Tensor,
    receiver_feats: torch.Tensor,
    senders: Segments,
    receivers: Segments,
) -> list[torch.Tensor]:
    """Several ``RadialMLP``, each on [edge_feats, sender_feats[sender], receiver_feats[receiver]].

    This concatenation, 10 + 2 * 512 wide in public models, is never made: the first layers are linear, so
    their node parts are computed for nodes and gathered as 64 numbers per network.

    Args:
        networks: MACE ``RadialMLP`` of the same input width.
        edge_feats: [E, n].
        sender_feats, receiver_feats: [N, s], [N, r].

    Returns:
        One [E, out] for each network.
    """
    firsts = [_first(network) for network in networks]
    widths = [edge_feats.shape[1], sender_feats.shape[1], receiver_feats.shape[1]]
    weight = torch.cat([first.weight for first in firsts])
    bias = torch.cat([first.bias for first in firsts])
    from_edge, from_sender, from_receiver = weight.split(widths, dim=1)
    hidden = torch.addmm(bias, edge_feats, from_edge.t())
    hidden = hidden + segment_gather(sender_feats @ from_sender.t(), senders)
    hidden = hidden + segment_gather(receiver_feats @ from_receiver.t(), receivers)
    parts = hidden.split([first.out_features for first in firsts], dim=1)
    return [_after_first(network, part) for network, part in zip(networks, parts, strict=True)]


def _first(network: torch.nn.Module) -> torch.nn.Linear:
    first = network.get_submodule("net.0")
    assert isinstance(first, torch.nn.Linear)
    return first


def _after_first(network: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    sequence = network.get_submodule("net")
    for position, layer in enumerate(sequence.children()):
        if position:
            hidden = layer(hidden)
    return hidden
