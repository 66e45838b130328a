"""Launches of the CUDA kernels of equivariant linear maps."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from mace_fast.kernels.build import CudaModule, Int32, load_cuda
from mace_fast.kernels.description.linear import Linear, parse_linear
from mace_fast.kernels.source.linear import (
    PACK,
    SUM_THREADS,
    TILINGS,
    Tiling,
    covers_weight,
    forward_blocks,
    forward_cuda,
    grad_cuda,
    linear_tables,
    row_tiles,
    shared_tables,
    weight_tiles,
)

_FILLED = 264  # thread blocks that keep an H100 busy, two per multiprocessor; with fewer a launch uses smaller tiles
_GRAD_BLOCKS = 528  # thread blocks that the weight gradient aims for
_SMALLEST_CHUNK = 32  # nodes; below this the sum over chunks costs more than the products


class _Tables(NamedTuple):
    """The map's tables on a device, and the sizes that go with them into a launch."""

    blocks: torch.Tensor
    paths: torch.Tensor
    block_count: Int32
    path_count: Int32
    x_dim: Int32
    z_dim: Int32
    weight_numel: Int32


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor | None,
    row_ptr: torch.Tensor | None,
    d: Linear,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, z_dim], with `addend` of that shape added.

    `weight` is [weight_numel], or [Z, weight_numel] with the lists of nodes by species."""
    nodes = x.shape[0]
    z = x.new_empty(nodes, d.z_dim)
    if z.numel() == 0:
        return z
    species = None if row_ptr is None else row_ptr.shape[0] - 1
    ids = torch.int64 if row_ptr is None else row_ptr.dtype
    tiling, blocks = choose_tiling(d, nodes, species, x.dtype)
    module = _forward_module(d.key, x.dtype, ids, tiling, x.device)
    lists = (_contiguous(order), _contiguous(row_ptr))
    more = None if addend is None else _aligned(addend)
    operands = (_aligned(x), _aligned(weight), _contiguous(bias), *lists, more, z, nodes)
    args = (*operands, *_tables(d.key, x.device), Int32(species or 1))
    shared = _shared_tables(d.key, tiling)
    module.launch("linear_forward", (blocks, 1, 1), (tiling.threads, 1, 1), shared, args)
    return z


def choose_tiling(d: Linear, nodes: int, species: int | None, values: torch.dtype) -> tuple[Tiling, int]:
    """The largest tiles that fill the device, else the smallest, and the number of thread blocks.

    `species` is None for a map without lists of nodes by species.
    """
    for tiling in TILINGS[_name(values)]:
        blocks = forward_blocks(d, nodes, species, tiling)
        if blocks >= _FILLED:
            break
    return tiling, blocks


def weight_grad(
    x: torch.Tensor, grad: torch.Tensor, order: torch.Tensor, row_ptr: torch.Tensor, d: Linear
) -> torch.Tensor:
    """[Z, weight_numel], for a map whose weight is contiguous along the output channel."""
    nodes, species = x.shape[0], row_ptr.shape[0] - 1
    if nodes == 0 or d.weight_numel == 0:
        return x.new_zeros(species, d.weight_numel)
    order, row_ptr = order.contiguous(), row_ptr.contiguous()
    tiling = TILINGS[_name(x.dtype)][0]
    tiles = weight_tiles(d, tiling)
    chunk = max(_SMALLEST_CHUNK, -(-nodes * tiles // _GRAD_BLOCKS))
    slots = row_tiles(nodes, species, 1, chunk)
    partial = (x.new_empty if covers_weight(d) else x.new_zeros)(slots, d.weight_numel)
    out = x.new_empty(species, d.weight_numel)
    module = _grad_module(d.key, x.dtype, row_ptr.dtype, tiling, x.device)
    operands = (_aligned(x), _aligned(grad), order, row_ptr, partial, nodes, Int32(chunk))
    args = (*operands, *_tables(d.key, x.device), Int32(species))
    module.launch("linear_grad_partial", (tiles, slots, 1), (tiling.threads, 1, 1), 0, args)
    # Enough threads for one number each; where each adds several, the surplus leaves.
    grid = (-(-d.weight_numel // SUM_THREADS), species, 1)
    sums = (partial, row_ptr, out, d.weight_numel, Int32(chunk))
    module.launch("linear_grad_sum", grid, (SUM_THREADS, 1, 1), 0, sums)
    return out


# Caches are keyed by the description's string, whose hash Python keeps, and not by the description, whose
# hash walks through all paths: these run at every call.


@cache
def _forward_module(
    key: str, values: torch.dtype, ids: torch.dtype, tiling: Tiling, device: torch.device
) -> CudaModule:
    return load_cuda(forward_cuda(parse_linear(key), _name(values), _name(ids), tiling), device)


@cache
def _shared_tables(key: str, tiling: Tiling) -> int:
    return shared_tables(parse_linear(key), tiling)


@cache
def _grad_module(key: str, values: torch.dtype, ids: torch.dtype, tiling: Tiling, device: torch.device) -> CudaModule:
    return load_cuda(grad_cuda(parse_linear(key), _name(values), _name(ids), tiling), device)


@cache
def _tables(key: str, device: torch.device) -> _Tables:
    """Copied to the device at first use: a few hundred bytes."""
    d = parse_linear(key)
    tables = linear_tables(d)
    blocks, paths = (
        torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(device)
        for data in (tables.blocks, tables.paths)
    )
    sizes = (tables.block_count, tables.path_count, d.x_dim, d.z_dim, d.weight_numel)
    return _Tables(blocks, paths, *(Int32(size) for size in sizes))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, beginning where 16-byte accesses may begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % (PACK[_name(tensor.dtype)] * tensor.element_size()) == 0 else tensor.clone()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@cache
def _name(dtype: torch.dtype) -> str:
    """float32, float64, int32 or int64."""
    return str(dtype).removeprefix("torch.")
