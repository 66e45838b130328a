"""When two results are the same: the tolerances in float64 and in float32, and why they are what they are.

float64
    ||candidate - reference|| <= 1e-12 * scale, for each structure (or tensor) by itself. The scale is the
    norm of the reference, or of the terms it is a sum of, if these are larger: energies are sums of
    isolated-atom energies and interaction energies that may cancel, forces and virials sums over edges that
    cancel in a symmetric crystal. Rounding is proportional to the terms, not to what is left of them. Where
    even this is not reached, the reference's own rounding error is the measure: its float32 error times
    eps(float64)/eps(float32), times 16; a quantity that vanishes identically (the gradient of a parameter
    that cancels out) has no other scale.

float32
    The distance to the float64 result is at most twice that of the reference's own float32, plus 4 ulp of the
    scale. Both are root mean squares of relative errors over all numbers of all structures, for a single
    error is a random number: in two orders of summation one number may be off by 0.1 ulp here and by 3 there.
    A mean in which one structure outweighs the others is hardly less random. What exceeds the tolerance is
    therefore measured again, on more copies of the structures with every atom displaced a little, and judged by
    the mean over all of them, by the same factor: chance is averaged away, a fault is not. (With the same model
    on rotated and renumbered structures, which round differently everywhere, the measured ratio stays between
    0.9 and 1.2 over nine copies, between 0.7 and 1.7 on one.) Where only a few of the structures are looked at,
    the reference's error is taken over all if it is larger there. A fault of one part in 1e5 in a single
    structure stands out of the mean, which is of the order of 1e-6.

    Tensors one by one, inputs and outputs of a module, have no structures to average over. How many random
    numbers such a mean holds is estimated by the participation ratio n = (sum e^2)^2 / sum e^4 of the
    reference's errors e; the ratio of two such means follows the F distribution with (n, n) degrees of freedom,
    and the factor two is widened by the square root of its one-in-a-million quantile, but at most fourfold, for
    a tensor may be one number. They too are measured again where they exceed this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

FLOAT64_TOLERANCE = 1e-12
FLOAT32_FACTOR = 2.0
FLOAT32_FLOOR_ULPS = 4.0
MORE_COPIES = 8
"""On how many displaced copies a float32 result that exceeds its tolerance is measured again."""
_NOISE_FACTOR = 16.0
_FALSE_ALARM = 1e-6
_MOST_LUCK = 4.0
_BEYOND_DOUBT = 1000.0
_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@dataclass(frozen=True)
class Part:
    """One structure's share of a quantity, or one tensor; float64 on the CPU.

    Attributes:
        name: of the structure or tensor.
        oracle: what the reference computes in float64.
        candidate: what the candidate computes, same shape.
        reference: what the reference computes in the candidate's dtype; None in float64 where it is the
            oracle.
        terms: norm of the terms that the quantity is a sum of, 0 where nothing better than the oracle's norm
            is known.
    """

    name: str
    oracle: torch.Tensor
    candidate: torch.Tensor
    reference: torch.Tensor | None
    terms: float = 0.0

    @property
    def scale(self) -> float:
        return max(_norm(self.oracle), self.terms)

    @classmethod
    def merged(cls, copies: Sequence[Part]) -> Part:
        """The same part of several evaluations as one, with all their numbers."""
        references = [part.reference for part in copies if part.reference is not None]
        return cls(
            copies[0].name,
            torch.cat([part.oracle.flatten() for part in copies]),
            torch.cat([part.candidate.flatten() for part in copies]),
            torch.cat([reference.flatten() for reference in references]) if references else None,
            float(np.sqrt(sum(part.terms**2 for part in copies))),
        )


@dataclass(frozen=True)
class Verdict:
    """Relative errors and tolerance of one quantity; ``worst`` names the structure or tensor furthest off."""

    worst: str
    scale: float
    error: float
    reference_error: float
    tolerance: float
    passed: bool
    note: str = ""


def judge_float64(parts: Sequence[Part], noise: Sequence[float] | None = None) -> Verdict:
    """Each part by itself; ``noise`` is the norm of the reference's float32 error of each part, if known."""
    ratios, verdicts = [], []
    for index, part in enumerate(parts):
        scale = part.scale
        error = _norm(part.candidate - part.oracle)
        allowed = FLOAT64_TOLERANCE * scale
        if noise is not None and np.isfinite(noise[index]):
            allowed = max(allowed, _NOISE_FACTOR * noise[index] * _EPS[torch.float64] / _EPS[torch.float32])
        passed = bool(np.isfinite(error) and error <= allowed)
        ratios.append(_ratio(error, allowed))
        verdicts.append(
            Verdict(
                part.name,
                scale,
                _ratio(error, scale),
                0.0,
                max(_ratio(allowed, scale), FLOAT64_TOLERANCE),
                passed,
            )
        )
    return _explained(verdicts[int(np.argmax(ratios))], parts[int(np.argmax(ratios))])


def judge_float32(parts: Sequence[Part], typical: float = 0.0) -> Verdict:
    """All parts together: root mean square of relative errors, a part weighted by how many numbers it has.

    ``typical`` is the reference's relative error in more structures than these, where it is known.
    """
    candidate = [_relative_error(part, part.candidate) for part in parts]
    reference = [_relative_error(part, part.reference) for part in parts]
    counts = [part.oracle.numel() for part in parts]
    error, reference_error = _rms(candidate, counts), max(_rms(reference, counts), typical)
    tolerance = FLOAT32_FACTOR * reference_error + FLOAT32_FLOOR_ULPS * _EPS[torch.float32]
    worst = int(np.argmax(candidate))
    scale = _rms([part.scale for part in parts], [1] * len(parts))
    passed = bool(np.isfinite(tolerance) and error <= tolerance)
    return _explained(Verdict(parts[worst].name, scale, error, reference_error, tolerance, passed), parts[worst])


def is_doubtful(error: float, tolerance: float) -> bool:
    """Whether a float32 error exceeds its tolerance, but not by more than chance ever brings about."""
    return bool(tolerance < error <= _BEYOND_DOUBT * tolerance)


def reference_error_float32(parts: Sequence[Part]) -> float:
    """Root mean square of the reference's relative errors."""
    return _rms([_relative_error(part, part.reference) for part in parts], [part.oracle.numel() for part in parts])


def judge_tensors_float32(parts: Sequence[Part], *, independent: bool = True) -> Verdict:
    """Each tensor by itself: parameter gradients, outputs of a module.

    A tensor may hold one number only, whose rounding error in the reference is small by luck. The measure is
    therefore the reference's relative error of this tensor, or the median over all tensors if that is larger.
    The numbers of a parameter's gradient are not ``independent``: the same few edges bring most of their
    rounding.
    """
    own = [_relative_error(part, part.reference) for part in parts]
    typical = float(np.median(own))
    verdicts, ratios = [], []
    for part, reference_error in zip(parts, own, strict=True):
        error = _relative_error(part, part.candidate)
        luck = _luck(_reference_noise(part)) if independent else _MOST_LUCK
        tolerance = FLOAT32_FACTOR * luck * max(reference_error, typical) + FLOAT32_FLOOR_ULPS * _EPS[torch.float32]
        passed = bool(np.isfinite(tolerance) and error <= tolerance)
        ratios.append(_ratio(error, tolerance) if np.isfinite(tolerance) else np.inf)
        verdicts.append(Verdict(part.name, part.scale, error, reference_error, tolerance, passed))
    worst = int(np.argmax(ratios))
    return _explained(verdicts[worst], parts[worst])


def _norm(values: torch.Tensor) -> float:
    """Euclidean norm; infinite where a value is not finite, so that nothing such ever compares as small."""
    norm = float(torch.linalg.vector_norm(values))
    return norm if np.isfinite(norm) else float("inf")


def _ratio(value: float, unit: float) -> float:
    """value / unit; 0 / 0 = 0, for two exact zeros agree."""
    if value == 0.0:
        return 0.0
    if not np.isfinite(value) or unit == 0.0:
        return float("inf")
    return value / unit


def _relative_error(part: Part, values: torch.Tensor | None) -> float:
    assert values is not None
    return _ratio(_norm(values - part.oracle), part.scale)


def _reference_noise(part: Part) -> torch.Tensor:
    """The reference's rounding errors, number by number, in units of a typical number of the part."""
    if part.reference is None or part.scale == 0.0:
        return torch.zeros(0, dtype=torch.float64)
    return ((part.reference - part.oracle) * (part.oracle.numel() ** 0.5 / part.scale)).flatten()


def _rms(values: Sequence[float], counts: Sequence[int]) -> float:
    """Root mean square with weights; infinite if a value is."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.sqrt(np.average(np.square(values), weights=counts)))


def _luck(errors: torch.Tensor) -> float:
    """How much larger than another one a root mean square of so many errors may be by chance; 1 to 4."""
    squares = errors.double().square()
    fourth = float(squares.square().sum())
    if fourth == 0.0 or not np.isfinite(fourth):
        return 1.0
    count = max(float(squares.sum()) ** 2 / fourth, 1.0)
    return min(float(np.sqrt(stats.f.isf(_FALSE_ALARM, count, count))), _MOST_LUCK)


def _explained(verdict: Verdict, part: Part) -> Verdict:
    """The verdict, with what is peculiar about a failing candidate's values."""
    if verdict.passed:
        return verdict
    return Verdict(**{**vars(verdict), "note": _explanation(part)})


def _explanation(part: Part) -> str:
    candidate, oracle = part.candidate.flatten(), part.oracle.flatten()
    if not bool(torch.isfinite(oracle).all()):
        return "the reference itself is not finite in float64"
    if part.reference is not None and not bool(torch.isfinite(part.reference).all()):
        return "the reference itself is not finite in this dtype"
    bad = int((~torch.isfinite(candidate)).sum())
    if bad:
        return f"{bad} of {candidate.numel()} numbers are NaN or infinite"
    size = float(oracle.square().sum())
    if size == 0.0:
        return "the reference is exactly zero"
    if not bool(candidate.any()):
        return "the candidate is exactly zero"
    factor = float(candidate @ oracle) / size
    if candidate.numel() > 1 and _norm(candidate - factor * oracle) < 1e-2 * _norm(candidate - oracle):
        return f"the candidate is {factor:.9g} times the reference"
    off = (candidate - oracle).abs()
    count = int((off > 0.1 * off.max()).sum())
    return f"{count} of {candidate.numel()} numbers carry the error" if candidate.numel() > 1 else ""
