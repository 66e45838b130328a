"""Parts of verification: structures and neighbour lists, criterion, single modules, report, bad input."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import ase
import mace.modules
import numpy as np
import pytest
import torch
from e3nn import o3

from mace_fast.errors import MaceFastError, StructureError, VerificationError
from mace_fast.verification import compare, default_structures
from mace_fast.verification.criterion import Part, judge_float32, judge_float64, judge_tensors_float32
from mace_fast.verification.graphs import batch_graphs, build_graphs
from mace_fast.zoo import architectures, build, small_variants

BOTH = (torch.float64, torch.float32)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Two layers, 8 channels, three elements; its first block returns a tuple that holds None."""
    variant = small_variants()["first/RealAgnosticInteractionBlock"]
    return build(replace(variant, atomic_numbers=(1, 6, 8)))


# --- structures


def test_every_element_head_and_category_occurs(seed: int) -> None:
    base = small_variants()["base"]
    specs = {
        "total_spin": {
            "type": "categorical",
            "per": "graph",
            "emb_dim": 4,
            "in_dim": 1,
            "num_classes": 20,
            "offset": 10,
        },
        "total_charge": {"type": "continuous", "per": "graph", "emb_dim": 4, "in_dim": 1},
    }
    elements = architectures()["mp0-medium"].atomic_numbers
    heads = tuple(f"head {index}" for index in range(20))
    model = build(replace(base, atomic_numbers=elements, heads=heads, embedding_specs=specs))
    structures = default_structures(model, seed=seed)
    assert set(np.concatenate([atoms.numbers for atoms in structures])) == set(elements)
    assert len(elements) == 89 <= len(structures[0]) < 95
    assert [atoms.info["head"] for atoms in structures] == list(heads)
    assert {atoms.info["total_spin"] for atoms in structures} == set(range(-10, 10))
    assert len({atoms.info["total_charge"] for atoms in structures}) == len(structures)
    graphs = build_graphs(model, structures)
    assert 800 < sum(graph.num_edges for graph in graphs) < 2500
    again = default_structures(model, seed=seed)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(structures, again, strict=True))
    assert not np.array_equal(structures[0].positions, default_structures(model)[0].positions)


def test_geometric_cases_occur(model: torch.nn.Module, seed: int) -> None:
    structures = {atoms.info["name"]: atoms for atoms in default_structures(model, seed=seed)}
    graphs = {graph.name: graph for graph in build_graphs(model, list(structures.values()))}
    r_max = float(model.r_max)
    assert np.linalg.det(structures["left-handed cell"].cell) < 0 < np.linalg.det(structures["triclinic cell"].cell)
    assert abs(structures["triclinic cell"].cell.angles() - 90.0).min() > 3.0
    assert {tuple(atoms.pbc) for atoms in structures.values()} >= {
        (True, True, True), (True, True, False), (False, True, False), (False, False, False)
    }  # fmt: skip
    thin = structures["cell thinner than the cutoff"]
    assert thin.cell.lengths().min() < 0.5 * r_max
    shifts = graphs["cell thinner than the cutoff"].data["unit_shifts"]
    assert shifts.abs().max() >= 2
    owner, other = graphs["cell thinner than the cutoff"].data["edge_index"]
    assert bool((owner == other).any())
    assert structures["molecule in a cell"].cell.volume > 0 and not structures["molecule in a cell"].pbc.any()
    assert (
        np.ptp(structures["molecule in a cell"].positions, axis=0).max()
        > structures["molecule in a cell"].cell.lengths().min()
    )
    outside = structures["atoms outside the cell"].get_scaled_positions(wrap=False)
    assert outside.min() < 0 or outside.max() > 1
    assert np.linalg.norm(structures["far from the origin"].positions, axis=1).min() > 500
    assert not structures["molecule"].cell.any()
    assert {name: graph.num_edges for name, graph in graphs.items() if graph.num_edges <= 2} == {
        "dimer": 2, "isolated atom": 0, "isolated atom in a cell": 0, "two atoms beyond the cutoff": 0
    }  # fmt: skip


def test_neighbour_lists_are_complete(model: torch.nn.Module, seed: int) -> None:
    """Against a sum over all images near enough, also for left-handed cells and atoms outside their cell."""
    r_max = float(model.r_max)
    for graph, atoms in zip(
        build_graphs(model, default_structures(model, seed=seed)),
        default_structures(model, seed=seed),
        strict=True,
    ):
        data = graph.data
        sender, receiver = data["edge_index"]
        vectors = data["positions"][receiver] - data["positions"][sender] + data["shifts"]
        found = sorted(zip(sender.tolist(), receiver.tolist(), vectors.norm(dim=-1).tolist(), strict=True))
        reach = [range(-6, 7) if periodic else range(1) for periodic in atoms.pbc]
        positions = data["positions"].numpy()
        expected = []
        cell = atoms.cell.array.astype(np.float32).astype(np.float64)
        for shift in np.stack(np.meshgrid(*reach, indexing="ij"), axis=-1).reshape(-1, 3):
            distances = np.linalg.norm(positions[None] + shift @ cell - positions[:, None], axis=-1)
            for i, j in np.argwhere(distances < r_max):
                if i != j or shift.any():
                    expected.append((int(i), int(j), float(distances[i, j])))
        expected.sort()
        assert len(found) == len(expected), graph.name
        assert np.allclose(np.array(found), np.array(expected), rtol=0, atol=1e-9), graph.name


def test_float32_sees_the_same_structure(model: torch.nn.Module, seed: int) -> None:
    batch = batch_graphs("all", build_graphs(model, default_structures(model, seed=seed)))
    double, single = (batch.inputs(dtype, torch.device("cpu")) for dtype in BOTH)
    assert torch.equal(double["positions"], single["positions"].double())
    assert single["edge_index"].dtype == torch.int64
    single["positions"] += 1.0
    assert torch.equal(batch.tensors["positions"], double["positions"])


# --- the criterion


def part(oracle: Any, candidate: Any, reference: Any = None, terms: float = 0.0, name: str = "it") -> Part:
    values = [None if v is None else torch.as_tensor(v, dtype=torch.float64) for v in (oracle, candidate, reference)]
    assert values[0] is not None and values[1] is not None
    return Part(name, values[0], values[1], values[2], terms)


def test_float64_is_relative_to_the_terms(rng: np.random.Generator) -> None:
    size = rng.normal(size=30)
    assert judge_float64([part(size, size * (1 + 9e-13))]).passed
    assert not judge_float64([part(size, size * (1 + 2e-12))]).passed
    assert not judge_float64([part([1e-14], [3e-14])]).passed
    assert judge_float64([part([1e-14], [3e-14], terms=1.0)]).passed
    assert judge_float64([part([0.0], [0.0])]).passed
    assert not judge_float64([part([0.0], [1e-300])]).passed
    verdict = judge_float64([part(size, size), part(size, size + 1e-3, name="that one"), part(size, size)])
    assert not verdict.passed and verdict.worst == "that one"


def test_float64_with_the_noise_of_the_reference() -> None:
    cancelling = part([1e-17, -2e-17], [3e-17, 1e-17])
    assert not judge_float64([cancelling]).passed
    assert judge_float64([cancelling], [1e-8]).passed
    assert not judge_float64([cancelling], [float("nan")]).passed
    assert not judge_float64([cancelling], [float("inf")]).passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_never_passes(bad: float) -> None:
    good = [1.0, 2.0, 3.0]
    spoilt = [1.0, bad, 3.0]
    for oracle, candidate, reference in (
        (good, spoilt, good),
        (spoilt, spoilt, spoilt),
        (good, spoilt, spoilt),
    ):
        assert not judge_float64([part(oracle, candidate)]).passed
        assert not judge_float32([part(oracle, candidate, reference)]).passed
        assert not judge_tensors_float32([part(oracle, candidate, reference)]).passed


def test_float32_factor(rng: np.random.Generator) -> None:
    def parts(factor: float) -> list[Part]:
        made = []
        for index in range(12):
            oracle = rng.normal(size=200)
            noise = 1e-6 * rng.normal(size=(2, 200)) * np.abs(oracle)
            made.append(part(oracle, oracle + factor * noise[0], oracle + noise[1], name=str(index)))
        return made

    assert all(judge_float32(parts(1.0)).passed and judge_tensors_float32(parts(1.0)).passed for _ in range(20))
    assert not any(judge_float32(parts(2.8)).passed for _ in range(20))
    assert not any(judge_tensors_float32(parts(20.0)).passed for _ in range(20))


def test_float32_is_not_fooled_by_a_lucky_number(rng: np.random.Generator) -> None:
    """The reference's energy of one structure may be exact by chance."""
    for _ in range(50):
        energies = rng.normal(size=14) * 100
        own = energies.astype(np.float32).astype(np.float64)
        own[0] = energies[0]
        other = energies + 1e-5 * rng.uniform(-1, 1, size=14)
        assert judge_float32(
            [part([e], [c], [r], terms=100.0) for e, c, r in zip(energies, other, own, strict=True)]
        ).passed


# --- single modules


class ScaledPath(o3.TensorProduct):
    """The first path is wrong by one part in ten million."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        assert weight is not None
        factor = torch.ones_like(weight[:1])
        factor[:, : self.instructions[0].path_shape[0]] += 1e-7
        return super().forward(x, y, weight * factor)


def test_one_path_of_a_tensor_product_is_found(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.interactions[1].conv_tp.__class__ = ScaledPath
    labels = {
        "interactions.0.conv_tp": "kernel a",
        "interactions.1.conv_tp": "kernel b",
        "interactions.1": "kernel c",
        "products.1": "kernel d",
    }
    report = compare(model, candidate, modules=labels, modes=["stress", "training"], seed=seed)
    failing = {row.name for row in report.modules if not row.passed}
    assert failing == {"interactions.1.conv_tp", "interactions.1"}
    with pytest.raises(VerificationError, match="kernel"):
        report.raise_if_failed()
    assert {row.quantity for row in report.rows if not row.passed} >= {
        "energy",
        "forces",
        "parameter gradients",
    }
    assert "kernel b" in str(report) and "ScaledPath" in str(report)
    order = [row.name for row in report.modules]
    assert order.index("interactions.0.conv_tp") < order.index("interactions.1.conv_tp") < order.index("products.1")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 + 1e-9)


class WrongBackward(mace.modules.blocks.EquivariantProductBasisBlock):
    def forward(self, node_feats: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return super().forward(WrongGradient.apply(node_feats), **arguments)


def test_a_wrong_gradient_is_found_in_its_module(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.products[0].__class__ = WrongBackward
    report = compare(model, candidate, modes=["energy", "forces"], seed=seed)
    assert {row.quantity for row in report.rows if not row.passed} == {"forces"}
    first = report.first_differing_module()
    assert first is not None and (first.name, first.worst) == ("products.0", "gradient of node_feats")


class OtherSignature(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_modules_that_cannot_be_called_or_are_missing(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.products[1] = OtherSignature()
    report = compare(model, candidate, modules={"products.1": "", "products.1.linear": ""}, modes=["energy"], seed=seed)
    notes = {row.name: row.note for row in report.modules}
    assert "TypeError" in notes["products.1"]
    assert "no module of this name" in notes["products.1.linear"]


def test_blocks_of_equal_models_agree(model: torch.nn.Module, seed: int) -> None:
    names = [
        "node_embedding",
        "spherical_harmonics",
        "radial_embedding",
        "interactions.0",
        "interactions.0.conv_tp",
    ]
    names += [
        "interactions.0.conv_tp_weights",
        "products.0.symmetric_contractions",
        "readouts.0",
        "readouts.1",
    ]
    report = compare(model, model, modules=dict.fromkeys(names, "e3nn"), modes=["energy"], dtypes=BOTH, seed=seed)
    assert report.passed, str(report)
    assert {row.name for row in report.modules} == set(names)
    assert all(row.error == 0.0 for row in report.modules if row.dtype == "float64")
    assert all(0.0 < row.reference_error < 1e-5 for row in report.modules if row.dtype == "float32" and row.error)


# --- the report


def test_report_as_text_and_json(model: torch.nn.Module, seed: int) -> None:
    seen: list[tuple[str, int, int]] = []
    report = compare(
        model,
        model,
        dtypes=BOTH,
        modes=["stress", "forces"],
        modules={"products.0": "symmetric_contraction"},
        progress=lambda *step: seen.append(step),
        seed=seed,
    )
    text = str(report)
    assert "PASSED" in text and "descriptors" in text and "symmetric_contraction" in text and str(seed) in text
    assert max(len(line) for line in text.splitlines()) <= 120 and "\x1b" not in text
    assert "\x1b[" in report.render(color=True)
    data = json.loads(report.to_json())
    assert data["passed"] and data["seed"] == seed and data["dtypes"] == ["float64", "float32"]
    assert {row["quantity"] for row in data["rows"]} >= {"energy", "forces"}
    assert data["environment"]["torch"] and data["seconds"]["total"] > 0
    assert any("Hessian" in line for line in data["not_compared"])
    assert all(done < known for _, done, known in seen) and [done for _, done, _ in seen] == list(range(len(seen)))


def test_failed_report_as_json(model: torch.nn.Module, seed: int) -> None:
    candidate = copy.deepcopy(model)
    candidate.scale_shift.scale *= float("nan")
    report = compare(model, candidate, modes=["stress"], seed=seed)
    data = json.loads(report.to_json())
    assert not data["passed"]
    assert any(row["error"] == "inf" for row in data["rows"])
    assert data["tensors"] == [{"name": "scale_shift.scale", "problem": "1 of 1 values differ"}]


def test_seed_repeats(model: torch.nn.Module) -> None:
    first = compare(model, model, dtypes=(torch.float32,), modes=["stress", "training"])
    again = compare(model, model, dtypes=(torch.float32,), modes=["stress", "training"], seed=first.seed)
    other = compare(model, model, dtypes=(torch.float32,), modes=["stress", "training"])
    assert first.rows == again.rows != other.rows


# --- bad input


def test_bad_arguments(model: torch.nn.Module) -> None:
    structures = [ase.Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])]
    with pytest.raises(ValueError, match=r"not in \[torch.float16\]"):
        compare(model, model, dtypes=(torch.float16,))
    with pytest.raises(ValueError, match="unknown modes \\['dipole'\\]"):
        compare(model, model, modes=["dipole"])
    with pytest.raises(ValueError, match="no modules named products.7"):
        compare(model, model, modules={"products.7": ""})
    with pytest.raises(ValueError, match="no structures"):
        compare(model, model, structures=[])
    with pytest.raises(StructureError, match="atomic numbers \\[26\\]"):
        compare(model, model, structures=[ase.Atoms("Fe")])
    with pytest.raises(StructureError, match="head 'dft'"):
        structures[0].info["head"] = "dft"
        compare(model, model, structures=structures)
    with pytest.raises(StructureError, match="no atoms"):
        compare(model, model, structures=[ase.Atoms()])
    with pytest.raises(StructureError, match="not finite"):
        compare(model, model, structures=[ase.Atoms("C", positions=[[0, 0, float("nan")]])])
    with pytest.raises(StructureError, match="not a MACE model"):
        compare(torch.nn.Linear(2, 2), model)


def test_every_head_is_compared_on_given_structures(seed: int) -> None:
    heads = ("a", "b", "c")
    model = build(replace(small_variants()["base"], heads=heads))
    atoms = ase.Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    other = ase.Atoms("COH", positions=[[0, 0, 0], [0, 0, 1.2], [1, 0, 2]], info={"head": "b"})

    def compared(*structures: ase.Atoms) -> list[str]:
        report = compare(model, model, structures=structures, modes=["energy"], seed=seed)
        left_out = set(heads) - {structure.head for structure in report.structures}
        assert all(any("heads" in line and head in line for line in report.not_compared) for head in left_out)
        return [structure.head for structure in report.structures]

    assert compared(atoms) == ["a", "b", "c"]
    assert compared(other, atoms) == ["b", "a", "c"]
    assert compared(other) == ["b"]
    assert compared(atoms, other, atoms, atoms) == ["a", "b", "c", "a"]
    assert "head" not in atoms.info


def test_missing_embedding_is_named(seed: int) -> None:
    base = small_variants()["base"]
    specs = {"temperature": {"type": "continuous", "per": "graph", "emb_dim": 4, "in_dim": 1}}
    model = build(replace(base, embedding_specs=specs))
    atoms = ase.Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    with pytest.raises(StructureError, match=r"atoms.info\['temperature'\]"):
        compare(model, model, structures=[atoms])
    atoms.info["temperature"] = 0.3
    assert compare(model, model, structures=[atoms], modes=["stress"], seed=seed).passed


class Broken(mace.modules.ScaleShiftMACE):
    def forward(self, data: dict[str, torch.Tensor], **arguments: bool) -> dict[str, Any]:
        raise KeyError("node_attrs")


def test_a_reference_that_fails_is_not_the_candidates_fault(model: torch.nn.Module) -> None:
    broken = copy.deepcopy(model)
    broken.__class__ = Broken
    with pytest.raises(MaceFastError, match="the reference, a Broken, cannot be evaluated"):
        compare(broken, model)


@pytest.mark.gpu
def test_on_the_gpu(model: torch.nn.Module, seed: int) -> None:
    """Another device rounds differently, but passes; a fault is found there as well."""
    rounded = copy.deepcopy(model).float()  # in float64 later: both then have the same parameters
    reference = copy.deepcopy(rounded).double().cuda()
    names = {"interactions.0": "", "products.1": "", "interactions.1.conv_tp": ""}
    report = compare(reference, rounded, device="cuda", modules=names, seed=seed)
    assert report.passed, str(report)
    assert report.device == "cuda" and report.environment["GPU"]
    assert next(reference.parameters()).is_cuda
    reference.products[0].linear.weight.data *= 1 + 1e-9
    failed = compare(reference, rounded, device="cuda", modes=["stress", "training"], seed=seed)
    first = failed.first_differing_module()
    assert not failed.passed and first is not None and first.name == "products.0"


def test_one_atom_alone(model: torch.nn.Module) -> None:
    report = compare(model, model, structures=[ase.Atoms("O")], dtypes=BOTH)
    assert report.passed, str(report)
    assert any("Hessian" in line for line in report.not_compared)
