"""The radial networks of a frozen model as splines of the distance, with an error bound proven for each table.

The weights of a convolution are functions of the edge length, and in newer models of the two species, alone. They are
evaluated in float64 at uniform knots, with exact derivatives, and the polynomials made of them are compared with the
network between the knots; where they are not good enough, intervals are halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mace_fast.errors import UnsupportedModuleError

RadialFunction = Callable[[Tensor], Tensor]
"""Distances [K] (A, float64) to values [K, n]."""

_GRIDS = {
    torch.float32: ((256, 6), (512, 6), (1024, 6), (2048, 6)),
    torch.float64: ((1024, 8), (2048, 8), (4096, 8)),
}
"""Intervals and coefficients of an interval, in the order in which they are tried."""

_TOLERANCE = {torch.float32: 4e-9, torch.float64: 2e-14}
"""Error between knots over the largest value. A tenth of the rounding of the type and less, because forces need the
slope, whose error is larger by about the number of intervals per A."""

_PROVEN_FROM = 0.3
"""Distances (A) from which the bound is proven; shorter ones do not occur, but have knots."""

_ZERO = 1e-3
"""Stands for a distance of zero (A), where radial bases divide by it."""


@dataclass(frozen=True)
class SplineTable:
    """Splines of several functions of the distance on one grid.

    Attributes:
        rows: [tables * (intervals + 1), order, n] coefficients, float64, CPU; the last row of each table is zero.
        intervals: of each table.
        cutoff: distance (A) at which tables end.
        error: the largest error seen between knots, over the largest value.
    """

    rows: Tensor
    intervals: int
    cutoff: float
    error: float

    @property
    def per_length(self) -> float:
        """Intervals per A."""
        return self.intervals / self.cutoff


def tabulate(name: str, functions: list[RadialFunction], cutoff: float, dtype: torch.dtype) -> SplineTable:
    """Splines for a model of this dtype, refined until the bound holds.

    Raises:
        UnsupportedModuleError: the bound does not hold with the finest grid.
    """
    for intervals, order in _GRIDS[dtype]:
        rows = [_rows(function, cutoff, intervals, order) for function in functions]
        error = max(_error(table, f, cutoff, intervals) for table, f in zip(rows, functions, strict=True))
        if error <= _TOLERANCE[dtype]:
            return SplineTable(torch.cat(rows), intervals, cutoff, error)
    raise UnsupportedModuleError(
        f"the radial network of {name} cannot be tabulated: with {intervals} intervals its spline is off by "
        f"{error:.1e} of the largest weight, more than {_TOLERANCE[dtype]:.0e}; use mace_fast.convert, which keeps "
        "the networks"
    )


def _rows(function: RadialFunction, cutoff: float, intervals: int, order: int) -> Tensor:
    """Coefficients [intervals + 1, order, n], the last row zero.

    With h = order / 2, each polynomial has the value and the first h derivatives of the function at the lower end, and
    the first h - 1 derivatives at the upper end. The value there is not used: the difference of two nearly equal values
    would bring their rounding, magnified by the number of intervals, into the slope.
    """
    r = torch.linspace(0, cutoff, intervals + 1, dtype=torch.float64)
    r[0] = _ZERO
    # The polynomial needs derivatives from below: cutoff functions are zero from the cutoff on, but the third
    # derivative of the usual one jumps there.
    r[-1] = math.nextafter(cutoff, 0.0)
    spacing = cutoff / intervals
    half = order // 2
    knots = [value * spacing**n for n, value in enumerate(_derivatives(function, r, half + 1))]
    if not all(bool(torch.isfinite(k).all()) for k in knots):
        raise UnsupportedModuleError(
            "a radial function is not finite between zero and the cutoff; it cannot be tabulated"
        )
    low = torch.stack([k[:-1] / math.factorial(n) for n, k in enumerate(knots)])
    # Falling factorials: the n-th derivative of t^m at t = 1 is m (m - 1) ... (m - n + 1).
    powers = torch.tensor([[math.perm(m, n) for m in range(order)] for n in range(1, half)], dtype=torch.float64)
    rest = torch.stack([k[1:] for k in knots[1:half]]) - torch.einsum("nm,mkc->nkc", powers[:, : half + 1], low)
    high = torch.einsum("mn,nkc->mkc", torch.linalg.inv(powers[:, half + 1 :]), rest)
    table = torch.cat([low, high]).transpose(0, 1)
    return torch.cat([table, torch.zeros_like(table[:1])])


def _derivatives(function: RadialFunction, r: Tensor, order: int) -> list[Tensor]:
    """The function and its first order - 1 derivatives, each [K, n].

    With one seed per value, the gradient of <seed, f> with respect to r is linear in the seed, and its gradient with
    respect to the seed is f'. So reverse mode gives all columns at once; forward mode does not exist for all of torch.
    """
    r = r.clone().requires_grad_()
    with torch.enable_grad():
        values = [function(r)]
        seed = torch.ones_like(values[0]).requires_grad_()
        contracted = (values[0] * seed).sum()
        for _ in range(order - 1):
            (slope,) = torch.autograd.grad(contracted, r, create_graph=True)
            contracted = slope.sum()
            (derivative,) = torch.autograd.grad(contracted, seed, retain_graph=True)
            values.append(derivative)
    return [value.detach() for value in values]


def _error(rows: Tensor, function: RadialFunction, cutoff: float, intervals: int) -> float:
    positions = (torch.arange(intervals, dtype=torch.float64)[:, None] + torch.tensor([0.25, 0.5, 0.8])).flatten()
    r = positions * (cutoff / intervals)
    seen = r >= min(_PROVEN_FROM, cutoff / 2)
    with torch.no_grad():
        exact = function(r[seen])
    scale = float(exact.abs().max())
    if scale == 0.0:
        return 0.0
    return float((interpolate(rows, positions[seen]) - exact).abs().max()) / scale


def interpolate(rows: Tensor, positions: Tensor) -> Tensor:
    """Splines with coefficients [K + 1, order, n] at positions [P] in units of the spacing; the kernels' definition."""
    interval = positions.long().clamp(max=rows.shape[0] - 1)
    t = (positions - interval)[:, None]
    value = rows[interval, -1]
    for power in range(rows.shape[1] - 2, -1, -1):
        value = value * t + rows[interval, power]
    return value
