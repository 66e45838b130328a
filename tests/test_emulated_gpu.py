"""The CUDA kernels against the same definitions as on a GPU, run thread by thread on the CPU (tests/simt).

Everything that a GPU would run is run: every gradient, numbers with tangents, many segments, splines, a whole model.
Speed, races and the compiler of the device are left to scripts/test-gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_channelwise
import test_harmonics
import test_linear
import test_program_kernels
import test_segment_sum
import test_spline_conv
import test_symmetric_contraction
import torch
from oracles import both_parities_product, mace_product, random_product
from simt import EmulatedModule, LaunchError, emulated_gpu

from mace_fast.inference import FrozenMACE
from mace_fast.kernels import channelwise_tp, channelwise_tp_conv
from mace_fast.kernels.build import CudaSource
from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.ops import channelwise_run, linear_cuda
from mace_fast.kernels.ops.blas import apply_linear
from mace_fast.kernels.ops.graph import edge_graph
from mace_fast.kernels.plan import sharing
from mace_fast.kernels.plan.channelwise import plan
from mace_fast.kernels.plan.layout import Role, Schedule
from mace_fast.kernels.source.linear import TILINGS, Tiling
from mace_fast.patch.api import convert
from mace_fast.zoo import alloy, checkpoint_path, graph

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")


@pytest.fixture
def gpu() -> Iterator[None]:
    """CPU tensors go to CUDA kernels."""
    with emulated_gpu():
        yield


@pytest.mark.parametrize(
    ("lmax", "mul", "dtype"),
    [(0, 32, torch.float32), (1, 33, torch.float32), (1, 64, torch.float64), (2, 5, torch.float32)],
    ids=str,
)
def test_mace_products(seed: int, gpu: None, lmax: int, mul: int, dtype: torch.dtype) -> None:
    """One warp, two, and lanes without a channel; L = 2 with tangents needs more than one segment."""
    test_channelwise.check_all_orders(mace_product(lmax, mul), dtype, "cpu", nodes=5, edges=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_random_products(rng: np.random.Generator, gpu: None, dtype: torch.dtype) -> None:
    test_channelwise.check_all_orders(random_product(rng), dtype, "cpu", nodes=5, edges=40)


def test_more_channels_than_a_block_takes(seed: int, gpu: None) -> None:
    test_channelwise.check_all_orders(mace_product(0, 257), torch.float32, "cpu", nodes=3, edges=20)


def test_without_graph(rng: np.random.Generator, gpu: None) -> None:
    test_channelwise.test_without_graph(rng, "cpu", shared=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tables", [1, 3])
def test_splines(seed: int, gpu: None, dtype: torch.dtype, tables: int) -> None:
    test_spline_conv.test_equals_written_weights(seed, "cpu", dtype, tables)


@pytest.mark.parametrize("vector, registers, dtype", test_spline_conv.STREAMS)
def test_coefficients_in_a_stream(
    seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, vector: int, registers: int, dtype: torch.dtype
) -> None:
    test_spline_conv.check_streams(seed, monkeypatch, "cpu", vector, registers, dtype)


@pytest.mark.parametrize("stretch", [7, 64])
def test_stretches_of_edges(seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, stretch: int) -> None:
    test_spline_conv.test_stretches_of_edges_add_up(seed, monkeypatch, "cpu", stretch, 20)


@pytest.mark.parametrize("mul", [20, 128])
def test_edges_beyond_the_cutoff(seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, mul: int) -> None:
    test_spline_conv.test_edges_beyond_the_cutoff_change_nothing(seed, monkeypatch, "cpu", 16, mul)


def test_splines_beyond_the_cutoff(seed: int, gpu: None) -> None:
    test_spline_conv.test_beyond_the_cutoff_is_exactly_zero_and_nan_stays(seed, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_harmonics_of_edges(seed: int, gpu: None, dtype: torch.dtype) -> None:
    test_harmonics.test_values_and_gradient(seed, "cpu", dtype, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_geometry_readouts_and_sums_of_a_program(seed: int, gpu: None, dtype: torch.dtype) -> None:
    test_program_kernels.test_geometry(seed, "cpu", dtype, 3)
    for users in ((1, 1), (3, 2)):
        test_program_kernels.test_gradient_of_several_users(seed, "cpu", dtype, users)
    test_program_kernels.test_rows_divided_by_their_density(seed, "cpu", dtype)
    test_program_kernels.test_repulsion_of_nuclei(seed, "cpu", dtype)
    for gradient in (True, False):
        test_program_kernels.test_node_energies(seed, "cpu", dtype, gradient)
    for padding in (0, 9):
        test_program_kernels.test_forces_and_stress(seed, "cpu", dtype, padding)
    test_program_kernels.test_a_structure_of_many_atoms(seed)


@pytest.mark.parametrize(("rows", "num_segments", "dim"), test_segment_sum.SHAPES)
def test_segment_sums(seed: int, gpu: None, rows: int, num_segments: int, dim: int) -> None:
    test_segment_sum.test_sum_of_rows(seed, torch.float32, torch.int32, rows, num_segments, dim)


def test_segment_with_most_of_the_rows(seed: int, gpu: None) -> None:
    index = torch.randint(20, (9000,))
    index[torch.rand(9000) < 0.8] = 7
    values = torch.randn(9000, 6)
    out = test_segment_sum.segment_sum(values, test_segment_sum.segments(index, 20))
    assert test_segment_sum.close(out, test_segment_sum.reference(values, index, 20), values, index)


@pytest.mark.parametrize("species", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_maps(seed: int, gpu: None, dtype: torch.dtype, species: int) -> None:
    d = test_linear.MACE_LIKE.without_bias
    x = torch.randn(70, d.x_dim, dtype=torch.float64)
    g = torch.randn(70, d.z_dim, dtype=torch.float64)
    weight = torch.randn(species, d.weight_numel, dtype=torch.float64)
    index = torch.randint(species, (70,))
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
    z = test_linear.indexed_linear(leaves[0], leaves[1], index, d)
    results = (z, *torch.autograd.grad(z, leaves, g.to(dtype)))
    plain = [test_linear.linear(x[n : n + 1], weight[index[n]], d) for n in range(0, 70, 13)]
    assert test_linear.error(z[::13], torch.cat(plain)) < 10 * test_linear.TOLERANCE[dtype]
    oracle = [t.requires_grad_() for t in (x, weight)]
    expected = torch.cat([test_linear.linear(oracle[0][n : n + 1], oracle[1][index[n]], d) for n in range(70)])
    for out, reference in zip(results, (expected, *torch.autograd.grad(expected, oracle, g)), strict=True):
        assert test_linear.error(out, reference) < 10 * test_linear.TOLERANCE[dtype]


# 132 and 36 channels are no whole number of any tiling's steps and shares, 33 none of a wide load; two paths meet in a
# block; the last block has no path.
_RAGGED = Linear.from_paths(
    [(132, 0), (36, 1), (8, 0)], [(36, 0), (4, 2), (40, 1)], [(0, 0, 0.3), (1, 2, -0.4), (2, 0, 0.5)], [(0, 0.7)]
)
_ODD = Linear.from_paths([(33, 0), (5, 1)], [(5, 1), (7, 0)], [(1, 0, 0.3), (0, 1, -0.4)])


@pytest.mark.parametrize(("dtype", "tiling"), [(d, t) for d in TILINGS for t in TILINGS[d]], ids=str)
@pytest.mark.parametrize("nodes", [1, 7, 64, 65])
def test_every_tiling_of_linear_maps(
    seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, dtype: str, tiling: Tiling, nodes: int
) -> None:
    """With and without species, bias and addend, both weights' directions, components or channels contiguous."""
    monkeypatch.setattr(linear_cuda, "TILINGS", {dtype: (tiling,)})
    kind = torch.float32 if dtype == "float32" else torch.float64
    maps = [_RAGGED, _RAGGED.with_layouts("mul_ir", "mul_ir"), _RAGGED.transposed, _ODD, _ODD.transposed]
    for d in maps if nodes == 7 else maps[:2]:
        x, addend = torch.randn(nodes, d.x_dim, dtype=torch.float64), torch.randn(nodes, d.z_dim, dtype=torch.float64)
        bias = torch.randn(d.bias_numel, dtype=torch.float64) if d.biases else None
        for species in (None, 3):
            weight = torch.randn(species or 1, d.weight_numel, dtype=torch.float64)
            index = torch.randint(species or 1, (nodes,))
            of_species = [torch.empty_like(addend) for _ in weight]
            for w, z in zip(weight, of_species, strict=True):
                apply_linear(x, w, bias, d, z)
            expected = torch.stack(of_species)[index, torch.arange(nodes)]
            lists = (None, None)
            if species is not None:
                if nodes > 2:
                    index[1], index[2] = -1, species
                    expected[1:3] = torch.nan
                groups = test_segment_sum.segments(index, species)
                lists = (groups.order, groups.row_ptr)
            operands = [None if t is None else t.to(kind) for t in (x, weight if species else weight[0], bias)]
            for more in (None, addend):
                wanted = expected if more is None else expected + more
                out = linear_cuda.forward(*operands, *lists, d, None if more is None else more.to(kind))
                assert torch.equal(out.isnan(), wanted.isnan())
                assert test_linear.error(out.nan_to_num(), wanted.nan_to_num()) < 5 * test_linear.TOLERANCE[kind]
                again = linear_cuda.forward(*operands, *lists, d, None if more is None else more.to(kind))
                assert torch.equal(out.nan_to_num(), again.nan_to_num())


def test_few_nodes_take_small_tiles() -> None:
    """So that the tiles of 64 nodes are more than a GPU's multiprocessors, while many nodes take the largest."""
    d = Linear.from_paths([(128, 3)], [(128, 3)], [(0, 0, 1.0)])
    taken = [linear_cuda.choose_tiling(d, nodes, None, torch.float32)[0].bm for nodes in (1, 64, 400, 2000)]
    assert taken == [16, 16, 32, 64]


@pytest.mark.parametrize("layout", ["ir_mul", "mul_ir"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_maps_with_addends(seed: int, gpu: None, dtype: torch.dtype, layout: str) -> None:
    test_linear.test_addends(seed, "cpu", dtype, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", test_symmetric_contraction.SHAPES[:2], ids=str)
def test_symmetric_contractions(seed: int, gpu: None, shape: Any, dtype: torch.dtype) -> None:
    test_symmetric_contraction.test_value_and_gradients_are_maces(seed, *shape, dtype)


def test_a_whole_frozen_model(seed: int, gpu: None) -> None:
    """The trained checkpoint, energies, forces and stress, through nothing but CUDA kernels."""
    model = torch.load(checkpoint_path(), weights_only=False, map_location="cpu").double()
    data = graph(alloy((1, 1, 1), seed=seed), model)
    with torch.enable_grad():
        expected = model(data, compute_stress=True)
    out = FrozenMACE(convert(model, verify=False))(data, compute_stress=True)
    for name in ("energy", "forces", "stress"):
        # Tables are proven to 1e-12 of the radial functions; forces and stress are what is left of sums that cancel.
        scale = expected[name].abs().max()
        assert (out[name] - expected[name]).abs().max() <= 3e-11 * scale, name


def test_the_emulation_finds_faults() -> None:
    """Lanes of one warp that wait in different places, and uninitialised shared memory."""
    text = """
    extern "C" __global__ void divergent(float* out) {
        if (threadIdx.x < 7) __syncwarp();
        else out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
        if (threadIdx.x == 3) __syncthreads();
    }
    extern "C" __global__ void unset(float* out) {
        __shared__ float values[32];
        if (threadIdx.x < 31) values[threadIdx.x] = 1.0f;
        __syncthreads();
        out[threadIdx.x] = values[31 - threadIdx.x];
    }
    """
    module = EmulatedModule(CudaSource("faults", text, (), ("divergent", "unset")))
    out = torch.zeros(32)
    with pytest.raises(LaunchError, match="lane that has left|different places"):
        module.launch("divergent", (1, 1, 1), (32, 1, 1), 0, (out,))
    with pytest.raises(LaunchError, match="number of arguments"):
        module.launch("unset", (1, 1, 1), (32, 1, 1), 0, (out, 3))


def test_the_graph_stays_what_it_was(seed: int) -> None:
    """Leaving the emulation gives the CPU its kernels back."""
    sender, receiver = torch.randint(0, 4, (9,)), torch.randint(0, 4, (9,))
    with emulated_gpu():
        emulated = edge_graph(sender, receiver, 4, 4)
    plain = edge_graph(sender, receiver, 4, 4)
    assert emulated.clusters is None and plain.clusters is None
    for field in set(plain._fields) - {"clusters"}:
        assert torch.equal(getattr(emulated, field), getattr(plain, field)), field
    with pytest.raises(ValueError, match="index"):
        test_segment_sum.segments(torch.tensor([0, 5]), 3)


@pytest.mark.parametrize(
    ("vector", "dtype"), [(1, torch.float32), (2, torch.float32), (4, torch.float32), (2, torch.float64)], ids=str
)
def test_several_channels_a_thread(seed: int, gpu: None, vector: int, dtype: torch.dtype) -> None:
    """Every width of load that a plan may choose, in every role."""
    with pytest.MonkeyPatch.context() as patch:
        test_channelwise.use_schedule(patch, Schedule(vector, 80, prefetch=vector != 2))
        test_channelwise.check_all_orders(mace_product(1, 32 * vector), dtype, "cpu", nodes=5, edges=40)


@pytest.mark.parametrize("registers", [9, 18, 80])
def test_segments_side_by_side_and_one_after_the_other(seed: int, gpu: None, registers: int) -> None:
    d = mace_product(2, 32)
    with pytest.MonkeyPatch.context() as patch:
        test_channelwise.use_schedule(patch, Schedule(1, registers, prefetch=False))
        test_channelwise.check_all_orders(d, torch.float32, "cpu", nodes=5, edges=40)


@pytest.mark.parametrize(
    ("vector", "ring", "dtype"),
    [(1, 3, torch.float32), (2, 4, torch.float32), (4, 3, torch.float32), (1, 5, torch.float64)],
    ids=str,
)
def test_operands_in_a_ring(seed: int, gpu: None, vector: int, ring: int, dtype: torch.dtype) -> None:
    """Weights and x by asynchronous copies, in every role, with more edges than a tile has, and an empty receiver."""
    with pytest.MonkeyPatch.context() as patch:
        test_channelwise.use_schedule(patch, Schedule(vector, 80, prefetch=False, ring=ring))
        test_channelwise.check_all_orders(mace_product(1, 32 * vector), dtype, "cpu", nodes=5, edges=150)


@pytest.mark.parametrize(("mul", "dtype"), [(32, torch.float32), (5, torch.float64)], ids=str)
def test_mirror_images_share_their_code(seed: int, gpu: None, mul: int, dtype: torch.dtype) -> None:
    """Segments of either parity, which differ in offsets alone, in every role."""
    d = both_parities_product(1, mul)
    schedule = Schedule(1, 12 * dtype.itemsize // 4, prefetch=True)
    for role in (Role(), Role(dual=True, backward=True)):
        assert plan(d, dtype.itemsize, role, schedule).alike == ((0, 1),)
    with pytest.MonkeyPatch.context() as patch:
        test_channelwise.use_schedule(patch, schedule)
        test_channelwise.check_all_orders(d, dtype, "cpu", nodes=5, edges=40)


@pytest.mark.parametrize("registers", [9, 18])
def test_segments_with_rings(seed: int, gpu: None, registers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_channelwise.use_schedule(patch, Schedule(1, registers, prefetch=False, ring=4))
        test_channelwise.check_all_orders(mace_product(2, 64), torch.float32, "cpu", nodes=5, edges=40)


@pytest.mark.parametrize(("mul", "ring"), [(5, 0), (20, 0), (64, 0), (64, 3)])
@pytest.mark.parametrize("degrees", [(300,), (0, 40, 0, 131, 7, 33, 32, 0, 97, 1), (64, 64, 64), (2, 500, 2)], ids=str)
def test_receivers_with_very_many_edges(
    seed: int, gpu: None, monkeypatch: pytest.MonkeyPatch, mul: int, ring: int, degrees: tuple[int, ...]
) -> None:
    """Shared out to windows of 32: one or two receivers in a window, receivers that end where a window does. Also
    without wide loads, and where blocks add the windows of several receivers."""
    d = mace_product(1, mul)
    monkeypatch.setattr(sharing, "edge_limit", lambda groups, receivers, edges: 32)
    if mul == 5:
        monkeypatch.setattr(channelwise_run, "_ALIGNMENT", 8)
        monkeypatch.setattr(channelwise_run, "_OVERFLOW_BLOCKS", 2)
    if ring:
        test_channelwise.use_schedule(monkeypatch, Schedule(2, 80, prefetch=False, ring=ring))
    receiver = torch.repeat_interleave(torch.arange(len(degrees)), torch.tensor(degrees))
    receiver = receiver[torch.randperm(len(receiver))]
    sender = torch.randint(0, len(degrees), receiver.shape)
    edges = edge_graph(sender, receiver, len(degrees), len(degrees))
    x, y, w = (
        torch.randn(n, m, dtype=torch.float64, requires_grad=True)
        for n, m in ((len(degrees), d.x_dim), (len(receiver), d.y_dim), (len(receiver), d.weight_numel))
    )
    z = channelwise_tp_conv(d, x, y, w, edges)
    g = torch.randn_like(z)
    expected = torch.zeros_like(z).index_add(0, receiver, channelwise_tp(d, x[sender], y, w))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    gradients = torch.autograd.grad(z, (x, y, w), g)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (x, y, w), g), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
