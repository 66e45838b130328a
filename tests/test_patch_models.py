"""Every architecture that mace-torch can be configured to: converted, it computes the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_patch_support import (
    FLOAT64_TOLERANCE,
    assert_as_good_in_float32,
    assert_same,
    evaluate,
    small_model,
    structures,
)

from mace_fast import zoo
from mace_fast.errors import UnsupportedModuleError, VerificationError
from mace_fast.patch import convert, describe, match, patch, restore, verify
from mace_fast.patch.blocks.base import FastModule
from mace_fast.patch.blocks.interaction import FastInteraction
from mace_fast.patch.blocks.product import FastEquivariantProductBasis
from mace_fast.patch.constants import with_fast_constants


@pytest.mark.parametrize("variant", list(zoo.small_variants()))
def test_variant_computes_the_same(variant: str, seed: int, rng: np.random.Generator) -> None:
    model = zoo.build(zoo.small_variants()[variant], seed=seed % 1000)
    data = structures(model, rng)
    exact = evaluate(model, data)
    fast = convert(model, verify=False)
    layers = int(model.num_interactions)
    assert sum(isinstance(m, FastInteraction) for m in fast.modules()) == layers
    assert sum(isinstance(m, FastEquivariantProductBasis) for m in fast.modules()) == layers
    assert not any(isinstance(m, FastModule) for m in model.modules())
    assert_same(evaluate(fast, data), exact, FLOAT64_TOLERANCE)


# Kernels of each dtype are compiled for each architecture, seconds each with a cold cache: one of each kind.
IN_FLOAT32 = [f"both/{block}" for block in zoo.INTERACTION_BLOCKS] + [
    "L2_lmax3",
    "correlation4",
    "edge_irreps",
    "multi_head",
    "nonlinear_foundation",
    "channels13",
]


@pytest.mark.parametrize("variant", IN_FLOAT32)
def test_variant_in_float32(variant: str, seed: int, rng: np.random.Generator) -> None:
    """Converted in float32, or converted and then cast: as good as mace-torch's own float32."""
    model = zoo.build(zoo.small_variants()[variant], seed=seed % 1000)
    data = structures(model, rng)
    exact = evaluate(model, data)
    cast = convert(model, verify=False).float()
    reference = evaluate(copy.deepcopy(model).float(), data)
    assert_as_good_in_float32(evaluate(cast, data), reference, exact)
    assert_as_good_in_float32(evaluate(convert(model.float(), verify=False), data), reference, exact)


@pytest.mark.parametrize("variant", ["base", "nonlinear_foundation", "mace_density"])
def test_every_way_of_calling(variant: str, rng: np.random.Generator) -> None:
    model = small_model(variant)
    data = structures(model, rng)
    fast = convert(model, verify=False)
    for arguments in (
        {"compute_force": False},
        {"compute_force": True},
        {"compute_virials": True},
        {"training": True, "compute_stress": True},
    ):
        assert_same(evaluate(fast, data, **arguments), evaluate(model, data, **arguments), FLOAT64_TOLERANCE)


def test_hessian_and_edge_forces(rng: np.random.Generator) -> None:
    model = small_model()
    data = zoo.graph(zoo.molecules(1, seed=int(rng.integers(1000)))[0], small_model(atomic_numbers=(1, 6, 7, 8)))
    model = small_model(atomic_numbers=(1, 6, 7, 8))
    fast = convert(model, verify=False)
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = (m(zoo.copy_graph(data), compute_hessian=True) for m in (fast, model))
        assert torch.allclose(
            ours["hessian"], theirs["hessian"], rtol=0, atol=1e-12 * float(theirs["hessian"].abs().max())
        )
        ours, theirs = (
            m(
                zoo.copy_graph(data),
                compute_edge_forces=True,
                compute_stress=True,
                compute_atomic_stresses=True,
            )
            for m in (fast, model)
        )
        for name in ("edge_forces", "atomic_virials"):
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-12 * float(theirs[name].abs().max())), name
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("variant", ["L1_lmax3", "nonlinear_foundation"])
def test_conversion_is_verified(variant: str) -> None:
    model = small_model(variant, dtype=torch.float32)
    fast = convert(model, verify=True)
    report = verify(model, fast)
    assert report.passed
    assert report.dtypes == ["float64", "float32"]
    assert {row.name for row in report.modules} == {n for n, m in fast.named_modules() if isinstance(m, FastModule)}
    assert all("linear" in row.kernel for row in report.modules)


def test_verification_catches_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is off by one part in a million is found, by name, and nothing is left half done."""
    wrong = FastEquivariantProductBasis.forward

    def forward(self, node_feats, sc, node_attrs):  # type: ignore[no-untyped-def]
        return wrong(self, node_feats, sc, node_attrs) * (1 + 1e-6)

    model = small_model()
    modules = dict(model.named_modules())
    monkeypatch.setattr(FastEquivariantProductBasis, "forward", forward)
    with pytest.raises(VerificationError, match=r"products\.0") as error:
        convert(model)
    assert not error.value.report.passed
    with pytest.raises(VerificationError):
        patch(model)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}


def test_float32_checkpoint_in_float64(rng: np.random.Generator) -> None:
    """Constants of a model that was once in float32 are rounded: both forms get them exact, and then agree to
    1e-12.
    """
    rounded = small_model("L1_lmax3", dtype=torch.float32).double()
    data = structures(rounded, rng)
    fast = convert(rounded, verify=False)
    reference = with_fast_constants(rounded, fast)
    assert reference is not rounded
    assert_same(evaluate(fast, data), evaluate(reference, data), FLOAT64_TOLERANCE)
    with pytest.raises(AssertionError):  # the rounding is there, and no larger than it may be
        assert_same(evaluate(fast, data), evaluate(rounded, data), FLOAT64_TOLERANCE)
    assert_same(evaluate(fast, data), evaluate(rounded, data), 3e-7)
    assert verify(rounded, fast).passed
    exact = small_model("L1_lmax3")
    assert with_fast_constants(exact, convert(exact, verify=False)) is exact


def test_convert_to_another_dtype(rng: np.random.Generator) -> None:
    model = small_model()
    data = structures(model, rng)
    exact = evaluate(model, data)
    fast = convert(model, dtype="float32", verify=False)
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_as_good_in_float32(evaluate(fast, data), evaluate(copy.deepcopy(model).float(), data), exact)
    with pytest.raises(ValueError, match="float16"):
        convert(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="half"):
        convert(model, dtype="half")


def test_parameters_of_two_dtypes_need_one(rng: np.random.Generator) -> None:
    model = small_model("base").float()
    model.readouts[0].linear.double()
    for call in (convert, patch):
        with pytest.raises(UnsupportedModuleError, match=r"readouts\.0\.linear\.weight \(torch\.float64\).*dtype="):
            call(model, verify=False)
    fast = convert(model, verify=False, dtype="float64")
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.float64}


def test_two_models_that_are_not_the_same() -> None:
    fast = convert(small_model("base"), verify=False)
    with pytest.raises(ValueError, match=r"not the same model.*shape"):
        verify(small_model("nonlinear_foundation"), fast)


def test_describe_names_every_block() -> None:
    model = small_model()
    text = describe(model)
    assert "interactions.0: RealAgnosticResidualInteractionBlock: replace" in text
    assert "products.1: EquivariantProductBasisBlock: replace" in text
    assert "readouts.0: LinearReadoutBlock: keep" in text
    fast = convert(model, verify=False)
    assert {m.status for m in match(fast)} == {"keep"}
    assert "channelwise_tp_conv" in describe(fast) and "symmetric_contraction" in describe(fast)
    assert describe(restore(fast)) == text


def test_no_edges_and_one_atom() -> None:
    from ase import Atoms

    model = small_model("both/RealAgnosticDensityInteractionBlock")
    fast = convert(model, verify=False)
    data = zoo.graph(Atoms("O", positions=[[0.1, 0.2, 0.3]]), model, dtype=torch.float64)
    assert data["edge_index"].shape[1] == 0
    assert_same(evaluate(fast, data), evaluate(model, data), FLOAT64_TOLERANCE)


def test_models_without_energies(rng: np.random.Generator) -> None:
    """Dipole models are built of the same blocks; each block is verified on random inputs."""
    from e3nn import o3
    from mace import modules

    energy_model = small_model(max_ell=1, correlation=2)
    block = modules.RealAgnosticResidualInteractionBlock
    torch.set_default_dtype(torch.float64)
    try:
        model = modules.AtomicDipolesMACE(
            r_max=4.5,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=1,
            interaction_cls=block,
            interaction_cls_first=block,
            num_interactions=2,
            num_elements=3,
            atomic_energies=None,
            hidden_irreps=o3.Irreps("8x0e+8x1o"),
            MLP_irreps=o3.Irreps("4x1o"),
            avg_num_neighbors=9.0,
            atomic_numbers=[1, 6, 8],
            correlation=2,
            gate=torch.nn.functional.silu,
            radial_MLP=[16, 16],
        )
    finally:
        torch.set_default_dtype(torch.float32)
    fast = convert(model)
    report = verify(model, fast)
    assert report.passed and {row.name for row in report.modules} == {
        "interactions.0", "interactions.1", "products.0", "products.1"
    }  # fmt: skip
    data = structures(energy_model, rng)
    ours, theirs = (m(zoo.copy_graph(data))["dipole"] for m in (fast, model))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max())) and bool(theirs.any())


@pytest.mark.parametrize("variant", ["base", "both/RealAgnosticResidualNonLinearInteractionBlock"])
def test_blocks_can_be_traced(variant: str) -> None:
    """Under torch.compile ops have fake kernels, and the memo keeps out of it."""
    fast = convert(small_model(variant), verify=False)
    # Edges are checked on the host before they are sorted, where tracing an interaction breaks off and goes
    # on.
    for block, fullgraph in ((fast.interactions[1], False), (fast.products[1], True)):
        arguments = block.example(torch.Generator().manual_seed(0))
        expected = block(**arguments)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=fullgraph)
        found = compiled(**arguments)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["L2_lmax3", "nonlinear_foundation", "mace_density"])
def test_on_a_gpu(variant: str) -> None:
    model = small_model(variant).cuda()
    fast = convert(model)
    assert all(p.is_cuda for p in fast.parameters())
