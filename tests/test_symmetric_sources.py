"""Between a symmetric contraction and its kernels: description, plan, resources. CUDA against CPU."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_symmetric_contraction import CUBIC, TOLERANCE, default_dtype, error, random_polynomial

from mace_fast.kernels.build import compile_cuda
from mace_fast.kernels.description.polynomial import SymmetricContraction, Term, WeightedPolynomial
from mace_fast.kernels.ops.symmetric import (
    describe_symmetric_plan,
    symmetric_contraction,
    weighted_polynomial,
)
from mace_fast.kernels.plan import symmetric as plans
from mace_fast.kernels.source.symmetric import symmetric_cpu, symmetric_cuda

KINDS = ("evaluate", "gradient", "weights")


@cache
def production(lmax_out: int, dtype: torch.dtype = torch.float64, lmax: int = 3) -> SymmetricContraction:
    """The contraction of foundation models: l up to 3, correlation 3, outputs l = 0 .. lmax_out."""
    return SymmetricContraction.from_u_matrices(
        [u_matrices(lmax, degree, dtype) for degree in range(lmax_out + 1)],
        [2 * degree + 1 for degree in range(lmax + 1)],
        [2 * degree + 1 for degree in range(lmax_out + 1)],
    )


@cache
def u_matrices(lmax: int, degree: int, dtype: torch.dtype) -> list[np.ndarray]:
    from mace.tools.cg import U_matrix_real

    irreps = " + ".join(f"{d}{'eo'[d % 2]}" for d in range(lmax + 1))
    with default_dtype(dtype):
        return [
            U_matrix_real(irreps, f"{degree}{'eo'[degree % 2]}", nu, dtype=dtype, use_cueq_cg=False)[-1].numpy()
            for nu in (3, 2, 1)
        ]


def signed_tensors(p: WeightedPolynomial, nodes: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(nodes, p.num_inputs, channels, dtype=dtype)
    weights = torch.randn(7, p.num_weights, channels, dtype=dtype)
    return x, weights, torch.randint(7, (nodes,))


@pytest.mark.parametrize(
    ("lmax_out", "paths", "weights", "most_terms"), [(0, 28, 13, 94), (1, 86, 29, 480), (2, 159, 49, 1203)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_description_removes_dependent_paths(
    lmax_out: int, paths: int, weights: int, most_terms: int, dtype: torch.dtype
) -> None:
    d = production(lmax_out, dtype)
    assert (d.num_paths, d.polynomial.num_weights) == (paths, weights)
    assert len(d.polynomial.terms) <= 1.05 * most_terms
    assert max(abs(term.coefficient) for term in d.polynomial.terms) < 3.5


def test_description_survives_pickle_and_its_key() -> None:
    d = production(1)
    for copy in (pickle.loads(pickle.dumps(d)), SymmetricContraction.from_key(d.key)):
        assert copy == d and hash(copy) == hash(d) and copy.key == d.key
    assert WeightedPolynomial.from_key(d.polynomial.key) == d.polynomial
    for key in ("", "nonsense!", "bm9uc2Vuc2U="):
        with pytest.raises(ValueError, match="not the key of a description"):
            WeightedPolynomial.from_key(key)


def test_key_works_in_a_process_that_never_saw_the_description(tmp_path: Path, seed: int) -> None:
    p = CUBIC
    x, weights, species = signed_tensors(p, 3, 2, torch.float64)
    torch.save((p.key, x, weights, species, weighted_polynomial(p, x, weights, species)), tmp_path / "call.pt")
    code = (
        "import sys, torch, mace_fast.kernels.ops.symmetric\n"
        "key, x, weights, species, expected = torch.load(sys.argv[1])\n"
        "assert torch.equal(torch.ops.mace_fast.symmetric_value(x, None, weights, species, key), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "call.pt")], check=True)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((Term(0, 0, (1, 0), 1.0),), "ascending"),
        ((Term(0, 0, (), 1.0),), "at least one component"),
        ((Term(0, 0, (4,), 1.0),), "x has 4 components"),
        ((Term(1, 0, (0,), 1.0),), "1 outputs, 2 weights"),
        ((Term(0, 2, (0,), 1.0),), "1 outputs, 2 weights"),
        ((Term(0, 0, (0,), 1.0), Term(0, 0, (0,), 2.0)), "sorted and distinct"),
    ],
)
def test_wrong_polynomials(terms: tuple[Term, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedPolynomial((1, 3), (1,), 2, terms)


def test_wrong_u_matrices() -> None:
    u = np.zeros((4, 4, 1))
    build = SymmetricContraction.from_u_matrices
    with pytest.raises(ValueError, match=r"u_matrices\[0\]\[0\] has shape"):
        build([[u]], (1, 3), (1,))
    with pytest.raises(ValueError, match="1 lists of U matrices for 2 output blocks"):
        build([[u]], (1, 3), (1, 3))
    with pytest.raises(TypeError, match=r"u_matrices\[0\]\[1\] is int64"):
        build([[u, np.zeros((4, 1), dtype=np.int64)]], (1, 3), (1,))
    u[0, 0, 0] = np.nan
    with pytest.raises(Exception, match="not finite"):
        build([[u, np.zeros((4, 1))]], (1, 3), (1,))


def test_plan_counts_and_says_what_it_does() -> None:
    plan = describe_symmetric_plan(production(1))
    assert plan.scheme == "straight"
    assert plan.evaluate_operations < 1100 and plan.gradient_operations < 1700
    assert f"{plan.gradient_operations} for the gradient" in str(plan)
    # every term is in exactly one place
    in_sections = sum(len(pair.entries) for section in plan.sections for pair in section.pairs)
    assert len(plan.linear) + in_sections == len(plan.polynomial.terms)
    assert all(len(section.products) <= plans.MAX_PRODUCTS for section in plan.sections)


def test_large_polynomials_become_tables(rng: np.random.Generator) -> None:
    places = {tuple(sorted(int(m) for m in rng.integers(16, size=4))) for _ in range(3000)}
    p = WeightedPolynomial((1, 3, 5, 7), (1,), 1, tuple(Term(0, 0, monomial, 0.5) for monomial in sorted(places)))
    plan = plans.plan_symmetric(p)
    assert plan.gradient_operations > plans.MAX_STRAIGHT_OPERATIONS and str(plan).startswith("table")
    compiled = compile_cuda(symmetric_cuda(p, "gradient", False, "float32", "int64"), "sm_90")
    assert compiled.resources["symmetric_gradient"].spill_stores == 0


def test_float_literals_are_exact() -> None:
    p = WeightedPolynomial((1,), (1,), 1, (Term(0, 0, (0, 0), 0.1),))
    assert f"{(0.1).hex()} * q_0_0" in symmetric_cpu(p, "evaluate", False, "float64", "int64").text
    assert f"{float(np.float32(0.1)).hex()}f * q_0_0" in symmetric_cpu(p, "evaluate", False, "float32", "int64").text


# Everything that inference and training use at L = 1, and the widest kernels
COMPILED = [
    *((1, kind, tangent, "float32", arch) for kind in KINDS for tangent in (False, True) for arch in ("sm_90",)),
    *((2, kind, False, "float32", arch) for kind in KINDS for arch in ("sm_80", "sm_90", "sm_100")),
    *((2, "gradient", False, "float32", arch) for arch in ("sm_86", "sm_89", "sm_120")),
    *((1, kind, False, "float64", arch) for kind in KINDS for arch in ("sm_80", "sm_90", "sm_100")),
]


@pytest.mark.parametrize(("lmax_out", "kind", "tangent", "values", "arch"), COMPILED)
def test_cuda_compiles_quickly_and_fits_in_registers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lmax_out: int,
    kind: str,
    tangent: bool,
    values: str,
    arch: str,
) -> None:
    monkeypatch.setenv("MACE_FAST_CACHE", str(tmp_path))
    source = symmetric_cuda(production(lmax_out).polynomial, kind, tangent, values, "int64")
    before = time.process_time()
    compiled = compile_cuda(source, arch)
    assert time.process_time() - before < 10.0
    resources = compiled.resources[f"symmetric_{kind}"]
    if values == "float32":
        assert (resources.spill_stores, resources.spill_loads, resources.stack) == (0, 0, 0)
        assert resources.registers <= 168
    else:  # doubles take two registers; a few of some hundred values may wait in local memory
        assert resources.spill_stores <= 64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("nodes", "channels"), [(0, 4), (1, 1), (37, 5), (9, 33), (50, 128), (3, 512)])
@pytest.mark.parametrize("lmax_out", [0, 1, 2])
def test_cuda_is_cpu(seed: int, lmax_out: int, nodes: int, channels: int, dtype: torch.dtype) -> None:
    p = production(lmax_out).polynomial
    x, weights, species = signed_tensors(p, nodes, channels, dtype)
    grad, tangent = torch.randn(nodes, p.num_outputs, channels, dtype=dtype), torch.randn_like(x)
    results = []
    for device, kind in (("cuda", dtype), ("cuda", dtype), ("cpu", torch.float64)):
        x0 = x.to(device, kind).requires_grad_()
        w0 = weights.to(device, kind).requires_grad_()
        value = weighted_polynomial(p, x0, w0, species.to(device))
        dx, dw = torch.autograd.grad(value, (x0, w0), grad.to(device, kind), create_graph=True)
        second = torch.autograd.grad((dx * tangent.to(device, kind)).sum() + (dw**2).sum(), (x0, w0))
        results.append([t.detach().cpu() for t in (value, dx, dw, *second)])
    first, again, oracle = results
    for actual, repeated, expected in zip(first, again, oracle, strict=True):
        assert torch.equal(actual, repeated)
        assert error(actual, expected) < 20 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cuda_tables_are_cpu(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(plans, "MAX_STRAIGHT_OPERATIONS", 0)
    p = random_polynomial(rng, 4, 120)
    assert plans.plan_symmetric(p).scheme == "table"
    x, weights, species = signed_tensors(p, 20, 40, dtype)
    grad = torch.randn(20, p.num_outputs, 40, dtype=dtype)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        x0, w0 = x.to(device, kind).requires_grad_(), weights.to(device, kind).requires_grad_()
        value = weighted_polynomial(p, x0, w0, species.to(device))
        results.append([value, *torch.autograd.grad(value, (x0, w0), grad.to(device, kind))])
    for actual, expected in zip(*results, strict=True):
        assert error(actual.cpu(), expected) < 10 * TOLERANCE[dtype]


@pytest.mark.gpu
def test_cuda_answers_unknown_species_with_nan(seed: int) -> None:
    d = production(0)
    x = torch.randn(5, 16, 40, device="cuda", requires_grad=True)
    weights = torch.randn(2, d.num_paths, 40, device="cuda", requires_grad=True)
    species = torch.tensor([0, 2, 1, -1, 1], device="cuda")
    value = symmetric_contraction(d, x, weights, species)
    dx, dw = torch.autograd.grad(value, (x, weights), torch.ones_like(value))
    known = torch.tensor([True, False, True, False, True], device="cuda")
    for tensor in (value, dx):
        assert torch.isfinite(tensor[known]).all() and torch.isnan(tensor[~known]).all()
    assert torch.isfinite(dw).all()


@pytest.mark.gpu
def test_cuda_neither_synchronises_nor_leaves_the_current_stream(seed: int) -> None:
    p = production(0).polynomial
    x, weights, species = (t.cuda() for t in signed_tensors(p, 30, 64, torch.float32))
    weights.requires_grad_()
    expected = weighted_polynomial(p, x, weights, species)
    expected_dw = torch.autograd.grad(expected.sum(), weights)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            later = torch.zeros_like(x)
            later.copy_(x)
            value = weighted_polynomial(p, later, weights, species)
            dw = torch.autograd.grad(value.sum(), weights)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(value, expected) and torch.equal(dw, expected_dw)
