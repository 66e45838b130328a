"""linear and indexed_linear against e3nn's o3.Linear and FullyConnectedTensorProduct in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels.build import CudaSource, compile_cuda
from mace_fast.kernels.description.linear import (
    LAYOUTS,
    Linear,
    LinearBias,
    LinearPath,
    describe_indexed_linear,
    describe_linear,
    parse_linear,
)
from mace_fast.kernels.ops.linear import arrange_indexed_weight, indexed_linear, linear, linear_add
from mace_fast.kernels.ops.segment import segments
from mace_fast.kernels.source.linear import FLOATS, IDS, TILINGS, forward_cuda, grad_cuda

MULTIPLICITIES = (1, 5, 13, 32, 33, 128)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
BOTH_LAYOUTS = [(x, z) for x in LAYOUTS for z in LAYOUTS]


def o3() -> Any:
    """e3nn, through mace, which makes its import work on recent torch."""
    import mace  # noqa: F401
    from e3nn import o3

    return o3


def reorder(rows: torch.Tensor, irreps: Any, *, back: bool = False) -> torch.Tensor:
    """mul_ir rows as ir_mul rows, or back."""
    pieces = []
    for where, (mul, ir) in zip(irreps.slices(), irreps, strict=True):
        shape = (rows.shape[0], ir.dim, mul) if back else (rows.shape[0], mul, ir.dim)
        pieces.append(rows[:, where].reshape(shape).transpose(1, 2).reshape(rows.shape[0], mul * ir.dim))
    return torch.cat(pieces, dim=1)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN anywhere makes it NaN, which no bound
    admits.
    """
    return float((out.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def random_irreps(rng: np.random.Generator, blocks: int, degrees: int = 3) -> str:
    """Unsorted, repeated and odd irreps with awkward multiplicities."""
    return " + ".join(
        f"{rng.choice(MULTIPLICITIES)}x{rng.integers(degrees)}{rng.choice(['e', 'o'])}" for _ in range(blocks)
    )


def e3nn_linear(irreps_in: str, irreps_out: str, biases: bool = False) -> Any:
    module = o3().Linear(irreps_in, irreps_out, biases=biases).double()
    if biases:
        module.bias.data.normal_()
    return module


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("x_layout", "z_layout"), BOTH_LAYOUTS)
@pytest.mark.parametrize("biases", [False, True])
def test_linear_is_e3nn_linear(
    rng: np.random.Generator, dtype: torch.dtype, x_layout: Any, z_layout: Any, biases: bool
) -> None:
    shared = f"{rng.choice(MULTIPLICITIES)}x0e + {rng.choice(MULTIPLICITIES)}x1o + {rng.choice(MULTIPLICITIES)}x2e"
    module = e3nn_linear(f"{shared} + {random_irreps(rng, 3)}", f"{random_irreps(rng, 3)} + {shared}", biases)
    print(module)
    x = torch.randn(7, module.irreps_in.dim, dtype=torch.float64)
    reference = module(x)
    description = describe_linear(module, x_layout=x_layout, z_layout=z_layout)
    if x_layout == "ir_mul":
        x = reorder(x, module.irreps_in)
    bias = module.bias.to(dtype) if description.biases else None
    z = linear(x.to(dtype), module.weight.to(dtype), description, bias)
    if z_layout == "ir_mul":
        z = reorder(z, module.irreps_out, back=True)
    assert z.dtype == dtype
    assert error(z, reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("x_layout", "z_layout"), BOTH_LAYOUTS)
@pytest.mark.parametrize("species", [1, 7])
def test_indexed_linear_is_e3nn_product_with_one_hot(
    rng: np.random.Generator, dtype: torch.dtype, x_layout: Any, z_layout: Any, species: int
) -> None:
    shared = f"{rng.choice(MULTIPLICITIES)}x0e + {rng.choice(MULTIPLICITIES)}x1o + {rng.choice(MULTIPLICITIES)}x2e"
    module = o3().FullyConnectedTensorProduct(
        f"{shared} + {random_irreps(rng, 2)}", f"{species}x0e", f"{random_irreps(rng, 2)} + {shared}"
    )
    module = module.double()
    print(module)
    index = torch.from_numpy(rng.integers(species, size=11))
    index[index == 3] = 0  # a species without nodes
    x = torch.randn(11, module.irreps_in1.dim, dtype=torch.float64)
    reference = module(x, torch.nn.functional.one_hot(index, species).double())
    description, count = describe_indexed_linear(module, x_layout=x_layout, z_layout=z_layout)
    assert count == species
    if x_layout == "ir_mul":
        x = reorder(x, module.irreps_in1)
    weight = arrange_indexed_weight(module.weight.to(dtype), description, species)
    z = indexed_linear(x.to(dtype), weight, index, description)
    if z_layout == "ir_mul":
        z = reorder(z, module.irreps_out, back=True)
    assert error(z, reference) < TOLERANCE[dtype]
    again = indexed_linear(x.to(dtype), weight, index.int(), description, segments(index.int(), species))
    assert torch.equal(indexed_linear(x.to(dtype), weight, index, description), again)


@pytest.mark.parametrize("normalization", ["component", "norm"])
def test_indexed_linear_reads_the_normalisation_from_the_module(seed: int, normalization: str) -> None:
    module = o3().FullyConnectedTensorProduct(
        "5x1o+3x2e", "4x0e", "2x1o+7x2e", irrep_normalization=normalization, path_normalization="path"
    )
    module = module.double()
    index = torch.randint(4, (6,))
    x = torch.randn(6, 30, dtype=torch.float64)
    description, _ = describe_indexed_linear(module, x_layout="mul_ir", z_layout="mul_ir")
    z = indexed_linear(x, arrange_indexed_weight(module.weight, description, 4), index, description)
    assert error(z, module(x, torch.nn.functional.one_hot(index, 4).double())) < TOLERANCE[torch.float64]


def test_split_x_is_simplify(seed: int) -> None:
    fine = o3().Irreps("5x0e+3x0e+2x1o+2x1o+4x1o+6x0e")
    module = e3nn_linear(str(fine.simplify()), "7x0e+3x1o+2x0e")
    x = torch.randn(4, fine.dim, dtype=torch.float64)
    description = describe_linear(module, z_layout="mul_ir").split_x([(mul, ir.l) for mul, ir in fine])
    assert error(linear(reorder(x, fine), module.weight, description), module(x)) < TOLERANCE[torch.float64]


def test_split_z_is_simplify(seed: int) -> None:
    fine = o3().Irreps("5x0e+3x0e+2x1o+2x1o+4x1o+6x0e")
    module = e3nn_linear("7x0e+3x1o+2x0e", str(fine.simplify()), biases=True)
    x = torch.randn(4, module.irreps_in.dim, dtype=torch.float64)
    description = describe_linear(module, x_layout="mul_ir").split_z([(mul, ir.l) for mul, ir in fine])
    z = linear(x, module.weight, description, module.bias)
    assert error(reorder(z, fine, back=True), module(x)) < TOLERANCE[torch.float64]


def test_scaled_leading_axes_and_strided_rows(seed: int) -> None:
    module = e3nn_linear("5x0e+3x1o", "4x0e+6x1o", biases=True)
    description = describe_linear(module, x_layout="mul_ir", z_layout="mul_ir").scaled(0.25)
    wide = torch.randn(2, 3, 20, dtype=torch.float64)
    for x in (
        wide[..., 4:18],
        wide.transpose(0, 1)[..., :14],
        wide[..., 6:].flip(-1),
        wide[:1, ..., :14].expand(4, 3, 14),
    ):
        z = linear(x, module.weight, description, module.bias)
        assert z.shape == (*x.shape[:-1], 22)
        assert error(z, module(x) / 4) < TOLERANCE[torch.float64]


def small(x_layout: Any, z_layout: Any) -> Linear:
    """Two paths into one block, one block unused on each side, a bias."""
    return Linear.from_paths(
        [(2, 0), (3, 1), (1, 2), (2, 1)],
        [(2, 1), (2, 3), (3, 0)],
        [(1, 0, 0.5), (0, 2, -1.25), (3, 0, 2.0)],
        [(2, 1.5)],
        x_layout=x_layout,
        z_layout=z_layout,
    )


@pytest.mark.parametrize(("x_layout", "z_layout"), BOTH_LAYOUTS)
def test_derivatives_of_linear(seed: int, x_layout: Any, z_layout: Any) -> None:
    d = small(x_layout, z_layout)
    shapes = ((3, d.x_dim), (d.weight_numel,), (d.bias_numel,))
    arguments = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, d, bias)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize(("x_layout", "z_layout"), BOTH_LAYOUTS)
def test_derivatives_of_indexed_linear(seed: int, x_layout: Any, z_layout: Any) -> None:
    d = small(x_layout, z_layout).without_bias
    index = torch.tensor([2, 0, 2, 3])
    x = torch.randn(4, d.x_dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4 * d.weight_numel, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return indexed_linear(x, arrange_indexed_weight(flat, d, 4), index, d)

    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_third_derivative(seed: int) -> None:
    """d3/dx2 dweight of a cubic function of the output: every op's own backward is used."""
    d = small("ir_mul", "mul_ir").without_bias
    x = torch.randn(2, d.x_dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(d.weight_numel, dtype=torch.float64, requires_grad=True)

    def second(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(linear(x, weight, d).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x, weight))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_nodes(dtype: torch.dtype) -> None:
    d = small("ir_mul", "ir_mul")
    x = torch.zeros(0, d.x_dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(d.weight_numel, dtype=dtype, requires_grad=True)
    z = linear(x, weight, d, torch.randn(d.bias_numel, dtype=dtype))
    assert z.shape == (0, d.z_dim)
    z.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()
    table = torch.randn(3, d.weight_numel, dtype=dtype, requires_grad=True)
    z = indexed_linear(x, table, torch.zeros(0, dtype=torch.int64), d.without_bias)
    z.sum().backward()
    assert z.shape == (0, d.z_dim)
    assert table.grad is not None and not table.grad.any()


def test_empty_blocks_and_no_paths(seed: int) -> None:
    d = Linear.from_paths([(0, 0), (3, 1)], [(2, 0), (0, 1), (4, 1)], [(0, 0, 1.0), (1, 1, 1.0)])
    assert d.weight_numel == 0
    assert not linear(torch.randn(5, 9), torch.zeros(0), d).any()
    z = indexed_linear(torch.randn(5, 9), torch.zeros(2, 0), torch.tensor([0, 1, 1, 0, 1]), d)
    assert z.shape == (5, 14) and not z.any()


def test_same_bits_twice(seed: int) -> None:
    module = o3().FullyConnectedTensorProduct("32x0e+33x1o", "5x0e", "32x0e+33x1o")
    d, species = describe_indexed_linear(module)
    weight = arrange_indexed_weight(module.weight.detach(), d, species).requires_grad_()
    x = torch.randn(40, d.x_dim, requires_grad=True)
    index = torch.randint(5, (40,))
    outputs = []
    for _ in range(2):
        z = indexed_linear(x, weight, index, d)
        outputs.append((z, *torch.autograd.grad(z.pow(2).sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_key_round_trip(rng: np.random.Generator) -> None:
    module = e3nn_linear(random_irreps(rng, 4) + "+1x0e", random_irreps(rng, 4) + "+1x0e", biases=True)
    description = describe_linear(module, z_layout="mul_ir").scaled(1 / 3)
    assert parse_linear(description.key) == description
    assert description.transposed.transposed == description.without_bias


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_are_registered_completely(seed: int, layout: Any) -> None:
    d = small(layout, layout)
    x = torch.randn(4, d.x_dim, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, d.z_dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(d.weight_numel, dtype=torch.float64, requires_grad=True)
    table = torch.randn(3, d.weight_numel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(d.bias_numel, dtype=torch.float64, requires_grad=True)
    lists = segments(torch.tensor([2, 0, 2, 0]), 3)[1:]
    ops, plain = torch.ops.mace_fast, d.without_bias.key
    torch.library.opcheck(ops.linear.default, (x, weight, bias, d.key))
    torch.library.opcheck(ops.linear_add.default, (x, weight, z, plain))
    torch.library.opcheck(ops.indexed_linear_add.default, (x, table, *lists, z, plain))
    torch.library.opcheck(ops.linear_weight_grad.default, (x, z, plain))
    torch.library.opcheck(ops.indexed_linear.default, (x, table, *lists, plain))
    torch.library.opcheck(ops.indexed_linear_weight_grad.default, (x, z, *lists, plain))


def test_errors_name_the_argument(seed: int) -> None:
    d = small("ir_mul", "ir_mul")
    x, weight, bias = torch.randn(4, d.x_dim), torch.randn(d.weight_numel), torch.randn(d.bias_numel)
    table, index = torch.randn(3, d.weight_numel), torch.tensor([0, 2, 1, 1])
    for arguments, kind, word in [
        ((x.half(), weight, d, bias), TypeError, "x is torch.float16"),
        ((x[:, 1:], weight, d, bias), ValueError, "x has shape"),
        ((x, weight.double(), d, bias), TypeError, "weight is torch.float64"),
        ((x, weight[1:], d, bias), ValueError, "weight has shape"),
        ((x, weight.to("meta"), d, bias), ValueError, "weight is on meta"),
        ((x, weight, d), ValueError, "bias is missing"),
        ((x, weight, d, bias.double()), TypeError, "bias is torch.float64"),
        ((x, weight, d, bias[1:]), ValueError, "bias has shape"),
    ]:
        with pytest.raises(kind, match=word):
            linear(*arguments)  # type: ignore[arg-type]
    for indexed, kind, word in [
        ((x[0], table, index, d), ValueError, "x has shape"),
        ((x, weight, index, d), ValueError, "weight has shape"),
        ((x, table[:, 1:], index, d), ValueError, "weight has shape"),
        ((x, table.double(), index, d), TypeError, "weight is torch.float64"),
        ((x, table, index.float(), d), TypeError, "index is torch.float32"),
        ((x, table, index[1:], d), ValueError, "order has shape"),
        ((x, table, index[:, None], d), ValueError, "index has shape"),
        ((x, table, index + 1, d), ValueError, r"index has values from 1 to 3"),
        ((x, table, index - 1, d), ValueError, r"index has values from -1 to 1"),
        ((x, table, index, d, segments(index, 4)), ValueError, "groups has 4 species"),
    ]:
        with pytest.raises(kind, match=word):
            indexed_linear(*indexed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight has shape"):
        arrange_indexed_weight(torch.randn(7), d, 3)


def test_descriptions_that_are_refused() -> None:
    x, z = [(2, 0), (3, 1)], [(2, 1)]
    with pytest.raises(UnsupportedDescriptionError, match="keeps l"):
        Linear.from_paths(x, z, [(0, 0, 1.0)])
    with pytest.raises(UnsupportedDescriptionError, match="does not exist"):
        Linear.from_paths(x, z, [(2, 0, 1.0)])
    with pytest.raises(UnsupportedDescriptionError, match="scalar block"):
        Linear.from_paths(x, z, [(1, 0, 1.0)], [(0, 1.0)])
    with pytest.raises(UnsupportedDescriptionError, match="x_layout"):
        Linear.from_paths(x, z, [(1, 0, 1.0)], x_layout="other")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDescriptionError, match="outside the 5 weights"):
        Linear(((3, 1),), ((2, 1),), (LinearPath(0, 0, 1.0, 0, 2, 1),), 5)
    with pytest.raises(UnsupportedDescriptionError, match="outside the 1 biases"):
        Linear(((2, 0),), ((2, 0),), (), 0, (LinearBias(0, 1.0, 0),), 1)
    with pytest.raises(UnsupportedDescriptionError, match="negative"):
        Linear.from_paths([(-1, 0)], z, [])
    with pytest.raises(UnsupportedDescriptionError, match="do not cut"):
        Linear.from_paths(x, z, [(1, 0, 1.0)]).split_x([(2, 0), (2, 1)])
    module = o3().Linear("2x0e", "2x0e", shared_weights=False)
    with pytest.raises(UnsupportedDescriptionError, match="shared_weights"):
        describe_linear(module)
    with pytest.raises(UnsupportedDescriptionError, match="f_in"):
        describe_linear(o3().Linear("2x0e", "2x0e", f_in=3, f_out=2))
    with pytest.raises(UnsupportedDescriptionError, match="scalars"):
        describe_indexed_linear(o3().FullyConnectedTensorProduct("2x0e", "2x1o", "2x1o"))
    uvu = o3().TensorProduct("2x0e", "3x0e", "2x0e", [(0, 0, 0, "uvu", True)])
    with pytest.raises(UnsupportedDescriptionError, match="uvw"):
        describe_indexed_linear(uvu)


MACE_LIKE = Linear.from_paths(
    [(128, 0), (128, 0), (128, 1), (64, 2)],
    [(128, 0), (128, 1), (64, 2)],
    [(0, 0, 0.1), (1, 0, -0.2), (2, 1, 0.3), (3, 2, 0.4)],
    [(0, 0.7)],
)


def variants(d: Linear) -> list[Linear]:
    arranged = [d.with_layouts(x, z) for x, z in BOTH_LAYOUTS]
    return arranged + [each.transposed for each in arranged]


@pytest.mark.parametrize(
    ("arch", "values", "descriptions"),
    [
        (arch, values, [*variants(MACE_LIKE), *variants(small("ir_mul", "ir_mul"))])
        for arch in ("sm_80", "sm_90", "sm_100")
        for values in FLOATS
    ]
    + [(arch, "float32", [MACE_LIKE]) for arch in ("sm_86", "sm_89", "sm_120")],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_cuda_text_compiles_without_spills(arch: str, values: str, descriptions: list[Linear]) -> None:
    sources: set[CudaSource] = set()
    for d in descriptions:
        sources.update(forward_cuda(d, values, "int64", tiling) for tiling in TILINGS[values])
        sources.add(grad_cuda(d.without_bias, values, "int64", TILINGS[values][0]))
    sources.add(forward_cuda(MACE_LIKE, values, "int32", TILINGS[values][0]))
    assert set(IDS) == {"int32", "int64"}
    for source in sources:
        for entry, resources in compile_cuda(source, arch).resources.items():
            print(arch, source.name, entry, resources)
            assert resources.spill_stores == resources.spill_loads == resources.stack == 0, entry


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("nodes", [1, 63, 1000])
def test_cuda_is_the_cpu(seed: int, dtype: torch.dtype, nodes: int) -> None:
    """linear and indexed_linear, value and both gradients, every layout, aligned and awkward
    multiplicities.
    """
    for d in [*variants(MACE_LIKE), *variants(small("ir_mul", "ir_mul"))]:
        x = torch.randn(nodes, d.x_dim, dtype=torch.float64)
        g = torch.randn(nodes, d.z_dim, dtype=torch.float64)
        for species in (0, 1, 89):
            shape = (d.weight_numel,) if species == 0 else (species, d.weight_numel)
            weight = torch.randn(shape, dtype=torch.float64)
            bias = torch.randn(d.bias_numel, dtype=torch.float64)
            index = torch.randint(max(species, 1), (nodes,))
            results = []
            for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
                moved = [t.to(device, kind).requires_grad_() for t in (x, weight, bias)]
                if species == 0:
                    z = linear(moved[0], moved[1], d, moved[2] if d.biases else None)
                else:
                    z = indexed_linear(moved[0], moved[1], index.to(device), d.without_bias)
                results.append((z, *torch.autograd.grad(z, moved[:2], g.to(device, kind))))
            for out, reference in zip(results[1], results[0], strict=True):
                assert error(out.cpu(), reference) < 10 * TOLERANCE[dtype], (species, d)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cuda_repeats_and_poisons(seed: int, dtype: torch.dtype) -> None:
    d = MACE_LIKE.without_bias
    weight = torch.randn(5, d.weight_numel, dtype=dtype, device="cuda", requires_grad=True)
    x = torch.randn(300, d.x_dim, dtype=dtype, device="cuda", requires_grad=True)
    index = torch.randint(5, (300,), device="cuda")
    runs = []
    for _ in range(2):
        z = indexed_linear(x, weight, index, d)
        runs.append((z, *torch.autograd.grad(z.pow(2).sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    bad = index.clone()
    bad[17], bad[200] = -1, 5
    z = indexed_linear(x, weight, bad, d)
    wrong = torch.zeros(300, dtype=torch.bool)
    wrong[[17, 200]] = True
    assert torch.equal(z.isnan().all(1).cpu(), wrong) and torch.equal(z.isnan().any(1).cpu(), wrong)
    assert torch.equal(z[(~wrong).cuda()], runs[0][0][(~wrong).cuda()])


@pytest.mark.gpu
def test_cuda_derivatives_and_graph_capture(seed: int) -> None:
    d = small("ir_mul", "mul_ir").without_bias
    index = torch.tensor([2, 0, 2, 3], device="cuda")
    x = torch.randn(4, d.x_dim, dtype=torch.float64, device="cuda", requires_grad=True)
    weight = torch.randn(4, d.weight_numel, dtype=torch.float64, device="cuda", requires_grad=True)
    function = lambda x, weight: indexed_linear(x, weight, index, d)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))
    with torch.no_grad():
        expected = function(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(x, weight)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["ir_mul", "mul_ir"])
def test_addends(seed: int, device: str, dtype: torch.dtype, layout: Any) -> None:
    """Added as the result is written, in either order of storage, with the gradients of a sum."""
    d = Linear.from_paths([(32, 0), (32, 1)], [(64, 0), (32, 1)], [(0, 0, 0.5), (1, 1, 2.0)], z_layout=layout)
    x, weights, addend = (
        torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)
        for shape in ((70, d.x_dim), (3, d.weight_numel), (70, d.z_dim))
    )
    index = torch.randint(3, (70,), device=device)
    groups = segments(index, 3)
    lists = (groups.order, groups.row_ptr)
    for leaves, sum_of, plain in (
        (
            [x, weights[0].clone(), addend],
            lambda x, w, a: linear_add(x, w, d, a),
            lambda x, w: linear(x, w, d),
        ),
        (
            [x, weights, addend],
            lambda x, w, a: torch.ops.mace_fast.indexed_linear_add(x, w, *lists, a, d.key),
            lambda x, w: indexed_linear(x, w, index, d, groups),
        ),
    ):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out, expected = sum_of(*leaves), plain(*leaves[:2]) + leaves[2]
        assert error(out, expected.double()) < 10 * TOLERANCE[dtype]
        g = torch.randn_like(out)
        wanted = torch.autograd.grad(expected, leaves, g)
        for found, each in zip(torch.autograd.grad(out, leaves, g), wanted, strict=True):
            assert error(found, each.double()) < 10 * TOLERANCE[dtype]
    with pytest.raises(ValueError, match="addend has shape"):
        linear_add(x, weights[0], d, addend[:-1])
