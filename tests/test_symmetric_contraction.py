"""symmetric_contraction against MACE's own SymmetricContraction in float64; its derivatives and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from mace_fast.kernels.build import CpuSource
from mace_fast.kernels.description.polynomial import SymmetricContraction, Term, WeightedPolynomial
from mace_fast.kernels.ops import symmetric as ops
from mace_fast.kernels.ops.symmetric import fold_weights, symmetric_contraction, weighted_polynomial
from mace_fast.kernels.plan import symmetric as plans
from mace_fast.kernels.source import symmetric as sources

TOLERANCE = {torch.float32: 2e-6, torch.float64: 3e-15}

# irreps of x, of the output, correlation, channels
SHAPES = [
    ("0e + 1o", "0e", 1, 1),
    ("0e + 1o", "1o + 0e", 4, 5),
    ("0e + 1o + 2e", "0e + 1o + 2e", 3, 13),
    ("0e + 1o + 2e", "1o", 4, 33),
    ("0e + 1o + 2e + 3o", "0e", 3, 32),
    ("0e + 1o + 2e + 3o", "0e + 1o", 3, 128),
    ("0e + 1o + 2e + 3o", "0e + 1o + 2e", 3, 8),
    ("0e + 1o + 2e + 3o + 4e", "2e + 0e", 2, 512),
    ("1o + 0e + 0o", "0o + 1e", 3, 16),  # irreps that MACE can be given and that a path may not reach
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """MACE makes buffers and parameters of torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def mace_contraction(
    irreps_in: str, irreps_out: str, correlation: int, channels: int, elements: int, dtype: torch.dtype
) -> Any:
    from mace.modules.symmetric_contraction import SymmetricContraction as MaceContraction

    o3 = __import__("e3nn.o3", fromlist=["Irreps"])
    with default_dtype(dtype):
        return MaceContraction(
            o3.Irreps([(channels, ir) for _, ir in o3.Irreps(irreps_in)]),
            o3.Irreps([(channels, ir) for _, ir in o3.Irreps(irreps_out)]),
            correlation,
            num_elements=elements,
        )


def describe(module: Any) -> SymmetricContraction:
    return SymmetricContraction.from_u_matrices(
        [[c.U_tensors(nu).numpy() for nu in range(c.correlation, 0, -1)] for c in module.contractions],
        [ir.dim for _, ir in module.contractions[0].coupling_irreps],
        [ir.dim for _, ir in module.irreps_out],
    )


def path_weights(module: Any) -> torch.Tensor:
    return torch.cat([w for c in module.contractions for w in (c.weights_max, *c.weights)], dim=1)


def mace_value(module: Any, x: torch.Tensor, species: torch.Tensor) -> torch.Tensor:
    """[N, M, C] -> [N, O, C] with MACE's own code."""
    elements = module.contractions[0].weights_max.shape[0]
    one_hot = torch.nn.functional.one_hot(species, elements).to(x.dtype)
    flat = module(x.transpose(1, 2), one_hot)
    blocks, at = [], 0
    for _, ir in module.irreps_out:
        size = x.shape[2] * ir.dim
        blocks.append(flat[:, at : at + size].reshape(x.shape[0], x.shape[2], ir.dim).transpose(1, 2))
        at += size
    return torch.cat(blocks, dim=1)


def error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest difference over the largest value; not-a-number passes no comparison."""
    if oracle.numel() == 0:
        return 0.0
    return float(
        (actual.detach().double() - oracle.detach()).abs().max() / oracle.detach().abs().max().clamp_min(1e-300)
    )


def random_polynomial(rng: np.random.Generator, degree: int, terms: int) -> WeightedPolynomial:
    """Any monomials of any degree up to `degree`, in any output: nothing that only MACE's have."""
    places = {
        (
            int(rng.integers(4)),
            int(rng.integers(5)),
            tuple(sorted(rng.integers(9, size=rng.integers(1, degree + 1)))),
        )
        for _ in range(terms)
    }
    chosen = sorted((o, w, tuple(int(m) for m in monomial)) for o, w, monomial in places)
    values = rng.choice([1.0, -1.0, 0.5, math.pi], size=len(chosen))
    return WeightedPolynomial(
        (1, 3, 5), (1, 3), 5, tuple(Term(*place, float(v)) for place, v in zip(chosen, values, strict=True))
    )


# Its kernels are compiled once and stay in the cache; what it is evaluated at is random in each run.
CUBIC = random_polynomial(np.random.default_rng(3), 3, 60)


def polynomial_value(
    p: WeightedPolynomial, x: torch.Tensor, weights: torch.Tensor, species: torch.Tensor
) -> torch.Tensor:
    """Term by term, in torch."""
    outputs = [torch.zeros_like(x[:, 0]) for _ in range(p.num_outputs)]
    for term in p.terms:
        product = term.coefficient * weights[species, term.weight]
        for m in term.monomial:
            product = product * x[:, m]
        outputs[term.output] = outputs[term.output] + product
    return torch.stack(outputs, dim=1)


@pytest.fixture
def fresh_plans() -> Iterator[Callable[[], None]]:
    """Forgets plans and sources, now and afterwards, so that a changed limit takes effect."""

    def forget() -> None:
        for cached in (
            plans.plan_symmetric,
            sources.symmetric_cpu,
            sources.symmetric_cuda,
            ops._cpu_function,
        ):
            cached.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("irreps_in", "irreps_out", "correlation", "channels"), SHAPES)
def test_value_and_gradients_are_maces(
    seed: int, irreps_in: str, irreps_out: str, correlation: int, channels: int, dtype: torch.dtype
) -> None:
    module = mace_contraction(irreps_in, irreps_out, correlation, channels, 4, dtype)
    description = describe(module)
    x = torch.randn(6, description.num_inputs, channels, dtype=dtype, requires_grad=True)
    weights = path_weights(module).detach().requires_grad_()
    species = torch.randint(4, (6,))

    value = symmetric_contraction(description, x, weights, species)
    grad = torch.randn_like(value)
    dx, dw = torch.autograd.grad(value, (x, weights), grad)

    oracle = module.double()
    x64 = x.detach().double().requires_grad_()
    expected = mace_value(oracle, x64, species)
    parameters = [p for c in oracle.contractions for p in (c.weights_max, *c.weights)]
    # where a correlation has no path, MACE freezes a weight at zero
    trained = [p.requires_grad for p in parameters]
    wanted = [x64, *(p for p in parameters if p.requires_grad)]
    expected_dx, *expected_dw = torch.autograd.grad(expected, wanted, grad.double())
    pieces = torch.split(dw, [p.shape[1] for p in parameters], dim=1)

    assert value.dtype == dtype
    assert error(value, expected) < TOLERANCE[dtype]
    assert error(dx, expected_dx) < TOLERANCE[dtype]
    trained_dw = torch.cat([piece for piece, kept in zip(pieces, trained, strict=True) if kept], dim=1)
    assert error(trained_dw, torch.cat(expected_dw, dim=1)) < TOLERANCE[dtype]


def test_float32_matrices_in_a_float64_model_are_reproduced_exactly(seed: int) -> None:
    module = mace_contraction("0e + 1o + 2e", "0e + 1o", 3, 8, 2, torch.float32).double()
    rounded = describe(module)
    removed = SymmetricContraction.from_u_matrices(
        [[c.U_tensors(nu).float().numpy() for nu in range(3, 0, -1)] for c in module.contractions],
        (1, 3, 5),
        (1, 3),
    )
    x = torch.randn(5, 9, 8, dtype=torch.float64)
    species = torch.randint(2, (5,))
    expected = mace_value(module, x, species)
    weights = path_weights(module)
    assert error(symmetric_contraction(rounded, x, weights, species), expected) < TOLERANCE[torch.float64]
    assert removed.polynomial.num_weights < rounded.polynomial.num_weights
    assert 1e-10 < error(symmetric_contraction(removed, x, weights, species), expected) < 1e-6


@pytest.mark.parametrize("limit", [0, 10**6], ids=["table", "straight"])
@pytest.mark.parametrize(("degree", "terms"), [(1, 10), (3, 60), (5, 40)])
def test_both_schemes_compute_any_polynomial(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    fresh_plans: Callable[[], None],
    limit: int,
    degree: int,
    terms: int,
) -> None:
    monkeypatch.setattr(plans, "MAX_STRAIGHT_OPERATIONS", limit)
    p = random_polynomial(rng, degree, terms)
    assert plans.plan_symmetric(p).scheme == ("straight" if limit else "table")
    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    species = torch.tensor([1, 0, 1, 1])
    value, expected = weighted_polynomial(p, x, weights, species), polynomial_value(p, x, weights, species)
    grad, tangent = torch.randn_like(value), torch.randn_like(x)
    results = []
    for v in (value, expected):
        dx, dw = torch.autograd.grad(v, (x, weights), grad, create_graph=True)
        second = torch.autograd.grad((dx * tangent).sum() + (dw**2).sum(), (x, weights), allow_unused=True)
        results.append([v, dx, dw, *(torch.zeros(()) if s is None else s for s in second)])
    for actual, oracle in zip(*results, strict=True):
        assert error(actual, oracle) < 1e-13


def test_second_derivatives(seed: int) -> None:
    module = mace_contraction("0e + 1o + 2e", "0e + 1o", 3, 2, 2, torch.float64)
    description = describe(module)
    species = torch.tensor([1, 0, 1])
    x = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    weights = path_weights(module).detach().requires_grad_()

    def function(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return symmetric_contraction(description, x, weights, species)

    assert torch.autograd.gradcheck(function, (x, weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x, weights.detach()), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: function(x.detach(), w), (weights,), fast_mode=True)


def test_third_derivative_is_refused(seed: int) -> None:
    p = CUBIC
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 5, 3, dtype=torch.float64)
    first = torch.autograd.grad(weighted_polynomial(p, x, weights, torch.tensor([0, 0])).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad((first**2).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="third derivatives with respect to x"):
        torch.autograd.grad(second.sum(), x)


def test_frozen_weights_take_no_gradient(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = CUBIC
    x = torch.randn(2, 9, 3, requires_grad=True)
    value = weighted_polynomial(p, x, torch.randn(1, 5, 3), torch.tensor([0, 0]))
    asked: list[str] = []
    load = ops.load_cpu

    def note(source: CpuSource) -> Any:
        asked.append(source.name)
        return load(source)

    monkeypatch.setattr(ops, "load_cpu", note)
    ops._cpu_function.cache_clear()
    value.sum().backward()
    assert asked == ["symmetric_gradient_float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_bits_at_every_call_and_number_of_threads(seed: int, dtype: torch.dtype) -> None:
    p = CUBIC
    x = torch.randn(100, 9, 21, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 5, 21, dtype=dtype, requires_grad=True)
    species = torch.randint(3, (100,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            value = weighted_polynomial(p, x, weights, species)
            results.append([value, *torch.autograd.grad(value.sum(), (x, weights))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("nodes", "channels", "elements"), [(0, 4, 2), (3, 0, 2), (0, 0, 0), (0, 3, 0)])
def test_nothing_to_compute(seed: int, nodes: int, channels: int, elements: int) -> None:
    p = CUBIC
    x = torch.randn(nodes, 9, channels, requires_grad=True)
    weights = torch.randn(elements, 5, channels, requires_grad=True)
    species = torch.zeros(nodes, dtype=torch.int64)
    value = weighted_polynomial(p, x, weights, species)
    assert value.shape == (nodes, 4, channels)
    dx, dw = torch.autograd.grad(value.sum(), (x, weights))
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weights))


def test_a_polynomial_without_terms_is_zero() -> None:
    p = WeightedPolynomial((1, 3), (3,), 0, ())
    x = torch.randn(2, 4, 5, requires_grad=True)
    value = weighted_polynomial(p, x, torch.randn(1, 0, 5), torch.tensor([0, 0]))
    assert torch.equal(value, torch.zeros(2, 3, 5))
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.zeros_like(x))


def test_strides_and_species_types(seed: int) -> None:
    p = CUBIC
    x, weights = torch.randn(7, 9, 6), torch.randn(2, 5, 6)
    species = torch.randint(2, (7,))
    expected = weighted_polynomial(p, x, weights, species)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(weighted_polynomial(p, strided, weights, species), expected)
    every_other = torch.stack([weights, weights], dim=1)[:, 1]
    assert torch.equal(weighted_polynomial(p, x, every_other, species), expected)
    assert torch.equal(weighted_polynomial(p, x, weights, species.to(torch.int32)), expected)
    assert torch.equal(weighted_polynomial(p, x, weights, species.repeat_interleave(2)[::2]), expected)
    x.requires_grad_()
    value = weighted_polynomial(p, x, weights, species)
    # the gradient of a sum is an expanded tensor without memory of its own
    assert torch.equal(
        torch.autograd.grad(value.sum(), x, retain_graph=True)[0],
        torch.autograd.grad(value, x, torch.ones_like(value))[0],
    )


def test_opcheck(seed: int) -> None:
    p = CUBIC
    x = torch.randn(4, 9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    species = torch.tensor([0, 1, 1, 0])
    namespace = torch.ops.mace_fast
    for tangent in (None, torch.randn_like(x)):
        torch.library.opcheck(namespace.symmetric_value, (x, tangent, weights, species, p.key))
        torch.library.opcheck(namespace.symmetric_weights, (x, tangent, species, grad, p.key, 2))
    torch.library.opcheck(namespace.symmetric_gradient, (x, None, weights, species, grad, p.key))


CHANGES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], type[Exception], str]] = [
    ("x", lambda t: t.half(), TypeError, "x is torch.float16"),
    ("x", lambda t: t[0], ValueError, "x has shape"),
    ("x", lambda t: t[:, :-1], ValueError, r"x has shape \(3, 3, 2\); it must be \(3, 4, 2\)"),
    ("weights", lambda t: t.double(), TypeError, "weights is torch.float64, but x is torch.float32"),
    ("weights", lambda t: t[:, :-1], ValueError, "weights has shape"),
    ("weights", lambda t: t[..., :1], ValueError, "weights has shape"),
    ("weights", lambda t: t.to("meta"), ValueError, "weights is on meta"),
    ("species", lambda t: t.float(), TypeError, "species is torch.float32"),
    ("species", lambda t: t[:-1], ValueError, "species has shape"),
    ("species", lambda t: t[:, None], ValueError, "species has shape"),
    ("species", lambda t: t + 2, ValueError, "species has values from 2 to 3, but there are weights for 2"),
    ("species", lambda t: t - 1, ValueError, "species has values from -1 to 0"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), CHANGES)
def test_wrong_arguments(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], kind: type[Exception], message: str
) -> None:
    p = WeightedPolynomial((1, 3), (1,), 2, (Term(0, 0, (0,), 1.0), Term(0, 1, (1, 1), 2.0)))
    good = {"x": torch.randn(3, 4, 2), "weights": torch.randn(2, 2, 2), "species": torch.tensor([0, 1, 1])}
    weighted_polynomial(p, **good)
    with pytest.raises(kind, match=message):
        weighted_polynomial(p, **{**good, name: change(good[name])})


def test_fold_checks_its_weights() -> None:
    description = SymmetricContraction.from_u_matrices([[np.eye(4)[:, :, None], np.eye(4)[0][:, None]]], (1, 3), (1,))
    assert fold_weights(description, torch.randn(2, 2, 3)).shape == (2, description.polynomial.num_weights, 3)
    with pytest.raises(ValueError, match="weights has shape"):
        fold_weights(description, torch.randn(2, 3, 3))
