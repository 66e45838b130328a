"""torch-sim's interface, where torch-sim is installed; and what is said where it is not."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from step_cases import assert_agree, build, crystal, reference

from mace_fast import MACEFastCalculator
from mace_fast.errors import MissingToolError, StructureError, UnsupportedModuleError

NAME = "mace_fast.calculators.torchsim"


def test_missing_torch_sim_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    monkeypatch.setitem(sys.modules, "torch_sim.models.interface", None)
    with pytest.raises(MissingToolError, match="pip install torch-sim-atomistic"):
        importlib.import_module(NAME)


@pytest.fixture(scope="module")
def torch_sim() -> Any:
    return pytest.importorskip("torch_sim", reason="torch-sim is not installed: pip install torch-sim-atomistic")


def make(model: Any, **settings: Any) -> Any:
    return importlib.import_module(NAME).MACEFastModel(model, **{"verify": False, **settings})


def state_of(torch_sim: Any, structures: list[Atoms], device: str = "cpu", dtype: torch.dtype = torch.float64) -> Any:
    return torch_sim.io.atoms_to_state(structures, torch.device(device), dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_systems_of_a_state(torch_sim: Any, device: str, rng: np.random.Generator) -> None:
    module = build()
    model = make(module, device=device)
    assert model.device.type == device and model.dtype == torch.float64
    structures = [crystal(rng), crystal(rng).repeat((2, 1, 1)), crystal(rng)[:1]]
    for step in range(3):
        state = state_of(torch_sim, structures, device)
        found = model(state)
        assert all(not value.requires_grad and value.device.type == device for value in found.values())
        expected = reference(structures, module)
        assert_agree({k: v.cpu().numpy() for k, v in found.items()}, expected, 1e-9, f"step {step}")
        for atoms in structures:
            atoms.positions += rng.normal(0, 0.04, atoms.positions.shape)
    model.compute_stress = model.compute_forces = False
    assert set(model(state)) == {"energy"}


def test_dtype_follows_the_state_and_mappings_do(torch_sim: Any, rng: np.random.Generator) -> None:
    module = build(dtype=torch.float32)
    model = make(module)
    state = state_of(torch_sim, [crystal(rng), crystal(rng)], dtype=torch.float32)
    found = model(state)
    assert {value.dtype for value in found.values()} == {torch.float32}
    fields = {name: getattr(state, name) for name in ("positions", "cell", "pbc", "atomic_numbers", "system_idx")}
    for name, value in model(fields).items():
        assert torch.equal(value, found[name])


def test_its_own_contract(torch_sim: Any) -> None:
    """torch-sim's check of models, made of the elements that it uses."""
    interface = importlib.import_module("torch_sim.models.interface")
    from mace_fast import zoo

    model = make(zoo.build("mp0-small", elements=[12, 14, 26], channels=8, dtype=torch.float64))
    interface.validate_model_outputs(model, torch.device("cpu"), torch.float64)


def test_dynamics(torch_sim: Any, rng: np.random.Generator) -> None:
    module = build()
    model = make(module)
    structures = [crystal(rng), crystal(rng)]
    final = torch_sim.integrate(
        system=structures,
        model=model,
        integrator=torch_sim.integrators.Integrator.nve
        if hasattr(torch_sim.integrators, "Integrator")
        else torch_sim.nve,
        n_steps=3,
        timestep=0.0005,
        temperature=100,
    )
    moved = final.to_atoms()
    expected = reference(moved, module)
    assert_agree({"energy": final.energy.detach().numpy()}, expected, 1e-9, "after dynamics")


def test_calculators_and_refusals(torch_sim: Any, rng: np.random.Generator) -> None:
    module = build()
    calculator = MACEFastCalculator(models=[module, build(seed=1)], verify=False)
    structures = [crystal(rng), crystal(rng)]
    model = importlib.import_module(NAME).MACEFastModel(calculator)
    found = model(state_of(torch_sim, structures))
    for atoms, energy in zip(structures, found["energy"].tolist(), strict=True):
        atoms.calc = calculator
        assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    with pytest.raises(TypeError, match="device"):
        importlib.import_module(NAME).MACEFastModel(calculator, device="cpu")
    with pytest.raises(UnsupportedModuleError, match="frozen form"):
        make(module, frozen=False)
    torn = crystal(rng)
    torn.positions[0, 0] = np.nan
    with pytest.raises(StructureError, match="system 1: the position of atom 0"):
        model(state_of(torch_sim, [structures[0], torn]))


def test_charge_and_spin(torch_sim: Any, rng: np.random.Generator) -> None:
    """Of the state or of the model; a default is warned of, once, and a charge that a run loses is an error."""
    calculator = MACEFastCalculator(models=build("embeddings"), verify=False)
    model_class = importlib.import_module(NAME).MACEFastModel
    structures = [crystal(rng), crystal(rng)]

    def expected(charges: list[int], spins: list[int]) -> list[float]:
        copies = [atoms.copy() for atoms in structures]
        for atoms, charge, spin in zip(copies, charges, spins, strict=True):
            atoms.info.update(charge=charge, spin=spin)
        return [found["energy"] for found in calculator.evaluate(copies, ("energy",))]

    def fields(**more: Any) -> dict[str, Any]:
        state = state_of(torch_sim, structures)
        names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
        return {**{name: getattr(state, name) for name in names}, **more}

    def energies(model: Any, **more: Any) -> list[float]:
        return model(fields(**more))["energy"].tolist()  # type: ignore[no-any-return]

    model = model_class(calculator)
    with pytest.warns(UserWarning) as caught:
        assert energies(model) == pytest.approx(expected([0, 0], [1, 1]))
        energies(model)
    said = [str(warning.message) for warning in caught if "the state has no field" in str(warning.message)]
    assert len(said) == 2
    assert "'total_charge'" in said[1] and "gets 0. Set state.charge" in said[1]
    assert "'total_spin'" in said[0] and "gets 1. Set state.spin" in said[0]

    given = {"charge": torch.tensor([1.0, -2.0]), "spin": torch.tensor([2, 3])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert energies(model, **given) == pytest.approx(expected([1, -2], [2, 3]))
        constant = model_class(calculator, features={"total_charge": 1, "total_spin": 2})
        assert energies(constant) == pytest.approx(expected([1, 1], [2, 2]))
        assert energies(constant, **given) == pytest.approx(expected([1, -2], [2, 3]))
    with pytest.raises(StructureError, match=r"earlier state had total_spin.*features=\{'total_spin'"):
        energies(model)
    for charge, value in ((torch.tensor([0, 30]), "30"), (torch.tensor([0.0, torch.nan]), "nan")):
        with pytest.raises(StructureError, match=f"system 1: total_charge .* is {value}; .* integers from -5 to 5"):
            energies(model, charge=charge, spin=given["spin"])
    with pytest.raises(ValueError, match="'charge'.*the model takes total_spin, total_charge"):
        model_class(calculator, features={"charge": 1})
