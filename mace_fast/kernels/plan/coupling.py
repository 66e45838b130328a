"""Static analysis of one path: the distinct linear forms in y that couple x to z.

M[i, k] = coefficient * sum_j C[i, j, k] y[j] is the same for all channels. Many of its entries are zero, and others
equal one another up to sign; only the distinct ones ('entries') are computed, stored and read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.description.channelwise import FlatPath

_RELATIVE_ZERO = 1e-12


@dataclass(frozen=True)
class Use:
    """M[i, k] = sign * entries[entry]."""

    i: int
    k: int
    entry: int
    sign: int


@dataclass(frozen=True)
class Coupling:
    """The non-zero structure of one path.

    Attributes:
        entries: for each distinct form, its terms (j, value), coefficient included.
        uses: the non-zero M[i, k], by i then k.
        triples: (i, j, k, value) of all non-zero couplings, coefficient included.
    """

    entries: tuple[tuple[tuple[int, float], ...], ...]
    uses: tuple[Use, ...]
    triples: tuple[tuple[int, int, int, float], ...]


@lru_cache(maxsize=1024)
def coupling(l1: int, l2: int, l3: int, coefficient: float) -> Coupling:
    """Distinct entries of the coupling of one (l1, l2, l3) path."""
    c = clebsch_gordan(l1, l2, l3)
    entries: list[tuple[tuple[int, float], ...]] = []
    uses: list[Use] = []
    triples: list[tuple[int, int, int, float]] = []
    for i in range(2 * l1 + 1):
        for k in range(2 * l3 + 1):
            terms = tuple((j, float(c[i, j, k]) * coefficient) for j in range(2 * l2 + 1) if c[i, j, k] != 0.0)
            if not terms or coefficient == 0.0:
                continue
            triples.extend((i, j, k, value) for j, value in terms)
            for number, known in enumerate(entries):
                sign = _proportional_by_sign(known, terms)
                if sign:
                    uses.append(Use(i, k, number, sign))
                    break
            else:
                entries.append(terms)
                uses.append(Use(i, k, len(entries) - 1, 1))
    return Coupling(tuple(entries), tuple(uses), tuple(triples))


def of_path(path: FlatPath) -> Coupling:
    """The coupling of a flat path."""
    return coupling(path.l1, path.l2, path.l3, path.coefficient)


def _proportional_by_sign(a: tuple[tuple[int, float], ...], b: tuple[tuple[int, float], ...]) -> int:
    """+1 or -1 when b equals that multiple of a, up to rounding of the coefficients; else 0."""
    if [j for j, _ in a] != [j for j, _ in b]:
        return 0
    for sign in (1, -1):
        if all(abs(vb - sign * va) <= _RELATIVE_ZERO * abs(va) for (_, va), (_, vb) in zip(a, b, strict=True)):
            return sign
    return 0
