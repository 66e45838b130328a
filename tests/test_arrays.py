"""Comparisons of arrays that each step makes."""

from __future__ import annotations

import numpy as np
import pytest

from mace_fast.inference.arrays import all_finite, fingerprint, same


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.bool_])
def test_same_is_array_equal(shape: tuple[int, ...], dtype: type, rng: np.random.Generator) -> None:
    a = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    others = [a.copy(), 1 - a.astype(np.int64), a[..., None], a.astype(np.float64) * -1.0]
    for b in others:
        assert same(a, b) is np.array_equal(a, b)
    assert not same(np.array([np.nan]), np.array([np.nan]))


def test_all_finite(rng: np.random.Generator) -> None:
    values = rng.normal(size=(9, 3))
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values * 1e300)
    for bad in (np.nan, np.inf, -np.inf):
        broken = values.copy()
        broken[4, 1] = bad
        assert not all_finite(broken)


def test_a_fingerprint_is_kept_by_value(rng: np.random.Generator) -> None:
    a = rng.integers(0, 9, (4, 3))
    key = fingerprint(a, a[0])
    assert key == fingerprint(a.copy(), a[0].copy())
    assert key != fingerprint(a.T.copy(), a[0]) and key != fingerprint(a.astype(np.float64), a[0])
    assert key == fingerprint(np.asfortranarray(a), a[0]), "of what is in it, however it lies"
    a[2, 2] += 1
    assert key != fingerprint(a, a[0])
