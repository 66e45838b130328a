"""What the tests of patching share: small models, one evaluation, one criterion; and tests that the criterion
can fail.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from mace_fast import zoo
from mace_fast.zoo import Architecture

QUANTITIES = ("energy", "node_energy", "forces", "stress", "node_feats")
FLOAT64_TOLERANCE = 1e-12


@lru_cache(maxsize=64)
def _built(architecture_key: tuple, seed: int) -> torch.nn.Module:  # type: ignore[type-arg]
    architecture = Architecture(**{k: (dict(v) if k == "embedding_specs" and v else v) for k, v in architecture_key})
    return zoo.build(architecture, seed=seed)


def small_model(
    variant: str = "base", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes
) -> torch.nn.Module:
    """A fresh copy of a small model of the zoo; building is slow (opt_einsum), copying is not."""
    architecture = replace(zoo.small_variants()[variant], **changes)
    key = tuple(
        (k, tuple(sorted(v.items())) if isinstance(v, dict) and k == "embedding_specs" else v)
        for k, v in vars(architecture).items()
    )
    try:
        hash(key)
    except TypeError:  # specifications of embeddings hold dictionaries
        return zoo.build(architecture, seed=seed).to(dtype)
    return copy.deepcopy(_built(key, seed)).to(dtype)


def structures(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A batch with a periodic crystal, a molecule without a cell, an isolated atom; no symmetry. float64."""
    from ase import Atoms

    numbers = model.atomic_numbers.cpu().numpy()
    cell = np.array([[3.4, 0.2, 0.0], [0.7, 3.1, -0.3], [-0.5, 0.4, 3.6]])
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + rng.uniform(-0.06, 0.06, (4, 3))
    places = 1.4 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    frames = [
        Atoms(rng.choice(numbers, 4), scaled_positions=sites, cell=cell, pbc=True),
        Atoms(rng.choice(numbers, 5), positions=places + rng.normal(scale=0.1, size=(5, 3))),
        Atoms(rng.choice(numbers, 1), positions=rng.normal(size=(1, 3))),
    ]
    heads = list(model.heads)
    chosen = [heads[i % len(heads)] for i in range(len(frames))]
    return zoo.batch(frames, model, dtype=torch.float64, device="cpu", head=chosen)


def evaluate(model: torch.nn.Module, data: dict[str, torch.Tensor], **arguments: bool) -> dict[str, torch.Tensor]:
    """Results in the model's own dtype and on its device, as float64 on the CPU."""
    parameter = next(model.parameters())
    before = torch.get_default_dtype()
    torch.set_default_dtype(parameter.dtype)  # mace-torch creates tensors of the default dtype
    try:
        inputs = {
            k: v.detach().clone().to(parameter.device, parameter.dtype if v.is_floating_point() else v.dtype)
            for k, v in data.items()
        }
        out = model(inputs, **(arguments or {"compute_stress": True}))
    finally:
        torch.set_default_dtype(before)
    return {k: v.detach().cpu().double() for k, v in out.items() if isinstance(v, torch.Tensor) and k in QUANTITIES}


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error over the root mean square of what is exact."""
    size = float(exact.norm())
    return float((value - exact).norm()) / size if size > 0 else float((value - exact).norm())


def assert_same(fast: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every quantity of the reference is there, finite, not trivially zero, and equal to a relative
    tolerance.
    """
    assert set(reference) == set(QUANTITIES) & set(reference) == set(fast) and "energy" in reference
    for name, exact in reference.items():
        assert fast[name].shape == exact.shape, f"{name}: {fast[name].shape} instead of {exact.shape}"
        error = relative_error(fast[name], exact)
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"
    assert float(reference["energy"].abs().max()) > 0


def assert_as_good_in_float32(
    fast: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """No further from float64 than twice the reference's own float32, plus rounding of the number itself."""
    eps = torch.finfo(torch.float32).eps
    for name in exact:
        error, own = relative_error(fast[name], exact[name]), relative_error(reference[name], exact[name])
        # An energy is one number, whose error in the reference may be small by luck: energies share a scale
        # of error.
        floor = (16 if "energy" in name else 8) * eps
        assert error <= 2 * own + floor, f"{name}: {error:.2e}, mace-torch's own float32 is at {own:.2e}"


def test_criterion_sees_small_errors(rng: np.random.Generator) -> None:
    exact = {"energy": torch.tensor(rng.normal(size=3)), "forces": torch.tensor(rng.normal(size=(7, 3)))}
    assert_same(exact, exact, FLOAT64_TOLERANCE)
    for name in exact:
        off = {**exact, name: exact[name] * (1 + 1e-11)}
        with pytest.raises(AssertionError, match=name):
            assert_same(off, exact, FLOAT64_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same({"energy": exact["energy"]}, exact, FLOAT64_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same({**exact, "forces": exact["forces"] * torch.nan}, exact, FLOAT64_TOLERANCE)


def test_float32_criterion_sees_small_errors(rng: np.random.Generator) -> None:
    exact = {"forces": torch.tensor(rng.normal(size=(40, 3)))}
    noise = torch.tensor(rng.normal(size=(40, 3))) * 1e-6
    reference = {"forces": exact["forces"] + noise}
    assert_as_good_in_float32({"forces": exact["forces"] - noise}, reference, exact)
    with pytest.raises(AssertionError, match="forces"):
        assert_as_good_in_float32({"forces": exact["forces"] + 4 * noise}, reference, exact)


def test_small_model_is_a_fresh_copy() -> None:
    first, second = small_model(), small_model()
    assert first is not second
    assert next(first.parameters()) is not next(second.parameters())
    assert torch.equal(next(first.parameters()), next(second.parameters()))
