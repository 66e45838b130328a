"""Clebsch-Gordan coefficients of real irreps of O(3), exact to float64, without torch.

The convention is e3nn's: components of l = 1 are ordered (x, y, z) after the change of basis below, each block is
real, and the sum of squares of one (l1, l2, l3) block is 1.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import factorial, sqrt

import numpy as np
from numpy.typing import NDArray


def _su2(j1: int, m1: int, j2: int, m2: int, j3: int, m3: int) -> float:
    """<j1 m1 j2 m2 | j3 m3> by Racah's formula in exact rational arithmetic; one square root at the end."""
    if m3 != m1 + m2:
        return 0.0
    f = factorial
    radicand = Fraction(
        (2 * j3 + 1)
        * f(j3 + j1 - j2)
        * f(j3 - j1 + j2)
        * f(j1 + j2 - j3)
        * f(j3 + m3)
        * f(j3 - m3)
        * f(j1 - m1)
        * f(j1 + m1)
        * f(j2 - m2)
        * f(j2 + m2),
        f(j1 + j2 + j3 + 1),
    )
    total = Fraction(0)
    for k in range(max(0, j2 - j3 - m1, j1 - j3 + m2), min(j1 + j2 - j3, j1 - m1, j2 + m2) + 1):
        denominator = (
            f(k) * f(j1 + j2 - j3 - k) * f(j1 - m1 - k) * f(j2 + m2 - k) * f(j3 - j2 + m1 + k) * f(j3 - j1 - m2 + k)
        )
        total += Fraction((-1) ** k, denominator)
    if total == 0:
        return 0.0
    square = total * total * radicand
    return (1.0 if total > 0 else -1.0) * sqrt(square)


def _real_to_complex(degree: int) -> NDArray[np.complex128]:
    """Unitary matrix from the real to the complex basis; the phase (-i)^l makes every coupling real."""
    q = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=np.complex128)
    q[degree, degree] = 1.0
    for m in range(1, degree + 1):
        q[degree - m, degree + m] = 1 / sqrt(2)
        q[degree - m, degree - m] = -1j / sqrt(2)
        q[degree + m, degree + m] = (-1) ** m / sqrt(2)
        q[degree + m, degree - m] = 1j * (-1) ** m / sqrt(2)
    return (-1j) ** degree * q


def _sorted_block(l1: int, l2: int, l3: int) -> NDArray[np.float64]:
    """The coupling for l1 <= l2 <= l3; e3nn's sign: the central entry is positive, or else the first non-zero one."""
    complex_basis = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            complex_basis[l1 + m1, l2 + m2, l3 + m1 + m2] = _su2(l1, m1, l2, m2, l3, m1 + m2)
    real = np.einsum(
        "ij,kl,mn,ikn->jlm",
        _real_to_complex(l1),
        _real_to_complex(l2),
        _real_to_complex(l3).conj().T,
        complex_basis,
    )
    if np.abs(real.imag).max() > 1e-10:
        raise AssertionError(f"coupling ({l1}, {l2}, {l3}) is not real in the real basis")
    c = real.real.copy()
    c[np.abs(c) < 1e-12] = 0.0
    c /= np.linalg.norm(c)
    leading = c[l1, l2, l3] if c[l1, l2, l3] != 0.0 else c[c != 0.0][0]
    return c if leading > 0 else -c


@cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> NDArray[np.float64]:
    """Real coupling coefficients C[i, j, k] of shape (2 l1 + 1, 2 l2 + 1, 2 l3 + 1), read-only, sum of squares 1.

    Signs are those of e3nn 0.4's ``wigner_3j``: an odd permutation of the three slots multiplies by
    (-1)^(l1 + l2 + l3). Entries that vanish by symmetry are exact zeros.

    Raises:
        ValueError: the degrees do not satisfy the triangle inequality.
    """
    degrees = (l1, l2, l3)
    if min(degrees) < 0 or not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"degrees l1={l1}, l2={l2}, l3={l3} do not satisfy |l1 - l2| <= l3 <= l1 + l2")
    order = sorted(range(3), key=lambda slot: degrees[slot])
    inversions = sum(order[a] > order[b] for a in range(3) for b in range(a + 1, 3))
    block = _sorted_block(*(degrees[slot] for slot in order))
    c = np.ascontiguousarray(block.transpose(np.argsort(order))) * (-1.0) ** (inversions * sum(degrees))
    c.setflags(write=False)
    return c
