"""The zoo builds every architecture, its graphs are mace-torch's, its structures are what they claim."""

from __future__ import annotations

import importlib.util
import io
import math
import pickletools
import re
import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from mace.calculators import MACECalculator

from mace_fast import zoo
from mace_fast.errors import StructureError

ARCHITECTURES = sorted(zoo.architectures())
VARIANTS = zoo.small_variants()


def evaluate(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output: dict[str, torch.Tensor] = model(zoo.copy_graph(data), compute_stress=True)
    return output


def assert_alive(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> None:
    """Energy, forces and stress are finite, not zero, and of a size that a test can resolve."""
    output = evaluate(model, data)
    for name in ("energy", "forces", "stress"):
        value = output[name]
        assert torch.isfinite(value).all(), name
        assert value.abs().max() > 1e-5, f"{name} vanishes"
        assert value.abs().max() < 1e5, f"{name} explodes"
    net = output["forces"].sum(dim=0).abs().max()
    assert net < 1e-9 * max(1.0, float(output["forces"].abs().max()))


def box(numbers: tuple[int, ...], seed: int) -> Atoms:
    """A small periodic crystal with every species of `numbers`."""
    atoms = zoo.diamond(8, rattle=0.1, seed=seed)
    atoms.numbers = np.resize(np.asarray(numbers), len(atoms))
    atoms.info["charge"] = 1
    atoms.info["spin"] = 3
    return atoms


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_builds_and_evaluates(name: str, seed: int) -> None:
    elements = (1, 6, 8)
    model = zoo.build(name, elements=elements, channels=4, seed=seed)
    assert_alive(model, zoo.graph(box(elements, seed), model))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_small_variant_builds_and_evaluates(name: str, seed: int) -> None:
    architecture = VARIANTS[name]
    model = zoo.build(architecture, seed=seed)
    assert_alive(model, zoo.graph(box(architecture.atomic_numbers, seed), model))


def test_variants_cover_every_interaction_block() -> None:
    import mace.modules

    assert set(zoo.INTERACTION_BLOCKS) == set(mace.modules.interaction_classes)
    used = {v.interaction for v in VARIANTS.values()} & {v.interaction_first for v in VARIANTS.values()}
    assert used == set(zoo.INTERACTION_BLOCKS)


def test_full_shapes_are_the_foundation_models_own() -> None:
    architecture = zoo.architectures()["mp0-medium"]
    assert architecture.hidden_irreps == "128x0e+128x1o"
    assert len(architecture.atomic_numbers) == 89
    assert architecture.r_max == 6.0 and architecture.num_bessel == 10
    model = zoo.build("off23-small")
    assert str(model.products[0].linear.irreps_out) == "96x0e"
    assert model.atomic_numbers.tolist() == [1, 6, 7, 8, 9, 15, 16, 17, 35, 53]
    assert model.interactions[0].conv_tp.weight_numel == 4 * 96


def test_reduced_scales_every_multiplicity() -> None:
    large = zoo.architectures()["omol-xl"].reduced(elements=[8, 1], channels=16)
    assert large.hidden_irreps == "16x0e+16x1o+16x2e"
    assert large.edge_irreps == "2x0e+2x1o+2x2e"
    assert large.atomic_numbers == (1, 8)
    assert large.embedding_specs is not None
    assert {spec["emb_dim"] for spec in large.embedding_specs.values()} == {16}


@pytest.mark.parametrize(
    "arguments",
    [{"elements": [6, 200]}, {"elements": []}, {"channels": 0}, {"dtype": torch.float16}],
)
def test_build_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        zoo.build("off23-small", **arguments)  # type: ignore[arg-type]


def test_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(KeyError, match="mp0-medium"):
        zoo.build("mp0-huge")


def test_seed_reproduces_and_torch_state_is_left_alone(seed: int) -> None:
    random_state = torch.random.get_rng_state()
    architecture = VARIANTS["base"]
    first, second = (zoo.build(architecture, seed=seed) for _ in range(2))
    other = zoo.build(architecture, seed=seed + 1)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.node_embedding.linear.weight, other.node_embedding.linear.weight)


def test_default_dtype_survives_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    from mace_fast.zoo import models

    def broken(**_: object) -> None:
        assert torch.get_default_dtype() == torch.float64
        raise RuntimeError("broken on purpose")

    monkeypatch.setitem(models._MODELS, "ScaleShiftMACE", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        zoo.build(VARIANTS["base"])
    assert torch.get_default_dtype() == torch.float32


def test_float32_model_is_the_rounded_float64_model(seed: int) -> None:
    double = zoo.build(VARIANTS["base"], seed=seed)
    single = zoo.build(VARIANTS["base"], seed=seed, dtype=torch.float32)
    for (name, a), (_, b) in zip(double.state_dict().items(), single.state_dict().items(), strict=True):
        assert torch.equal(a.to(b.dtype), b), name
    assert {p.dtype for p in single.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["nonlinear_foundation", "embeddings", "mace", "multi_head"])
def test_nothing_is_left_at_a_constant(name: str, seed: int) -> None:
    """Every tensor of weights varies, or is a scalar that is neither zero nor one."""
    model = zoo.build(VARIANTS[name], seed=seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0, parameter_name
        elif parameter.numel() == 1:
            assert float(parameter) not in (0.0, 1.0, 20.0), parameter_name


def test_heads_and_charge_change_the_energy(seed: int) -> None:
    model = zoo.build(VARIANTS["multi_head"], seed=seed)
    atoms = box((1, 6, 8), seed)
    energies = [float(evaluate(model, zoo.graph(atoms, model, head=h))["energy"]) for h in model.heads]
    assert len({round(e, 6) for e in energies}) == 3
    together = evaluate(model, zoo.batch([atoms] * 3, model, head=model.heads))["energy"]
    assert torch.allclose(together, torch.tensor(energies, dtype=torch.float64), rtol=0, atol=1e-9)

    model = zoo.build(VARIANTS["embeddings"], seed=seed)
    neutral = atoms.copy()
    neutral.info.clear()
    assert abs(float(evaluate(model, zoo.graph(atoms, model))["energy"]) - float(
        evaluate(model, zoo.graph(neutral, model))["energy"]
    )) > 1e-4  # fmt: skip


def test_graph_is_what_the_calculator_evaluates(seed: int) -> None:
    """The same energy, forces and stress as mace-torch's own ASE calculator."""
    model = zoo.build(VARIANTS["L2"], seed=seed)
    calculator = MACECalculator(models=model, device="cpu", default_dtype="float64")
    torch.set_default_dtype(torch.float32)  # MACECalculator changes it
    for name, atoms in zoo.edge_case_structures([1, 6, 8], cutoff=float(model.r_max), seed=seed).items():
        output = evaluate(model, zoo.graph(atoms, model))
        atoms.calc = calculator
        torch.set_default_dtype(torch.float64)
        try:
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        finally:
            torch.set_default_dtype(torch.float32)
        assert abs(float(output["energy"]) - energy) < 1e-9, name
        assert np.abs(output["forces"].detach().numpy() - forces).max() < 1e-9, name


def test_batch_of_structures_is_each_of_them(seed: int) -> None:
    model = zoo.build(VARIANTS["base"], seed=seed)
    structures = [a for a in zoo.molecules(8, seed=seed) if set(a.numbers) <= {1, 6, 8}]
    structures.append(box((1, 6, 8), seed))
    together = evaluate(model, zoo.batch(structures, model))
    forces = []
    for index, atoms in enumerate(structures):
        alone = evaluate(model, zoo.graph(atoms, model))
        assert abs(float(together["energy"][index] - alone["energy"][0])) < 1e-9
        forces.append(alone["forces"])
    assert (together["forces"] - torch.cat(forces)).abs().max() < 1e-9


def test_dtype_and_device_of_a_graph(seed: int) -> None:
    model = zoo.build(VARIANTS["base"], seed=seed)
    data = zoo.graph(box((1, 6, 8), seed), model, dtype=torch.float32)
    assert data["positions"].dtype == data["node_attrs"].dtype == data["shifts"].dtype == torch.float32
    assert data["edge_index"].dtype == torch.int64
    assert torch.get_default_dtype() == torch.float32


def test_graph_refuses(seed: int) -> None:
    model = zoo.build(VARIANTS["base"], seed=seed)
    with pytest.raises(StructureError, match="Cu"):
        zoo.graph(bulk("Cu"), model)
    with pytest.raises(StructureError, match="no atoms"):
        zoo.graph(Atoms(), model)
    with pytest.raises(StructureError, match="no structures"):
        zoo.batch([], model)
    with pytest.raises(StructureError, match="head"):
        zoo.graph(box((1, 6, 8), seed), model, head="nowhere")
    with pytest.raises(StructureError, match="finite"):
        zoo.graph(Atoms("C", positions=[[0, 0, math.nan]]), model)
    with pytest.raises(StructureError, match="volume"):
        zoo.graph(Atoms("C", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=True), model)
    with pytest.raises(StructureError, match="zero"):
        zoo.graph(Atoms("C", cell=[3, 3, 0], pbc=True), model)


@pytest.mark.parametrize(("natoms", "edges"), [(64, 10106), (1000, 157858), (4096, 646600)])
def test_diamond_has_the_edges_of_the_benchmarks(natoms: int, edges: int) -> None:
    from matscipy.neighbours import neighbour_list

    assert len(neighbour_list("i", zoo.diamond(natoms), 6.0)) == edges


def test_diamond_names_the_sizes_near_by() -> None:
    with pytest.raises(ValueError, match="64"):
        zoo.diamond(100)


@pytest.mark.parametrize(("nmolecules", "edges"), [(64, 10852), (1000, 169626)])
def test_water_box(nmolecules: int, edges: int) -> None:
    from matscipy.neighbours import neighbour_list

    atoms = zoo.water(nmolecules)
    i, j, d = neighbour_list("ijd", atoms, 5.0)
    assert abs(len(i) - edges) < 0.015 * edges
    assert d[i // 3 != j // 3].min() > 1.4
    density = atoms.get_masses().sum() / atoms.get_volume() * 1.66054
    assert 0.95 < density < 1.1
    assert np.allclose(zoo.water(7, seed=3).positions, zoo.water(7, seed=3).positions)


def test_alloy_and_molecules(seed: int) -> None:
    crystal = zoo.alloy((3, 2, 2), symbols=("Cu", "Ni"), seed=seed)
    assert len(crystal) == 48 and crystal.symbols.count("Ni") == 24
    assert np.allclose(crystal.positions, zoo.alloy((3, 2, 2), symbols=("Cu", "Ni"), seed=seed).positions)
    small = zoo.molecules(20, seed=seed)
    assert len(small) == 20 and not any(a.pbc.any() for a in small)
    assert set(np.concatenate([a.numbers for a in small])) == {1, 6, 7, 8}


def test_edge_cases_are_what_they_are_called(seed: int) -> None:
    cutoff = 4.5
    cases = zoo.edge_case_structures([1, 8], cutoff=cutoff, seed=seed)
    assert all(set(a.numbers) <= {1, 8} for a in cases.values())
    assert len(cases["isolated atom"]) == len(cases["one atom periodic"]) == 1
    assert np.linalg.det(cases["left-handed cell"].cell.array) < 0 < np.linalg.det(cases["triclinic cell"].cell.array)
    assert np.linalg.norm(cases["thin cell"].cell.array, axis=1).min() < cutoff / 2
    assert not cases["molecule with a cell"].pbc.any() and cases["molecule with a cell"].cell.rank == 3
    assert cases["mixed pbc slab"].pbc.sum() == 2 and cases["one periodic direction"].pbc.sum() == 1
    scaled = cases["atoms outside the cell"].get_scaled_positions(wrap=False)
    assert scaled.min() < -0.5 or scaled.max() > 1.5
    assert np.linalg.norm(cases["far from the origin"].positions, axis=1).min() > 1000

    model = zoo.build(VARIANTS["base"], elements=[1, 8], seed=seed)
    edges = {name: zoo.graph(a, model)["edge_index"].shape[1] for name, a in cases.items()}
    assert edges["no edges"] == edges["isolated atom"] == 0
    assert edges["dimer"] == 2
    assert min(n for name, n in edges.items() if name not in ("no edges", "isolated atom", "dimer")) > 10
    for name, atoms in cases.items():
        output = evaluate(model, zoo.graph(atoms, model))
        assert torch.isfinite(output["energy"]).all() and torch.isfinite(output["forces"]).all(), name


def test_checkpoint_is_a_trained_model() -> None:
    """Near EMT's equilibrium it knows EMT's forces; a random model would not."""
    from ase.calculators.emt import EMT

    path = zoo.checkpoint_path()
    assert path.stat().st_size <= 2_000_000
    model = torch.load(path, map_location="cpu", weights_only=False).double()
    assert model.atomic_numbers.tolist() == [29, 47, 79]
    atoms = zoo.alloy((2, 2, 2), rattle=0.1, seed=1)
    forces = evaluate(model, zoo.graph(atoms, model))["forces"].detach().numpy()
    atoms.calc = EMT()
    assert np.abs(forces - atoms.get_forces()).mean() < 0.06
    assert np.abs(atoms.get_forces()).mean() > 0.3


def test_checkpoint_names_no_path_of_the_machine_that_made_it() -> None:
    """Neither in the texts beside the model nor in the TorchScript archives inside its pickle."""
    path = zoo.checkpoint_path()
    texts = [(path.parent / name).read_bytes() for name in ("training.log", "errors.json", "README.md")]
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        for _, argument, _ in pickletools.genops(archive.read(pickled)):
            if isinstance(argument, str) and argument.startswith("PK\x03\x04"):
                inner = zipfile.ZipFile(io.BytesIO(argument.encode("latin-1")))
                texts.extend(inner.read(name) for name in inner.namelist())
    assert len(texts) > 50
    for text in texts:
        assert not re.search(rb"site-packages|/(?:home|root|tmp|work|usr)/", text)


def test_reduced_cg_depends_on_cuequivariance() -> None:
    """mace-torch drops `use_reduced_cg` without a word where cuequivariance is missing: the zoo says so."""
    reduced, full = (zoo.build(VARIANTS[name]) for name in ("reduced_cg", "base"))
    same = reduced.state_dict().keys() == full.state_dict().keys() and all(
        a.shape == b.shape for a, b in zip(reduced.state_dict().values(), full.state_dict().values(), strict=True)
    )
    assert same == (importlib.util.find_spec("cuequivariance") is None)
