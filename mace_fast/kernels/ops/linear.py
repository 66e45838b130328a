"""Equivariant linear maps: one for all nodes (`linear`) and one per species (`indexed_linear`).

Both are bilinear in (x, weight), and so is every derivative of them: with respect to x it is the transposed
description over the same weight, with respect to the weight it is `linear_weight_grad`. Three ops close under
differentiation to any order.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from mace_fast.kernels.description.linear import Linear, parse_linear
from mace_fast.kernels.ops import linear_cuda
from mace_fast.kernels.ops.blas import apply_linear, apply_weight_grad
from mace_fast.kernels.ops.checks import require_like, require_lists, require_shape, require_values
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.ops.segment import Segments, segments
from mace_fast.kernels.source.linear import aligned_multiplicities, weight_along_x

_BLAS_NODES = 1000

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, str key) -> Tensor")
_LIBRARY.define("linear_add(Tensor x, Tensor weight, Tensor addend, str key) -> Tensor")
_LIBRARY.define(
    "indexed_linear_add(Tensor x, Tensor weight, Tensor order, Tensor row_ptr, Tensor addend, str key) -> Tensor"
)
_LIBRARY.define("linear_weight_grad(Tensor x, Tensor grad, str key) -> Tensor")
_LIBRARY.define("indexed_linear(Tensor x, Tensor weight, Tensor order, Tensor row_ptr, str key) -> Tensor")
_LIBRARY.define("indexed_linear_weight_grad(Tensor x, Tensor grad, Tensor order, Tensor row_ptr, str key) -> Tensor")


def linear(
    x: torch.Tensor, weight: torch.Tensor, description: Linear, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """e3nn's `o3.Linear`, with the storage order of either side as the description says.

    Args:
        x: float32 or float64 [..., x_dim].
        weight: flat [weight_numel], e3nn's order.
        description: what to compute; `describe_linear` reads it from a module.
        bias: flat [bias_numel]; required if and only if the description has biases.

    Returns:
        [..., z_dim]. Differentiable to any order in x, weight and bias. On CUDA, float32 is never
        rounded to TF32, except where torch's matmul does the work and its setting holds: the gradient of
        the weight, and maps with multiplicities that are no multiple of four.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
    """
    if x.dim() == 0:
        raise ValueError("linear: x has no axes; its last one must be the irreps")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x
    z: torch.Tensor = torch.ops.mace_fast.linear(flat, weight, bias, description.key)
    return z.reshape(*x.shape[:-1], description.z_dim) if x.dim() != 2 else z


def indexed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    description: Linear,
    groups: Segments | None = None,
) -> torch.Tensor:
    """A linear map per node, chosen by the node's species: what e3nn's FullyConnectedTensorProduct does with
    one-hot attributes.

    Args:
        x: float32 or float64 [N, x_dim].
        weight: [Z, weight_numel], the flat linear weight of each species; `arrange_indexed_weight` makes it
            from e3nn's.
        index: int32 or int64 [N], the species of each node.
        description: the linear map of one species; `describe_indexed_linear` reads it from a module.
        groups: `segments(index, Z)` if the caller has it already (it is the same for every layer of a model).

    Returns:
        [N, z_dim], differentiable to any order in x and weight; the sum into the weight gradient has a fixed
        order.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, or, on the CPU, a species outside
            [0, Z). On CUDA, where the host does not look, such a node's output is NaN.
    """
    if weight.dim() != 2:
        raise ValueError(f"indexed_linear: weight has shape {tuple(weight.shape)}; it must be [species, weight_numel]")
    if groups is None:
        groups = segments(index, weight.shape[0])
    if groups.num_segments != weight.shape[0]:
        raise ValueError(f"indexed_linear: groups has {groups.num_segments} species, but weight has {weight.shape[0]}")
    order = groups.order
    if order is None:
        order = torch.arange(index.shape[0], dtype=groups.row_ptr.dtype, device=index.device)
    z: torch.Tensor = torch.ops.mace_fast.indexed_linear(x, weight, order, groups.row_ptr, description.key)
    return z


def linear_add(x: torch.Tensor, weight: torch.Tensor, description: Linear, addend: torch.Tensor) -> torch.Tensor:
    """`linear` of x [N, x_dim] without bias, plus `addend` [N, z_dim], added as the result is written.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, naming the argument.
    """
    z: torch.Tensor = torch.ops.mace_fast.linear_add(x, weight, addend, description.key)
    return z


def arrange_indexed_weight(weight: torch.Tensor, description: Linear, num_species: int) -> torch.Tensor:
    """e3nn's flat tensor product weight ([u, species, w] per path) as [Z, weight_numel]; differentiable.

    Raises:
        ValueError: the weight does not have Z * weight_numel elements.
    """
    if weight.shape != (num_species * description.weight_numel,):
        raise ValueError(
            f"arrange_indexed_weight: weight has shape {tuple(weight.shape)}; "
            f"it must be ({num_species * description.weight_numel},)"
        )
    pieces, here = [], 0
    for path in description.paths:
        mul_x, mul_z = description.x[path.x][0], description.z[path.z][0]
        size = mul_x * num_species * mul_z
        piece = weight[here : here + size].view(mul_x, num_species, mul_z)
        pieces.append(piece.transpose(0, 1).reshape(num_species, mul_x * mul_z))
        here += size
    return torch.cat(pieces, dim=1) if pieces else weight.new_zeros(num_species, 0)


def _check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, d: Linear) -> None:
    require_values("linear", "x", x, 2)
    require_shape("linear", "x", x, (x.shape[0], d.x_dim))
    require_like("linear", "weight", weight, x, "x")
    require_shape("linear", "weight", weight, (d.weight_numel,))
    if bias is None:
        if d.biases:
            raise ValueError(f"linear: bias is missing; the description has {d.bias_numel} biases")
        return
    require_like("linear", "bias", bias, x, "x")
    require_shape("linear", "bias", bias, (d.bias_numel,))


def _check_pair(op: str, x: torch.Tensor, grad: torch.Tensor, d: Linear) -> None:
    require_values(op, "x", x, 2)
    require_shape(op, "x", x, (x.shape[0], d.x_dim))
    require_like(op, "grad", grad, x, "x")
    require_shape(op, "grad", grad, (x.shape[0], d.z_dim))


def _check_indexed(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, d: Linear
) -> None:
    require_values("indexed_linear", "x", x, 2)
    require_shape("indexed_linear", "x", x, (x.shape[0], d.x_dim))
    require_like("indexed_linear", "weight", weight, x, "x")
    require_shape("indexed_linear", "weight", weight, (row_ptr.shape[0] - 1, d.weight_numel))
    require_lists("indexed_linear", x, order, row_ptr)


def _check_addend(op: str, addend: torch.Tensor, x: torch.Tensor, d: Linear) -> None:
    require_like(op, "addend", addend, x, "x")
    require_shape(op, "addend", addend, (x.shape[0], d.z_dim))


# --- linear
# -----------------------------------------------------------------------------------------------------------


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_linear(x, weight, bias, d)
    z = x.new_empty(x.shape[0], d.z_dim)
    apply_linear(x, weight, bias, d, z)
    return z


def _linear_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_linear(x, weight, bias, d)
    if _prefers_blas(x, d):
        return _linear(x, weight, bias, key)
    return linear_cuda.forward(x, weight, bias, None, None, d)


def _prefers_blas(x: torch.Tensor, d: Linear) -> bool:
    """Whether cuBLAS, with a launch per path, serves better than one launch of our own kernel.

    In float64 for many nodes, which it multiplies on tensor cores (in float32 those would round to TF32);
    and for odd multiplicities, such as a readout's single scalar, which would have another variant of our
    kernel compiled.
    """
    if x.dtype == torch.float64 and x.shape[0] >= _BLAS_NODES:
        return True
    return not aligned_multiplicities(d, str(x.dtype).removeprefix("torch."))


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_linear(x, weight, bias, d)
    return x.new_empty(x.shape[0], d.z_dim)


def _linear_add(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor, key: str) -> torch.Tensor:
    _check_addend("linear_add", addend, x, parse_linear(key))
    return _linear(x, weight, None, key).add_(addend)


def _linear_add_cuda(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_linear(x, weight, None, d)
    _check_addend("linear_add", addend, x, d)
    if _prefers_blas(x, d):
        return _linear_add(x, weight, addend, key)
    return linear_cuda.forward(x, weight, None, None, None, d, addend)


def _linear_add_fake(x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor, key: str) -> torch.Tensor:
    _check_addend("linear_add", addend, x, parse_linear(key))
    return _linear_fake(x, weight, None, key)


def _linear_add_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    d = parse_linear(ctx.key)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mace_fast.linear(grad, weight, None, d.transposed.key)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.mace_fast.linear_weight_grad(x, grad, d.key)
    return grad_x, grad_weight, grad, None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, ctx.key = inputs
    ctx.save_for_backward(x, weight)


def _linear_backward(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
    x, weight = ctx.saved_tensors
    d = parse_linear(ctx.key)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mace_fast.linear(grad, weight, None, d.transposed.key)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.mace_fast.linear_weight_grad(x, grad, d.without_bias.key)
    if ctx.needs_input_grad[2]:
        grad_bias = _bias_grad(grad, d)
    return grad_x, grad_weight, grad_bias, None


def _bias_grad(grad: torch.Tensor, d: Linear) -> torch.Tensor:
    """Column sums; biases lie one after the other in `d.biases` order."""
    return torch.cat([
        grad[:, d.z_starts[b.z] : d.z_starts[b.z] + d.z[b.z][0]].sum(dim=0) * b.coefficient for b in d.biases
    ])  # fmt: skip


def _linear_weight_grad(x: torch.Tensor, grad: torch.Tensor, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_pair("linear_weight_grad", x, grad, d)
    out = x.new_empty(d.weight_numel)
    apply_weight_grad(x, grad, d, out)
    return out


def _linear_weight_grad_fake(x: torch.Tensor, grad: torch.Tensor, key: str) -> torch.Tensor:
    d = parse_linear(key)
    _check_pair("linear_weight_grad", x, grad, d)
    return x.new_empty(d.weight_numel)


def _linear_weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, grad, ctx.key = inputs
    ctx.save_for_backward(x, grad)


def _linear_weight_grad_backward(
    ctx: Any, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, grad = ctx.saved_tensors
    d = parse_linear(ctx.key)
    grad_x = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mace_fast.linear(grad, weight, None, d.transposed.key)
    if ctx.needs_input_grad[1]:
        grad_grad = torch.ops.mace_fast.linear(x, weight, None, d.key)
    return grad_x, grad_grad, None


# --- indexed linear
# ---------------------------------------------------------------------------------------------------


def _indexed_cpu(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_indexed(x, weight, order, row_ptr, d)
    z = x.new_empty(x.shape[0], d.z_dim)
    present = _present("indexed_linear", row_ptr, x.shape[0])
    if len(present) == 1:
        apply_linear(x, weight[present[0][0]], None, d, z)
    elif present:
        x = x.index_select(0, order)
        grouped = torch.empty_like(z)
        for species, first, last in present:
            apply_linear(x[first:last], weight[species], None, d, grouped[first:last])
        z.index_copy_(0, order.long(), grouped)
    return z


def _indexed_cuda(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_indexed(x, weight, order, row_ptr, d)
    return linear_cuda.forward(x, weight, None, order, row_ptr, d)


def _indexed_fake(
    x: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_indexed(x, weight, order, row_ptr, d)
    return x.new_empty(x.shape[0], d.z_dim)


def _indexed_add_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    row_ptr: torch.Tensor,
    addend: torch.Tensor,
    key: str,
) -> torch.Tensor:
    _check_addend("indexed_linear_add", addend, x, parse_linear(key))
    return _indexed_cpu(x, weight, order, row_ptr, key).add_(addend)


def _indexed_add_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    row_ptr: torch.Tensor,
    addend: torch.Tensor,
    key: str,
) -> torch.Tensor:
    d = parse_linear(key)
    _check_indexed(x, weight, order, row_ptr, d)
    _check_addend("indexed_linear_add", addend, x, d)
    return linear_cuda.forward(x, weight, None, order, row_ptr, d, addend)


def _indexed_add_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    row_ptr: torch.Tensor,
    addend: torch.Tensor,
    key: str,
) -> torch.Tensor:
    _check_addend("indexed_linear_add", addend, x, parse_linear(key))
    return _indexed_fake(x, weight, order, row_ptr, key)


def _indexed_add_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, order, row_ptr, _, key = inputs
    _indexed_setup(ctx, (x, weight, order, row_ptr, key), output)


def _indexed_add_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x, grad_weight, *_ = _indexed_backward(ctx, grad)
    return grad_x, grad_weight, None, None, grad, None


def _indexed_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, order, row_ptr, ctx.key = inputs
    ctx.save_for_backward(x, weight, order, row_ptr)


def _indexed_backward(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
    x, weight, order, row_ptr = ctx.saved_tensors
    d = parse_linear(ctx.key)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mace_fast.indexed_linear(grad, weight, order, row_ptr, d.transposed.key)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.mace_fast.indexed_linear_weight_grad(x, grad, order, row_ptr, d.key)
    return grad_x, grad_weight, None, None, None


def _indexed_weight_grad_cpu(
    x: torch.Tensor, grad: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_pair("indexed_linear_weight_grad", x, grad, d)
    require_lists("indexed_linear_weight_grad", x, order, row_ptr)
    out = x.new_zeros(row_ptr.shape[0] - 1, d.weight_numel)
    present = _present("indexed_linear_weight_grad", row_ptr, x.shape[0])
    if len(present) > 1:
        x, grad = x.index_select(0, order), grad.index_select(0, order)
    for species, first, last in present:
        apply_weight_grad(x[first:last], grad[first:last], d, out[species])
    return out


def _indexed_weight_grad_cuda(
    x: torch.Tensor, grad: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_pair("indexed_linear_weight_grad", x, grad, d)
    require_lists("indexed_linear_weight_grad", x, order, row_ptr)
    if weight_along_x(d):  # the same outer products, with the operands' roles exchanged
        return linear_cuda.weight_grad(grad, x, order, row_ptr, d.transposed)
    return linear_cuda.weight_grad(x, grad, order, row_ptr, d)


def _indexed_weight_grad_fake(
    x: torch.Tensor, grad: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, key: str
) -> torch.Tensor:
    d = parse_linear(key)
    _check_pair("indexed_linear_weight_grad", x, grad, d)
    require_lists("indexed_linear_weight_grad", x, order, row_ptr)
    return x.new_empty(row_ptr.shape[0] - 1, d.weight_numel)


def _indexed_weight_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, grad, order, row_ptr, ctx.key = inputs
    ctx.save_for_backward(x, grad, order, row_ptr)


def _indexed_weight_grad_backward(
    ctx: Any, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
    x, grad, order, row_ptr = ctx.saved_tensors
    d = parse_linear(ctx.key)
    grad_x = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mace_fast.indexed_linear(grad, weight, order, row_ptr, d.transposed.key)
    if ctx.needs_input_grad[1]:
        grad_grad = torch.ops.mace_fast.indexed_linear(x, weight, order, row_ptr, d.key)
    return grad_x, grad_grad, None, None, None


def _present(op: str, row_ptr: torch.Tensor, rows: int) -> list[tuple[int, int, int]]:
    """The species that occur, as (species, first, last) in grouped order. CPU only: it reads the offsets."""
    bounds = row_ptr.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"{op}: row_ptr covers rows {bounds[0]} to {bounds[-1]}, but x has {rows}")
    return [(species, first, last) for species, (first, last) in enumerate(pairwise(bounds)) if last > first]


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear_cuda, "CUDA")
_LIBRARY.impl("linear_add", _linear_add, "CPU")
_LIBRARY.impl("linear_add", _linear_add_cuda, "CUDA")
_LIBRARY.impl("indexed_linear_add", _indexed_add_cpu, "CPU")
_LIBRARY.impl("indexed_linear_add", _indexed_add_cuda, "CUDA")
_LIBRARY.impl("linear_weight_grad", _linear_weight_grad, "CPU")
_LIBRARY.impl("linear_weight_grad", _linear_weight_grad, "CUDA")
_LIBRARY.impl("indexed_linear", _indexed_cpu, "CPU")
_LIBRARY.impl("indexed_linear", _indexed_cuda, "CUDA")
_LIBRARY.impl("indexed_linear_weight_grad", _indexed_weight_grad_cpu, "CPU")
_LIBRARY.impl("indexed_linear_weight_grad", _indexed_weight_grad_cuda, "CUDA")
torch.library.register_fake("mace_fast::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::linear_add", _linear_add_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::indexed_linear_add", _indexed_add_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::linear_weight_grad", _linear_weight_grad_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::indexed_linear", _indexed_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::indexed_linear_weight_grad", _indexed_weight_grad_fake, lib=_LIBRARY)
torch.library.register_autograd("mace_fast::linear", _linear_backward, setup_context=_linear_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "mace_fast::linear_weight_grad",
    _linear_weight_grad_backward,
    setup_context=_linear_weight_grad_setup,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "mace_fast::indexed_linear", _indexed_backward, setup_context=_indexed_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "mace_fast::indexed_linear_weight_grad",
    _indexed_weight_grad_backward,
    setup_context=_indexed_weight_grad_setup,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "mace_fast::linear_add", _linear_add_backward, setup_context=_linear_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "mace_fast::indexed_linear_add", _indexed_add_backward, setup_context=_indexed_add_setup, lib=_LIBRARY
)
map_one_by_one(
    "linear", "linear_add", "indexed_linear_add", "linear_weight_grad", "indexed_linear", "indexed_linear_weight_grad"
)
