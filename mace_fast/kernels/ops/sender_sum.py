"""Gradients of edges summed at their senders, a stretch of edges at a time: a part of other ops, not one itself."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import Int32, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.source.sender_sum import MOST_WARPS, PACK, SENDER_SUM, sender_sum_cpu, sender_sum_cuda

_CTYPES = {torch.float32: "float", torch.float64: "double"}
_ROWS_A_WARP = 16
"""Rows from which a warp has enough of them in flight for long enough."""


def sum_at_senders(
    values: Tensor, order: Tensor, row: Tensor, out: Tensor, first: int, end: int, rows_a_sender: float
) -> None:
    """``out[n] = (0 if first == 0 else out[n]) + sum of values[e - first] over e in [first, end) that n sends``.

    Args:
        values: [at least end - first, D], float32 or float64, contiguous like all that follow.
        order: int32, the edges by sender, ascending for each.
        row: [at least N + 1] int32, where a sender's edges begin in ``order``.
        out: [N, D].
        first, end: the stretch of edges.
        rows_a_sender: about how many edges a sender has in a stretch; decides how the work is shared out.
    """
    senders, dim = out.shape
    if out.numel() == 0:
        return
    lists, fresh = (values, order, row, out, first, end), Int32(int(first == 0))
    ctype = _CTYPES[values.dtype]
    if not on_gpu(values):
        plain = [each.data_ptr() if isinstance(each, Tensor) else each for each in lists]
        _function(ctype)(*plain, senders, dim, int(first == 0), cpu_threads())
        return
    packed = dim % PACK[ctype] == 0 and values.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    columns = 32 * (PACK[ctype] if packed else 1)
    warps = min(MOST_WARPS, max(1, 1 << int(rows_a_sender / _ROWS_A_WARP).bit_length() >> 1))
    module = load_cuda(sender_sum_cuda(ctype), values.device)
    entry = f"{SENDER_SUM}_{'packed' if packed else '1'}"
    module.launch(entry, (senders, -(-dim // columns), 1), (32, warps, 1), 0, (*lists, dim, fresh))


@lru_cache(maxsize=8)
def _function(ctype: str) -> Any:
    function = getattr(load_cpu(sender_sum_cpu(ctype)), SENDER_SUM)
    pointer, integer = ctypes.c_void_p, ctypes.c_longlong
    function.argtypes = [pointer] * 4 + [integer] * 4 + [ctypes.c_int] * 2
    function.restype = None
    return function
