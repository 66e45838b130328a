"""A training step through the fast blocks: losses on forces reach every parameter by second derivatives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_patch_support import small_model, structures

from mace_fast import zoo
from mace_fast.patch import convert, patch


def _loss_gradients(model: torch.nn.Module, data: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        out = model(zoo.copy_graph(data), training=True, compute_stress=True)
        loss = sum(
            (torch.randn(out[name].shape, generator=generator, dtype=torch.float64) * out[name]).sum()
            for name in ("energy", "forces", "stress")
        )
        model.zero_grad()
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


BLOCKS = [f"both/{block}" for block in zoo.INTERACTION_BLOCKS] + [
    "nonlinear_foundation",
    "correlation4",
    "multi_head",
]


@pytest.mark.parametrize("variant", BLOCKS)
def test_parameter_gradients_are_equal(variant: str, seed: int, rng: np.random.Generator) -> None:
    _assert_equal_gradients(small_model(variant).train(), seed, rng)


def test_parameter_gradients_where_most_species_are_absent(seed: int, rng: np.random.Generator) -> None:
    """Weights of species that do not occur get the gradient zero, not none."""
    _assert_equal_gradients(small_model(atomic_numbers=tuple(range(1, 31))).train(), seed, rng)


def _assert_equal_gradients(model: torch.nn.Module, seed: int, rng: np.random.Generator) -> None:
    data = structures(model, rng)
    fast = convert(model, verify=False)
    assert fast.training
    theirs, ours = _loss_gradients(model, data, seed), _loss_gradients(fast, data, seed)
    assert theirs.keys() == ours.keys()
    assert any("conv_tp_weights" in name for name in ours) and any("symmetric_contractions" in name for name in ours)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        # The gradient of a parameter that cancels out is rounding error on the scale of the others.
        scale = max(float(gradient.norm()), 1e-4 * largest)
        assert float((ours[name] - gradient).norm()) <= 1e-12 * scale, name


def test_a_wrong_gradient_is_seen(rng: np.random.Generator) -> None:
    model = small_model()
    data = structures(model, rng)
    fast = convert(model, verify=False)
    theirs = _loss_gradients(model, data, 1)
    with torch.no_grad():
        fast.interactions[1].linear.weight[0] *= 1 + 1e-6
    ours = _loss_gradients(fast, data, 1)
    assert any(float((ours[n] - g).norm()) > 1e-12 * float(g.norm()) for n, g in theirs.items())


def test_optimiser_steps_through_a_patched_model(rng: np.random.Generator) -> None:
    """An optimiser made before patching keeps training the same tensors."""
    model = small_model("both/RealAgnosticDensityResidualInteractionBlock").train()
    twin = copy.deepcopy(model)
    data = structures(model, rng)
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, twin)]
    patch(model, verify=False)
    for step in range(3):
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            _loss_gradients(m, data, step)
            optimiser.step()
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11), name
    assert not torch.equal(next(twin.parameters()), next(small_model().parameters()))


def test_frozen_parameters_stay_frozen(rng: np.random.Generator) -> None:
    model = small_model()
    model.interactions[0].linear_up.weight.requires_grad_(False)
    fast = convert(model, verify=False)
    gradients = _loss_gradients(fast, structures(model, rng), 0)
    assert "interactions.0.linear_up.weight" not in gradients
    assert "interactions.0.linear.weight" in gradients


def test_same_bits_twice(rng: np.random.Generator) -> None:
    model = convert(small_model("both/RealAgnosticResidualNonLinearInteractionBlock").train(), verify=False)
    data = structures(model, rng)
    first = {n: g.clone() for n, g in _loss_gradients(model, data, 3).items()}
    second = _loss_gradients(model, data, 3)
    assert all(torch.equal(first[n], second[n]) for n in first)
