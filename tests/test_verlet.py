"""The criterion for a list of candidates: while it holds, no pair may be missing, whatever atoms and cells do."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from step_cases import as_structures, build, crystal

from mace_fast.inference.neighbours import NeighbourSearch
from mace_fast.inference.verlet import Structures, Verlet

CUTOFF, SKIN = 4.0, 0.6
MODEL = build()


def pairs(structures: Structures, cutoff: float) -> dict[tuple[int, ...], np.ndarray]:
    """Vectors of all pairs, by sender, receiver and image."""
    found = NeighbourSearch("cpu").batch(structures, cutoff)
    (sender, receiver), shifts = found.edge_index.numpy(), found.shifts.numpy()
    keys = np.column_stack([sender, receiver, shifts]).tolist()
    return {tuple(key): np.array(key) for key in keys}


def moved(atoms: Atoms, rng: np.random.Generator, size: float) -> Atoms:
    """By about ``size`` A: at random, together, by a strain with or without the atoms, or all of it."""
    new = atoms.copy()
    way = rng.integers(0, 5)
    if way in (0, 4):
        new.positions += size * rng.uniform(-0.6, 0.6, new.positions.shape)
    if way in (1, 4):
        new.positions += size * rng.normal(size=3)
    if way in (2, 3, 4):
        strain = np.identity(3) + 0.2 * size * rng.uniform(-0.5, 0.5, (3, 3))
        new.set_cell(np.array(new.cell) @ strain, scale_atoms=way != 3)
    return new


def test_nothing_is_missing_while_it_holds(rng: np.random.Generator) -> None:
    held = 0
    for number in range(400):
        atoms = crystal(rng)
        if number % 3 == 0:
            atoms.pbc = rng.random(3) < 0.5
        old = as_structures([atoms, crystal(rng)], MODEL)
        size = rng.choice([0.05, 0.3, 0.8])
        new = as_structures([moved(atoms, rng, size), Atoms(old_part(old, 1, atoms))], MODEL)
        if Verlet(old, CUTOFF, SKIN).holds(new):
            held += 1
            assert pairs(new, CUTOFF).keys() <= pairs(old, CUTOFF + SKIN).keys()
    assert 40 < held < 360, f"{held} of 400: too few to show anything"


def old_part(structures: Structures, number: int, like: Atoms) -> Atoms:
    first, last = structures.ptr[number : number + 2]
    symbols = np.array([1, 6, 8])[structures.species[first:last]]
    return Atoms(symbols, structures.positions[first:last], cell=structures.cells[number], pbc=structures.pbc[number])


def test_the_usual_rule_for_a_constant_cell(rng: np.random.Generator) -> None:
    atoms = crystal(rng)
    verlet = Verlet(as_structures([atoms], MODEL), CUTOFF, SKIN)
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    for distance, holds in ((0.0, True), (0.499 * SKIN, True), (0.501 * SKIN, False)):
        new = atoms.copy()
        new.positions[3] += distance * direction
        assert verlet.holds(as_structures([new], MODEL)) is holds


def test_a_list_lasts_along_a_barostat(rng: np.random.Generator) -> None:
    """Strains that take the atoms along, about any origin, cost as little of the skin as they can."""
    atoms = crystal(rng)
    verlet = Verlet(as_structures([atoms], MODEL), CUTOFF, SKIN)
    for factor, holds in ((1.001, True), (1.02, True), (0.99, True), (0.8 * CUTOFF / (CUTOFF + SKIN), False)):
        new = atoms.copy()
        new.set_cell(atoms.cell * factor, scale_atoms=True)
        new.positions += rng.normal(size=3)
        assert verlet.holds(as_structures([new], MODEL)) is holds, factor


@pytest.mark.parametrize("change", ["number", "order", "species", "pbc", "nan", "split"])
def test_what_it_does_not_hold_for(change: str, rng: np.random.Generator) -> None:
    atoms = crystal(rng)
    verlet = Verlet(as_structures([atoms], MODEL), CUTOFF, SKIN)
    assert verlet.holds(as_structures([atoms], MODEL))
    new = [atoms.copy()]
    if change == "number":
        del new[0][0]
    elif change == "order":
        new[0] = new[0][::-1]
    elif change == "species":
        new[0].numbers[0] = 6 if new[0].numbers[0] != 6 else 8
    elif change == "pbc":
        new[0].pbc[1] = False
    elif change == "nan":
        new[0].positions[2, 1] = np.nan
    else:
        new = [atoms[:4], atoms[4:]]
    assert not verlet.holds(as_structures(new, MODEL))


def test_it_keeps_its_own_copies(rng: np.random.Generator) -> None:
    atoms = crystal(rng)
    given = as_structures([atoms], MODEL)
    verlet = Verlet(given, CUTOFF, SKIN)
    given.positions[:] += 1.0
    assert not verlet.holds(given)
