"""Argument checks shared by the ops: each error names the op, the argument, what it is and what it must
be."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64)
IDS = (torch.int32, torch.int64)


def require_values(op: str, name: str, tensor: torch.Tensor, dims: int) -> None:
    """A float32 or float64 tensor with `dims` axes."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be torch.float32 or torch.float64")
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must have {dims} axes")


def require_like(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, but {like_name} is {like.dtype}; convert one of them")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but {like_name} is on {like.device}; move one of them")


def require_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {shape}")


def require_ids(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A one-dimensional int32 or int64 tensor on a device."""
    if tensor.dtype not in IDS:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be torch.int32 or torch.int64")
    if tensor.dim() != 1:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be one-dimensional")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the other arguments are on {device}; move it")


def require_lists(op: str, rows: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor) -> None:
    """Lists of all rows by segment: `order` [rows], `row_ptr` [segments + 1], of one integer type."""
    require_ids(op, "order", order, rows.device)
    require_ids(op, "row_ptr", row_ptr, rows.device)
    require_shape(op, "order", order, (rows.shape[0],))
    if row_ptr.shape[0] == 0:
        raise ValueError(f"{op}: row_ptr is empty; it must have one entry more than there are segments")
    if order.dtype != row_ptr.dtype:
        raise TypeError(f"{op}: order is {order.dtype}, but row_ptr is {row_ptr.dtype}; they must be the same")
