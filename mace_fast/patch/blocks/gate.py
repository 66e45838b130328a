"""MACE's gate: scalars through an activation, and each irrep of l > 0 times the activation of its own
scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mace_fast.errors import UnsupportedModuleError
from mace_fast.kernels.description.linear import Block, Layout
from mace_fast.patch.understand import class_name, require_class, require_unhooked, submodule

GATED_BLOCK = "mace.modules.gate.GatedEquivariantBlock"
E3NN_GATE = "e3nn.nn._gate.Gate"  # in models pickled by mace-torch 0.3.14

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Gate:
    """The gate on rows whose blocks are, in this order, scalars, gates, and the gated irreps.

    Attributes:
        layout: storage order in which it works. In "mul_ir" the original module is called; the fields below
            are for "ir_mul".
        scalars, gates: how many numbers of each.
        gated: (multiplicity, l) of the gated blocks; gates come in the same order.
        scalar, gate: activations, None for the identity, and the constants that normalise their second
            moment.
    """

    layout: Layout
    scalars: int = 0
    gates: int = 0
    gated: tuple[Block, ...] = ()
    scalar: Activation | None = None
    scalar_constant: float = 1.0
    gate: Activation | None = None
    gate_constant: float = 1.0

    def __call__(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The gate of x [N, scalars + gates + gated]; ``module`` is the original."""
        if self.layout == "mul_ir":
            gated: torch.Tensor = module(x)
            return gated
        sizes = [mul * (2 * degree + 1) for mul, degree in self.gated]
        scalars, gates, *blocks = x.split([self.scalars, self.gates, *sizes], dim=1)
        out = [_activate(scalars, self.scalar, self.scalar_constant)]
        if blocks:
            gates = _activate(gates, self.gate, self.gate_constant)
            for block, gate, (mul, degree) in zip(
                blocks, gates.split([m for m, _ in self.gated], dim=1), self.gated, strict=True
            ):
                out.append((block.unflatten(1, (2 * degree + 1, mul)) * gate.unsqueeze(1)).flatten(1))
        return torch.cat(out, dim=1)


def _activate(x: torch.Tensor, activation: Activation | None, constant: float) -> torch.Tensor:
    return x if activation is None else activation(x) * constant


def read_gate(parent: torch.nn.Module, name: str, blocks: tuple[Block, ...]) -> Gate:
    """The gate at ``parent.name``, whose input has these blocks.

    Raises:
        UnsupportedModuleError: it is neither MACE's nor e3nn's gate.
    """
    module: Any = submodule(parent, name)
    if class_name(module) == E3NN_GATE:
        require_unhooked(name, module)
        return Gate("mul_ir")
    require_class(name, module, GATED_BLOCK)
    if module._layout_is_ir_mul:
        raise UnsupportedModuleError(f"its {name} works in ir_mul order, as in a model converted to cuEquivariance")
    gated = tuple((mul, (dim - 1) // 2) for _, _, dim, mul, _ in module._gated_info)
    gate = Gate(
        layout="ir_mul",
        scalars=module._s_len,
        gates=module._g_len,
        gated=gated,
        scalar=module._act_scalar,
        scalar_constant=module._scalar_cst,
        gate=module._act_gate,
        gate_constant=module._gate_cst,
    )
    # The module states where each part begins. Rows in another order are left to it, in its own layout.
    gated_start, gates_start = module._s_len + module._g_len, 0
    expected = []
    for mul, degree in gated:
        expected.append((gated_start, gates_start))
        gated_start += mul * (2 * degree + 1)
        gates_start += mul
    in_order = [(start, gate) for start, _, _, _, gate in module._gated_info] == expected
    begins = module._s_start == 0 and (not gated or module._g_start == module._s_len)
    same_blocks = tuple(block for block in blocks if block[1] > 0) == gated
    whole_row = gated_start == sum(mul * (2 * degree + 1) for mul, degree in blocks)
    if in_order and begins and same_blocks and whole_row:
        return gate
    return Gate("mul_ir")
