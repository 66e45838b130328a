"""MACEFastCalculator against mace.calculators.MACECalculator, and what it does where that one surprises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from mace.calculators import MACECalculator

from mace_fast import freeze, zoo
from mace_fast.calculators import MACEFastCalculator
from mace_fast.errors import MissingToolError, ModelFileError, StructureError, UnsupportedModuleError
from mace_fast.inference import FrozenMACE
from mace_fast.patch.api import convert

# Relative to the largest number of the result. float64 sums of some thousand terms agree to this; a wrong
# path or head is off by 1e-3 and more.
TOLERANCE = 1e-11

CASES = list(zoo.edge_case_structures([1, 6, 8]))
SCALES = {"energy": "energies", "node_energy": "energies"}  # differences of larger numbers


def build(variant: str = "base", seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return zoo.build(zoo.small_variants()[variant], seed=seed, dtype=dtype)


def reference(models: Any, **kwargs: Any) -> MACECalculator:
    """mace-torch's calculator on copies, since it changes what it is given."""
    return MACECalculator(models=copy.deepcopy(models), default_dtype="float64", **kwargs)


def ours(models: Any, **kwargs: Any) -> MACEFastCalculator:
    """The converted model, unverified: that it is verified is tested by itself, and takes seconds."""
    return MACEFastCalculator(models=models, **{"verify": False, "frozen": False, **kwargs})


def structure(case: str = "triclinic cell") -> Atoms:
    return zoo.edge_case_structures([1, 6, 8], cutoff=4.5, seed=5)[case]


def assert_same_results(found: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert np.shape(found[name]) == np.shape(value), name
        scale = max(np.abs(expected[SCALES.get(name, name)]).max(initial=0), 1e-3)
        np.testing.assert_allclose(found[name], value, atol=tolerance * scale, rtol=0, err_msg=name)


def all_results(calculator: Calculator, atoms: Atoms) -> dict[str, Any]:
    calculator.calculate(atoms.copy())
    return calculator.results


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build()


@pytest.fixture(scope="module")
def calculator(model: torch.nn.Module) -> MACEFastCalculator:
    return ours(model)


@pytest.fixture
def model_file(model: torch.nn.Module, tmp_path: Path) -> Path:
    torch.save(model, tmp_path / "one.model")
    return tmp_path / "one.model"


@pytest.fixture(scope="module")
def mace_calculator(model: torch.nn.Module) -> MACECalculator:
    return reference(model)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_structure(case: str, calculator: MACEFastCalculator, mace_calculator: MACECalculator) -> None:
    atoms = structure(case)
    assert_same_results(all_results(calculator, atoms), all_results(mace_calculator, atoms))


@pytest.fixture(scope="module")
def frozen_calculator(model: torch.nn.Module) -> MACEFastCalculator:
    return ours(model, frozen=True)


# The splines of float64 models are good to 1e-12 of the largest radial weight.
FROZEN_TOLERANCE = 1e-9


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_structure_frozen(
    case: str, frozen_calculator: MACEFastCalculator, mace_calculator: MACECalculator
) -> None:
    found, expected = all_results(frozen_calculator, structure(case)), all_results(mace_calculator, structure(case))
    assert_same_results(found, expected, FROZEN_TOLERANCE)


@pytest.mark.parametrize("variant", ["nonlinear_foundation", "multi_head_mace", "embedding_readout"])
def test_every_kind_of_model_frozen(variant: str) -> None:
    model = build(variant)
    head = model.heads[-1]
    found, expected = ours(model, frozen=True, head=head), reference(model, head=head)
    for case in ("triclinic cell", "molecule with a cell", "triclinic cell"):
        results = all_results(found, structure(case))
        assert_same_results(results, all_results(expected, structure(case)), FROZEN_TOLERANCE)


def test_frozen_is_the_default_and_the_program_runs(model: torch.nn.Module) -> None:
    calculator = MACEFastCalculator(models=model, verify=False)
    (program,) = calculator._programs
    assert isinstance(program, FrozenMACE)
    assert program._prepared is None
    calculator.calculate(structure(), ["forces"])
    assert program._prepared is not None, "the program has evaluated something"


def test_frozen_model_is_taken_as_it_is(model: torch.nn.Module, calculator: MACEFastCalculator) -> None:
    given = ours(freeze(model, verify=False), frozen=True)
    assert_same_results(all_results(given, structure()), all_results(calculator, structure()), FROZEN_TOLERANCE)


def test_model_without_a_frozen_form_says_so() -> None:
    model = build("block/RealAgnosticAttResidualInteractionBlock")
    with pytest.warns(UserWarning, match=r"no frozen form.*interactions\.1"):
        found = ours(model, frozen=True)
    assert_same_results(all_results(found, structure()), all_results(reference(model), structure()))


@pytest.mark.parametrize(
    "variant",
    ["mace", "layers1", "layers3", "L2", "pair_repulsion", "keep_last_layer_irreps", "last_readout_only"],
)
def test_every_kind_of_model(variant: str) -> None:
    model = build(variant, seed=2)
    found, expected = ours(model), reference(model)
    for case in ("triclinic cell", "dimer"):
        assert_same_results(all_results(found, structure(case)), all_results(expected, structure(case)))
    atoms = structure("triclinic cell")
    np.testing.assert_allclose(found.get_descriptors(atoms), expected.get_descriptors(atoms), atol=1e-10)


@pytest.mark.parametrize("variant", ["multi_head", "nonlinear_foundation"])
def test_every_head(variant: str) -> None:
    model = build(variant)
    energies = []
    for head in model.heads:
        found = all_results(ours(model, head=head), structure())
        assert_same_results(found, all_results(reference(model, head=head), structure()))
        energies.append(found["energy"])
    assert len(set(energies)) == len(model.heads), "each head has its own energy"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("variant", ["embeddings", "embedding_readout"])
def test_charge_and_spin(variant: str, frozen: bool) -> None:
    model, energies = build(variant), []
    found, expected = ours(model, frozen=frozen), reference(model)
    assert (found.stepper is not None) == frozen
    # One calculator for all: what it keeps of the charge before must not be taken for the next.
    for info in ({}, {"charge": 1, "spin": 3}, {"charge": -1, "spin": 3}, {"charge": -2, "spin": 2}, {}):
        atoms = structure("molecule with a cell")
        atoms.info.update(info)
        results = all_results(found, atoms)
        assert_same_results(results, all_results(expected, atoms), FROZEN_TOLERANCE if frozen else TOLERANCE)
        energies.append(results["energy"])
    assert len(set(energies)) == 4, "charge and spin change the energy"


NOT_TAKEN: tuple[tuple[dict[str, object], str], ...] = (
    ({"charge": 30}, r"total_charge \(atoms.info\['charge'\]\) is 30; the model takes integers from -5 to 5"),
    ({"charge": -6}, "total_charge .* is -6; .* from -5 to 5"),
    ({"charge": -0.5}, "total_charge .* is -0.5; .* integers"),
    ({"charge": np.nan}, "total_charge .* is nan"),
    ({"charge": "plus"}, "total_charge .* is 'plus'; the model takes one number"),
    ({"charge": [1, 2]}, r"total_charge .* is \[1, 2\]; the model takes one number"),
    ({"spin": 11}, "total_spin .* is 11; the model takes integers from 0 to 10"),
    ({"total_charge": 1}, r"atoms.info\['total_charge'\] is 1, .* read from atoms.info\['charge'\], .* not set"),
    ({"spin": 2, "total_spin": 3}, r"atoms.info\['total_spin'\] is 3, .* atoms.info\['spin'\], which is 2"),
)


@pytest.mark.parametrize("frozen", [True, False])
def test_charge_and_spin_that_the_model_cannot_take(frozen: bool) -> None:
    calculator = ours(build("embeddings"), frozen=frozen)
    for info, said in NOT_TAKEN:
        bad = structure("dimer")
        bad.info.update(info)
        bad.calc = calculator
        with pytest.raises(StructureError, match="^" + said):
            bad.get_potential_energy()
        with pytest.raises(StructureError, match="^structure 1: " + said):
            calculator.evaluate([structure("dimer"), bad])


def test_ends_of_the_range_and_another_name_of_the_same() -> None:
    atoms = structure("dimer")
    atoms.calc = ours(build("embeddings"))
    neutral, energies = atoms.get_potential_energy(), set()
    atoms.info["total_charge"] = 0  # as the default
    assert atoms.get_potential_energy() == neutral
    for charge in (-5, 5):
        atoms.info.update(charge=charge, total_charge=charge, spin=10)
        energies.add(atoms.get_potential_energy())
    assert len(energies) == 2
    # Here the feature's own name is where it is read.
    atoms = structure("dimer")
    atoms.info["total_charge"] = 5
    atoms.calc = ours(build("embeddings"), info_keys={"total_charge": "total_charge", "total_spin": "spin"})
    assert atoms.get_potential_energy() not in (neutral, *energies)


def test_changed_charge_is_noticed() -> None:
    atoms = structure("dimer")
    atoms.calc = ours(build("embeddings"))
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    assert atoms.get_potential_energy() != neutral


@pytest.mark.parametrize("case", ["triclinic cell", "dimer"])
def test_committee(case: str) -> None:
    models = [build(seed=seed) for seed in range(2)]
    found, expected = ours(models), reference(models)
    results = all_results(found, structure(case))
    assert_same_results(results, all_results(expected, structure(case)))
    assert {"energy_comm", "energy_var", "forces_comm", "stress_var"} <= set(found.implemented_properties)
    assert results["energy_var"] == pytest.approx(np.var(results["energy_comm"]))
    atoms = structure(case)
    for mine, theirs in (
        (found.get_descriptors(atoms), expected.get_descriptors(atoms)),
        (found.get_hessian(atoms), expected.get_hessian(atoms)),
    ):
        assert isinstance(mine, list) and len(mine) == 2
        np.testing.assert_allclose(mine, theirs, atol=1e-10)


def test_committee_must_agree(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="same atomic_numbers"):
        ours([model, build("one_element")])
    with pytest.raises(ValueError, match="same heads"):
        ours([model, build("multi_head")], head="Default")
    with pytest.raises(ValueError, match="same dtype"):
        ours([model, build(dtype=torch.float32)])


@pytest.mark.parametrize("invariants_only", [True, False])
@pytest.mark.parametrize("num_layers", [-1, 1, 2])
def test_descriptors(
    invariants_only: bool,
    num_layers: int,
    calculator: MACEFastCalculator,
    mace_calculator: MACECalculator,
) -> None:
    arguments = {"invariants_only": invariants_only, "num_layers": num_layers}
    found = calculator.get_descriptors(structure(), **arguments)
    expected = mace_calculator.get_descriptors(structure(), **arguments)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_hessian(calculator: MACEFastCalculator, mace_calculator: MACECalculator) -> None:
    atoms = structure("one periodic direction")
    found, expected = calculator.get_hessian(atoms), mace_calculator.get_hessian(atoms)
    assert found.shape == expected.shape == (3 * len(atoms), len(atoms), 3)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def test_atomic_stresses(model: torch.nn.Module) -> None:
    found = all_results(ours(model, compute_atomic_stresses=True), structure())
    assert_same_results(found, all_results(reference(model, compute_atomic_stresses=True), structure()))
    assert {"stresses", "virials"} <= found.keys()


def test_units(model: torch.nn.Module) -> None:
    """Every result in its own power of the units; mace-torch leaves E0 of node_energy in the model's."""
    units = {"energy_units_to_eV": 27.2, "length_units_to_A": 0.529}
    found, plain = all_results(ours(model, **units), structure()), all_results(ours(model), structure())
    powers = {"energy": 0, "energies": 0, "node_energy": 0, "free_energy": 0, "forces": 1, "stress": 3}
    for name, power in powers.items():
        factor = 27.2 / 0.529**power
        np.testing.assert_allclose(found[name], factor * np.asarray(plain[name]), rtol=1e-12, err_msg=name)


def test_float32_is_as_near_the_truth_as_mace_torch(model: torch.nn.Module) -> None:
    """At most twice mace-torch's own distance from float64, over several structures, plus a few ulp."""
    single = ours(model, default_dtype="float32")
    theirs = MACECalculator(models=copy.deepcopy(model), default_dtype="float32")
    truth = reference(model)
    assert single.default_dtype == "float32"
    errors: dict[str, list[float]] = {}
    for case in ("triclinic cell", "thin cell", "molecule with a cell", "mixed pbc slab"):
        # Coordinates that float32 holds exactly: the error is then one of arithmetic.
        atoms = structure(case)
        atoms.positions = atoms.positions.astype(np.float32)
        atoms.cell = np.array(atoms.cell).astype(np.float32)
        exact = all_results(truth, atoms)
        for who, found in (("ours", all_results(single, atoms)), ("theirs", all_results(theirs, atoms))):
            for name in ("energies", "forces", "stress"):
                scale = np.linalg.norm(exact[name])
                errors.setdefault(f"{name} {who}", []).append(float(np.linalg.norm(found[name] - exact[name]) / scale))
    rms = {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in errors.items()}
    for name in ("energies", "forces", "stress"):
        assert rms[f"{name} ours"] <= 2 * rms[f"{name} theirs"] + 4 * np.finfo(np.float32).eps, rms


def test_results_are_float64_whatever_the_model() -> None:
    results = all_results(ours(build(dtype=torch.float32)), structure())
    for name in ("forces", "stress", "energies", "node_energy"):
        assert results[name].dtype == np.float64
    assert results["energy"] == pytest.approx(results["energies"].sum(), rel=1e-14)


@pytest.mark.parametrize("form", ["converted", "exact", "static", "forward"])
@pytest.mark.parametrize("case", ["triclinic cell", "one isolated among many"])
def test_forces_and_stress_are_derivatives(
    case: str, form: str, model: torch.nn.Module, rng: np.random.Generator
) -> None:
    """Of the energy of the same form: of its own tables, if it has them."""
    calculator = ours(model, frozen=form != "converted")
    if form == "static":  # as on a GPU, with edges beyond the cutoff and padding
        assert calculator.stepper is not None
        calculator.stepper = calculator.stepper.like(static=True)
    if form == "forward":  # the program's own forward, which per-atom stresses need
        calculator.stepper = None
    atoms = structure(case)
    atoms.calc = calculator
    forces, step = atoms.get_forces(), 2e-5
    assert np.abs(forces.sum(axis=0)).max() < 1e-12 * max(np.abs(forces).max(), 1)
    direction = rng.normal(size=forces.shape)

    def energy(displacement: float, strain: np.ndarray) -> float:
        moved = atoms.copy()
        moved.positions += displacement * direction
        moved.set_cell(np.array(moved.cell) @ (np.eye(3) + strain), scale_atoms=bool(moved.pbc.all()))
        moved.calc = calculator
        return float(moved.get_potential_energy())

    none = np.zeros((3, 3))
    slope = (energy(step, none) - energy(-step, none)) / (2 * step)
    assert -np.vdot(forces, direction) == pytest.approx(slope, rel=1e-6, abs=1e-7)
    if atoms.pbc.all():
        strain = rng.normal(size=(3, 3))
        strain += strain.T
        slope = (energy(0, step * strain) - energy(0, -step * strain)) / (2 * step)
        assert np.vdot(atoms.get_stress(voigt=False), strain) * atoms.get_volume() == pytest.approx(
            slope, rel=1e-5, abs=1e-7
        )


def test_only_what_is_asked_for(model: torch.nn.Module, rng: np.random.Generator) -> None:
    atoms = structure()
    atoms.calc = ours(model)
    atoms.get_potential_energy()
    assert not {"forces", "stress"} & atoms.calc.results.keys()
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    atoms.rattle(0.01, rng=rng)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    stress = atoms.get_stress()
    # An NPT step asks for forces first and stress second: from now on they come together.
    atoms.rattle(0.01, rng=rng)
    atoms.get_forces()
    assert "stress" in atoms.calc.results and not np.array_equal(atoms.get_stress(), stress)
    atoms.rattle(0.01, rng=rng)
    atoms.get_forces()
    atoms.rattle(0.01, rng=rng)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results, "not asked for any more"


@pytest.mark.parametrize(
    "change",
    [
        lambda atoms: atoms.positions.__iadd__(np.random.default_rng(0).normal(0, 0.05, atoms.positions.shape)),
        lambda atoms: atoms.set_cell(atoms.cell * 1.01, scale_atoms=True),
        lambda atoms: atoms.set_pbc((True, False, True)),
        lambda atoms: atoms.numbers.__setitem__(0, 1 if atoms.numbers[0] != 1 else 8),
        lambda atoms: atoms.__delitem__(-1),
        lambda atoms: atoms.extend(Atoms("H", positions=[[0.7, 0.9, 1.1]])),
    ],
)
def test_nothing_stale(
    change: Callable[[Atoms], None], model: torch.nn.Module, mace_calculator: MACECalculator
) -> None:
    atoms = structure()
    atoms.calc = ours(model)
    before = atoms.get_potential_energy()
    change(atoms)
    assert atoms.get_potential_energy() != before
    expected = all_results(mace_calculator, atoms)
    np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-10)


def test_error_leaves_no_results(calculator: MACEFastCalculator) -> None:
    atoms = structure()
    atoms.calc = calculator
    atoms.get_forces()
    good = atoms.positions.copy()
    atoms.positions[1] = np.nan
    for _ in range(2):
        with pytest.raises(StructureError, match="position of atom 1"):
            atoms.get_forces()
    atoms.positions[:] = good
    assert np.isfinite(atoms.get_forces()).all()


def test_result_that_is_not_finite_names_the_atoms(calculator: MACEFastCalculator) -> None:
    atoms = structure()
    atoms.positions[2] = atoms.positions[0] + atoms.cell[1]
    atoms.calc = calculator
    with pytest.raises(StructureError, match="atoms (0 and 2|2 and 0) are 0 A apart"):
        atoms.get_forces()


def test_twice_the_same_bits(model: torch.nn.Module) -> None:
    first, other = all_results(ours(model), structure()), all_results(ours(model), structure("dimer"))
    again = ours(model)
    all_results(again, structure("dimer"))
    second = all_results(again, structure())
    assert other["energy"] != first["energy"]
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name


def test_nothing_global_changes(model: torch.nn.Module) -> None:
    default, properties = torch.get_default_dtype(), list(Calculator.implemented_properties)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    all_results(ours(model, default_dtype="float32"), structure())
    assert torch.get_default_dtype() == default
    assert list(Calculator.implemented_properties) == properties
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(clone: Callable[[Any], Any], calculator: MACEFastCalculator) -> None:
    assert_same_results(all_results(clone(calculator), structure()), all_results(calculator, structure()))


def test_works_inside_no_grad(calculator: MACEFastCalculator) -> None:
    expected = all_results(calculator, structure())
    with torch.no_grad():
        assert_same_results(all_results(calculator, structure()), expected)


def test_paths(model: torch.nn.Module, model_file: Path, calculator: MACEFastCalculator) -> None:
    torch.save(build(seed=1), model_file.with_name("two.model"))
    energy = all_results(calculator, structure())["energy"]
    for given in (model_file, str(model_file), [model_file], [str(model_file)]):
        single = MACEFastCalculator(given, verify=False)
        assert all_results(single, structure())["energy"] == pytest.approx(energy, rel=1e-13)
    assert MACEFastCalculator(str(model_file.with_name("*.model")), verify=False).num_models == 2
    with pytest.warns(FutureWarning, match="model_path"):
        assert MACEFastCalculator(model_path=str(model_file), verify=False).num_models == 1


def test_converted_model_is_taken_as_it_is(model: torch.nn.Module, calculator: MACEFastCalculator) -> None:
    converted = ours(convert(model, verify=False))
    assert_same_results(all_results(converted, structure()), all_results(calculator, structure()))


def test_wrong_arguments(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for error, said, arguments in (
        (ValueError, "exactly one", {}),
        (ValueError, "exactly one", {"models": model, "model_paths": "x.model"}),
        (ValueError, "both", {"model_path": "y.model", "model_paths": "x.model"}),
        (ValueError, "energy models only", {"models": model, "model_type": "DipoleMACE"}),
        (ValueError, "'MACEX'", {"models": model, "model_type": "MACEX"}),
        (ValueError, "no model is given", {"models": []}),
        (ValueError, "no model is given", {"model_paths": []}),
        (ValueError, "float16", {"models": model, "default_dtype": "float16"}),
        (ValueError, r"head='surface'.*Default", {"models": model, "head": "surface"}),
        (TypeError, "dispersion", {"models": model, "dispersion": True}),
        (MissingToolError, "device='cuda'", {"models": model, "device": "cuda"}),
        (ModelFileError, "no such file", {"model_paths": "nothing-*.model"}),
        (ModelFileError, "Linear, not a MACE model", {"models": torch.nn.Linear(2, 2)}),
    ):
        with pytest.raises(error, match=said):
            MACEFastCalculator(**arguments)


def test_head_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"several heads.*--head.*first.*second.*third"):
        ours(build("multi_head"))


def test_other_accelerators_have_no_effect_and_say_so(model: torch.nn.Module) -> None:
    with pytest.warns(UserWarning, match="enable_cueq, pad_num_edges: no effect"):
        ours(model, enable_cueq=True, pad_num_edges=128)


def test_other_energy_models_are_refused(model: torch.nn.Module) -> None:
    class PolarMACE(type(model)):  # type: ignore[misc]
        """A subclass may compute something else."""

    other = copy.deepcopy(model)
    other.__class__ = PolarMACE
    with pytest.raises(UnsupportedModuleError, match=r"PolarMACE.*MACECalculator"):
        ours(other)


@pytest.mark.parametrize("skin", [0.0, 0.2, 1.0])
def test_dynamics_with_any_skin(
    skin: float, model: torch.nn.Module, mace_calculator: MACECalculator, rng: np.random.Generator
) -> None:
    atoms, calculator = structure(), ours(model, frozen=True, skin=skin)
    atoms.calc = calculator
    for step in range(8):
        atoms.positions += rng.normal(0, 0.015, atoms.positions.shape)
        if step == 4:
            atoms.set_cell(atoms.cell * 1.01, scale_atoms=True)
        if step == 6:
            atoms += Atoms("H", positions=[atoms.positions[0] + [0.9, 0.6, -0.4]])
        atoms.get_forces()
        atoms.get_stress()
        assert_same_results(calculator.results, all_results(mace_calculator, atoms), FROZEN_TOLERANCE)
    assert calculator.stepper is not None
    assert calculator.stepper.rebuilds == 8 if skin == 0 else calculator.stepper.rebuilds < 8


def test_two_calculators_and_one_for_two_structures(
    model: torch.nn.Module, mace_calculator: MACECalculator, rng: np.random.Generator
) -> None:
    other_model = build(seed=4)
    first, other, other_reference = ours(model, frozen=True), ours(other_model, frozen=True), reference(other_model)
    structures = [structure(), structure("thin cell")]
    for _ in range(3):
        for atoms in structures:
            atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
            assert_same_results(all_results(first, atoms), all_results(mace_calculator, atoms), FROZEN_TOLERANCE)
            assert_same_results(all_results(other, atoms), all_results(other_reference, atoms), FROZEN_TOLERANCE)


def test_nothing_more_is_computed_than_asked_for(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calculator = ours(model, frozen=True)
    seen: list[tuple[bool, bool]] = []
    original = calculator.stepper.__class__.__call__

    def record(self: Any, structures: Any, *, forces: bool, stress: bool) -> Any:
        seen.append((forces, stress))
        return original(self, structures, forces=forces, stress=stress)

    monkeypatch.setattr(calculator.stepper.__class__, "__call__", record)
    atoms = structure()
    atoms.calc = calculator
    for change in range(3):
        atoms.positions[0, 0] += 0.01
        atoms.get_forces()
        atoms.get_potential_energy()
        assert "stress" not in calculator.results, change
    assert seen == [(True, False)] * 3
    assert "stress" not in calculator.results


@pytest.mark.parametrize(
    "change",
    [
        lambda atoms: None,
        lambda atoms: atoms.positions.__setitem__((0, 0), np.nextafter(atoms.positions[0, 0], 9) + 1e-12),
        lambda atoms: atoms.numbers.__setitem__(0, 8 if atoms.numbers[0] != 8 else 1),
        lambda atoms: atoms.cell.__setitem__((0, 0), atoms.cell[0, 0] + 1e-9),
        lambda atoms: atoms.set_pbc((True, False, True)),
        lambda atoms: atoms.set_initial_charges([0.1] * len(atoms)),
        lambda atoms: atoms.set_initial_magnetic_moments([1.0] * len(atoms)),
        lambda atoms: atoms.set_initial_charges([0.0] * len(atoms)),
        lambda atoms: atoms.__delitem__(-1),
    ],
)
def test_changes_are_those_that_ase_names(change: Callable[[Atoms], None], calculator: MACEFastCalculator) -> None:
    atoms = structure()
    calculator.calculate(atoms.copy(), ["energy"])
    change(atoms)
    assert sorted(calculator.check_state(atoms)) == sorted(Calculator.check_state(calculator, atoms))


def test_atoms_of_the_last_results_are_a_copy(calculator: MACEFastCalculator, rng: np.random.Generator) -> None:
    atoms = structure()
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)))
    atoms.set_constraint(FixAtoms([1]))
    atoms.info["name"] = "kept"
    calculator.reset()
    atoms.calc = calculator
    atoms.get_potential_energy()
    expected = atoms.copy()
    atoms.positions += 1.0
    atoms.numbers[0] = 1 if atoms.numbers[0] != 1 else 8
    atoms.cell[0, 0] += 1.0
    atoms.pbc = ~atoms.pbc
    atoms.info["name"] = "changed"
    atoms.constraints[0].index[0] = 0
    kept = calculator.atoms
    assert kept is not None and kept is calculator.atoms and kept.calc is None
    assert kept == expected and kept.info == expected.info
    assert np.array_equal(kept.get_momenta(), expected.get_momenta())
    assert [c.todict() for c in kept.constraints] == [c.todict() for c in expected.constraints]
    assert calculator.check_state(expected) == []
    kept.positions[0, 0] += 0.1
    assert calculator.check_state(expected) == ["positions"], "whoever writes into them is seen"


def test_atoms_of_a_class_of_their_own_are_copied_by_it(calculator: MACEFastCalculator) -> None:
    class Marked(Atoms):
        def copy(self) -> Atoms:
            new = super().copy()
            new.info["copied"] = True
            return new

    atoms = Marked(structure())
    calculator.reset()
    atoms.calc = calculator
    atoms.get_potential_energy()
    assert isinstance(calculator.atoms, Marked) and calculator.atoms.info["copied"]


def test_settings_of_the_stepper(model: torch.nn.Module) -> None:
    calculator = ours(model, frozen=True, skin=0.3, cuda_graph=False)
    assert calculator.stepper is not None and calculator.stepper.skin == 0.3
    assert ours(model).stepper is None
    with pytest.raises(ValueError, match="skin="):
        ours(model, frozen=True, skin=-1.0)
    with pytest.raises(ValueError, match="only frozen programs are captured"):
        ours(model, frozen=False, cuda_graph=True)
    with pytest.raises(ValueError, match="one of vesin"):
        ours(model, frozen=True, neighbours="nvalchemi")
    if not torch.cuda.is_available():
        with pytest.raises(MissingToolError, match="cuda_graph=False"):
            ours(model, frozen=True, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gpu_dynamics(dtype: str, cuda_graph: bool, model: torch.nn.Module, rng: np.random.Generator) -> None:
    """NVE, then NPT, then an insertion; two calculators in turns."""
    tolerance = FROZEN_TOLERANCE if dtype == "float64" else 2e-5
    calculators = [
        ours(each, frozen=True, device="cuda", default_dtype=dtype, cuda_graph=cuda_graph)
        for each in (model, build(seed=4))
    ]
    references = [ours(each) for each in (model, build(seed=4))]
    atoms = structure().repeat((2, 1, 1))
    for step in range(12):
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        if step > 5:
            atoms.set_cell(atoms.cell * 1.002, scale_atoms=True)
        if step > 8:
            atoms += Atoms("H", positions=[atoms.positions[step] + [0.9, 0.6, -0.4]])
        for calculator, exact in zip(calculators, references, strict=True):
            calculator.calculate(atoms.copy(), ["forces"] if step < 5 else ["forces", "stress"])
            assert ("stress" in calculator.results) == (step >= 5)
            expected = {name: value for name, value in all_results(exact, atoms).items() if name in calculator.results}
            assert_same_results(calculator.results, expected, tolerance)


@pytest.mark.gpu
def test_gpu_committee(rng: np.random.Generator) -> None:
    models = [build(seed=seed) for seed in range(3)]
    on_gpu, on_cpu = ours(models, frozen=True, device="cuda"), ours(models)
    atoms = structure()
    for _ in range(4):
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        assert_same_results(all_results(on_gpu, atoms), all_results(on_cpu, atoms), FROZEN_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gpu_gives_what_the_cpu_gives(dtype: str, frozen: bool, model: torch.nn.Module) -> None:
    tolerance = FROZEN_TOLERANCE if dtype == "float64" else 2e-5
    on_gpu = ours(model, device="cuda", default_dtype=dtype, frozen=frozen)
    on_cpu = ours(model, default_dtype=dtype)
    assert all(parameter.device.type == "cuda" for parameter in on_gpu.models[0].parameters())
    for case in CASES:
        found, expected = all_results(on_gpu, structure(case)), all_results(on_cpu, structure(case))
        assert_same_results(found, expected, tolerance)
    np.testing.assert_allclose(
        on_gpu.get_hessian(structure("dimer")), on_cpu.get_hessian(structure("dimer")), atol=1e-4, rtol=1e-4
    )
