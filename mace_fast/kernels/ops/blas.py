"""A linear description carried out by the vendor's matrix products, written straight into slices of the
output.

Every irreps block of a row is a matrix with a stride that BLAS understands, so that nothing is gathered,
concatenated or
scaled in a pass of its own: one product per path (a batch over the 2l+1 components), coefficients as alpha,
further paths into the same output accumulated by beta. A mul_ir block with l > 0 is the exception: its
channels are 2l+1 apart, and it is copied once to or from component-major order.
"""

from __future__ import annotations

import torch

from mace_fast.kernels.description.linear import Block, Layout, Linear, LinearPath
from mace_fast.kernels.source.linear import covers_weight


def apply_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, d: Linear, z: torch.Tensor) -> None:
    """z [N, z_dim] = the map of x [N, x_dim]; z is overwritten and must have unit stride along its rows."""
    if x.shape[0] == 0:
        return
    x, weight = _unit_stride(x), weight.contiguous()
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    for b in d.biases:
        if bias is None:
            raise ValueError("linear: bias is missing")
        mul = d.z[b.z][0]
        outputs[b.z] = _block(z, d.z, d.z_starts, b.z, d.z_layout)
        outputs[b.z].copy_(bias[b.offset : b.offset + mul] * b.coefficient)
    for path in d.paths:
        if not _is_empty(path, d):
            if path.x not in inputs:
                inputs[path.x] = _component_major(x, d.x, d.x_starts, path.x, d.x_layout)
            beta = 1.0 if path.z in outputs else 0.0
            if path.z not in outputs:
                outputs[path.z] = _destination(z, d.z, d.z_starts, path.z, d.z_layout)
            _accumulate(outputs[path.z], inputs[path.x], _matrix(weight, path, d), beta, path.coefficient)
    for block, (mul, degree) in enumerate(d.z):
        if mul == 0:
            continue
        if block not in outputs:
            z[:, d.z_starts[block] : d.z_starts[block] + mul * (2 * degree + 1)] = 0
        elif _needs_copy(degree, d.z_layout):
            _block(z, d.z, d.z_starts, block, d.z_layout).copy_(outputs[block])


def apply_weight_grad(x: torch.Tensor, grad: torch.Tensor, d: Linear, out: torch.Tensor) -> None:
    """out [weight_numel] = gradient with respect to the weight for a gradient `grad` [N, z_dim] of the
    output."""
    if x.shape[0] == 0 or not covers_weight(d):
        out.zero_()
    if x.shape[0] == 0:
        return
    x, grad = _unit_stride(x), _unit_stride(grad)
    inputs: dict[int, torch.Tensor] = {}
    grads: dict[int, torch.Tensor] = {}
    for path in d.paths:
        if not _is_empty(path, d):
            if path.x not in inputs:
                inputs[path.x] = _component_major(x, d.x, d.x_starts, path.x, d.x_layout)
            if path.z not in grads:
                grads[path.z] = _component_major(grad, d.z, d.z_starts, path.z, d.z_layout)
            _outer(_matrix(out, path, d), inputs[path.x], grads[path.z], path.coefficient)


def _unit_stride(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _is_empty(path: LinearPath, d: Linear) -> bool:
    return d.x[path.x][0] == 0 or d.z[path.z][0] == 0


def _needs_copy(degree: int, layout: Layout) -> bool:
    return layout == "mul_ir" and degree > 0


def _matrix(weight: torch.Tensor, path: LinearPath, d: Linear) -> torch.Tensor:
    """The path's [mul_x, mul_z] view of the flat weight."""
    size = (d.x[path.x][0], d.z[path.z][0])
    return weight.as_strided(size, (path.x_stride, path.z_stride), weight.storage_offset() + path.offset)


def _block(
    rows: torch.Tensor, blocks: tuple[Block, ...], starts: tuple[int, ...], block: int, layout: Layout
) -> torch.Tensor:
    """One block of all rows as a view: [N, mul] for scalars, otherwise [2l+1, N, mul]."""
    mul, degree = blocks[block]
    dim, row, start = 2 * degree + 1, rows.stride(0), rows.storage_offset() + starts[block]
    if dim == 1:
        return rows.as_strided((rows.shape[0], mul), (row, 1), start)
    strides = (mul, row, 1) if layout == "ir_mul" else (1, row, dim)
    return rows.as_strided((dim, rows.shape[0], mul), strides, start)


def _component_major(
    rows: torch.Tensor, blocks: tuple[Block, ...], starts: tuple[int, ...], block: int, layout: Layout
) -> torch.Tensor:
    view = _block(rows, blocks, starts, block, layout)
    return view.contiguous() if _needs_copy(blocks[block][1], layout) else view


def _destination(
    rows: torch.Tensor, blocks: tuple[Block, ...], starts: tuple[int, ...], block: int, layout: Layout
) -> torch.Tensor:
    mul, degree = blocks[block]
    if _needs_copy(degree, layout):
        return rows.new_empty(2 * degree + 1, rows.shape[0], mul)
    return _block(rows, blocks, starts, block, layout)


def _accumulate(z: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, beta: float, alpha: float) -> None:
    """z = beta z + alpha x @ matrix, over components where there are any. With beta = 0, z may hold
    anything."""
    if x.dim() == 2:
        z.addmm_(x, matrix, beta=beta, alpha=alpha)
    else:
        z.baddbmm_(x, matrix.expand(x.shape[0], *matrix.shape), beta=beta, alpha=alpha)


def _outer(out: torch.Tensor, x: torch.Tensor, grad: torch.Tensor, alpha: float) -> None:
    """out = alpha sum over nodes and components of x[u] grad[w]."""
    if x.dim() == 2:
        out.addmm_(x.t(), grad, beta=0.0, alpha=alpha)
        return
    for component in range(x.shape[0]):
        out.addmm_(x[component].t(), grad[component], beta=float(component > 0), alpha=alpha)
