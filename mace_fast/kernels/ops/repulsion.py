"""The repulsion of nuclei at short distance, in one kernel and one for its gradient.

Some hundred elementwise operations on edges take as long as the rest of a small model. The formula is that of
mace.modules.radial.ZBLBasis: J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Matter
(1985), with a polynomial envelope that ends at the sum of the covalent radii.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.source.repulsion import GRADIENT, REPULSION, THREADS, repulsion_cpu, repulsion_cuda

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define(
    "nuclear_repulsion(Tensor radius, Tensor species, Tensor sender, Tensor row, Tensor table, float[] shares, "
    "float length, int p) -> (Tensor, Tensor)"
)
_LIBRARY.define("nuclear_repulsion_gradient(Tensor g, Tensor slope, Tensor row) -> Tensor")
_CTYPES = {torch.float32: "float", torch.float64: "double"}
_WARP = 32


class Repulsion(NamedTuple):
    """What the repulsion of pairs of species is made of.

    Attributes:
        table: [S, 3] float32 or float64, of each species its nuclear charge, the power of it that the screening length
            has, and its covalent radius, A.
        shares: of the four exponentials.
        length: A; the screening length of a pair is this divided by the sum of their powers.
        p: of the envelope.
    """

    table: Tensor
    shares: tuple[float, float, float, float]
    length: float
    p: int


def nuclear_repulsion(form: Repulsion, radius: Tensor, species: Tensor, sender: Tensor, row: Tensor) -> Tensor:
    """[N] eV, half the repulsion of the pairs that enter each atom; differentiable once with respect to the lengths.

    Args:
        form: of the species.
        radius: [E] float32 or float64, A, edges by receiver; those that ``row`` does not list are not read, and their
            gradient is not written.
        species: [N] int64, rows of the table.
        sender: [E] int32.
        row: [N + 1] int32, where the edges that enter an atom begin.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    energy: Tensor
    energy, _ = torch.ops.mace_fast.nuclear_repulsion(
        radius, species, sender, row, form.table, form.shares, form.length, form.p
    )
    return energy


def _fake(
    radius: Tensor,
    species: Tensor,
    sender: Tensor,
    row: Tensor,
    table: Tensor,
    shares: list[float],
    length: float,
    p: int,
) -> tuple[Tensor, Tensor]:
    op = "nuclear_repulsion"
    require_values(op, "radius", radius, 1)
    require_like(op, "table", table, radius, "radius")
    require_shape(op, "table", table, (table.shape[0], 3))
    for name, tensor, dtype in (
        ("species", species, torch.int64),
        ("sender", sender, torch.int32),
        ("row", row, torch.int32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")
        if tensor.device != radius.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but radius is on {radius.device}; move one of them")
    require_shape(op, "sender", sender, (radius.shape[0],))
    require_shape(op, "row", row, (species.shape[0] + 1,))
    if len(shares) != 4 or p < 1:
        raise ValueError(f"{op}: {len(shares)} shares and p = {p}; there are four, and p is at least 1")
    return radius.new_empty(species.shape), radius.new_empty(radius.shape)


def _repulsion(
    radius: Tensor,
    species: Tensor,
    sender: Tensor,
    row: Tensor,
    table: Tensor,
    shares: list[float],
    length: float,
    p: int,
) -> tuple[Tensor, Tensor]:
    energy, slope = _fake(radius, species, sender, row, table, shares, length, p)
    tensors = [*(t.contiguous() for t in (radius, species, sender, row, table)), energy, slope]
    _run(REPULSION, tensors, [*map(float, shares), length, p, species.shape[0]], radius)
    return energy, slope


def _gradient_fake(g: Tensor, slope: Tensor, row: Tensor) -> Tensor:
    op = "nuclear_repulsion_gradient"
    require_values(op, "g", g, 1)
    require_like(op, "slope", slope, g, "g")
    require_shape(op, "row", row, (g.shape[0] + 1,))
    return slope.new_empty(slope.shape)


def _gradient(g: Tensor, slope: Tensor, row: Tensor) -> Tensor:
    dradius = _gradient_fake(g, slope, row)
    _run(GRADIENT, [g.contiguous(), slope.contiguous(), row.contiguous(), dradius], [g.shape[0]], g)
    return dradius


def _run(entry: str, tensors: list[Tensor], numbers: list[Any], like: Tensor) -> None:
    atoms = numbers[-1]
    if atoms == 0:
        return
    ctype = _CTYPES[like.dtype]
    if on_gpu(like):
        grid = (-(-atoms * _WARP // THREADS), 1, 1)
        _cuda(ctype, like.device).launch(entry, grid, (THREADS, 1, 1), 0, (*tensors, *numbers))
    else:
        _function(entry, ctype, len(tensors))(*(t.data_ptr() for t in tensors), *numbers, cpu_threads())


@lru_cache(maxsize=16)
def _cuda(ctype: str, device: torch.device) -> CudaModule:
    return load_cuda(repulsion_cuda(ctype), device)


@lru_cache(maxsize=16)
def _function(entry: str, ctype: str, pointers: int) -> Any:
    function = getattr(load_cpu(repulsion_cpu(ctype)), entry)
    integer = ctypes.c_longlong
    numbers = [*[ctypes.c_double] * 5, integer, integer] if entry == REPULSION else [integer]
    function.argtypes = [ctypes.c_void_p] * pointers + numbers + [ctypes.c_int]
    function.restype = None
    return function


for _name, _op, _fake_of in (
    ("nuclear_repulsion", _repulsion, _fake),
    ("nuclear_repulsion_gradient", _gradient, _gradient_fake),
):
    _LIBRARY.impl(_name, _op, "CPU")
    _LIBRARY.impl(_name, _op, "CUDA")
    torch.library.register_fake(f"mace_fast::{_name}", _fake_of, lib=_LIBRARY)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[3])


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    slope, row = ctx.saved_tensors
    return (torch.ops.mace_fast.nuclear_repulsion_gradient(g, slope, row), *(None,) * 7)


torch.library.register_autograd("mace_fast::nuclear_repulsion", _backward, setup_context=_setup)
