"""What is static about an interaction block, read from the live module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mace_fast.errors import UnsupportedModuleError
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.description.linear import Linear
from mace_fast.patch.blocks.gate import Gate
from mace_fast.patch.blocks.radial import FullyConnectedNet
from mace_fast.patch.understand import (
    read_channelwise,
    read_linear,
    require_class,
    require_own_forward,
    require_unhooked,
    submodule,
)

_RESHAPE = "mace.modules.irreps_tools.reshape_irreps"


@dataclass(frozen=True)
class InteractionPlan:
    """What the interaction blocks have in common.

    Attributes:
        channels, components: the message is [N, components, channels].
        up: node features (mul_ir) to edge features.
        conv: the tensor product.
        down: the summed message to the block's output; up to the gate in the non-linear block.
        skip: the skip connection, or the species-indexed map of the message.
        species: how many species ``skip`` is indexed by; 0 where it is a plain linear.
        radial, density: the bias-free networks, None where the block has others.
    """

    channels: int
    components: int
    up: Linear
    conv: ChannelwiseTensorProduct
    down: Linear
    skip: Linear
    species: int
    radial: FullyConnectedNet | None
    density: FullyConnectedNet | None


@dataclass(frozen=True)
class AttentionPlan(InteractionPlan):
    """Also the scalars of each node that the radial network sees."""

    scalars: Linear


@dataclass(frozen=True)
class NonLinearPlan(InteractionPlan):
    """Also the gate, what surrounds it, and the two embeddings of the species."""

    source: Linear
    target: Linear
    residual: Linear
    gate: Gate
    last: Linear


def read_common(original: Any, last: str, layout: Any, message: str = "linear") -> dict[str, Any]:
    """The parts of a plan that every interaction block has; ``message`` follows the sum, ``last`` gives the
    output.
    """
    require_own_forward("block", original)
    _require_no_accelerator(original)
    conv_module: Any = submodule(original, "conv_tp")
    conv = read_channelwise("conv_tp", conv_module)
    require_unhooked("conv_tp", conv_module)
    if conv_module.internal_weights or conv_module.shared_weights:
        raise UnsupportedModuleError("its conv_tp has weights of its own, not one set per edge")
    reshape: Any = submodule(original, "reshape")
    require_class("reshape", reshape, _RESHAPE)
    out = submodule(original, last)
    blocks = read_linear(original, last).z
    multiplicities = {mul for mul, _ in blocks}
    if len(multiplicities) != 1:
        raise UnsupportedModuleError(f"its output {out.irreps_out} has irreps of different multiplicities")
    if [(mul, ir.l) for mul, ir in reshape.irreps] != list(blocks):
        raise UnsupportedModuleError(f"its reshape is made for {reshape.irreps}, but its {last} gives {out.irreps_out}")
    up = read_linear(original, "linear_up", x_layout="mul_ir", z_layout=layout)
    return {
        "channels": multiplicities.pop(),
        "components": sum(2 * degree + 1 for _, degree in blocks),
        "up": up.split_z(conv.x),
        "conv": conv,
        "down": read_linear(original, message, x_layout=layout, z_layout=layout).split_x(conv.z),
    }


def _require_no_accelerator(original: torch.nn.Module) -> None:
    """The block computes with e3nn.

    Raises:
        UnsupportedModuleError: it was converted to another accelerator, whose layouts and calls differ.
    """
    for attribute, package, remedy in (
        ("cueq_config", "cuEquivariance", "mace.cli.convert_cueq_e3nn.run"),
        ("oeq_config", "OpenEquivariance", "mace.cli.convert_oeq_e3nn.run"),
    ):
        config = original.__dict__.get(attribute)  # absent in models pickled by mace-torch <= 0.3.8 and <= 0.3.13
        if config is not None and config.enabled:
            raise UnsupportedModuleError(f"it was converted to {package}: convert it back first, with {remedy}")
    if original.__dict__.get("conv_fusion"):
        raise UnsupportedModuleError("its conv_tp sums over edges itself (conv_fusion), as other accelerators make it")
