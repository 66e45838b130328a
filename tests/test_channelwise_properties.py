"""Random tensor products of e3nn: the patched module and the kernels' own functions compute what e3nn does.

Every example compiles four kernels on the CPU, some seconds each, so that a run draws few; every run draws
others. A failure prints how to repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mace  # noqa: F401  before e3nn: prepares torch for reading its constants
import pytest
import torch
from e3nn import o3
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from oracles import assert_close, mace_product
from torch import Tensor

from mace_fast.kernels import ChannelwiseTensorProduct, channelwise_tp, channelwise_tp_conv, edge_graph
from mace_fast.patch import convert
from mace_fast.patch.blocks.tensor_product import FastTensorProduct, to_ir_mul, to_mul_ir
from mace_fast.patch.understand import read_channelwise

MULTIPLICITIES = (1, 5, 13, 32, 33, 128)
# Copies of the second operand are paths of their own: of many, little would be learned for much compilation.
COPIES = {"cpu": (1, 2, 5), "cuda": (1, 2, 5)}
MAX_DEGREE = {"cpu": 2, "cuda": 4}
HIGHEST_DEGREE = 6  # that kernels have
MAX_PATHS = {"cpu": 4, "cuda": 6}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NODES, EDGES = 6, 21

Product = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """An e3nn tensor product with 'uvu' paths, in words, and what it is evaluated in."""

    x: str
    y: str
    z: str
    paths: tuple[tuple[int, int, int, bool, float], ...]
    shared: bool
    irrep_normalization: str
    path_normalization: str
    dtype: torch.dtype
    seed: int

    def build(self) -> o3.TensorProduct:
        """The module, float64."""
        with default_dtype(torch.float64):
            return o3.TensorProduct(
                self.x,
                self.y,
                self.z,
                [(i, j, k, "uvu", weighted, factor) for i, j, k, weighted, factor in self.paths],
                irrep_normalization=self.irrep_normalization,
                path_normalization=self.path_normalization,
                shared_weights=self.shared,
                internal_weights=False,
            )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@st.composite
def problems(draw: st.DrawFn, device: str, multiplicities: tuple[int, ...] = MULTIPLICITIES) -> Problem:
    """Blocks of either parity; outputs that are shared by paths, and outputs that no path reaches."""

    def irreps(most: int, multiplicities: tuple[int, ...]) -> list[tuple[int, o3.Irrep]]:
        degrees, parities = st.integers(0, MAX_DEGREE[device]), st.sampled_from([-1, 1])
        blocks = st.lists(st.tuples(st.sampled_from(multiplicities), degrees, parities), min_size=1, max_size=most)
        return [(mul, o3.Irrep(degree, parity)) for mul, degree, parity in draw(blocks)]

    x, y = irreps(3, multiplicities), irreps(2, COPIES[device])
    products = [(i, j, ir) for i, (_, a) in enumerate(x) for j, (_, b) in enumerate(y) for ir in a * b]
    possible = [each for each in products if each[2].l <= HIGHEST_DEGREE]
    chosen = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=MAX_PATHS[device]))
    z: list[tuple[int, o3.Irrep]] = irreps(1, multiplicities) if draw(st.booleans()) else []
    paths = []
    for i, j, ir in chosen:
        block = (x[i][0], ir)
        if block not in z or draw(st.booleans()):
            z.append(block)
        slot = draw(st.sampled_from([k for k, other in enumerate(z) if other == block]))
        paths.append((i, j, slot, draw(st.booleans()), draw(st.floats(0.1, 3.0))))
    return Problem(
        *(str(o3.Irreps(blocks)) for blocks in (x, y, z)),
        paths=tuple(paths),
        shared=draw(st.booleans()),
        irrep_normalization=draw(st.sampled_from(["component", "norm", "none"])),
        path_normalization=draw(st.sampled_from(["element", "path", "none"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def examples(count: int) -> settings:
    """Fresh examples in every run; no shrinking, each step of which would compile kernels."""
    return settings(
        max_examples=count,
        derandomize=False,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize("device", ["cpu"])
@examples(6)
@given(data=st.data())
def test_equals_e3nn(device: str, data: st.DataObject) -> None:
    check(data.draw(problems(device)), device)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@examples(8)
@given(data=st.data())
def test_equals_e3nn_on_gpu(device: str, data: st.DataObject) -> None:
    check(data.draw(problems(device)), device)


@pytest.mark.parametrize("device", ["cpu"])
@examples(2)
@given(data=st.data())
def test_derivatives_by_finite_differences(device: str, data: st.DataObject) -> None:
    check_derivatives(data.draw(problems(device, (1, 5))), device)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@examples(2)
@given(data=st.data())
def test_derivatives_by_finite_differences_on_gpu(device: str, data: st.DataObject) -> None:
    check_derivatives(data.draw(problems(device, (1, 5))), device)


def check_derivatives(problem: Problem, device: str) -> None:
    """First and second derivatives of function and convolution, along random directions."""
    torch.manual_seed(problem.seed)
    d = read_channelwise("product", problem.build().to(device))
    sender, receiver = torch.randint(3, (2, 5), device=device)
    graph = edge_graph(sender, receiver, 3, 3)
    x, y = float32_numbers(device, 3, d.x_dim), float32_numbers(device, 5, d.y_dim)
    w = float32_numbers(device, *(() if problem.shared else (5,)), d.weight_numel)
    operands = [t.requires_grad_() for t in ((x, y, w) if d.weight_numel else (x, y))]

    def convolved(x: Tensor, y: Tensor, w: Tensor = w) -> Tensor:
        return channelwise_tp_conv(d, x, y, w, graph)

    def by_function(x: Tensor, y: Tensor, w: Tensor = w) -> Tensor:
        return channelwise_tp(d, x[sender], y, w)

    for function in (convolved, by_function):
        assert torch.autograd.gradcheck(function, operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


def check(problem: Problem, device: str) -> None:
    """Module, function and convolution: values, gradients and gradients of those; then equivariance."""
    torch.manual_seed(problem.seed)
    oracle = problem.build().to(device)
    fast = convert(oracle, verify=False).to(problem.dtype)
    assert isinstance(fast, FastTensorProduct)
    d = read_channelwise("product", oracle)
    x = float32_numbers(device, NODES, oracle.irreps_in1.dim)
    y = float32_numbers(device, EDGES, oracle.irreps_in2.dim)
    w = float32_numbers(device, *(() if problem.shared else (EDGES,)), oracle.weight_numel)
    sender = torch.randint(NODES, (EDGES,), device=device)

    def by_e3nn(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return oracle(x, y, w) if oracle.weight_numel else oracle(x, y)

    def by_module(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return fast(x, y, w) if oracle.weight_numel else fast(x, y)

    def by_function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return to_mul_ir(channelwise_tp(d, to_ir_mul(x, d.x), to_ir_mul(y, d.y), w), d.z)

    def operands_on(edges: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(edges[0])
        y = float32_numbers(device, rows, oracle.irreps_in2.dim)
        return x, y, w if problem.shared else float32_numbers(device, rows, oracle.weight_numel)

    def compare(function: Product, reference: Product, operands: Sequence[Tensor], strided: bool = False) -> None:
        inputs = [*operands, float32_numbers(device, *reference(*operands).shape)]
        cotangents = [float32_numbers(device, *t.shape) for t in operands]
        expected = results(reference, inputs, cotangents)
        given = [spaced(t.to(problem.dtype)) if strided else t.to(problem.dtype) for t in inputs]
        found = results(function, given, [t.to(problem.dtype) for t in cotangents])
        for actual, exact in zip(found, expected, strict=True):
            assert actual.dtype == problem.dtype
            assert_close(actual, exact, terms=1e3)

    for function in (by_module, by_function):
        compare(function, by_e3nn, (x[sender], y, w), strided=function is by_function)
    for name, edges in graphs(device).items():
        note(name)
        compare(*convolutions(d, by_e3nn, *edges), operands_on(edges), strided=name == "random")
    assert_equivariant(oracle, by_function, (x[sender], y, w), problem.dtype)


def graphs(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Senders and receivers, in no order."""
    sender, receiver = torch.randint(NODES, (2, EDGES), device=device)
    nowhere = sender[:0]
    many = torch.randint(NODES, (1000,), device=device)
    return {
        "random": (sender, receiver),
        "no edges": (nowhere, nowhere),
        "isolated nodes": (sender % 2 + 1, receiver % 2 + 3),
        "duplicates": (sender.repeat(2), receiver.repeat(2)),
        "a node with 1000 edges": (many, torch.full_like(many, 2)),
        "a sender of 1000 edges": (torch.full_like(many, 4), many),
    }


def convolutions(
    d: ChannelwiseTensorProduct, product: Product, sender: Tensor, receiver: Tensor
) -> tuple[Product, Product]:
    """The kernels' convolution on a graph, and the same by e3nn's ``product``."""
    graph = edge_graph(sender, receiver, NODES, NODES)

    def ours(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return to_mul_ir(channelwise_tp_conv(d, to_ir_mul(x, d.x), to_ir_mul(y, d.y), w, graph), d.z)

    def theirs(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return x.new_zeros(NODES, d.z_dim).index_add(0, receiver, product(x[sender], y, w))

    return ours, theirs


def spaced(tensor: Tensor) -> Tensor:
    """The same numbers, not contiguous in memory."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def float32_numbers(device: str, *shape: int) -> Tensor:
    """Normal numbers in float64 that are the same in float32."""
    return torch.randn(shape, dtype=torch.float32, device=device).double()


def results(function: Product, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Value, its gradients along the last of ``inputs``, and gradients of those, also by that last input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    *operands, g = leaves
    z = function(*operands)
    first = torch.autograd.grad(z, operands, g, create_graph=True, materialize_grads=True)
    used = [(a, c) for a, c in zip(first, cotangents, strict=True) if a.requires_grad]
    second = torch.autograd.grad([a for a, _ in used], leaves, [c for _, c in used], materialize_grads=True)
    return [z, *first, *second]


def assert_equivariant(
    oracle: o3.TensorProduct, function: Product, operands: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Under a random rotation with inversion, f(D x, D y) = D f(x, y)."""
    x, y, w = operands
    with default_dtype(torch.float64):
        rotation = -o3.rand_matrix()
        by_x, by_y, by_z = (
            irreps.D_from_matrix(rotation).T.to(x.device)
            for irreps in (oracle.irreps_in1, oracle.irreps_in2, oracle.irreps_out)
        )
    turned = function(*(t.to(dtype) for t in (x @ by_x, y @ by_y, w)))
    plain = function(*(t.to(dtype) for t in operands)).double() @ by_z
    assert_close(turned, plain, terms=1e3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_convolution_is_equivariant(seed: int, device: str, dtype: torch.dtype) -> None:
    """The convolution of a MACE layer, rotated and inverted; its gradient with respect to edge attributes too."""
    d = mace_product(2, 21)
    irreps = [o3.Irreps([(mul, (degree, (-1) ** degree)) for mul, degree in blocks]) for blocks in (d.x, d.y, d.z)]
    with default_dtype(torch.float64):
        rotation = -o3.rand_matrix()
        turns = [part.D_from_matrix(rotation).T.to(device) for part in irreps]
    x, y = (float32_numbers(device, rows, part.dim) for rows, part in zip((7, 90), irreps, strict=False))
    w, g = float32_numbers(device, 90, d.weight_numel), float32_numbers(device, 7, d.z_dim)
    sender, receiver = torch.randint(7, (2, 90), device=device)
    graph = edge_graph(sender, receiver, 7, 7)

    def run(x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
        x, y = (t.to(dtype).requires_grad_() for t in (x, y))
        z = to_mul_ir(channelwise_tp_conv(d, to_ir_mul(x, d.x), to_ir_mul(y, d.y), w.to(dtype), graph), d.z)
        return [z, *torch.autograd.grad(z, (x, y), g.to(dtype))]

    turned = run(x @ turns[0], y @ turns[1], g @ turns[2])
    for there, here, turn in zip(turned, run(x, y, g), (turns[2], *turns[:2]), strict=True):
        assert_close(there, here.double() @ turn, terms=1e4)
