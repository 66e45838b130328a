"""The frozen program: the same results as mace-torch, within the accuracy that its splines are proven to."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import mace.modules
import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3
from mace.modules.radial import PolynomialCutoff

from mace_fast import zoo
from mace_fast.errors import MissingToolError, UnsupportedModuleError, VerificationError
from mace_fast.inference import CapturedMACE, FrozenMACE, api, freeze, verify_frozen
from mace_fast.inference import frozen as frozen_module
from mace_fast.inference.edges import SortedEdges
from mace_fast.inference.frozen import atomic_forces, edge_vectors
from mace_fast.inference.packed import Packed
from mace_fast.inference.padded import padded_parts, refill, without_edges
from mace_fast.inference.radial import radial_weights
from mace_fast.inference.tables import interpolate, tabulate
from mace_fast.patch.api import convert, verify
from mace_fast.verification.graphs import default_dtype

MODELS = ["mp0-small", "mp0-medium", "off23-medium", "omat0-small", "mh-1"]


def small(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return zoo.build(name, dtype=dtype, elements=[6, 8], channels=8)


def crystal(seed: int, *, mixed: bool = False) -> Atoms:
    """Rattled diamond, of one element so that models with tables for each pair of species need one."""
    atoms = zoo.diamond(8)
    atoms.rattle(0.1, seed=seed % 1000)
    if mixed:
        atoms.numbers[::3] = 8
    return atoms


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", MODELS)
def test_float64_agrees_to_1e_12(seed: int, name: str) -> None:
    model = small(name)
    data = zoo.graph(crystal(seed, mixed=name == "omat0-small"), model)
    with default_dtype(torch.float64):  # in which mace-torch multiplies nuclear charges
        expected = model(dict(data), compute_stress=True, compute_edge_forces=True)
    got = FrozenMACE(convert(model, verify=False))(dict(data), compute_stress=True)
    for key in ("energy", "node_energy", "forces", "node_feats"):
        assert relative(got[key], expected[key]) < 1e-12, key
    # Virials are sums over edges that nearly cancel in a crystal at rest: their scale is that of the terms.
    sender, receiver = data["edge_index"]
    vectors = data["positions"][receiver] - data["positions"][sender] + data["shifts"]
    terms = float((vectors.norm(dim=1) * expected["edge_forces"].norm(dim=1)).sum())
    assert float((got["virials"] - expected["virials"]).norm()) < 1e-12 * terms
    assert relative(got["stress"], expected["stress"]) < 1e-11


def test_every_head_of_a_batch(seed: int) -> None:
    """Hidden channels of readouts belong to heads."""
    model = small("mh-1")
    data = zoo.batch([crystal(seed)] * len(model.heads), model, head=model.heads)
    with default_dtype(torch.float64):
        expected = model(dict(data), compute_stress=True)
    got = FrozenMACE(convert(model, verify=False))(dict(data), compute_stress=True)
    assert len({round(float(energy), 6) for energy in expected["energy"]}) == len(model.heads)
    for key in ("energy", "node_energy", "forces"):
        assert relative(got[key], expected[key]) < 1e-12, key


@pytest.mark.parametrize("name", ["mp0-medium", "mh-1"])
def test_float32_is_no_further_from_float64_than_twice_mace(seed: int, name: str) -> None:
    exact, rounded = small(name), small(name, torch.float32)
    exact.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in rounded.state_dict().items()})
    frozen = FrozenMACE(convert(rounded, verify=False))
    errors: dict[str, list[tuple[float, float]]] = {"forces": [], "stress": []}
    for number in range(4):  # rounding is random: compare root mean squares over structures
        atoms = crystal(seed + number)
        oracle = exact(dict(zoo.graph(atoms, exact, dtype=torch.float64)), compute_stress=True)
        data = zoo.graph(atoms, rounded, dtype=torch.float32)
        theirs, ours = rounded(dict(data), compute_stress=True), frozen(dict(data), compute_stress=True)
        for key, pairs in errors.items():
            pairs.append((relative(ours[key], oracle[key]), relative(theirs[key], oracle[key])))
    for key, pairs in errors.items():
        ours_rms, theirs_rms = np.sqrt((np.array(pairs) ** 2).mean(0))
        assert ours_rms <= 2 * theirs_rms, f"{key}: {ours_rms:.1e} against mace-torch's {theirs_rms:.1e}"


def test_verification_passes_and_fails(seed: int) -> None:
    model = small("mp0-small")
    frozen = freeze(model, verify=False)
    assert verify_frozen(model, frozen).passed
    with torch.no_grad():
        frozen.interactions[0].linear.weight.mul_(1 + 1e-7)
    with pytest.raises(VerificationError):
        verify_frozen(model, frozen).raise_if_failed()


def test_several_structures_in_one_batch(seed: int) -> None:
    model = small("mp0-small")
    structures = [crystal(seed), zoo.molecules(1)[0], crystal(seed + 1)]
    for atoms in structures:
        atoms.numbers[:] = np.where(np.arange(len(atoms)) % 2, 6, 8)
    frozen = FrozenMACE(convert(model, verify=False))
    together = frozen(dict(zoo.batch(structures, model)), compute_stress=True)
    for number, atoms in enumerate(structures):
        alone = frozen(dict(zoo.graph(atoms, model)), compute_stress=True)
        assert relative(together["energy"][number], alone["energy"][0]) < 1e-13
        assert relative(together["stress"][number], alone["stress"][0]) < 1e-10


def test_edge_and_atomic_quantities(seed: int) -> None:
    model = small("mp0-small")
    data = zoo.graph(crystal(seed), model)
    flags = {"compute_stress": True, "compute_edge_forces": True, "compute_atomic_stresses": True}
    expected = model(dict(data), **flags)
    got = FrozenMACE(convert(model, verify=False))(dict(data), **flags)
    for key in ("edge_forces", "atomic_virials", "atomic_stresses"):
        assert relative(got[key], expected[key]) < 1e-12, key


def test_structures_without_edges(seed: int) -> None:
    model = small("mpa0-medium")
    data = zoo.graph(Atoms("C"), model)
    expected = model(dict(data))
    got = FrozenMACE(convert(model, verify=False))(dict(data))
    assert relative(got["energy"], expected["energy"]) < 1e-12
    assert torch.equal(got["forces"], torch.zeros(1, 3, dtype=torch.float64))


def test_padding_changes_nothing(seed: int) -> None:
    model = small("mp0-small", torch.float32)
    frozen = FrozenMACE(convert(model, verify=False))
    data = zoo.graph(crystal(seed), model, dtype=torch.float32)
    plain = frozen(dict(data))
    edges = frozen.sorted_edges(data)
    count = edges.sender.shape[0]

    def pad(capacity: int) -> SortedEdges:
        parts = padded_parts(edges.num_atoms, capacity, len(model.atomic_numbers), with_pairs=edges.pair is not None)
        return refill(without_edges(Packed(parts, torch.device("cpu")).on_device), count, edges)

    padded = pad(count + 777)
    shifts = torch.full((count + 777, 3), 1e4)
    shifts[:count] = data["shifts"][edges.permutation]
    vectors = edge_vectors(data["positions"], padded, shifts)
    out, edge_forces = frozen.evaluate(data, padded, vectors, want_forces=True)
    assert torch.equal(out["energy"].to(torch.float32), plain["energy"])
    assert torch.equal(atomic_forces(edge_forces, padded), plain["forces"])
    with pytest.raises(ValueError, match="do not fit"):
        pad(count - 1)


def test_follows_its_parameters_dtype_and_copies(seed: int) -> None:
    model = small("mp0-small")
    frozen = FrozenMACE(convert(model, verify=False))
    data = zoo.graph(crystal(seed), model)
    before = frozen(dict(data))["energy"]
    copies = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]
    for each in copies:
        assert torch.equal(each(dict(data))["energy"], before)
    assert list(frozen.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        frozen.interactions[0].conv_tp_weights.layer0.weight.mul_(1.5)
    changed = frozen(dict(data))["energy"]
    assert not torch.equal(changed, before)
    assert relative(changed, frozen.converted(dict(data))["energy"]) < 1e-12
    frozen.to(torch.float32)
    single = zoo.graph(crystal(seed), model, dtype=torch.float32)
    assert frozen(dict(single))["energy"].dtype == torch.float32


@pytest.fixture(scope="module")
def base() -> tuple[torch.nn.Module, bytes]:
    """A model, and its frozen form pickled."""
    model = zoo.build(zoo.small_variants()["base"], dtype=torch.float64)
    return model, pickle.dumps(FrozenMACE(convert(model, verify=False)))


def _in_place(frozen: FrozenMACE) -> None:
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.mul_(1.1)


def _by_optimizer(frozen: FrozenMACE) -> None:
    optimizer = torch.optim.SGD(frozen.converted.parameters(), lr=0.1)
    for parameter in frozen.converted.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()


def _replacement(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter of the same version."""
    other = torch.nn.Parameter(1.3 * weight.detach())
    with torch.no_grad():
        while other._version < weight._version:
            other.mul_(1.0)
    return other


def _one_replaced(frozen: FrozenMACE) -> None:
    linear = frozen.interactions[1].linear
    linear.weight = _replacement(linear.weight)


def _another_replaced(frozen: FrozenMACE) -> None:
    contraction = frozen.products[0].symmetric_contractions.contractions[0]
    contraction.weights_max = _replacement(contraction.weights_max)


def _by_state_dict(frozen: FrozenMACE) -> None:
    frozen.load_state_dict(
        {name: 1.1 * value for name, value in frozen.state_dict().items() if "weight" in name}, False
    )


def _by_assigned_state_dict(frozen: FrozenMACE) -> None:
    names = [name for name, _ in frozen.named_parameters()]
    frozen.load_state_dict({name: 1.1 * frozen.state_dict()[name] for name in names}, strict=False, assign=True)


def _rounded_and_back(frozen: FrozenMACE) -> None:
    """The memory of the first numbers is free for the last."""
    frozen.to(torch.float32).to(torch.float64)


def _other_data(frozen: FrozenMACE) -> None:
    """Only one that is not the first."""
    weight = frozen.readouts[0].linear.weight
    weight.data = 1.1 * weight.data


def _a_buffer(frozen: FrozenMACE) -> None:
    frozen.scale_shift.scale = 1.1 * frozen.scale_shift.scale


def _through_data(frozen: FrozenMACE) -> None:
    """As torch_ema's average_parameters() does."""
    for parameter in frozen.parameters():
        parameter.data.copy_(1.1 * parameter.data)


def _through_data_and_refreshed(frozen: FrozenMACE) -> None:
    _through_data(frozen)
    frozen.refresh()


@pytest.mark.parametrize(
    "write",
    [
        _in_place,
        _by_optimizer,
        _one_replaced,
        _another_replaced,
        _by_state_dict,
        _by_assigned_state_dict,
        _rounded_and_back,
        _other_data,
        _a_buffer,
        _through_data_and_refreshed,
    ],
)
def test_every_way_of_writing_a_parameter_is_followed(
    write: Callable[[FrozenMACE], None], base: tuple[torch.nn.Module, bytes], seed: int
) -> None:
    model, saved = base
    frozen: FrozenMACE = pickle.loads(saved)
    static = CapturedMACE(frozen, capture=False)
    data = zoo.graph(crystal(seed), model)
    before = frozen(data)["forces"]
    static(data)
    write(frozen)
    found = frozen(data), static(data)
    expected = frozen.converted(dict(data))
    assert relative(expected["forces"], before) > 1e-9
    for after in found:
        for key in ("energy", "forces"):
            assert relative(after[key], expected[key]) < 1e-11, key


def test_what_is_not_noticed_changes_nothing(base: tuple[torch.nn.Module, bytes], seed: int) -> None:
    """Parameters of two times would give numbers of no model: here those of other atoms, whose inputs are made anew."""
    model, saved = base
    frozen: FrozenMACE = pickle.loads(saved)
    static = CapturedMACE(frozen, capture=False)
    first, second = (zoo.graph(crystal(seed, mixed=True) * size, model) for size in ((1, 1, 1), (2, 1, 1)))
    frozen(first), static(first)
    expected = frozen.converted(dict(second))
    _through_data(frozen)
    for got in (frozen(second), static(second)):
        for key in ("energy", "forces"):
            assert relative(got[key], expected[key]) < 1e-11, key


def test_tables_made_in_inference_mode_serve_outside(base: tuple[torch.nn.Module, bytes], seed: int) -> None:
    model, saved = base
    frozen: FrozenMACE = pickle.loads(saved)
    data = zoo.graph(crystal(seed), model)
    with torch.inference_mode():
        frozen.prepare(())
    assert relative(frozen(data)["forces"], frozen.converted(dict(data))["forces"]) < 1e-11


def test_refusals(seed: int) -> None:
    variants = zoo.small_variants()
    attention = next(a for a in variants.values() if "Att" in a.interaction)
    with pytest.raises(UnsupportedModuleError, match="depend on node features"):
        FrozenMACE(convert(zoo.build(attention), verify=False))
    model = small("mp0-small")
    with pytest.raises(UnsupportedModuleError, match="convert the model first"):
        FrozenMACE(model)
    frozen = FrozenMACE(convert(model, verify=False))
    data = zoo.graph(crystal(seed), model)
    for flag in ("training", "compute_hessian", "lammps_mliap"):
        with pytest.raises(NotImplementedError, match=flag):
            frozen(dict(data), **{flag: True})
    if not torch.cuda.is_available():
        with pytest.raises(MissingToolError, match="CUDA device"):
            CapturedMACE(frozen)


class ScaleShiftBlock(mace.modules.blocks.ScaleShiftBlock):
    """The same name, and another result."""

    def forward(self, x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x, head)


class RadialEmbeddingBlock(mace.modules.blocks.RadialEmbeddingBlock):
    """Could depend on anything."""


class ScaleShiftMACE(mace.modules.ScaleShiftMACE):
    """The same name, and another result."""


def _other_class(name: str, cls: type) -> Callable[[torch.nn.Module], None]:
    return lambda model: setattr(model.get_submodule(name), "__class__", cls)


def _other_harmonics(**changes: object) -> Callable[[torch.nn.Module], None]:
    arguments = {"normalize": True, "normalization": "component", **changes}
    return lambda model: setattr(model, "spherical_harmonics", o3.SphericalHarmonics([0, 1, 2], **arguments))


def _listener(name: str, register: str) -> Callable[[torch.nn.Module], None]:
    return lambda model: getattr(model.get_submodule(name), register)(lambda *args: None)


def _own_forward(model: torch.nn.Module) -> None:
    model.radial_embedding.forward = model.radial_embedding.forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_class("scale_shift", ScaleShiftBlock), r"scale_shift is a .*test_inference\.ScaleShiftBlock"),
        (_other_class("radial_embedding", RadialEmbeddingBlock), "radial_embedding is a"),
        (_other_class("", ScaleShiftMACE), r"test_inference\.ScaleShiftMACE has no frozen form"),
        (_other_harmonics(normalization="norm"), "normalization='norm'"),
        (_other_harmonics(normalize=False), "normalize=False"),
        (_listener("products.0", "register_forward_hook"), r"products\.0 .* has a forward hook"),
        (_listener("interactions.1", "register_forward_pre_hook"), r"interactions\.1 .* has a forward pre-hook"),
        (_listener("readouts.0.linear", "register_forward_hook"), r"readouts\.0\.linear .* has a forward hook"),
        (_listener("scale_shift", "register_full_backward_hook"), "scale_shift .* has a backward hook"),
        (_listener("", "register_forward_hook"), "the model .* has a forward hook"),
        (_own_forward, "radial_embedding .* has a forward that was replaced"),
    ],
)
def test_what_would_be_skipped_is_refused(
    change: Callable[[torch.nn.Module], None], message: str, base: tuple[torch.nn.Module, bytes]
) -> None:
    fast = pickle.loads(base[1]).converted
    change(fast)
    with pytest.raises(UnsupportedModuleError, match=f"{message}.*use mace_fast.convert"):
        FrozenMACE(fast)


class Squashed(torch.nn.Module):
    """In the place of a linear map, and not linear."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.irreps_in, self.irreps_out = inner.irreps_in, inner.irreps_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


def test_a_readout_of_other_parts_is_called(base: tuple[torch.nn.Module, bytes], seed: int) -> None:
    fast = pickle.loads(base[1]).converted
    fast.readouts[0].linear = Squashed(fast.readouts[0].linear)
    data = zoo.graph(crystal(seed), base[0])
    assert relative(FrozenMACE(fast)(data)["energy"], fast(dict(data))["energy"]) < 1e-11


def test_out_of_range_edges_are_refused(seed: int) -> None:
    model = small("mp0-small")
    data = dict(zoo.graph(crystal(seed), model))
    data["edge_index"] = data["edge_index"].clone()
    data["edge_index"][0, 3] = 99
    with pytest.raises(ValueError, match="outside"):
        FrozenMACE(convert(model, verify=False))(data)


def test_tables_are_proven_and_refused(seed: int) -> None:
    table = tabulate("f", [lambda r: torch.stack([torch.sin(3 * r), torch.exp(-r)], 1)], 5.0, torch.float64)
    r = 0.3 + 4.7 * torch.rand(500, dtype=torch.float64)  # from where the bound is proven
    positions = r * table.per_length
    assert table.rows.shape[1] == 8 and table.intervals == 1024
    error = (interpolate(table.rows, positions)[:, 0] - torch.sin(3 * r)).abs().max()
    assert error < 1e-12
    assert float(interpolate(table.rows, torch.tensor([float(table.intervals) + 5])).abs().max()) == 0.0
    with pytest.raises(UnsupportedModuleError, match="cannot be tabulated"):
        tabulate("g", [lambda r: torch.sin(4000 * r)[:, None]], 5.0, torch.float32)


def test_rounding_that_no_grid_makes_smaller_is_let_pass() -> None:
    """Of two hydrogen atoms in a model that transforms distances, on the finest grid; what is rougher is refused."""
    model = convert(zoo.build(zoo.small_variants()["transform_Agnesi"]), verify=False)
    table = tabulate("f", [radial_weights(model, 1, 0, 0)], float(model.r_max), torch.float64)
    assert table.intervals == 4096 and 2e-14 < table.error < 1e-13
    with pytest.raises(UnsupportedModuleError, match="off by .*allowed: 1e-13"):
        tabulate("g", [lambda r: (torch.sin(r) + 1e-12 * torch.sin(1e9 * r))[:, None]], 5.0, torch.float64)


@pytest.mark.parametrize(("dtype", "slope"), [(torch.float32, 1e-7), (torch.float64, 1e-12)])
def test_slopes_of_tables(dtype: torch.dtype, slope: float, seed: int) -> None:
    """Forces are made of them: proven to a bound, and continuous where polynomials meet."""
    table = tabulate("f", [lambda r: torch.stack([torch.sin(3 * r), torch.exp(-r)], 1)], 5.0, dtype)
    r = (0.3 + 4.6 * torch.rand(500, dtype=torch.float64)).requires_grad_()
    spline = interpolate(table.rows, r * table.per_length)
    (got,) = torch.autograd.grad(spline[:, 0].sum(), r)
    assert float((got - 3 * torch.cos(3 * r)).abs().max()) < 3 * slope
    assert table.slope_error < slope
    jumps = table.rows[:-2].sum(1) - table.rows[1:-1, 0]  # upper ends, and where the next ones begin
    assert float(jumps[20:].abs().max()) < 1e-13


def test_a_table_with_a_wrong_slope_is_refused() -> None:
    """Values to 1e-9 with a slope to 1e-6: ripples too short for the grid."""
    period = 5.0 / 2048 / 3

    def rippled(r: torch.Tensor) -> torch.Tensor:
        return (torch.sin(r) + 1e-9 * torch.sin(2 * torch.pi * r / period))[:, None]

    with pytest.raises(UnsupportedModuleError, match="its slope"):
        tabulate("f", [rippled], 5.0, torch.float32)


def test_derivatives_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from mace_fast.inference import tables

    r = torch.linspace(0.5, 4.0, 70, dtype=torch.float64)
    whole = tables._derivatives(lambda r: torch.sin(r)[:, None], r, 4)
    monkeypatch.setattr(tables, "_AT_ONCE", 16)
    for got, expected in zip(tables._derivatives(lambda r: torch.sin(r)[:, None], r, 4), whole, strict=True):
        assert torch.equal(got, expected)


def test_a_cutoff_function_s_jump_costs_no_intervals(seed: int) -> None:
    """Its third derivative is zero at the cutoff and not below it, where the last polynomial ends."""
    envelope = PolynomialCutoff(5.0, p=5)

    def radial(r: torch.Tensor) -> torch.Tensor:
        return (torch.sin(3 * r) * envelope(r))[:, None]

    assert tabulate("f", [radial], 5.0, torch.float64).intervals == 1024


def test_verifying_fetches_what_may_be_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables for each pair of species; a tensor of a GPU cannot become an array by itself."""

    def refuse(self: torch.Tensor, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    model = small("omat0-small")
    fast = convert(model, verify=False)
    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    assert verify_frozen(model, FrozenMACE(fast)).passed


def test_verification_reaches_every_pair_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the tables of one pair of three elements, with species that the first structures do not hold."""
    model = zoo.build("omat0-small", dtype=torch.float64, elements=[1, 6, 8], channels=8)
    frozen = FrozenMACE(convert(model, verify=False))
    monkeypatch.setattr(api, "_SECONDS", 1000.0)
    report = verify_frozen(model, frozen)
    assert report.passed and not any("pairs of elements" in line for line in report.not_compared)
    assert {"energy", "forces"} <= {row.quantity for row in report.rows if row.mode == "pairs"}
    monkeypatch.setattr(api, "_SECONDS", 0.0)
    (line,) = [line for line in verify_frozen(model, frozen).not_compared if "pairs of elements" in line]
    assert "3 of 6" in line and "all pairs with O" in line
    monkeypatch.setattr(api, "_SECONDS", 1000.0)
    right = frozen_module.radial_weights

    def wrong(exact: torch.nn.Module, layer: int, sender: int, receiver: int) -> object:
        function = right(exact, layer, sender, receiver)
        return (lambda r: 1.001 * function(r)) if {sender, receiver} == {1, 2} else function

    monkeypatch.setattr(frozen_module, "radial_weights", wrong)
    report = verify_frozen(model, frozen)
    assert {row.mode for row in report.rows if not row.passed} == {"pairs"}


def test_verify_names_what_compares_a_frozen_model(base: tuple[torch.nn.Module, bytes]) -> None:
    with pytest.raises(TypeError, match="verify_frozen"):
        verify(base[0], pickle.loads(base[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_captured_program_follows_the_frozen_one(seed: int, name: str) -> None:
    """In float64: a padded list may be summed in another order."""
    model = small(name, torch.float64)
    frozen = FrozenMACE(convert(model, verify=False)).to("cuda")
    captured = CapturedMACE(frozen)
    for number in range(3):  # other positions, then other edges, then another size
        atoms = crystal(seed + number) if number < 2 else crystal(seed) * (2, 1, 1)
        data = {k: v.cuda() for k, v in zoo.graph(atoms, model, dtype=torch.float64).items()}
        for _ in range(2):
            expected, got = frozen(dict(data), compute_stress=True), captured(data, compute_stress=True)
            for key in ("energy", "forces", "stress", "node_energy"):
                error = (got[key].double() - expected[key].double()).abs().max()
                assert error <= 1e-11 * expected[key].abs().max(), key
            data["positions"] = data["positions"] + 0.01 * torch.randn_like(data["positions"])


@pytest.mark.parametrize(("variant", "tables"), [("transform_Agnesi", 6), ("nonlinear_foundation", 9)])
def test_pairs_of_species_share_tables(variant: str, tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where radial functions do not tell sender from receiver, three species have six; and nothing else changes."""
    model = zoo.build(zoo.small_variants()[variant], dtype=torch.float32)
    atoms = zoo.alloy((2, 1, 1), symbols=("H", "C", "O"), seed=3)
    data = zoo.graph(atoms, model, dtype=torch.float32, device="cpu")
    frozen = FrozenMACE(convert(model, verify=False))
    out = frozen(zoo.copy_graph(data), compute_stress=True)
    prepared = frozen.prepare((0, 1, 2))
    assert all(len(layer.weights.rows) == tables * (layer.weights.intervals + 1) for layer in prepared.layers)
    assert (prepared.table_of_pair is None) == (tables == 9)
    monkeypatch.setattr(frozen_module, "shared_functions", lambda functions, cutoff: 2 * (list(range(9)),))
    alone = FrozenMACE(convert(model, verify=False))(zoo.copy_graph(data), compute_stress=True)
    for name in ("node_energy", "forces", "stress"):
        assert torch.equal(out[name], alone[name]), name
