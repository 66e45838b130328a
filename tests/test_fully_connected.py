"""The fully connected product against e3nn and a dense float64 definition: values and derivatives to third order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from e3nn import o3
from oracles import assert_close
from simt import emulated_gpu

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels import FullyConnectedTensorProduct, Path, edge_graph, fully_connected_tp, fully_connected_tp_conv
from mace_fast.kernels.build import compile_cuda
from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.ops.fully_connected import describe_fully_connected_plan
from mace_fast.kernels.plan import fully_connected as planning
from mace_fast.kernels.source.fully_connected import Variant, cuda_source

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
RELATIVES = ["sm_86", "sm_89", "sm_120"]
DIFFDOCK = "10x1o+10x1e+48x0e+48x0o"
GRAPHS = {
    "random": (7, [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 0, 6], [2, 5, 0, 2, 4, 5, 2, 3, 5, 3, 0, 2]),
    "no edges": (4, [], []),
    "no nodes": (0, [], []),
    "one edge": (1, [0], [0]),
    "isolated nodes": (50, [49, 49, 0], [0, 0, 49]),
    "1000 edges at one node": (3, [0, 2] * 500, [1] * 1000),
    "1000 edges from one node": (9, [4] * 1000, [0, 8, 3, 3, 1] * 200),
}
WANTS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


@pytest.fixture
def gpu() -> Iterator[None]:
    """CPU tensors go to CUDA kernels."""
    with emulated_gpu():
        yield


def blocks(irreps: o3.Irreps) -> tuple[tuple[int, int], ...]:
    return tuple((mul, ir.l) for mul, ir in irreps)


def of_module(module: o3.TensorProduct) -> FullyConnectedTensorProduct:
    """What an e3nn module computes, coefficient and order of weights included."""
    paths = tuple(Path(i.i_in1, i.i_in2, i.i_out, float(i.path_weight)) for i in module.instructions)
    return FullyConnectedTensorProduct(
        blocks(module.irreps_in1), blocks(module.irreps_in2), blocks(module.irreps_out), paths
    )


@contextmanager
def double_constants() -> Iterator[None]:
    """e3nn makes its coupling constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def all_paths(x: str, y: str, z: str, **normalization: str) -> o3.FullyConnectedTensorProduct:
    with double_constants():
        return o3.FullyConnectedTensorProduct(x, y, z, internal_weights=False, shared_weights=False, **normalization)


def to_ir_mul(rows: torch.Tensor, irreps: o3.Irreps) -> torch.Tensor:
    return torch.cat([rows[:, s].unflatten(1, (m, i.dim)).mT.flatten(1) for s, (m, i) in slices(irreps)], 1)


def to_mul_ir(rows: torch.Tensor, irreps: o3.Irreps) -> torch.Tensor:
    return torch.cat([rows[:, s].unflatten(1, (i.dim, m)).mT.flatten(1) for s, (m, i) in slices(irreps)], 1)


def slices(irreps: o3.Irreps) -> list[tuple[slice, tuple[int, o3.Irrep]]]:
    return list(zip(irreps.slices(), irreps, strict=True))


def random_irreps(rng: np.random.Generator, lmax: int, muls: list[int], count: int) -> str:
    return "+".join(
        f"{rng.choice(muls)}x{rng.integers(0, lmax + 1)}{rng.choice(['e', 'o'])}"
        for _ in range(rng.integers(1, count + 1))
    )


def random_module(rng: np.random.Generator) -> o3.TensorProduct:
    """Irreps of both parities with l up to 3, and of the possible paths some, in any order."""
    while True:
        x, y, z = (
            o3.Irreps(random_irreps(rng, 3, muls, 3)) for muls in ([1, 2, 5, 13, 33], [1, 1, 2, 3], [1, 3, 8, 17, 33])
        )
        possible = [
            (i, j, k, "uvw", True, float(rng.uniform(0.1, 2)))
            for i, (_, a) in enumerate(x)
            for j, (_, b) in enumerate(y)
            for k, (_, c) in enumerate(z)
            if c in a * b
        ]
        chosen = [possible[n] for n in rng.permutation(len(possible)) if rng.random() < 0.8][:6]
        if chosen:
            with double_constants():
                return o3.TensorProduct(x, y, z, chosen, internal_weights=False, shared_weights=False)


def definition(
    d: FullyConnectedTensorProduct,
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor,
    sender: torch.Tensor,
    receiver: torch.Tensor,
    nodes: int,
) -> torch.Tensor:
    """Gather, couple by einsum with dense Clebsch-Gordan blocks, add at receivers; differentiable by torch."""
    edges = sender.shape[0]
    weights = w if w.dim() == 2 else w.expand(edges, -1)
    out = []
    for p in d.resolved:
        c = torch.tensor(clebsch_gordan(p.l1, p.l2, p.l3).copy(), dtype=x.dtype, device=x.device) * p.coefficient
        d1, d2, d3 = c.shape
        xs = x[sender][:, p.x_offset : p.x_offset + d1 * p.mul_x].reshape(edges, d1, p.mul_x)
        ys = y[:, p.y_offset : p.y_offset + d2 * p.mul_y].reshape(edges, d2, p.mul_y)
        ws = weights[:, p.w_offset : p.w_offset + p.rows * p.mul_z].reshape(edges, p.mul_x, p.mul_y, p.mul_z)
        block = torch.einsum("eiu,ejv,ijk,euvw->ekw", xs, ys, c, ws).reshape(edges, d3 * p.mul_z)
        out.append(torch.nn.functional.pad(block, (p.z_offset, d.z_dim - p.z_offset - d3 * p.mul_z)))
    return x.new_zeros(nodes, d.z_dim).index_add(0, receiver, sum(out))


def operands(
    d: FullyConnectedTensorProduct, nodes: int, edges: int, dtype: torch.dtype, device: str, *, shared: bool = False
) -> list[torch.Tensor]:
    """Signed random x, y, w that require gradients."""
    shapes = [(nodes, d.x_dim), (edges, d.y_dim), (d.weight_numel,) if shared else (edges, d.weight_numel)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def check(
    d: FullyConnectedTensorProduct,
    dtype: torch.dtype,
    device: str = "cpu",
    graph: tuple[int, list[int], list[int]] = GRAPHS["random"],
    *,
    shared: bool = False,
    second: bool = True,
) -> None:
    """z, its gradients and gradients of those, each against torch's derivatives of the float64 definition."""
    nodes, *lists = graph
    sender, receiver = (torch.tensor(index, dtype=torch.int64, device=device) for index in lists)
    edges = len(sender)
    ours = operands(d, nodes, edges, dtype, device, shared=shared)
    theirs = [t.detach().double().requires_grad_() for t in ours]
    z = fully_connected_tp_conv(d, *ours, edge_graph(sender, receiver, nodes, nodes))
    oracle = definition(d, *theirs, sender, receiver, nodes)
    terms = 64.0 * max(1, edges) * max(path.rows for path in d.resolved)
    assert_close(z, oracle, terms=terms)
    g = torch.randn_like(oracle)
    first = torch.autograd.grad(z, ours, g.to(dtype), create_graph=True)
    first_oracle = torch.autograd.grad(oracle, theirs, g, create_graph=True)
    for a, b in zip(first, first_oracle, strict=True):
        assert_close(a, b, terms=terms)
    if not second:
        return
    cotangents = [torch.randn_like(t) for t in first_oracle]
    found = torch.autograd.grad(first, ours, [c.to(dtype) for c in cotangents])
    for a, b in zip(found, torch.autograd.grad(first_oracle, theirs, cotangents), strict=True):
        assert_close(a, b, terms=4 * terms)


# --- against e3nn


def check_module(module: o3.TensorProduct, dtype: torch.dtype, device: str = "cpu", *, shared: bool = False) -> None:
    """The same numbers as e3nn's float64 module from the same operands, and the same gradients."""
    d = of_module(module)
    assert d.weight_numel == module.weight_numel
    rows = 5
    x = torch.randn(rows, d.x_dim, dtype=torch.float64, requires_grad=True)
    y = torch.randn(rows, d.y_dim, dtype=torch.float64, requires_grad=True)
    w = torch.randn(*(() if shared else (rows,)), d.weight_numel, dtype=torch.float64, requires_grad=True)
    oracle = module(x, y, w.expand(rows, -1))
    ours = [to_ir_mul(x.detach(), module.irreps_in1), to_ir_mul(y.detach(), module.irreps_in2), w.detach()]
    ours = [t.to(device, dtype).requires_grad_() for t in ours]
    z = fully_connected_tp(d, *ours)
    terms = 64.0 * max(path.rows for path in d.resolved)
    assert_close(to_mul_ir(z, module.irreps_out).cpu(), oracle, terms=terms)
    g = torch.randn_like(oracle)
    expected = torch.autograd.grad(oracle, (x, y, w), g)
    found = torch.autograd.grad(z, ours, to_ir_mul(g, module.irreps_out).to(device, dtype))
    assert_close(to_mul_ir(found[0], module.irreps_in1).cpu(), expected[0], terms=terms)
    assert_close(to_mul_ir(found[1], module.irreps_in2).cpu(), expected[1], terms=terms)
    assert_close(found[2].cpu(), expected[2], terms=terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_modules_are_e3nns(rng: np.random.Generator, device: str, dtype: torch.dtype) -> None:
    for _ in range(2 if device == "cpu" else 8):
        check_module(random_module(rng), dtype, device, shared=bool(rng.random() < 0.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y", ["1x0e+1x1o", "1x0e+1x1o+1x2e"])
def test_diffdock_is_e3nns(seed: int, device: str, dtype: torch.dtype, y: str) -> None:
    check_module(all_paths(DIFFDOCK, y, DIFFDOCK), dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_high_degrees_are_e3nns(seed: int, device: str, shared: bool) -> None:
    check_module(all_paths("2x6e+3x1o", "2x5o+1x6e", "3x6o+2x4e"), torch.float64, device, shared=shared)


@pytest.mark.parametrize("normalization", ["component", "norm"])
def test_normalisations_of_e3nn(seed: int, normalization: str) -> None:
    irreps = "4x0e+3x1o", "2x0e+1x1o", "5x0e+2x1o"
    check_module(all_paths(*irreps, irrep_normalization=normalization, path_normalization="path"), torch.float64)


# --- with the graph, to any order


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_all_orders(rng: np.random.Generator, device: str, dtype: torch.dtype, shared: bool) -> None:
    check(of_module(random_module(rng)), dtype, device, shared=shared)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_graph_shapes(seed: int, device: str, shared: bool) -> None:
    d = of_module(all_paths("3x0e+2x1o", "1x0e+2x1o", "4x0e+2x1o"))
    for graph in GRAPHS.values():
        check(d, torch.float64, device, graph, shared=shared)


def test_gradcheck_to_third_order(seed: int) -> None:
    d = of_module(all_paths("2x0e+1x1o", "1x0e+2x1o", "2x0e+1x1o"))
    graph = edge_graph(torch.randint(0, 3, (4,)), torch.randint(0, 3, (4,)), 3, 3)
    inputs = operands(d, 3, 4, torch.float64, "cpu")

    def conv(*args: torch.Tensor) -> torch.Tensor:
        return fully_connected_tp_conv(d, *args, graph)

    def gradients(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad((conv(*args) ** 2).sum(), args, create_graph=True)
        return torch.autograd.grad(sum((t**2).sum() for t in first), args, create_graph=True)

    assert torch.autograd.gradcheck(conv, inputs)
    assert torch.autograd.gradgradcheck(conv, inputs)
    assert torch.autograd.gradcheck(gradients, inputs, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wants", WANTS, ids=str)
def test_gradients_of_some_operands_only(seed: int, device: str, wants: tuple[bool, ...]) -> None:
    d = of_module(all_paths("3x0e+2x1o", "1x0e+2x1o", "4x0e+2x1o"))
    ours = [
        t.detach().requires_grad_(want) for t, want in zip(operands(d, 6, 6, torch.float64, device), wants, strict=True)
    ]
    every = [t.detach().requires_grad_() for t in ours]
    index = torch.arange(6, device=device)
    z, oracle = fully_connected_tp(d, *ours), definition(d, *every, index, index, 6)
    g = torch.randn_like(z)
    used = [t for t in ours if t.requires_grad]
    expected = [t for t, want in zip(torch.autograd.grad(oracle, every, g), wants, strict=True) if want]
    for a, b in zip(torch.autograd.grad(z, used, g), expected, strict=True):
        assert_close(a, b, terms=256)


def test_blocks_without_a_path_are_zero(seed: int) -> None:
    d = FullyConnectedTensorProduct(((2, 0), (3, 1)), ((1, 0), (2, 1)), ((2, 2), (4, 1)), (Path(1, 0, 1, 0.7),))
    assert not d.covers_x and not d.covers_z
    check(d, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_same_bits_twice(seed: int, device: str, dtype: torch.dtype, shared: bool) -> None:
    d = of_module(all_paths("8x0e+4x1o", "1x0e+1x1o", "8x0e+4x1o"))
    x, y, w = operands(d, 20, 700, dtype, device, shared=shared)
    graph = edge_graph(*(torch.randint(0, 20, (700,), device=device) for _ in range(2)), 20, 20)

    def run() -> list[torch.Tensor]:
        z = fully_connected_tp_conv(d, x, y, w, graph)
        return [z, *torch.autograd.grad(z, (x, y, w), torch.ones_like(z))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_inputs_of_any_stride_and_index_type(seed: int) -> None:
    d = of_module(all_paths("3x0e+2x1o", "1x0e+2x1o", "4x0e+2x1o"))
    x, y, w = (t.detach() for t in operands(d, 6, 11, torch.float64, "cpu"))
    sender, receiver = (torch.randint(0, 6, (11,)) for _ in range(2))
    plain = fully_connected_tp_conv(d, x, y, w, edge_graph(sender, receiver, 6, 6))
    strided = [torch.stack([t, -t], -1)[..., 0] for t in (x, y, w)]
    graph = edge_graph(sender.int(), receiver.int(), 6, 6)
    assert torch.equal(plain, fully_connected_tp_conv(d, *strided, graph))


# --- what is refused


def test_wrong_operands_are_named() -> None:
    d = of_module(all_paths("3x0e+2x1o", "1x0e+1x1o", "4x0e"))
    graph = edge_graph(torch.tensor([0, 1]), torch.tensor([1, 0]), 2, 2)
    x, y, w = torch.randn(2, d.x_dim), torch.randn(2, d.y_dim), torch.randn(2, d.weight_numel)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\)"):
        fully_connected_tp_conv(d, x[:, :3], y, w, graph)
    with pytest.raises(ValueError, match="y has shape"):
        fully_connected_tp_conv(d, x, y[:1], w, graph)
    with pytest.raises(ValueError, match="w has shape"):
        fully_connected_tp(d, x, y, w.T)
    with pytest.raises(TypeError, match=r"w is torch\.float64"):
        fully_connected_tp(d, x, y, w.double())
    with pytest.raises(TypeError, match="float16"):
        fully_connected_tp(d, x.half(), y.half(), w.half())


def test_descriptions_that_make_no_sense_are_refused() -> None:
    def build(x: tuple[int, int], y: tuple[int, int], z: tuple[int, int], *paths: Path) -> FullyConnectedTensorProduct:
        return FullyConnectedTensorProduct((x,), (y,), (z,), paths)

    with pytest.raises(UnsupportedDescriptionError, match="cannot give 2"):
        build((4, 0), (1, 1), (4, 2), Path(0, 0, 0, 1.0))
    with pytest.raises(UnsupportedDescriptionError, match="at least one path"):
        build((4, 0), (1, 1), (4, 1))
    with pytest.raises(UnsupportedDescriptionError, match="l=7"):
        build((4, 7), (1, 0), (4, 7), Path(0, 0, 0, 1.0))
    with pytest.raises(UnsupportedDescriptionError, match="has no weights"):
        build((4, 1), (1, 0), (4, 1), Path(0, 0, 0, 1.0, weighted=False))
    with pytest.raises(UnsupportedDescriptionError, match="block 1 of y"):
        build((4, 1), (1, 0), (4, 1), Path(0, 1, 0, 1.0))


def test_key_round_trip(rng: np.random.Generator) -> None:
    d = of_module(random_module(rng))
    assert FullyConnectedTensorProduct.parse(d.key) == d
    assert hash(FullyConnectedTensorProduct.parse(d.key)) == hash(d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_fake_kernels_and_schemas(seed: int, device: str, shared: bool) -> None:
    d = of_module(all_paths("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o"))
    x, y, w = operands(d, 3, 5, torch.float64, device, shared=shared)
    graph = edge_graph(*(torch.randint(0, 3, (5,), device=device) for _ in range(2)), 3, 3)
    g = torch.randn(3, d.z_dim, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.mace_fast.fully_connected.default, (x, y, w, *graph[:7], d.key))
    backward = torch.ops.mace_fast.fully_connected_backward.default
    torch.library.opcheck(backward, (x, y, w, g, *graph[:7], d.key, True, True, True))


def test_compiles_without_a_graph_break(seed: int) -> None:
    """Under torch.compile, and between sets of nodes of different size."""
    d = of_module(all_paths("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o"))
    sender, receiver = torch.randint(0, 3, (7,)), torch.randint(0, 8, (7,))
    graph = edge_graph(sender, receiver, 3, 8)
    inputs = operands(d, 3, 7, torch.float64, "cpu")

    def energy(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (fully_connected_tp_conv(d, x, y, w, graph) ** 2).sum()

    found = torch.autograd.grad(torch.compile(energy, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    oracle = (definition(d, *inputs, sender, receiver, 8) ** 2).sum()
    for a, b in zip(found, torch.autograd.grad(oracle, inputs), strict=True):
        assert_close(a, b, terms=256)


@pytest.mark.gpu
def test_out_of_range_edges_poison_results_on_gpu() -> None:
    d = of_module(all_paths("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o"))
    x, y, w = (t.detach() for t in operands(d, 4, 3, torch.float32, "cuda"))
    graph = edge_graph(torch.tensor([0, 9, 1], device="cuda"), torch.tensor([1, 0, 2], device="cuda"), 4, 4)
    assert torch.isnan(fully_connected_tp_conv(d, x, y, w, graph)).all()


@pytest.mark.gpu
def test_streams_and_graph_capture(seed: int) -> None:
    d = of_module(all_paths(DIFFDOCK, "1x0e+1x1o", DIFFDOCK))
    x, y, w = (t.detach() for t in operands(d, 20, 300, torch.float32, "cuda"))
    graph = edge_graph(*(torch.randint(0, 20, (300,), device="cuda") for _ in range(2)), 20, 20)
    expected = fully_connected_tp_conv(d, x, y, w, graph)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        z = fully_connected_tp_conv(d, x, y, w, graph)
    x.mul_(2.0)
    captured.replay()
    torch.cuda.synchronize()
    assert_close(z, 2.0 * expected.double())


# --- CUDA texts, run thread by thread on the CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own-weights", "shared-weights"])
def test_emulated_random_modules(rng: np.random.Generator, gpu: None, dtype: torch.dtype, shared: bool) -> None:
    check(of_module(random_module(rng)), dtype, shared=shared)


def test_emulated_diffdock(seed: int, gpu: None) -> None:
    check_module(all_paths(DIFFDOCK, "1x0e+1x1o", DIFFDOCK), torch.float32)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_emulated_graphs(seed: int, gpu: None, graph: tuple[int, list[int], list[int]]) -> None:
    """Weights for all, of which 264 blocks sum the gradient of 1000 edges."""
    check(
        of_module(all_paths("2x0e+1x1o", "1x0e+1x1o", "2x0e+1x1o")),
        torch.float64,
        "cpu",
        graph,
        shared=True,
        second=False,
    )


@pytest.mark.parametrize("wants", WANTS, ids=str)
def test_emulated_gradients_of_some_operands_only(seed: int, gpu: None, wants: tuple[bool, ...]) -> None:
    test_gradients_of_some_operands_only(seed, "cpu", wants)


@pytest.mark.parametrize("limit", [100, 1000])
def test_emulated_batches(seed: int, gpu: None, limit: int) -> None:
    """Shared memory so small that products of x and y are made in several batches, and paths are cut between them."""
    d = of_module(all_paths("7x0e+3x1o+2x2e", "3x0e+2x1o", "200x0e+5x1o+2x2e"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BATCH_BYTES", limit)
        planning.plan.cache_clear()
        cuda_source.cache_clear()
        layout = describe_fully_connected_plan(d, torch.float64)
        assert len(layout.batches) > 1 and layout.products * 8 <= limit
        pieces = [piece for batch in layout.batches for piece in batch.pieces]
        assert limit > 100 or len({piece.path for piece in pieces}) < len(pieces), "no path is cut"
        check(d, torch.float64)
    planning.plan.cache_clear()
    cuda_source.cache_clear()


def test_emulated_blocks_without_a_path(seed: int, gpu: None) -> None:
    test_blocks_without_a_path_are_zero(seed)


def test_emulated_high_degrees(seed: int, gpu: None) -> None:
    check_module(all_paths("2x6e", "2x5o", "3x6o"), torch.float64)


# --- CUDA texts, compiled


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("y", ["1x0e+1x1o", "1x0e+1x1o+1x2e"])
@pytest.mark.parametrize(
    "variant", [Variant(), Variant(True, True, True, True), Variant(True, want_w=True)], ids=lambda v: v.entry
)
def test_diffdock_compiles_without_spills(arch: str, y: str, variant: Variant) -> None:
    d = of_module(all_paths(DIFFDOCK, y, DIFFDOCK))
    for item_bytes in (4, 8):
        compiled = compile_cuda(cuda_source(d, item_bytes, variant), arch)
        for entry, resources in compiled.resources.items():
            assert resources.spill_stores == 0 and resources.spill_loads == 0, f"{entry}: {resources}"


@pytest.mark.parametrize("arch", RELATIVES)
def test_widest_diffdock_compiles_without_spills(arch: str) -> None:
    d = of_module(all_paths(DIFFDOCK, "1x0e+1x1o+1x2e", DIFFDOCK))
    variant = Variant(True, True, True, True)
    resources = compile_cuda(cuda_source(d, 4, variant), arch).resources[variant.entry]
    assert resources.spill_stores == resources.spill_loads == 0, resources


def test_plan_prints_its_decisions() -> None:
    layout = describe_fully_connected_plan(of_module(all_paths(DIFFDOCK, "1x0e+1x1o", DIFFDOCK)), torch.float32)
    text = str(layout)
    assert "a block of 96 threads an edge, 1 batch(es)" in text
    assert "10 paths, 252 rows of weights" in text and "2 into block 2" in text
    assert layout.lanes[0] == 16
