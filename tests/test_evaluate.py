"""``evaluate``: many structures at once give what each gives by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from step_cases import build, crystal

import mace_fast
from mace_fast import MACEFastCalculator, evaluate, zoo
from mace_fast.calculators.batches import pack
from mace_fast.errors import StructureError
from mace_fast.inference import FrozenMACE, Stepper

ALL = ("energy", "forces", "stress")


def some(rng: np.random.Generator) -> list[Atoms]:
    """Crystals and the zoo's odd structures, in random order."""
    odd = list(zoo.edge_case_structures([1, 6, 8], cutoff=4.5, seed=int(rng.integers(1000))).values())
    structures = odd + [crystal(rng) for _ in range(3)] + [crystal(rng).repeat((2, 1, 1))]
    return [structures[number] for number in rng.permutation(len(structures))]


def calculator(models: Any, **settings: Any) -> MACEFastCalculator:
    return MACEFastCalculator(models=models, **{"verify": False, **settings})


def alone(atoms: Atoms, by: MACEFastCalculator, properties: tuple[str, ...] = ALL) -> dict[str, Any]:
    by.calculate(atoms.copy(), properties)
    return by.results


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.shape(found[name]) == np.shape(value), name
        scale = max(float(np.abs(expected["energies"] if "energ" in name else value).max(initial=0)), 1e-2)
        np.testing.assert_allclose(found[name], value, atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("atoms_per_batch", [1, 20, 10_000])
def test_structures_do_not_see_each_other(atoms_per_batch: int, rng: np.random.Generator) -> None:
    by = calculator(build())
    structures = some(rng)
    before = [atoms.copy() for atoms in structures]
    found = by.evaluate(structures, ALL, atoms_per_batch=atoms_per_batch)
    assert by.atoms is None and by.results == {}
    assert structures == before and all(atoms.calc is None for atoms in structures)
    for atoms, results in zip(structures, found, strict=True):
        assert_same(results, alone(atoms, calculator(by.models[0]), ALL), 1e-11)


@pytest.mark.parametrize("variant", ["nonlinear_foundation", "embedding_readout"])
def test_other_models(variant: str, rng: np.random.Generator) -> None:
    model = build(variant)
    by = calculator(model, head=model.heads[-1])
    structures = [crystal(rng), Atoms("OH", positions=[[0, 0, 0], [0, 0, 1.0]]), crystal(rng)]
    for charge, atoms in enumerate(structures):
        atoms.info.update(charge=charge, spin=1)
    for atoms, results in zip(structures, by.evaluate(structures, ALL), strict=True):
        assert_same(results, alone(atoms, by), 1e-11)


def test_committee_units_and_converted_models(rng: np.random.Generator) -> None:
    structures = [crystal(rng), Atoms("H"), crystal(rng)]
    models = [build(seed=seed) for seed in range(2)]
    for settings in ({}, {"energy_units_to_eV": 27.2, "length_units_to_A": 0.529}, {"frozen": False}):
        by = calculator(models, **settings)
        for atoms, results in zip(structures, by.evaluate(structures, ALL), strict=True):
            assert {"energy_comm", "forces_var", "stress_var"} <= results.keys()
            assert_same(results, alone(atoms, by), 1e-11)


def test_atomic_stresses_and_only_what_is_asked_for(rng: np.random.Generator) -> None:
    by, structures = calculator(build(), compute_atomic_stresses=True), [crystal(rng), Atoms("H")]
    for atoms, results in zip(structures, by.evaluate(structures, ("stresses",)), strict=True):
        assert_same(results, alone(atoms, calculator(by.models[0], compute_atomic_stresses=True), ("stresses",)), 1e-11)
    (first, _) = by.evaluate(structures, ("energy",))
    assert "forces" not in first and "stress" not in first
    (first, _) = by.evaluate(structures)
    assert "forces" in first and "stress" not in first


def test_function_takes_models_files_and_calculators(rng: np.random.Generator, tmp_path: Any) -> None:
    model, structures = build(), [crystal(rng), Atoms("H")]
    by = calculator(model)
    expected = [results["energy"] for results in by.evaluate(structures)]
    torch.save(model, tmp_path / "one.model")
    assert mace_fast.evaluate is evaluate
    for given, settings in ((by, {}), (model, {"verify": False}), (tmp_path / "one.model", {"verify": False})):
        found = [results["energy"] for results in evaluate(iter(structures), given, **settings)]
        np.testing.assert_allclose(found, expected, rtol=1e-13)
    committee = evaluate(structures, [model, build(seed=1)], verify=False)
    assert len(committee[0]["energy_comm"]) == 2
    assert evaluate([], by) == []
    with pytest.raises(TypeError, match="device"):
        evaluate(structures, by, device="cpu")
    with pytest.raises(TypeError, match="not as both"):
        evaluate(structures, [model, tmp_path / "one.model"])


def test_errors_name_the_structure(rng: np.random.Generator) -> None:
    by = calculator(build())
    gold, torn, close = Atoms("Au"), crystal(rng), crystal(rng)
    torn.positions[3, 1] = np.nan
    # In numbers that add without rounding: the two are then exactly one in the other's image.
    close.cell[1], close.positions[0] = np.round(close.cell[1] * 64) / 64, np.round(close.positions[0] * 64) / 64
    close.positions[2] = close.positions[0] + close.cell[1]
    for bad, said in ((gold, "structure 1: the model does not know Au"), (torn, "structure 1: the position of atom 3")):
        with pytest.raises(StructureError, match=said):
            by.evaluate([crystal(rng), bad])
    with pytest.raises(StructureError, match=r"structure 1: .*not finite.*atoms (0 and 2|2 and 0)"):
        by.evaluate([crystal(rng), close])
    with pytest.raises(PropertyNotImplementedError, match="dipole"):
        by.evaluate([crystal(rng)], ("dipole",))
    with pytest.raises(ValueError, match="atoms_per_batch"):
        by.evaluate([crystal(rng)], atoms_per_batch=-1)


def test_one_property_and_what_is_no_list_of_structures() -> None:
    by, atoms = calculator(build()), Atoms("OH", positions=[[0, 0, 0], [0, 0, 1.0]])
    (one,), (listed,) = evaluate([atoms], by, "energy"), evaluate([atoms], by, ("energy",))
    assert one.keys() == listed.keys() and one["energy"] == listed["energy"] and "forces" not in one
    assert "forces" in evaluate([atoms], by, "forces")[0]
    by.calculate(atoms, "forces")
    assert "forces" in by.results
    wrong: Any
    for wrong, said in (
        (atoms, r"got one Atoms: give it in a list, \[atoms\]"),
        ("frames.xyz", "got 'frames.xyz': read a file with ase.io.read"),
        ([atoms, "H"], "structure 1 is of the class str"),
    ):
        with pytest.raises(TypeError, match=said):
            evaluate(wrong, by)


def test_batches_are_full_and_of_like_sizes(rng: np.random.Generator) -> None:
    sizes = rng.integers(1, 50, 200).tolist()
    batches = pack(sizes, 100)
    assert sorted(number for batch in batches for number in batch) == list(range(200))
    assert all(sum(sizes[n] for n in batch) <= 100 for batch in batches)
    assert len(batches) < 1.5 * sum(sizes) / 100 + 1
    assert pack([500, 3], 100) == [[1], [0]], "a large structure is a batch of its own"


@pytest.mark.parametrize(("atoms_per_batch", "sizes"), [(None, [6]), (24, [3, 3]), (16, [2, 2, 2]), (8, [1] * 6)])
def test_structures_are_evaluated_together(
    atoms_per_batch: int | None, sizes: list[int], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time the results are the same, and screening several times slower: evaluations are counted."""
    by, structures = calculator(build()), [crystal(rng) for _ in range(6)]
    called, evaluated = Stepper.__call__, FrozenMACE.evaluate
    of_stepper: list[int] = []
    of_program: list[int] = []

    def step(self: Stepper, given: Any, **kwargs: Any) -> Any:
        of_stepper.append(len(given.cells))
        return called(self, given, **kwargs)

    def evaluate_program(self: FrozenMACE, data: Any, *args: Any, **kwargs: Any) -> Any:
        of_program.append(data["ptr"].shape[0] - 1)
        return evaluated(self, data, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", step)
    monkeypatch.setattr(FrozenMACE, "evaluate", evaluate_program)
    assert len(by.evaluate(structures, ALL, atoms_per_batch=atoms_per_batch)) == 6
    assert of_stepper == of_program == sizes


def test_halves_where_memory_does_not_suffice(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    by, structures = calculator(build()), [crystal(rng) for _ in range(5)]
    expected = by.evaluate(structures)
    original = Stepper.__call__

    def small(self: Stepper, given: Any, **kwargs: Any) -> Any:
        if len(given.cells) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, given, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", small)
    for results, right in zip(by.evaluate(structures), expected, strict=True):
        assert_same(results, right, 1e-11)


@pytest.mark.gpu
def test_screening_on_a_gpu(rng: np.random.Generator) -> None:
    model = build()
    on_gpu, on_cpu = calculator(model, device="cuda"), calculator(model)
    for limit in (30, 10_000):
        structures = some(rng)
        found = on_gpu.evaluate(structures, ALL, atoms_per_batch=limit)
        for results, expected in zip(found, on_cpu.evaluate(structures, ALL), strict=True):
            assert_same(results, expected, 1e-9)
    assert on_gpu._batches is not None and len(on_gpu._batches._programs) <= 4
