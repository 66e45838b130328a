"""Real Clebsch-Gordan coefficients against e3nn's."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn: prepares torch for reading its constants
import numpy as np
import pytest
import torch
from e3nn import o3

from mace_fast.kernels.cg import clebsch_gordan


def test_equal_e3nn_to_rounding() -> None:
    for l1 in range(5):
        for l2 in range(5):
            for l3 in range(abs(l1 - l2), min(l1 + l2, 6) + 1):
                expected = o3.wigner_3j(l1, l2, l3, dtype=torch.float64).numpy()
                assert np.abs(clebsch_gordan(l1, l2, l3) - expected).max() < 1e-14, (l1, l2, l3)


def test_refuses_what_cannot_couple_and_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="l1=1, l2=1, l3=3"):
        clebsch_gordan(1, 1, 3)
    with pytest.raises(ValueError, match="read-only"):
        clebsch_gordan(1, 1, 2)[0] = 1.0
