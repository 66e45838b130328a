"""The radial networks of a frozen model as splines of the distance, with an error bound proven for each table.

The weights of a convolution are functions of the edge length, and in newer models of the two species, alone. They are
evaluated in float64, and the polynomials made of them, on intervals of equal lengths, are compared with the network,
values and slopes; where they are not good enough, intervals are halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mace_fast.errors import UnsupportedModuleError

RadialFunction = Callable[[Tensor], Tensor]
"""Distances [K] (A, float64) to values [K, n]."""

_GRIDS = {
    torch.float32: ((256, 6), (512, 6), (1024, 6), (2048, 6)),
    torch.float64: ((1024, 8), (4096, 6), (8192, 6), (4096, 8)),
}
"""Intervals and coefficients of an interval, tried in this order: a fourth derivative takes several times a third."""

_TOLERANCE = {torch.float32: 4e-9, torch.float64: 2e-14}
"""Error between knots over the largest value; a tenth of the rounding of the type and less."""

_FINEST_TOLERANCE = {torch.float32: 4e-9, torch.float64: 1e-13}
"""The same on the finest grid. Where it is more than above there, it is rounding, of lengths and in the network, which
no grid makes smaller. Weights of up to 10 that change by 60 each A have 2e-14."""

_SLOPE_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-10}
"""Error of the slope, which forces are made of, over the largest slope. The rounding of a length in float32 changes the
slope by more."""

_AT_ONCE = 512
"""Distances for which derivatives are computed at a time: what autograd keeps for them takes hundreds of MB."""

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
        slope_error: the largest error of the slope, over the largest slope.
    """

    rows: Tensor
    intervals: int
    cutoff: float
    error: float
    slope_error: float

    @property
    def per_length(self) -> float:
        """Intervals per A."""
        return self.intervals / self.cutoff


def tabulate(name: str, functions: list[RadialFunction], cutoff: float, dtype: torch.dtype) -> SplineTable:
    """Splines for a model of this dtype, refined until the bound holds.

    Raises:
        UnsupportedModuleError: the bound does not hold with the finest grid.
    """
    polynomials = _through_values if dtype == torch.float32 else _through_derivatives
    hardest = 0  # the function that the grid before was too coarse for: it shows soonest whether the next one is
    for intervals, order in _GRIDS[dtype]:
        finest = (intervals, order) == _GRIDS[dtype][-1]
        tolerance = (_FINEST_TOLERANCE if finest else _TOLERANCE)[dtype]
        rows: list[Tensor | None] = [None] * len(functions)
        errors = []
        for number in [hardest, *(n for n in range(len(functions)) if n != hardest)]:
            rows[number] = table = polynomials(functions[number], cutoff, intervals, order)
            errors.append(_errors(table, functions[number], cutoff, intervals))
            error, slope_error = errors[-1]
            if error > tolerance or slope_error > _SLOPE_TOLERANCE[dtype]:
                hardest = number
                break
        else:
            error, slope_error = (max(each) for each in zip(*errors, strict=True))
            return SplineTable(torch.cat([r for r in rows if r is not None]), intervals, cutoff, error, slope_error)
    raise UnsupportedModuleError(
        f"the radial network of {name} cannot be tabulated: with {intervals} intervals its spline is off by "
        f"{error:.1e} of the largest weight (allowed: {tolerance:.0e}), and its slope by {slope_error:.1e} of "
        f"the largest (allowed: {_SLOPE_TOLERANCE[dtype]:.0e}); use mace_fast.convert, which keeps the networks"
    )


def _through_values(function: RadialFunction, cutoff: float, intervals: int, order: int) -> Tensor:
    """Coefficients [intervals + 1, order, n], the last row zero, of polynomials through ``order`` values each.

    Neighbours share the value at their knot. The slope is as good as that of any polynomials on these intervals (see
    :func:`_nodes`), but for what rounding does to differences of nearly equal values: some 1e-12, nothing to float32.
    """
    nodes = _nodes(order)
    lower = torch.arange(intervals, dtype=torch.float64)[:, None]
    r = torch.cat([((lower + nodes[:-1]) * (cutoff / intervals)).flatten(), torch.tensor([cutoff]).double()])
    r[0], r[-1] = _ZERO, math.nextafter(cutoff, 0.0)
    with torch.no_grad():
        values = function(r)
    _require_finite(values)
    inner = values[:-1].reshape(intervals, order - 1, -1)
    first, last = inner[:, :1], torch.cat([inner[1:, 0], values[-1:]])
    differences = torch.cat([inner[:, 1:], last[:, None]], 1) - first
    powers = nodes[1:, None] ** torch.arange(1, order)
    table = torch.cat([first, torch.einsum("mj,kjc->kmc", torch.linalg.inv(powers), differences)], 1)
    return torch.cat([table, torch.zeros_like(table[:1])])


def _nodes(order: int) -> Tensor:
    """The places in [0, 1], both ends among them, through which a polynomial of even ``order`` has the best slope.

    The error of a polynomial through values is, to leading order, a multiple of w(t) = (t - t_0) ... (t - t_n-1); that
    of its slope is smallest where w' is a Chebyshev polynomial, as that deviates least from zero. Its integral from one
    end of the interval on vanishes at the other end too.
    """
    w = np.polynomial.Chebyshev.basis(order - 1).integ(lbnd=-1)
    roots = np.sort(np.real(w.roots()))
    roots[0], roots[-1] = -1.0, 1.0
    return torch.from_numpy((roots + 1) / 2)


def _through_derivatives(function: RadialFunction, cutoff: float, intervals: int, order: int) -> Tensor:
    """Coefficients [intervals + 1, order, n], the last row zero.

    With h = order / 2, each polynomial has the value and the first h derivatives of the function at the lower end, and
    the first h - 1 derivatives at the upper end. The value there is not used: the difference of two nearly equal values
    would bring their rounding, magnified by the number of intervals, into the slope.
    """
    r = torch.linspace(0, cutoff, intervals + 1, dtype=torch.float64)
    # The polynomial needs derivatives from below: cutoff functions are zero from the cutoff on, but the third
    # derivative of the usual one jumps there.
    r[0], r[-1] = _ZERO, math.nextafter(cutoff, 0.0)
    spacing = cutoff / intervals
    half = order // 2
    knots = [value * spacing**n for n, value in enumerate(_derivatives(function, r, half + 1))]
    low = torch.stack([k[:-1] / math.factorial(n) for n, k in enumerate(knots)])
    # Falling factorials: the n-th derivative of t^m at t = 1 is m (m - 1) ... (m - n + 1).
    powers = torch.tensor([[math.perm(m, n) for m in range(order)] for n in range(1, half)], dtype=torch.float64)
    rest = torch.stack([k[1:] for k in knots[1:half]]) - torch.einsum("nm,mkc->nkc", powers[:, : half + 1], low)
    high = torch.einsum("mn,nkc->mkc", torch.linalg.inv(powers[:, half + 1 :]), rest)
    table = torch.cat([low, high]).transpose(0, 1)
    return torch.cat([table, torch.zeros_like(table[:1])])


def _require_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UnsupportedModuleError(
            "a radial function is not finite between zero and the cutoff; it cannot be tabulated"
        )


def _derivatives(function: RadialFunction, r: Tensor, order: int) -> list[Tensor]:
    """The function and its first order - 1 derivatives, each [K, n]; all finite."""
    pieces = [_derivatives_at_once(function, piece, order) for piece in r.split(_AT_ONCE)]
    found = [torch.cat(each) for each in zip(*pieces, strict=True)]
    for values in found:
        _require_finite(values)
    return found


def _derivatives_at_once(function: RadialFunction, r: Tensor, order: int) -> list[Tensor]:
    """With one seed per value, the gradient of <seed, f> with respect to r is linear in the seed, and its gradient with
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


def _errors(rows: Tensor, function: RadialFunction, cutoff: float, intervals: int) -> tuple[float, float]:
    """Of values and slopes, over the largest value and slope, where the polynomials are worst."""
    lower = torch.arange(intervals, dtype=torch.float64)[:, None]
    between, beside = (
        (lower + torch.tensor(places, dtype=torch.float64)).flatten() for places in ([0.25, 0.5, 0.8], [0.0, 0.65])
    )
    least = min(_PROVEN_FROM, cutoff / 2) * intervals / cutoff
    between, beside = between[between >= least], beside[beside >= least]
    per_length = intervals / cutoff
    with torch.no_grad():
        exact = function(between / per_length)
    _, slopes = _derivatives(function, beside / per_length, 2)
    return (
        _relative(interpolate(rows, between) - exact, exact),
        _relative(per_length * _slope(rows, beside) - slopes, slopes),
    )


def _relative(error: Tensor, exact: Tensor) -> float:
    largest = float(error.abs().max())
    return largest / float(exact.abs().max()) if largest else 0.0


def interpolate(rows: Tensor, positions: Tensor) -> Tensor:
    """Splines with coefficients [K + 1, order, n] at positions [P] in units of the spacing; the kernels' definition."""
    interval = positions.long().clamp(max=rows.shape[0] - 1)
    t = (positions - interval)[:, None]
    value = rows[interval, -1]
    for power in range(rows.shape[1] - 2, -1, -1):
        value = value * t + rows[interval, power]
    return value


def _slope(rows: Tensor, positions: Tensor) -> Tensor:
    """The derivative of :func:`interpolate` with respect to the positions."""
    interval = positions.long().clamp(max=rows.shape[0] - 1)
    t = (positions - interval)[:, None]
    slope = (rows.shape[1] - 1) * rows[interval, -1]
    for power in range(rows.shape[1] - 2, 0, -1):
        slope = slope * t + power * rows[interval, power]
    return slope
