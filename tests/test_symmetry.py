"""Whole models obey the symmetries of space, in every form that a CPU evaluates. Nothing but the model itself is
compared with, so an error that it shared with the reference would be seen too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from oracles import assert_close
from step_cases import as_structures, build, crystal, frozen

from mace_fast import zoo
from mace_fast.inference import FrozenMACE, Stepper

Results = dict[str, np.ndarray]

# Each result goes through some ten sums of at most a hundred terms, and transformed coordinates, of up to 20 A, are
# rounded again: in 60 runs of each test the largest difference was 3e-14. The tolerance is 4e-13.
TERMS = 10000.0


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """With features of degree 2."""
    return build("L2")


@pytest.fixture(scope="module")
def program(model: torch.nn.Module) -> FrozenMACE:
    return frozen(model)


def forward(atoms: Atoms, program: FrozenMACE) -> Results:
    """The frozen program on mace-torch's input."""
    out = program(zoo.graph(atoms, program), compute_stress=True)
    names = ("energy", "node_energy", "forces", "virials", "stress")
    return {name: out[name].detach().numpy() for name in names}  # type: ignore[union-attr]


def evaluator(form: str, program: FrozenMACE) -> Any:
    if form == "forward":
        return lambda atoms: forward(atoms, program)
    stepper = Stepper([program], static=form == "static")
    return lambda atoms: stepper(as_structures([atoms], program), stress=True)[0]


def molecule(rng: np.random.Generator) -> Atoms:
    """Without a cell."""
    atoms = crystal(rng)
    atoms.pbc, atoms.cell = False, np.zeros((3, 3))
    return atoms


def orthogonal(rng: np.random.Generator, determinant: int) -> np.ndarray:
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    matrix[0] *= determinant * np.sign(np.linalg.det(matrix))
    return matrix


def assert_same(found: Results, expected: Results, periodic: bool) -> None:
    for name, value in expected.items():
        if name == "stress" and not periodic:
            continue  # it is the virial over the volume of a box that mace-torch makes up, which turns with nothing
        assert np.abs(value).max() > 1e-4, f"{name} vanishes"
        assert_close(torch.from_numpy(found[name]), torch.from_numpy(value), terms=TERMS)


FORMS = pytest.mark.parametrize("form", ["exact", "static", "forward"])
STRUCTURES = pytest.mark.parametrize("make", [crystal, molecule])


@FORMS
@STRUCTURES
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_forces_and_stress_turn_along(
    determinant: int, make: Any, form: str, rng: np.random.Generator, program: FrozenMACE
) -> None:
    evaluate, atoms, turn = evaluator(form, program), make(rng), orthogonal(rng, determinant)
    before = evaluate(atoms)
    atoms.positions, atoms.cell = atoms.positions @ turn.T, np.array(atoms.cell) @ turn.T
    turned = {**before, "forces": before["forces"] @ turn.T}
    turned |= {name: turn @ before[name] @ turn.T for name in ("virials", "stress")}
    assert_same(evaluate(atoms), turned, atoms.pbc.all())


@FORMS
@STRUCTURES
def test_order_of_atoms_does_not_matter(make: Any, form: str, rng: np.random.Generator, program: FrozenMACE) -> None:
    evaluate, atoms = evaluator(form, program), make(rng)
    before, order = evaluate(atoms), rng.permutation(len(atoms))
    permuted = {name: value[order] if name in ("forces", "node_energy") else value for name, value in before.items()}
    assert_same(evaluate(atoms[order]), permuted, atoms.pbc.all())


@FORMS
@STRUCTURES
def test_place_does_not_matter(make: Any, form: str, rng: np.random.Generator, program: FrozenMACE) -> None:
    evaluate, atoms = evaluator(form, program), make(rng)
    before = evaluate(atoms)
    atoms.positions += rng.normal(0, 5, 3)
    assert_same(evaluate(atoms), before, atoms.pbc.all())


@FORMS
def test_image_of_an_atom_is_the_atom(form: str, rng: np.random.Generator, program: FrozenMACE) -> None:
    evaluate, atoms = evaluator(form, program), crystal(rng)
    before = evaluate(atoms)
    atoms.positions[rng.integers(len(atoms))] += np.array([2, -1, 1]) @ np.array(atoms.cell)
    assert_same(evaluate(atoms), before, atoms.pbc.all())
