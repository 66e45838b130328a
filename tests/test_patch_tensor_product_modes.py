"""Tensor products of e3nn with paths of several modes: everything that is served, against e3nn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from e3nn import o3
from simt import emulated_gpu

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels.description.channelwise import Path
from mace_fast.kernels.description.elementwise import ElementwiseTensorProduct
from mace_fast.kernels.ops.elementwise import elementwise_tp
from mace_fast.patch import convert, restore
from mace_fast.patch.blocks.tensor_product import FastTensorProduct

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WEIGHTS = ["internal", "shared", "external"]

# One path of each mode and more, weights of all modes between one another's, outputs shared by modes, both operands
# with several copies, an odd sum of degrees under exchange, paths without weights, blocks that no path names.
MIXED = (
    "3x0e + 3x1o + 2x2e",
    "3x1o + 2x0e + 2x1e",
    "3x1o + 2x1e + 3x1e + 4x0e + 2x2e",
    [
        (1, 1, 0, "uvu", True, 0.7),
        (0, 0, 0, "uvv", True, 1.3),
        (1, 2, 0, "uvw", True, 0.4),
        (1, 0, 2, "uuu", True, 1.1),
        (1, 0, 1, "uvw", True, 0.9),
        (1, 0, 2, "uvv", True, 2.0),
        (0, 0, 0, "uuu", False, 0.6),
        (1, 0, 2, "uvu", False, 1.7),
        (1, 0, 2, "uvv", False, 0.8),
        (2, 2, 1, "uuu", True, 0.5),
        (0, 0, 0, "uuu", True, 1.4),
        (1, 1, 0, "uvu", True, 1.9),
    ],
)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """e3nn makes weights and constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def product(x: str, y: str, z: str, paths: list, weights: str, **normalization: str) -> o3.TensorProduct:
    return o3.TensorProduct(
        x, y, z, paths, shared_weights=weights != "external", internal_weights=weights == "internal", **normalization
    )


def random_product(rng: np.random.Generator, weights: str) -> o3.TensorProduct:
    """Some of the paths that any of the modes allows, in any order, of irreps of both parities with l up to 3."""

    def irreps(muls: list[int]) -> o3.Irreps:
        blocks = [(int(rng.choice(muls)), (int(rng.integers(0, 4)), int(rng.choice([1, -1])))) for _ in range(3)]
        return o3.Irreps(blocks)

    while True:
        x, y, z = (irreps([0, 1, 2, 3]) for _ in range(3))
        possible = []
        for i, (mul_x, a) in enumerate(x):
            for j, (mul_y, b) in enumerate(y):
                for k, (mul_z, c) in enumerate(z):
                    if c not in a * b:
                        continue
                    fits = {"uvw": True, "uvu": mul_x == mul_z, "uvv": mul_y == mul_z, "uuu": mul_x == mul_y == mul_z}
                    possible += [
                        (i, j, k, mode, mode == "uvw" or bool(rng.random() < 0.8), float(rng.uniform(0.2, 2)))
                        for mode, serves in fits.items()
                        if serves and mul_x * mul_y * mul_z
                    ]
        chosen = [possible[n] for n in rng.permutation(len(possible))][:6]
        if len({path[3] for path in chosen}) > 2 and any(path[4] for path in chosen):
            normalization = {
                "irrep_normalization": str(rng.choice(["component", "norm", "none"])),
                "path_normalization": str(rng.choice(["element", "path", "none"])),
            }
            return product(str(x), str(y), str(z), chosen, weights, **normalization)


def operands(module: o3.TensorProduct, rows: int, device: str = "cpu") -> list[torch.Tensor]:
    shapes = [(rows, module.irreps_in1.dim), (rows, module.irreps_in2.dim)]
    if module.weight_numel and not module.internal_weights:
        shapes.append((module.weight_numel,) if module.shared_weights else (rows, module.weight_numel))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def compare(module: o3.TensorProduct, device: str = "cpu", rows: int = 5) -> FastTensorProduct:
    """Values, first and second derivatives, those of internal weights too."""
    module = module.to(device)
    fast = convert(module, verify=False)
    assert isinstance(fast, FastTensorProduct)
    inputs = operands(module, rows, device)
    g = torch.randn(rows, module.irreps_out.dim, device=device)
    directions: list[torch.Tensor] = []
    results = []
    for m in (module, fast):
        points = [*inputs, *(p for p in m.parameters() if p.numel())]
        z = m(*inputs)
        first = torch.autograd.grad((z * g).sum(), points, create_graph=True, materialize_grads=True)
        directions = directions or [torch.randn_like(t) for t in first]
        along = sum((a * t).sum() for a, t in zip(first, directions, strict=True))
        results.append([z, *first, *torch.autograd.grad(along, points, materialize_grads=True)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).detach().abs().max()) <= 1e-12 * float(theirs.detach().abs().max().clamp_min(1.0))
    return fast


@pytest.mark.parametrize("device", DEVICES)
def test_random_products(rng: np.random.Generator, device: str) -> None:
    compare(random_product(rng, str(rng.choice(WEIGHTS))), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_mode_in_one_product(seed: int, device: str, weights: str) -> None:
    fast = compare(product(*MIXED, weights), device)
    assert fast.kernels() == (
        "channelwise_tp (3 paths) + channelwise_tp (3 paths) + fully_connected_tp (2 paths) + "
        "elementwise_tp (3 paths) + elementwise_tp (1 paths)"
    )


def test_every_mode_in_one_product_on_an_emulated_gpu(seed: int) -> None:
    module = product(*MIXED, "external")
    with emulated_gpu():
        compare(module)


@pytest.mark.parametrize("weights", ["shared", "external"])
def test_derivatives_of_every_mode(seed: int, weights: str) -> None:
    fast = convert(product(*MIXED, weights), verify=False)
    inputs = operands(fast, 2)
    assert torch.autograd.gradcheck(fast, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(fast, inputs, fast_mode=True)


def test_conversion_verifies_and_keeps_the_state(seed: int) -> None:
    module = product(*MIXED, "internal")
    fast = convert(module)
    assert list(fast.state_dict()) == list(module.state_dict())
    loaded = product(*MIXED, "internal")
    loaded = convert(loaded, verify=False)
    loaded.load_state_dict(fast.state_dict())
    inputs = operands(module, 4)
    assert torch.equal(loaded(*inputs), fast(*inputs))
    assert torch.equal(restore(fast)(*inputs), module(*inputs))
    parts = [torch.randn(ins.path_shape) for ins in module.instructions if ins.has_weight]
    twin, theirs = convert(product(*MIXED, "shared"), verify=False), product(*MIXED, "shared")
    assert torch.allclose(twin(*inputs, parts), theirs(*inputs, parts), rtol=0, atol=1e-12)


def test_subclasses_that_choose_paths(rng: np.random.Generator) -> None:
    elementwise = o3.ElementwiseTensorProduct("5x1o + 5x1e", "4x1e + 6x0e", irrep_normalization="norm")
    assert "elementwise_tp (" in compare(elementwise).kernels()
    connected = o3.FullyConnectedTensorProduct(
        "2x0e + 1x1o", "1x0e + 1x1o", "2x0e + 1x1o", internal_weights=False, shared_weights=False
    )
    assert "fully_connected_tp (4 paths)" in compare(connected).kernels()


def test_compiles_without_a_graph_break(seed: int) -> None:
    fast = convert(product(*MIXED, "external"), verify=False)
    inputs = operands(fast, 3)
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(*inputs), fast(*inputs))


def test_elementwise_operands_and_descriptions() -> None:
    d = ElementwiseTensorProduct(((4, 1),), ((4, 1),), ((4, 0),), (Path(0, 0, 0, 1.0), Path(0, 0, 0, 2.0, False)))
    assert (d.x_dim, d.y_dim, d.z_dim, d.weight_numel) == (12, 12, 4, 4)
    x = torch.randn(3, 12)
    assert elementwise_tp(d, x, x, torch.ones(4)).shape == (3, 4)
    assert elementwise_tp(d, x[:0], x[:0], torch.ones(0, 4)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"y has shape \(2, 12\)"):
        elementwise_tp(d, x, x[:2], torch.ones(4))
    with pytest.raises(ValueError, match="w has shape"):
        elementwise_tp(d, x, x, torch.ones(5))
    with pytest.raises(TypeError, match="w is torch.float32"):
        elementwise_tp(d, x, x, torch.ones(4, dtype=torch.float32))
    with pytest.raises(UnsupportedDescriptionError, match=r"multiplicities \[3, 4\]"):
        ElementwiseTensorProduct(((4, 1),), ((3, 1),), ((4, 0),), (Path(0, 0, 0, 1.0),))
    with pytest.raises(UnsupportedDescriptionError, match="cannot give 3"):
        ElementwiseTensorProduct(((4, 1),), ((4, 1),), ((4, 3),), (Path(0, 0, 0, 1.0),))
    with pytest.raises(UnsupportedDescriptionError, match="names block 1 of y"):
        ElementwiseTensorProduct(((4, 1),), ((4, 1),), ((4, 0),), (Path(0, 1, 0, 1.0),))
    with pytest.raises(UnsupportedDescriptionError, match="at least one path"):
        ElementwiseTensorProduct(((4, 1),), ((4, 1),), ((4, 0),), ())
    with pytest.raises(UnsupportedDescriptionError, match="l=7"):
        ElementwiseTensorProduct(((4, 7),), ((4, 7),), ((4, 0),), (Path(0, 0, 0, 1.0),))
