"""A plain tensor product of e3nn in any module is found, replaced and verified."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from e3nn import nn, o3

from mace_fast.errors import VerificationError
from mace_fast.patch import convert, match, patch, restore, verify
from mace_fast.patch.blocks.tensor_product import FastTensorProduct, to_ir_mul, to_mul_ir

X, Y = o3.Irreps("5x0e + 3x1o"), o3.Irreps("2x0e + 1x1o")


def _product(weights: str) -> o3.TensorProduct:
    """uvu paths with two copies of the second operand, a shared output, and a path without weights.

    The same at every call, so that its kernels are compiled once; numbers that go in are random.
    """
    weighted = weights != "none"
    return o3.TensorProduct(
        X,
        Y,
        "5x0e + 3x1o + 5x1o + 3x1e + 3x0e",
        [
            (0, 0, 0, "uvu", weighted, 0.7),
            (1, 0, 1, "uvu", weighted, 1.3),
            (0, 1, 2, "uvu", False, 2.0),
            (1, 1, 3, "uvu", weighted, 0.4),
            (1, 1, 4, "uvu", False, 1.0),
            (0, 0, 0, "uvu", weighted, 1.1),
        ],
        shared_weights=weights != "external",
        internal_weights=weights == "internal",
        irrep_normalization="norm",
        path_normalization="path",
    )


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """e3nn makes weights and constants in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Network(torch.nn.Module):
    """What a user of e3nn might write."""

    def __init__(self, product: o3.TensorProduct) -> None:
        super().__init__()
        self.tp = product
        self.mlp = torch.nn.Linear(4, max(product.weight_numel, 1))
        self.out = o3.Linear(product.irreps_out, "3x0e + 1x1o")

    def forward(self, x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.tp.internal_weights or self.tp.weight_numel == 0:
            z = self.tp(x, y)
        elif self.tp.shared_weights:
            z = self.tp(x, y, self.mlp(s[0]))
        else:
            z = self.tp(x, y, weight=self.mlp(s))
        return self.out(z)  # type: ignore[no-any-return]


def _inputs(rng: np.random.Generator, rows: int = 7) -> list[torch.Tensor]:
    return [torch.tensor(rng.normal(size=(rows, n)), requires_grad=True) for n in (X.dim, Y.dim, 4)]


@pytest.mark.parametrize("weights", ["internal", "shared", "external", "none"])
def test_network_computes_the_same(weights: str, rng: np.random.Generator) -> None:
    model = Network(_product(weights))
    fast = convert(model)
    assert isinstance(fast.tp, FastTensorProduct) and type(model.tp) is o3.TensorProduct
    inputs = _inputs(rng)
    results = []
    for m in (model, fast):
        out = m(*inputs)
        weight = [p for n, p in m.named_parameters() if p.numel() and not n.startswith("out")]
        first = torch.autograd.grad((out**2).sum(), [*inputs[:2], *weight], create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first if g is not None), inputs[:2])
        results.append([out, *first, *second])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert float((a - b).abs().max()) <= 1e-13 * float(a.abs().max())
    patch(model)
    original = restore(model).tp
    assert type(original) is o3.TensorProduct


def test_fully_connected_network_computes_the_same(rng: np.random.Generator) -> None:
    """Every sum over copies of both operands, into one output from two paths; a block without copies."""
    product = o3.TensorProduct(
        X,
        Y,
        "4x0e + 0x2e + 2x1o",
        [(0, 0, 0, "uvw", True, 0.7), (1, 1, 0, "uvw", True), (1, 0, 2, "uvw", True, 1.3), (0, 1, 2, "uvw", True)],
        shared_weights=False,
        internal_weights=False,
    )
    model = Network(product)
    fast = convert(model)
    assert isinstance(fast.tp, FastTensorProduct) and "fully_connected_tp (4 paths)" in fast.tp.kernels()
    inputs = _inputs(rng)
    results = []
    for m in (model, fast):
        out = m(*inputs)
        first = torch.autograd.grad((out**2).sum(), inputs[:2], create_graph=True)
        results.append([out, *first, *torch.autograd.grad(sum((g**2).sum() for g in first), inputs[:2])])
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= 1e-13 * float(a.abs().max())


def test_verification_of_a_generic_module(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network(_product("external")).float()
    report = verify(model, convert(model, verify=False))
    assert report.passed and [row.name for row in report.modules] == ["tp", "tp"]
    assert report.dtypes == ["float64", "float32"]
    right = FastTensorProduct.forward
    monkeypatch.setattr(
        FastTensorProduct, "forward", lambda self, x, y, weight=None: right(self, x, y, weight) * 1.00001
    )
    with pytest.raises(VerificationError, match="tp"):
        convert(model)


def test_broadcasting_lists_and_errors(rng: np.random.Generator) -> None:
    external, shared = _product("external"), _product("shared")
    x, y = torch.tensor(rng.normal(size=(4, 1, X.dim))), torch.tensor(rng.normal(size=(3, Y.dim)))
    w = torch.tensor(rng.normal(size=(1, 3, external.weight_numel)))
    fast = convert(external)
    assert torch.allclose(fast(x, y, w), external(x, y, w), rtol=0, atol=1e-13)
    assert fast(x, y, w).shape == (4, 3, external.irreps_out.dim)
    parts = [torch.tensor(rng.normal(size=(12, *ins.path_shape))) for ins in external.instructions if ins.has_weight]
    rows = [t.expand(4, 3, t.shape[-1]).reshape(12, -1) for t in (x, y)]
    assert torch.allclose(fast(*rows, parts), external(*rows, parts), rtol=0, atol=1e-13)
    one = [t[0] for t in rows]
    ours = convert(shared)
    w = torch.tensor(rng.normal(size=shared.weight_numel))
    assert torch.allclose(ours(*one, w), shared(*one, w), rtol=0, atol=1e-13) and ours(*one, w).dim() == 1
    assert ours(x[:0], y[:1], w).shape == (0, 1, shared.irreps_out.dim)
    views = list(ours.weight_views(w))
    assert all(torch.equal(a, b) for a, b in zip(views, shared.weight_views(w), strict=True))
    with pytest.raises(ValueError, match="weight is missing"):
        fast(*rows)
    with pytest.raises(ValueError, match="last dimension"):
        fast(rows[0][:, 1:], rows[1], parts)
    with pytest.raises(ValueError, match="shared weights"):
        ours(*rows, w[1:])
    with pytest.raises(ValueError, match="one set a sample"):
        fast(*rows, w)
    with pytest.raises(TypeError, match="dtype"):
        ours(rows[0].float(), rows[1], w)


def test_state_of_a_tensor_product(rng: np.random.Generator) -> None:
    product = _product("internal")
    inputs = [t.detach() for t in _inputs(rng)[:2]]
    exact = product(*inputs)
    fast = convert(product)
    assert list(fast.state_dict()) == list(product.state_dict()) and any("_w3j_" in k for k in fast.state_dict())
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(fast), loaded):
        assert torch.allclose(twin(*inputs), exact, rtol=0, atol=1e-13)
        assert list(twin.state_dict()) == list(product.state_dict())
        twin = twin.float()
        assert all(t.dtype == torch.float32 for t in [*twin.parameters(), *twin.buffers()])
        assert torch.allclose(twin(*[t.float() for t in inputs]).double(), exact, rtol=0, atol=1e-4)
        original = restore(twin)
        assert type(original) is o3.TensorProduct and original.weight.dtype == torch.float32
    calls: list[int] = []
    fast.register_forward_hook(lambda m, a, out: calls.append(1))
    fast(*inputs)
    assert calls == [1]


def test_what_stays_with_e3nn() -> None:
    pairs = "gives a copy for each pair of copies"
    kept = {
        "uvuv": (o3.FullTensorProduct("2x0e", "3x1o"), pairs),
        "u<vw": (o3.TensorProduct("4x1o", "4x1o", "2x0e", [(0, 0, 0, "u<vw", True)]), "pairs of copies of one operand"),
        "uuw": (o3.TensorProduct("4x1o", "4x1o", "2x0e", [(0, 0, 0, "uuw", True)]), "mixes what equal copies give"),
        "beside": (
            o3.TensorProduct("2x1o", "2x1o", "4x0e+2x0e", [(0, 0, 0, "uvuv", True), (0, 0, 1, "uvu", True)]),
            pairs,
        ),
        "no copies of the result": (
            o3.TensorProduct("2x1o", "1o", "0x0e+2x0e", [(0, 0, 0, "uvu", False), (0, 0, 1, "uvu", True)]),
            "path 0 of its tensor product has copies of its operands but none of its result",
        ),
        "no path": (o3.TensorProduct("2x1o", "2x1o", "2x1o", []), "no path"),
        "shared paths": (
            o3.TensorProduct("3x0e", "2x0e", "4x0e", [(0, 0, 0, "uvw", True)]),
            "one set of weights for all samples",
        ),
        "shared": (o3.FullyConnectedTensorProduct("3x0e+2x1o", "1o", "2x1o"), "one set of weights for all samples"),
        "square": (o3.TensorSquare("3x1o"), "no kernel of its own"),
        "gate": (nn.Gate("4x0e", [torch.relu], "2x0e", [torch.sigmoid], "2x1o"), "no kernel of its own"),
    }
    model = torch.nn.ModuleDict({name: module for name, (module, _) in kept.items()})
    model["served"] = o3.TensorProduct("4x1o", "1o", "4x0e", [(0, 0, 0, "uvu", True)])
    found = {m.name: m for m in match(model)}
    assert found["served"].status == "replace"
    for name, (_, reason) in kept.items():
        assert found[name].status == "keep" and reason in found[name].reason, found[name]
    fast = convert(model)
    changed = [name for name, module in fast.items() if type(module) is not type(model[name])]
    assert changed == ["served"]


def test_blocks_without_channels(rng: np.random.Generator) -> None:
    product = o3.TensorProduct(
        "0x0e + 2x1o", "1x1o + 0x2o", "2x0e + 0x1e + 2x1e",
        [(1, 0, 0, "uvu", True), (1, 0, 2, "uvu", True), (1, 1, 2, "uvu", True)],
    )  # fmt: skip
    x, y = torch.tensor(rng.normal(size=(3, 6))), torch.tensor(rng.normal(size=(3, 3)))
    assert torch.allclose(convert(product)(x, y), product(x, y), atol=1e-13)


def test_layouts_are_inverse(rng: np.random.Generator) -> None:
    blocks = [(3, 0), (4, 1), (1, 2), (2, 3)]
    rows = torch.tensor(rng.normal(size=(5, sum(m * (2 * d + 1) for m, d in blocks))))
    assert torch.equal(to_mul_ir(to_ir_mul(rows, blocks), blocks), rows)
    moved = to_ir_mul(rows, blocks)
    assert torch.equal(moved[:, 3 : 3 + 4], rows[:, 3 : 3 + 12 : 3])  # x components of the four vectors
    scalars = rows[:, :3]
    assert to_ir_mul(scalars, blocks[:1]) is scalars  # nothing to move
