"""``compare`` passes what is equal, in whatever order it sums, and finds and names planted faults."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import ase.build
import mace.modules
import pytest
import torch

from mace_fast.errors import VerificationError
from mace_fast.verification import compare, default_structures
from mace_fast.zoo import build, small_variants

FLOAT64, FLOAT32 = (torch.float64,), (torch.float32,)
BOTH = (torch.float64, torch.float32)
# Far from one: a wrong head, charge or spin must change the energy by more than rounding.
HEADS = ("first", "second")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Two layers, 8 channels, three elements, two heads, charge and spin: about 6000 parameters, float64."""
    embeddings = small_variants()["embeddings"].embedding_specs
    return build(replace(small_variants()["base"], name="tested", heads=HEADS, embedding_specs=embeddings))


def faulty(model: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A copy of the model, with the same state, whose class is ``kind``."""
    candidate = copy.deepcopy(model)
    candidate.__class__ = kind
    return candidate


# --- what is equal passes


@pytest.mark.parametrize("working", BOTH, ids=str)
def test_a_model_equals_itself(model: torch.nn.Module, working: torch.dtype, seed: int) -> None:
    reference = copy.deepcopy(model).to(working)
    report = compare(reference, reference, seed=seed)
    assert report.passed, str(report)
    assert report.dtypes == ["float64"] if working == torch.float64 else ["float64", "float32"]
    assert report.repeatable
    assert not report.failures() and not report.tensors and not report.not_compared
    quantities = {row.quantity for row in report.rows}
    assert quantities >= {"energy", "node_energy", "forces", "stress", "virials", "node_feats", "hessian"}
    assert {row.mode for row in report.rows} >= {"stress", "energy", "forces", "displacement", "training"}
    report.raise_if_failed()


class RotatedAndRenumbered(mace.modules.ScaleShiftMACE):
    """The same function, evaluated on permuted axes, atoms and edges: it rounds differently everywhere."""

    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> dict[str, torch.Tensor | None]:
        rotation = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0]]).to(data["positions"])
        atoms = torch.randperm(data["positions"].shape[0])
        edges = torch.randperm(data["edge_index"].shape[1])
        back = torch.argsort(atoms)
        turned = dict(data)
        turned["positions"] = (data["positions"] @ rotation)[atoms]
        turned["cell"] = data["cell"] @ rotation
        turned["shifts"] = (data["shifts"] @ rotation)[edges]
        turned["unit_shifts"] = data["unit_shifts"][edges]
        turned["edge_index"] = back[data["edge_index"][:, edges]]
        turned["node_attrs"] = data["node_attrs"][atoms]
        turned["batch"] = data["batch"][atoms]
        out = dict(super().forward(turned, **arguments))
        out["node_energy"] = out["node_energy"][back]
        if out["forces"] is not None:
            out["forces"] = (out["forces"] @ rotation.T)[back]
        for key in ("stress", "virials"):
            if out[key] is not None:
                out[key] = rotation @ out[key] @ rotation.T
        out["node_feats"] = super().forward(dict(data), compute_force=False)["node_feats"]
        return out


@pytest.mark.parametrize("built_in", BOTH, ids=str)
def test_other_rounding_passes(model: torch.nn.Module, built_in: torch.dtype, seed: int) -> None:
    # Weights that are float32 numbers round no further: there is less error of the reference to hide behind.
    reference = copy.deepcopy(model)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(built_in).to(torch.float64)
    candidate = faulty(reference, RotatedAndRenumbered)
    modes = ["stress", "energy", "forces", "virials", "displacement", "no edges", "training"]
    report = compare(reference, candidate, dtypes=BOTH, modes=modes, seed=seed)
    assert report.passed, str(report)
    assert not report.repeatable
    assert max(row.error for row in report.rows if row.dtype == "float64") > 0.0


def test_perfect_crystal_passes(model: torch.nn.Module, seed: int) -> None:
    """Forces that cancel to nothing have the scale of what cancels."""
    candidate = faulty(model, RotatedAndRenumbered)
    crystals = [ase.build.bulk("C", "sc", 2.3), ase.build.bulk("C", "diamond", 3.6, cubic=True)]
    modes = ["stress", "virials", "training"]
    report = compare(model, candidate, structures=crystals, dtypes=BOTH, modes=modes, seed=seed)
    assert report.passed, str(report)


def test_models_are_left_alone(model: torch.nn.Module, seed: int) -> None:
    reference, candidate = copy.deepcopy(model).train(), copy.deepcopy(model).float().eval()
    calls: list[int] = []
    candidate.register_forward_hook(lambda *_: calls.append(1))
    before = [{name: t.clone() for name, t in {**m.state_dict(keep_vars=True)}.items()} for m in (reference, candidate)]
    hooks = [sum(len(module._forward_pre_hooks) for module in m.modules()) for m in (reference, candidate)]
    structures = default_structures(reference, seed=seed)[1:4]
    kept = [atoms.copy() for atoms in structures]
    dtype, state = torch.get_default_dtype(), torch.random.get_rng_state()
    with torch.no_grad():
        compare(
            reference,
            candidate,
            structures=structures,
            modules={"products.0": "x"},
            modes=["stress", "training"],
        )
        assert not torch.is_grad_enabled()
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.random.get_rng_state(), state)
    assert structures == kept
    assert reference.training and not candidate.training
    for m, saved, count in zip((reference, candidate), before, hooks, strict=True):
        assert all(torch.equal(t, saved[name]) and t.dtype == saved[name].dtype for name, t in m.state_dict().items())
        assert all(p.grad is None for p in m.parameters())
        assert sum(len(module._forward_pre_hooks) for module in m.modules()) == count


def test_inside_autocast_and_inference_mode(model: torch.nn.Module, seed: int) -> None:
    structures = default_structures(model, seed=seed)[1:4]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compare(model, model, structures=structures, modes=["stress"], dtypes=BOTH, seed=seed).passed


# --- planted faults: class, the quantity that is wrong, the mode or structure that shows it

Outputs = dict[str, Any]


class Faulty(mace.modules.ScaleShiftMACE):
    """MACE whose outputs pass through ``spoil``."""

    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        given = dict(data)
        return self.spoil(given, dict(super().forward(data, **arguments)), arguments)

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        raise NotImplementedError


class WrongSign(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "forces": None if out["forces"] is None else -out["forces"]}


class NoForces(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "forces": None if out["forces"] is None else 0.0 * out["forces"]}


class TwoPercent(Faulty):
    """Right energy, forces off by 2 %."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "forces": None if out["forces"] is None else 1.02 * out["forces"]}


class StressOnlyWithComputeStress(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if arguments.get("compute_stress") and not arguments.get("compute_virials"):
            out["stress"] = 1.01 * out["stress"]
        return out


class VirialsOnlyByThemselves(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if arguments.get("compute_virials") and not arguments.get("compute_stress"):
            out["virials"] = out["virials"] * (1 + 1e-9)
        return out


class StressUnlessDisplaced(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if arguments.get("compute_displacement"):
            out["stress"] = out["stress"].transpose(1, 2).roll(1, 0)
        return out


class EnergyAlone(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if arguments.get("compute_force") is False:
            out["energy"] = out["energy"] * (1 + 1e-10)
        return out


class SwappedAtoms(Faulty):
    """The total is right, the atoms' shares are not."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        shares = out["node_energy"].clone()
        first = torch.searchsorted(data["batch"], data["batch"][-1])
        shares[first:] = shares[first:].roll(1)
        return {**out, "node_energy": shares}


class NotANumber(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        out["node_energy"] = out["node_energy"].clone()
        out["node_energy"][0] = float("nan")
        return out


class Infinite(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "node_feats": out["node_feats"] / torch.zeros_like(out["node_feats"][:1])}


class LeftHanded(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        wrong = torch.linalg.det(data["cell"].view(-1, 3, 3)) < 0
        for key in ("stress", "virials"):
            if out[key] is not None:
                out[key] = torch.where(wrong.view(-1, 1, 1), -out[key], out[key])
        return out


class FarFromTheOrigin(Faulty):
    """float32 rounding of the positions leaks in where they are large."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        far = data["positions"].norm(dim=-1) > 200.0
        if out["forces"] is not None:
            out["forces"] = torch.where(far[:, None], out["forces"] * (1 + 1e-6), out["forces"])
        return out


class WrongHessian(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "hessian": None if out["hessian"] is None else out["hessian"].flip(0)}


class FrozenForces(Faulty):
    """Right values, but the forces carry no gradient to the parameters."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "forces": None if out["forces"] is None else out["forces"].detach()}


class WrongShape(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "energy": out["energy"].sum()}


class NoDescriptors(Faulty):
    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        return {**out, "node_feats": None}


class HeadZero(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        return super().forward({**data, "head": torch.zeros_like(data["head"])}, **arguments)


class Neutral(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        return super().forward({**data, "total_charge": 0.0 * data["total_charge"]}, **arguments)


class Singlet(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        return super().forward({**data, "total_spin": torch.ones_like(data["total_spin"])}, **arguments)


class NeedsEdges(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        if data["edge_index"].shape[1] == 0:
            raise RuntimeError("invalid configuration argument")
        return super().forward(data, **arguments)


class NoVirialArgument(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        if "compute_virials" in arguments and "training" not in arguments:
            raise TypeError("forward() got an unexpected keyword argument 'compute_virials'")
        return super().forward(data, **arguments)


FAULTS = [
    (WrongSign, "forces", "stress", "-1 times the reference"),
    (NoForces, "forces", "forces", "exactly zero"),
    (TwoPercent, "forces", "stress", "1.02 times the reference"),
    (StressOnlyWithComputeStress, "stress", "stress", "1.01 times the reference"),
    (VirialsOnlyByThemselves, "virials", "virials", "times the reference"),
    (StressUnlessDisplaced, "stress", "displacement", ""),
    (EnergyAlone, "energy", "energy", ""),
    (SwappedAtoms, "node_energy", "stress", ""),
    (NotANumber, "node_energy", "no edges", "1 of 1 numbers are NaN or infinite"),
    (Infinite, "node_feats", "forces", "NaN or infinite"),
    (FarFromTheOrigin, "forces", "stress", "far from the origin"),
    (WrongHessian, "hessian", "hessian", ""),
    (WrongShape, "energy", "stress", "shape () instead of"),
    (NoDescriptors, "node_feats", "stress", "does not return it"),
    (HeadZero, "energy", "stress", ""),
    (Neutral, "energy", "stress", ""),
    (Singlet, "interaction_energy", "stress", ""),
    (NeedsEdges, "call", "no edges", "RuntimeError: invalid configuration argument"),
    (NoVirialArgument, "call", "virials", "TypeError"),
]


@pytest.mark.parametrize(("kind", "quantity", "mode", "said"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_fault_is_found_and_named(
    model: torch.nn.Module, kind: type[torch.nn.Module], quantity: str, mode: str, said: str, seed: int
) -> None:
    report = compare(model, faulty(model, kind), modes=[mode], seed=seed)
    assert not report.passed
    rows = [row for row in report.rows if not row.passed and row.quantity == quantity]
    assert rows and rows[0].mode == mode
    with pytest.raises(VerificationError) as raised:
        report.raise_if_failed()
    assert raised.value.report is report
    assert said in str(raised.value) or any(said in f"{row.worst} {row.note}" for row in rows)
    assert "FAILED" in str(report)


@pytest.mark.parametrize("kind", [StressOnlyWithComputeStress, VirialsOnlyByThemselves, EnergyAlone, WrongHessian])
def test_fault_shows_in_its_own_mode_only(model: torch.nn.Module, kind: type[torch.nn.Module], seed: int) -> None:
    own = next(mode for fault, _, mode, _ in FAULTS if fault is kind)
    others = {"stress", "energy", "forces", "virials", "displacement", "hessian"} - {own}
    assert compare(model, faulty(model, kind), modes=sorted(others), seed=seed).passed


def test_left_handed_cell_is_named(model: torch.nn.Module, seed: int) -> None:
    report = compare(model, faulty(model, LeftHanded), modes=["stress"], seed=seed)
    assert {row.worst for row in report.failures() if hasattr(row, "mode")} == {"left-handed cell"}
    assert all(row.quantity in ("stress", "virials") for row in report.failures() if hasattr(row, "mode"))


def test_forces_without_gradient_fail_in_training(model: torch.nn.Module, seed: int) -> None:
    report = compare(model, faulty(model, FrozenForces), modes=["stress", "training"], seed=seed)
    assert {row.quantity for row in report.rows if not row.passed} == {"parameter gradients"}


class PoorFloat32(Faulty):
    """float64 is right; float32 has the precision of a 16-bit accumulation."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if out["forces"] is not None and out["forces"].dtype == torch.float32:
            noise = torch.randn(out["forces"].shape, generator=torch.Generator().manual_seed(0))
            out["forces"] = out["forces"] * (1 + 1e-4 * noise)
        return out


def test_poor_float32_fails_though_float64_passes(model: torch.nn.Module, seed: int) -> None:
    report = compare(model, faulty(model, PoorFloat32), dtypes=BOTH, modes=["stress"], seed=seed)
    assert {(row.quantity, row.dtype) for row in report.rows if not row.passed} == {("forces", "float32")}


class OffInFloat32(Faulty):
    """Forces that are off by a factor in the first float32 calls, or in all."""

    factor = 1.0
    calls = 0
    wrong_calls = 2  # that of a mode and its repetition

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        if out["forces"] is not None and out["forces"].dtype == torch.float32:
            self.calls += 1
            if self.calls <= self.wrong_calls:
                out["forces"] = out["forces"] * self.factor
        return out


def test_chance_is_told_from_fault_by_measuring_again(model: torch.nn.Module, seed: int) -> None:
    """What is off by a little more than the tolerance may be chance, unless it is so on displaced copies as well."""

    def compared(factor: float, wrong_calls: int) -> tuple[bool, Any]:
        candidate = faulty(model, OffInFloat32)
        candidate.factor, candidate.wrong_calls = factor, wrong_calls
        report = compare(model, candidate, dtypes=FLOAT32, modes=["stress"], seed=seed)
        (row,) = [row for row in report.rows if row.quantity == "forces" and row.mode == "stress"]
        assert {r.quantity for r in report.rows if not r.passed} <= {"forces"}
        return report.passed, row

    passed, gross = compared(1.001, 1000)
    assert not passed
    _, right = compared(1.0, 0)
    # Scaling by 1 + x makes an error of x times what is left of the terms after they have cancelled.
    little = 1.0 + 1.3 * right.tolerance * 1e-3 / gross.error
    passed, row = compared(little, 2)
    assert passed and "measured again" in row.note, row
    passed, row = compared(little, 1000)
    assert not passed and not row.passed


class LargerRounding(mace.modules.ScaleShiftMACE):
    """In float32, every output is ``times`` as far from the float64 result as mace-torch's own float32 is."""

    times = 1.0

    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> Outputs:
        out = dict(super().forward(dict(data), **arguments))
        if data["positions"].dtype == torch.float64:
            return out
        inputs = {k: v.detach().double() if v.is_floating_point() else v for k, v in data.items()}
        exact = copy.deepcopy(self).double().forward(inputs, **arguments)
        return {k: v if v is None else (exact[k] + self.times * (v - exact[k])).float() for k, v in out.items()}


def test_float32_may_round_twice_as_much_and_no_more(model: torch.nn.Module, seed: int) -> None:
    candidate = faulty(model, LargerRounding)
    structures = [ase.build.molecule(name) for name in ("CH3CH2OH", "H2O", "CH4")]
    structures += [ase.build.bulk("C", "diamond", 3.6), ase.build.bulk("CO", "zincblende", 4.2)]
    for index, atoms in enumerate(structures):
        atoms.rattle(0.1, seed=seed % 2**31 + index)
    for candidate.times, passes in ((1.0, True), (1.7, True), (3.0, False)):
        report = compare(model, candidate, structures=structures, dtypes=FLOAT32, modes=["stress"], seed=seed)
        assert report.passed == passes, (candidate.times, str(report))


def test_weights_in_half_precision_fail_in_every_mode(model: torch.nn.Module, seed: int) -> None:
    """Rounding of the size of tensor-core formats, in the weights of one linear map of float32 alone."""
    candidate = copy.deepcopy(model)
    weight = candidate.interactions[1].linear_up.weight
    weight.data = weight.data.half().double()
    report = compare(model, candidate, dtypes=FLOAT32, modules={"interactions.1": ""}, seed=seed)
    failed = {(row.mode, row.quantity) for row in report.rows if not row.passed}
    modes = {"stress", "energy", "forces", "virials", "displacement", "training"}
    assert failed >= {(mode, "interaction_energy") for mode in modes}
    assert failed >= {("stress", "forces"), ("stress", "stress"), ("virials", "virials"), ("hessian", "hessian")}
    assert failed >= {("training", "parameter gradients")}
    assert [row.passed for row in report.modules] == [False]


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_wrong_sign_of_a_small_path_fails_in_float32(model: torch.nn.Module, share: float, seed: int) -> None:
    """The path contributes little, so that the error is not far beyond rounding: no chance on displaced copies."""
    reference = copy.deepcopy(model)
    product = reference.interactions[1].conv_tp
    first, size = product.instructions[0], 8
    assert first.has_weight and first.path_shape == (size, 1)
    reference.interactions[1].conv_tp_weights[-1].weight.data[:, :size] *= share
    candidate = copy.deepcopy(reference)
    candidate.interactions[1].conv_tp_weights[-1].weight.data[:, :size] *= -1
    report = compare(
        reference, candidate, dtypes=FLOAT32, modules={"interactions.1": ""}, modes=["stress", "training"], seed=seed
    )
    failed = {(row.mode, row.quantity) for row in report.rows if not row.passed}
    assert failed >= {("stress", "forces"), ("stress", "node_feats"), ("training", "parameter gradients")}, str(report)
    assert [row.passed for row in report.modules] == [False]


class Uninitialised(Faulty):
    """The first call is right, later ones are not."""

    def spoil(self, data: Outputs, out: Outputs, arguments: dict[str, bool]) -> Outputs:
        self.calls = getattr(self, "calls", 0) + 1
        return out if self.calls == 1 else {**out, "energy": out["energy"] * 1.001}


def test_second_call_is_checked(model: torch.nn.Module, seed: int) -> None:
    report = compare(model, faulty(model, Uninitialised), modes=["stress"], seed=seed)
    assert report.repeatable is False
    assert {(row.quantity, row.mode) for row in report.rows if not row.passed} == {("energy", "stress, called again")}


# --- tensors


def test_small_change_of_one_weight_is_named(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.interactions[1].linear_up.weight.data *= 1 + 1e-6
    report = compare(model, candidate, modes=["stress"], seed=seed)
    assert not report.passed
    assert [difference.name for difference in report.tensors] == ["interactions.1.linear_up.weight"]
    module = report.first_differing_module()
    assert module is not None and module.name == "interactions.1"
    with pytest.raises(VerificationError, match=r"first module that differs is interactions\.1 ") as raised:
        report.raise_if_failed()
    assert "interactions.1.linear_up.weight" in str(raised.value)


def test_tensor_faults(model: torch.nn.Module, seed: int) -> None:
    structures = default_structures(model, seed=seed)[1:3]

    def problems(candidate: torch.nn.Module) -> dict[str, str]:
        report = compare(model, candidate, structures=structures, modes=["energy"], seed=seed)
        assert not report.passed
        return {difference.name: difference.problem for difference in report.tensors}

    candidate = copy.deepcopy(model)
    del candidate.interactions[0].conv_tp.output_mask
    assert problems(candidate) == {"interactions.0.conv_tp.output_mask": "missing in the candidate"}
    candidate = copy.deepcopy(model)
    candidate.register_buffer("extra", torch.zeros(2))
    assert problems(candidate) == {"extra": "not in the reference"}
    candidate = copy.deepcopy(model)
    candidate.interactions[0].linear.output_mask[3] = 0.0
    assert problems(candidate) == {"interactions.0.linear.output_mask": "1 of 72 values differ"}
    candidate = copy.deepcopy(model)
    candidate.scale_shift.scale = candidate.scale_shift.scale.reshape(1, -1)
    assert "shape (1, 2) instead of (2,)" in problems(candidate)["scale_shift.scale"]


def test_float32_copy_has_equal_tensors(model: torch.nn.Module, seed: int) -> None:
    structures = default_structures(model, seed=seed)[1:3]
    report = compare(model.float(), copy.deepcopy(model).double(), structures=structures, modes=["energy"])
    model.double()
    assert not report.tensors


def test_frozen_parameter_is_reported(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.products[0].linear.weight.requires_grad_(False)
    report = compare(model, candidate, modes=["training"], seed=seed)
    (row,) = [row for row in report.rows if not row.passed]
    assert row.quantity == "parameter gradients" and "products.0.linear.weight" in row.note


def test_gradients_are_compared_where_no_parameter_requires_one(model: torch.nn.Module, seed: int) -> None:
    """As in files of mace_run_train; both models stay as they were."""
    reference = copy.deepcopy(model).requires_grad_(False)
    report = compare(reference, copy.deepcopy(reference), modes=["training"], dtypes=FLOAT32, seed=seed)
    assert report.passed and "parameter gradients" in {row.quantity for row in report.rows}
    wrong = faulty(reference, FrozenForces)
    report = compare(reference, wrong, modes=["training"], dtypes=FLOAT32, seed=seed)
    assert {row.quantity for row in report.rows if not row.passed} == {"parameter gradients"}
    assert not any(parameter.requires_grad for each in (reference, wrong) for parameter in each.parameters())
