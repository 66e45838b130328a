"""Deterministic sums of rows over segments (edges at their receiver, atoms in their structure), and their
adjoint."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch

from mace_fast.kernels.build import Int32, cpu_threads, load_cpu, load_cuda
from mace_fast.kernels.ops.checks import require_ids, require_shape, require_values
from mace_fast.kernels.ops.mapping import map_one_by_one
from mace_fast.kernels.source.segment import (
    CHUNK,
    LISTS_THREADS,
    LONG_SEGMENT,
    PACK,
    SUM_THREADS,
    segment_cpu,
    segment_cuda,
    segment_lists_cuda,
)

_FEW_SEGMENTS = 128
_FEW_ROWS = 65536
_MAX_LOG_COLUMNS = 7
_LIST_FAULTS = {
    1: "row_ptr does not begin at 0 and end at the number of rows",
    2: "row_ptr decreases",
    3: "order has an entry that is not a row",
}

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define("csr(Tensor index, int num_segments) -> (Tensor, Tensor)")
_LIBRARY.define("segment_sum(Tensor values, Tensor index, Tensor? order, Tensor row_ptr) -> Tensor")
_LIBRARY.define("segment_gather(Tensor values, Tensor index, Tensor? order, Tensor row_ptr) -> Tensor")


class Segments(NamedTuple):
    """Which rows belong to which segment.

    Attributes:
        ids: int32 or int64 [E], the segment of each row.
        order: same dtype [E], the rows listed segment by segment, in ascending order inside a segment; None
            when the rows already lie that way.
        row_ptr: same dtype [N + 1]; segment n owns `order[row_ptr[n] : row_ptr[n + 1]]`.
    """

    ids: torch.Tensor
    order: torch.Tensor | None
    row_ptr: torch.Tensor

    @property
    def num_segments(self) -> int:
        """N."""
        return self.row_ptr.shape[0] - 1


def csr(index: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of each segment as lists: `(order [E], row_ptr [N + 1])`, int64, built on the device without a
    host sync.

    Args:
        index: int32 or int64 [E], in any order.
        num_segments: N.

    Raises:
        TypeError: `index` is not int32 or int64.
        ValueError: `index` is not one-dimensional, or, on the CPU, has a value outside [0, N). On CUDA such
            rows are listed before `row_ptr[0]` or from `row_ptr[N]` on, where every consumer in this package
            answers them with NaN.
    """
    order, row_ptr = torch.ops.mace_fast.csr(index, num_segments)
    return order, row_ptr


def segments(index: torch.Tensor, num_segments: int) -> Segments:
    """`Segments` of rows in any order; see `csr` for the arguments and errors."""
    return Segments(index, *csr(index, num_segments))


def segment_sum(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`out[n] = sum of values[e] over index[e] == n`, [E, D] -> [N, D]; bit for bit the same at every call.

    Differentiable to any order. A segment without rows is zero.

    Raises:
        TypeError: `values` is not float32 or float64.
        ValueError: shapes or devices do not fit, or, on the CPU, the lists do not cover the E rows. On CUDA,
            where the host does not look, lists that do not cover all rows (an id out of range) make the whole
            output NaN.
    """
    out: torch.Tensor = torch.ops.mace_fast.segment_sum(values, segments.ids, segments.order, segments.row_ptr)
    return out


def segment_gather(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    """`out[e] = values[index[e]]`, [N, D] -> [E, D]: the adjoint of `segment_sum`, with a deterministic
    gradient.

    Raises:
        TypeError: `values` is not float32 or float64.
        ValueError: shapes or devices do not fit, or, on the CPU, an id is out of range. On CUDA such a row is
        NaN.
    """
    out: torch.Tensor = torch.ops.mace_fast.segment_gather(values, segments.ids, segments.order, segments.row_ptr)
    return out


def _check(
    op: str, values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> None:
    require_values(op, "values", values, 2)
    require_ids(op, "index", index, values.device)
    require_ids(op, "row_ptr", row_ptr, values.device)
    if row_ptr.shape[0] == 0:
        raise ValueError(f"{op}: row_ptr is empty; it must have one entry more than there are segments")
    if order is not None:
        require_ids(op, "order", order, values.device)
        require_shape(op, "order", order, (index.shape[0],))
        if order.dtype != row_ptr.dtype:
            raise TypeError(f"{op}: order is {order.dtype}, but row_ptr is {row_ptr.dtype}; they must be the same")


def _check_sum(values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor) -> None:
    _check("segment_sum", values, index, order, row_ptr)
    require_shape("segment_sum", "values", values, (index.shape[0], values.shape[1]))


def _check_gather(values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor) -> None:
    _check("segment_gather", values, index, order, row_ptr)
    require_shape("segment_gather", "values", values, (row_ptr.shape[0] - 1, values.shape[1]))


def _csr_check(index: torch.Tensor, num_segments: int) -> None:
    require_ids("csr", "index", index, index.device)
    if num_segments < 0:
        raise ValueError(f"csr: num_segments is {num_segments}; it cannot be negative")


def _require_in_range(op: str, index: torch.Tensor, num_segments: int) -> None:
    if index.numel():
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= num_segments:
            raise ValueError(f"{op}: index has values from {low} to {high}; they must lie in [0, {num_segments})")


def _csr_cpu(index: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    _csr_check(index, num_segments)
    index = index.contiguous()
    order = index.new_empty(index.shape[0], dtype=torch.int64)
    row_ptr = index.new_empty(num_segments + 1, dtype=torch.int64)
    function = _cpu_lists(_name(index))
    if not function(index.data_ptr(), num_segments, index.shape[0], order.data_ptr(), row_ptr.data_ptr()):
        _require_in_range("csr", index, num_segments)
    return order, row_ptr


def _csr_cuda(index: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    _csr_check(index, num_segments)
    rows = index.shape[0]
    # One launch in which every segment's block reads all ids, while that is little work; else a radix sort.
    if num_segments <= _FEW_SEGMENTS and rows <= _FEW_ROWS:
        index = index.contiguous()
        order = index.new_empty(rows, dtype=torch.int64)
        row_ptr = index.new_empty(num_segments + 1, dtype=torch.int64)
        module = load_cuda(segment_lists_cuda(_name(index)), index.device)
        grid, block = (num_segments + 2, 1, 1), (LISTS_THREADS, 1, 1)
        module.launch("segment_lists", grid, block, 0, (index, order, row_ptr, num_segments, rows))
        return order, row_ptr
    ids, order = torch.sort(index, stable=True)
    row_ptr = torch.searchsorted(ids, torch.arange(num_segments + 1, dtype=ids.dtype, device=ids.device))
    return order, row_ptr


def _csr_fake(index: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    _csr_check(index, num_segments)
    return index.new_empty(index.shape, dtype=torch.int64), index.new_empty(num_segments + 1, dtype=torch.int64)


def _segment_sum_cpu(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_sum(values, index, order, row_ptr)
    values, order, row_ptr = (
        values.contiguous(),
        None if order is None else order.contiguous(),
        row_ptr.contiguous(),
    )
    rows, dim = values.shape
    out = values.new_empty(row_ptr.shape[0] - 1, dim)
    function = _cpu_sum(_name(values), _name(row_ptr))
    wrong = function(
        values.data_ptr(),
        _pointer(order),
        row_ptr.data_ptr(),
        out.shape[0],
        rows,
        dim,
        out.data_ptr(),
        cpu_threads(),
    )
    if wrong:
        raise ValueError(f"segment_sum: {_LIST_FAULTS[wrong]} (values has {rows} rows); make the lists with csr()")
    return out


def _segment_sum_cuda(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_sum(values, index, order, row_ptr)
    order = None if order is None else order.contiguous()
    return sum_on_gpu(values.contiguous(), order, row_ptr.contiguous())


def sum_on_gpu(
    values: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor, *, all_listed: bool = True
) -> torch.Tensor:
    """A part of ops, not one itself. All tensors contiguous.

    Args:
        all_listed: otherwise ``order`` and ``row_ptr`` may list fewer rows than there are, those of use first.
    """
    rows, dim = values.shape
    segments = row_ptr.shape[0] - 1
    out = values.new_empty(segments, dim)
    if out.numel() == 0:
        return out
    module = load_cuda(segment_cuda(_name(values), _name(row_ptr)), values.device)
    suffix, width = _access(values, dim)
    log_columns, log_lanes = _shape(rows, segments, dim, width)
    column_blocks = -(-dim // (width << log_columns))
    block = (SUM_THREADS, 1, 1)
    flag, partial = Int32(int(all_listed)), None
    if rows > LONG_SEGMENT:  # only then can a segment be long
        chunks = -(-rows // CHUNK)
        partial = values.new_empty(chunks, 2, dim)
        all_lanes = (SUM_THREADS >> log_columns).bit_length() - 1
        lists = (values, order, row_ptr, partial, segments, rows, dim, flag, Int32(log_columns), Int32(all_lanes))
        module.launch(f"segment_partial_{suffix}", (chunks, column_blocks, 1), block, 0, lists)
    groups = SUM_THREADS >> (log_columns + log_lanes)
    args = (values, order, row_ptr, partial, out, segments, rows, dim, flag, Int32(log_columns), Int32(log_lanes))
    module.launch(f"segment_sum_{suffix}", (-(-segments // groups), column_blocks, 1), block, 0, args)
    return out


def _segment_gather_cpu(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_gather(values, index, order, row_ptr)
    _require_in_range("segment_gather", index, values.shape[0])
    return values.index_select(0, index)


def _segment_gather_cuda(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_gather(values, index, order, row_ptr)
    values, index = values.contiguous(), index.contiguous()
    segments, dim = values.shape
    rows = index.shape[0]
    out = values.new_empty(rows, dim)
    if out.numel() == 0:
        return out
    module = load_cuda(segment_cuda(_name(values), _name(index)), values.device)
    suffix, width = _access(values, dim)
    log_columns, _ = _shape(rows, rows, dim, width)
    grid = (-(-rows // (SUM_THREADS >> log_columns)), -(-dim // (width << log_columns)), 1)
    args = (values, index, out, segments, rows, dim, Int32(log_columns))
    module.launch(f"segment_gather_{suffix}", grid, (SUM_THREADS, 1, 1), 0, args)
    return out


def _name(tensor: torch.Tensor) -> str:
    """float32, float64, int32 or int64."""
    return str(tensor.dtype).removeprefix("torch.")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _access(values: torch.Tensor, dim: int) -> tuple[str, int]:
    """Which kernel variant, and how many numbers it reads at once: 16 bytes where every row begins on such a
    boundary."""
    width = PACK[_name(values)]
    return ("packed", width) if dim % width == 0 and values.data_ptr() % 16 == 0 else ("1", 1)


def _shape(rows: int, segments: int, dim: int, width: int) -> tuple[int, int]:
    """log2 of the columns and of the lanes of a group: about four rows per lane for the average segment."""
    log_columns = min((-(-dim // width) - 1).bit_length(), _MAX_LOG_COLUMNS)
    lanes_left = SUM_THREADS.bit_length() - 1 - log_columns
    return log_columns, min((rows // (4 * segments)).bit_length(), lanes_left)


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_longlong


@cache
def _cpu_lists(ids: str) -> Any:
    function = getattr(load_cpu(segment_cpu()), f"segment_lists_{ids}")
    function.argtypes = [_POINTER, _NUMBER, _NUMBER, _POINTER, _POINTER]
    function.restype = ctypes.c_int
    return function


@cache
def _cpu_sum(values: str, ids: str) -> Any:
    function = getattr(load_cpu(segment_cpu()), f"segment_sum_{values}_{ids}")
    function.argtypes = [_POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER, _NUMBER, _POINTER, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def _segment_sum_fake(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_sum(values, index, order, row_ptr)
    return values.new_empty(row_ptr.shape[0] - 1, values.shape[1])


def _segment_gather_fake(
    values: torch.Tensor, index: torch.Tensor, order: torch.Tensor | None, row_ptr: torch.Tensor
) -> torch.Tensor:
    _check_gather(values, index, order, row_ptr)
    return values.new_empty(index.shape[0], values.shape[1])


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _segment_sum_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return torch.ops.mace_fast.segment_gather(grad, *ctx.saved_tensors), None, None, None


def _segment_gather_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return torch.ops.mace_fast.segment_sum(grad, *ctx.saved_tensors), None, None, None


_LIBRARY.impl("csr", _csr_cpu, "CPU")
_LIBRARY.impl("csr", _csr_cuda, "CUDA")
_LIBRARY.impl("segment_sum", _segment_sum_cpu, "CPU")
_LIBRARY.impl("segment_sum", _segment_sum_cuda, "CUDA")
_LIBRARY.impl("segment_gather", _segment_gather_cpu, "CPU")
_LIBRARY.impl("segment_gather", _segment_gather_cuda, "CUDA")
torch.library.register_fake("mace_fast::csr", _csr_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::segment_sum", _segment_sum_fake, lib=_LIBRARY)
torch.library.register_fake("mace_fast::segment_gather", _segment_gather_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "mace_fast::segment_sum", _segment_sum_backward, setup_context=_save_segments, lib=_LIBRARY
)
torch.library.register_autograd(
    "mace_fast::segment_gather", _segment_gather_backward, setup_context=_save_segments, lib=_LIBRARY
)
map_one_by_one("csr", "segment_sum", "segment_gather")
