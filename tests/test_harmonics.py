"""Edge lengths and spherical harmonics, and their gradient, against e3nn."""

from __future__ import annotations

import mace  # noqa: F401  before e3nn: prepares torch for reading its constants
import pytest
import torch
from e3nn import o3
from oracles import assert_close

from mace_fast.kernels.ops.harmonics import edge_harmonics

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lmax", [1, 2, 3, 4])
def test_values_and_gradient(seed: int, device: str, dtype: torch.dtype, lmax: int) -> None:
    oracle_vectors = torch.randn(201, 3, dtype=torch.float64, requires_grad=True)
    vectors = oracle_vectors.detach().to(device, dtype).requires_grad_()
    radius, y = edge_harmonics(vectors, lmax)
    oracle = o3.spherical_harmonics(list(range(lmax + 1)), oracle_vectors, True, "component")
    assert_close(y, oracle)
    assert_close(radius, oracle_vectors.norm(dim=1))
    a, b = torch.randn(201, dtype=torch.float64), torch.randn_like(oracle)
    (expected,) = torch.autograd.grad([oracle_vectors.norm(dim=1), oracle], oracle_vectors, [a, b])
    (got,) = torch.autograd.grad([radius, y], vectors, [a.to(device, dtype), b.to(device, dtype)])
    assert_close(got, expected, terms=1e4)  # short vectors: the gradient of a direction goes as 1 / length


def test_no_edges_and_wrong_input() -> None:
    radius, y = edge_harmonics(torch.empty(0, 3), 3)
    assert radius.shape == (0,) and y.shape == (0, 16)
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        edge_harmonics(torch.empty(4, 2), 3)
    with pytest.raises(ValueError, match="lmax is 7"):
        edge_harmonics(torch.empty(4, 3), 7)
    with pytest.raises(TypeError, match="int64"):
        edge_harmonics(torch.zeros(4, 3, dtype=torch.int64), 1)


def test_length_zero_is_not_a_number() -> None:
    _, y = edge_harmonics(torch.zeros(1, 3), 1)
    assert torch.isnan(y[0, 1:]).all()
