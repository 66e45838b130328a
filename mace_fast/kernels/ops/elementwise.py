"""The elementwise tensor product, evaluated as a polynomial of each channel.

The second operand differs here from channel to channel, as x does in the symmetric contraction, whose kernels serve:
straight-line code, a thread a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mace_fast.kernels.description.elementwise import ElementwiseTensorProduct
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.ops.symmetric import weighted_polynomial


def elementwise_tp(description: ElementwiseTensorProduct, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Copy by copy x times y, coupled and weighted.

    Args:
        description: what couples to what.
        x: [B, x_dim], ``ir_mul``, float32 or float64.
        y: [B, y_dim], ``ir_mul``.
        w: [B, weight_numel], or [weight_numel] for all rows.

    Returns:
        [B, z_dim], ``ir_mul``. Differentiable twice; the same inputs give the same bits.

    Raises:
        TypeError: operands differ in dtype, or are neither float32 nor float64.
        ValueError: a shape or device does not match.
    """
    rows = x.shape[0] if x.dim() else 0
    numel = description.weight_numel
    require_values("elementwise_tp", "x", x, 2)
    require_like("elementwise_tp", "y", y, x, "x")
    require_like("elementwise_tp", "w", w, x, "x")
    require_shape("elementwise_tp", "x", x, (rows, description.x_dim))
    require_shape("elementwise_tp", "y", y, (rows, description.y_dim))
    require_shape("elementwise_tp", "w", w, (numel,) if w.dim() == 1 else (rows, numel))
    operands = [x, y, w.expand(rows, numel)]
    components = torch.cat(operands, 1).unflatten(1, (-1, description.mul))
    one = x.new_ones(1, 1, description.mul)
    species = torch.zeros(rows, dtype=torch.int32, device=x.device)
    return weighted_polynomial(description.polynomial, components, one, species).flatten(1)
