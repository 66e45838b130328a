"""A plain e3nn tensor product, in any module built on e3nn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, Segment
from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct
from mace_fast.kernels.ops.channelwise import channelwise_tp
from mace_fast.kernels.ops.elementwise import elementwise_tp
from mace_fast.kernels.ops.fully_connected import fully_connected_tp
from mace_fast.patch.blocks.base import FastModule, random_tensor
from mace_fast.patch.blocks.tensor_product_plan import (
    Description,
    Part,
    TensorProductPlan,
    WeightSlice,
    read_tensor_product,
)
from mace_fast.patch.understand import require_own_forward

Weight = torch.Tensor | Sequence[torch.Tensor] | None


class FastTensorProduct(FastModule[TensorProductPlan]):
    """``e3nn.o3.TensorProduct`` with paths of modes 'uvu', 'uvv', 'uuu' and 'uvw': same arguments, same order.

    Weights are internal, shared, or one set per sample; paths without weights are allowed among the others.
    What is not the forward (``right``, ``weight_views`` ...) is the original's.
    """

    weight: torch.Tensor
    weight_numel: int
    shared_weights: bool
    internal_weights: bool
    instructions: list[Any]

    @classmethod
    def plan(cls, original: torch.nn.Module) -> TensorProductPlan:
        require_own_forward("tensor product", original)
        return read_tensor_product("tensor product", original)

    @classmethod
    def kernels_of(cls, plan: TensorProductPlan) -> str:
        return " + ".join(f"{_kernel(part.description)} ({len(part.description.paths)} paths)" for part in plan.parts)

    def example(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        plan = self._plan
        inputs = {
            "x": random_tensor(generator, 24, plan.x_dim),
            "y": random_tensor(generator, 24, plan.y_dim),
        }
        if plan.weight_numel > 0 and not self.internal_weights:
            shape = (plan.weight_numel,) if self.shared_weights else (24, plan.weight_numel)
            inputs["weight"] = random_tensor(generator, *shape)
        return inputs

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: Weight = None) -> torch.Tensor:
        """x [..., irreps_in1.dim] times y [..., irreps_in2.dim], giving [..., irreps_out.dim].

        Args:
            x, y: leading dimensions broadcast against each other, and against those of weights that are not
                shared.
            weight: flat weights, [weight_numel] if shared or else [..., weight_numel], or a list with one
                tensor a path; None for the internal ones.

        Raises:
            ValueError: weights are missing, or a shape is wrong.
            TypeError: dtypes differ.
        """
        plan = self._plan
        weights = self._flat_weights(weight, x)
        leading = [x.shape[:-1], y.shape[:-1]] + ([] if self.shared_weights else [weights.shape[:-1]])
        batch = torch.broadcast_shapes(*leading)
        if not self.shared_weights:
            weights = _rows(weights, batch, plan.weight_numel, "weight")
        x, y = _rows(x, batch, plan.x_dim, "x"), _rows(y, batch, plan.y_dim, "y")
        results = [_run(part, plan, x, y, weights) for part in plan.parts]
        return _assembled(plan, results).reshape(*batch, plan.z_dim)

    def _flat_weights(self, weight: Weight, x: torch.Tensor) -> torch.Tensor:
        if weight is None:
            if self.weight_numel == 0:
                return x.new_empty(0)
            if not self.internal_weights:
                raise ValueError("weight is missing: this tensor product has no internal weights")
            return self.weight
        if not isinstance(weight, torch.Tensor):
            sizes = [math.prod(ins.path_shape) for ins in self.instructions if ins.has_weight]
            lead = () if self.shared_weights else (-1,)
            weight = torch.cat([part.reshape(*lead, size) for part, size in zip(weight, sizes, strict=True)], dim=-1)
        if self.shared_weights and weight.shape != (self.weight_numel,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; shared weights are [{self.weight_numel}]")
        if not self.shared_weights and weight.dim() < 2:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; it must be [..., {self.weight_numel}], one set a sample"
            )
        return weight

    def right(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """e3nn's partial evaluation, by e3nn."""
        original: Any = self._original[0]
        result: torch.Tensor = original.right(*args, **kwargs)
        return result

    def weight_views(self, *args: Any, **kwargs: Any) -> Any:
        """e3nn's views of the weights of each path."""
        original: Any = self._original[0]
        return original.weight_views(*args, **kwargs)

    def weight_view_for_instruction(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """e3nn's view of the weights of one path."""
        original: Any = self._original[0]
        view: torch.Tensor = original.weight_view_for_instruction(*args, **kwargs)
        return view


def _rows(tensor: torch.Tensor, batch: Sequence[int], width: int, name: str) -> torch.Tensor:
    """[..., width] as [rows, width], leading dimensions broadcast."""
    if tensor.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its last dimension must be {width}")
    return tensor.expand(*batch, width).reshape(math.prod(batch), width)


def _kernel(description: Description) -> str:
    if isinstance(description, ChannelwiseTensorProduct):
        return "channelwise_tp"
    return "fully_connected_tp" if isinstance(description, FullyConnectedTensorProduct) else "elementwise_tp"


def _run(part: Part, plan: TensorProductPlan, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The result of a part, its own blocks alone, ``ir_mul``."""
    first, second = to_ir_mul(x, plan.x, part.x), to_ir_mul(y, plan.y, part.y)
    if part.exchanged:
        first, second = second, first
    own = _weights_of(part.weights, weights) if part.weights else x.new_empty(0)
    description = part.description
    if isinstance(description, ChannelwiseTensorProduct):
        return channelwise_tp(description, first, second, own)
    if isinstance(description, FullyConnectedTensorProduct):
        return fully_connected_tp(description, first, second, own)
    return elementwise_tp(description, first, second, own)


def _weights_of(slices: Sequence[WeightSlice], weights: torch.Tensor) -> torch.Tensor:
    """Weights of a part, [..., numel], from those of all."""
    pieces = []
    for piece in slices:
        numbers = weights.narrow(-1, piece.first, piece.size)
        if not piece.in_order:
            numbers = numbers.unflatten(-1, (piece.rows, piece.columns)).transpose(-2, -1).flatten(-2)
        pieces.append(numbers)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _assembled(plan: TensorProductPlan, results: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the parts' results, ``mul_ir``; blocks that no path gives are zero."""
    if len(results) == 1 and len(plan.parts[0].z) == len(plan.z):
        return to_mul_ir(results[0], plan.z)
    sums: list[torch.Tensor | None] = [None] * len(plan.z)
    for part, result in zip(plan.parts, results, strict=True):
        blocks = [plan.z[index] for index in part.z]
        pieces = result.split([mul * (2 * degree + 1) for mul, degree in blocks], dim=1)
        for index, piece in zip(part.z, pieces, strict=True):
            known = sums[index]
            sums[index] = piece if known is None else known + piece
    rows = results[0].shape[0]
    shapes = [(2 * degree + 1, mul) for mul, degree in plan.z]
    return torch.cat(
        [
            results[0].new_zeros(rows, a * b) if total is None else _swapped(total, (a, b))
            for total, (a, b) in zip(sums, shapes, strict=True)
        ],
        dim=1,
    )


def to_ir_mul(rows: torch.Tensor, blocks: Sequence[Segment], chosen: Sequence[int] | None = None) -> torch.Tensor:
    """Rows [B, dim] from e3nn's order, block [multiplicity, 2l+1], to [2l+1, multiplicity]; all blocks, or those chosen
    by number, in ascending order."""
    return _transposed(rows, [(mul, 2 * degree + 1) for mul, degree in blocks], chosen)


def to_mul_ir(rows: torch.Tensor, blocks: Sequence[Segment]) -> torch.Tensor:
    """The inverse of :func:`to_ir_mul` of all blocks."""
    return _transposed(rows, [(2 * degree + 1, mul) for mul, degree in blocks])


def _transposed(
    rows: torch.Tensor, shapes: Sequence[tuple[int, int]], chosen: Sequence[int] | None = None
) -> torch.Tensor:
    every = chosen is None or len(chosen) == len(shapes)
    if every and all(1 in shape for shape in shapes):
        return rows
    parts = rows.split([a * b for a, b in shapes], dim=1)
    moved = [_swapped(parts[i], shapes[i]) for i in (range(len(shapes)) if chosen is None else chosen)]
    return moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)


def _swapped(rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return rows if 1 in shape else rows.unflatten(1, shape).transpose(1, 2).flatten(1)
