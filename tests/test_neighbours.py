"""Neighbour search against every image tried, for each way to search."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.geometry import complete_cell
from step_cases import as_structures, build, crystal

from mace_fast.errors import MissingToolError
from mace_fast.inference.neighbours import CUDA_METHODS, Neighbours, NeighbourSearch, _in_order

CUTOFF = 4.5
PBC = list(itertools.product([False, True], repeat=3))


def brute_force(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> set[tuple[int, ...]]:
    """(sender, receiver, image) of every pair, by trying every image that could be near enough."""
    box = complete_cell(np.where(pbc[:, None], cell, 0.0))
    inverse = np.linalg.inv(box)
    reach = np.ceil(cutoff * np.linalg.norm(inverse, axis=0) + np.ptp(positions @ inverse, axis=0)).astype(int)
    images = [range(-n, n + 1) if p else range(1) for n, p in zip(reach, pbc, strict=True)]
    found = set()
    for image in itertools.product(*images):
        vectors = positions[None] - positions[:, None] + np.array(image) @ box
        for sender, receiver in np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff):
            if sender != receiver or any(image):
                found.add((int(sender), int(receiver), *image))
    return found


def as_set(found: Neighbours) -> set[tuple[int, ...]]:
    rows = torch.cat([found.edge_index.T, found.shifts.to(torch.int64)], dim=1).tolist()
    assert len(rows) == len(set(map(tuple, rows))), "a pair is there twice"
    return set(map(tuple, rows))


def random_cell(rng: np.random.Generator) -> np.ndarray:
    """Triclinic, of either hand, often thinner than the cutoff."""
    while True:
        cell = rng.normal(size=(3, 3)) * rng.uniform(2, 8)
        if abs(np.linalg.det(cell)) > 0.1 * np.prod(np.linalg.norm(cell, axis=1)):
            return cell


def check(search: NeighbourSearch, pbc: tuple[bool, ...], rng: np.random.Generator) -> None:
    for _ in range(4):
        cell, periodic = random_cell(rng), np.array(pbc)
        if not periodic.all() and rng.random() < 0.5:
            cell[~periodic] = 0.0
        # Inside the cell, outside it, and far away from the origin.
        positions = rng.normal(size=(rng.integers(1, 8), 3)) * rng.choice([2, 12]) + rng.choice([0, 300])
        found = search(positions, cell, periodic, CUTOFF)
        assert found.edge_index.dtype == torch.int64 and found.shifts.dtype == torch.int32
        assert found.edge_index.device.type == found.shifts.device.type == search.device.type
        assert as_set(found) == brute_force(positions, cell, periodic, CUTOFF)


@pytest.mark.parametrize("pbc", PBC)
def test_every_pair_is_there(pbc: tuple[bool, ...], rng: np.random.Generator) -> None:
    check(NeighbourSearch("cpu"), pbc, rng)


def test_one_atom_two_apart_and_none(rng: np.random.Generator) -> None:
    search, no = NeighbourSearch("cpu"), np.zeros(3, bool)
    for positions in (np.zeros((0, 3)), np.zeros((1, 3)), np.array([[0.0, 0, 0], [0, 0, 50]])):
        found = search(positions, np.zeros((3, 3)), no, CUTOFF)
        assert found.edge_index.shape == (2, 0) and found.shifts.shape == (0, 3)
    alone = search(np.zeros((1, 3)), 3.0 * np.identity(3), np.ones(3, bool), 3.1)
    assert alone.edge_index.shape == (2, 6), "its own images"


def test_cutoffs_take_turns(rng: np.random.Generator) -> None:
    search, cell = NeighbourSearch("cpu"), random_cell(rng)
    positions = rng.normal(size=(5, 3))
    for cutoff in (2.0, 5.0, 2.0, 3.5):
        found = search(positions, cell, np.ones(3, bool), cutoff)
        assert as_set(found) == brute_force(positions, cell, np.ones(3, bool), cutoff)


def test_batches_are_structures_side_by_side(rng: np.random.Generator) -> None:
    model, search = build(), NeighbourSearch("cpu")
    clusters = [
        Atoms(f"H{n}", positions=rng.normal(scale=2.0, size=(n, 3)) + [rng.normal(scale=50), 0, 0]) for n in (1, 4, 9)
    ]
    structures = [crystal(rng), Atoms("H"), *clusters, Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]]), crystal(rng)]
    structures = [structures[number] for number in rng.permutation(len(structures))]
    found = as_set(search.batch(as_structures(structures, model), CUTOFF))
    expected, first = set(), 0
    for atoms in structures:
        alone = as_set(search(atoms.positions, np.array(atoms.cell), np.array(atoms.pbc), CUTOFF))
        expected |= {(s + first, r + first, *image) for s, r, *image in alone}
        first += len(atoms)
    assert found == expected


@pytest.mark.parametrize("pbc", PBC)
def test_pairs_are_a_list_with_each_pair_once(pbc: tuple[bool, ...], rng: np.random.Generator) -> None:
    """One structure, a batch of like ones, and a batch in which some are put in a row."""
    model, search = build(), NeighbourSearch("cpu")
    one = Atoms("H5", positions=rng.normal(size=(5, 3)) * 2, cell=random_cell(rng), pbc=pbc)
    for given in ([one], [one, one, one], [crystal(rng), one, Atoms("H"), one]):
        structures = as_structures(given, model)
        expected, found = search.batch(structures, CUTOFF), search.pairs(structures, CUTOFF)
        (first, second), images = found.atoms.T, found.images
        both = Neighbours(
            torch.from_numpy(np.stack([np.r_[first, second], np.r_[second, first]])),
            torch.from_numpy(np.concatenate([images, -images])),
        )
        assert as_set(both) == as_set(expected)


def test_small_structures_are_for_the_host(rng: np.random.Generator) -> None:
    model = build()
    cluster, small, large = Atoms("H40", rng.normal(size=(40, 3))), crystal(rng), crystal(rng).repeat(6)
    for device in ("cpu", "cuda"):
        search = NeighbourSearch(device)
        for given in ([cluster], [small], [small, cluster] * 40):
            assert search.small(as_structures(given, model), CUTOFF)
        assert not search.small(as_structures([large], model), CUTOFF)
        assert not search.small(as_structures([small, large], model), CUTOFF)
    for method in CUDA_METHODS:
        if method != "nvalchemi":
            assert not NeighbourSearch("cuda", method).small(as_structures([small], model), CUTOFF), (
                "another was asked for"
            )


def test_wrong_methods_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of vesin"):
        NeighbourSearch("cpu", "nvalchemi")
    with pytest.raises(ValueError, match="one of vesin-cuda, nvalchemi, vesin-upload"):
        NeighbourSearch("cuda", "vesin")
    monkeypatch.setattr("mace_fast.inference.neighbours._has_nvalchemi", lambda: False)
    with pytest.raises(MissingToolError, match="pip install"):
        NeighbourSearch("cuda", "nvalchemi")


def test_copies(rng: np.random.Generator) -> None:
    search, cell = NeighbourSearch("cpu"), random_cell(rng)
    positions = rng.normal(size=(4, 3))
    expected = as_set(search(positions, cell, np.ones(3, bool), CUTOFF))
    assert as_set(pickle.loads(pickle.dumps(search))(positions, cell, np.ones(3, bool), CUTOFF)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("method", CUDA_METHODS)
@pytest.mark.parametrize("pbc", PBC)
def test_every_pair_is_there_on_a_gpu(pbc: tuple[bool, ...], method: str, rng: np.random.Generator) -> None:
    if method == "nvalchemi":
        pytest.importorskip("nvalchemiops", reason="nvalchemi-toolkit-ops is not installed")
    check(NeighbourSearch("cuda", method), pbc, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("method", CUDA_METHODS)
def test_large_structures_on_a_gpu(method: str, rng: np.random.Generator) -> None:
    """A cell list, not every pair, and more neighbours than a first guess has room for."""
    if method == "nvalchemi":
        pytest.importorskip("nvalchemiops", reason="nvalchemi-toolkit-ops is not installed")
    for cutoff, pbc in ((6.5, (True, True, True)), (9.0, (True, True, True)), (6.0, (True, False, True))):
        cell = 17.8 * np.identity(3) + rng.uniform(-2, 2, (3, 3))
        positions = rng.uniform(0, 1, (1000, 3)) @ cell
        found = NeighbourSearch("cuda", method)(positions, cell, np.array(pbc), cutoff)
        right = NeighbourSearch("cpu")(positions, cell, np.array(pbc), cutoff)
        assert as_set(found) == as_set(right)


@pytest.mark.gpu
def test_a_method_is_chosen_and_works_on_any_stream(rng: np.random.Generator) -> None:
    search, cell = NeighbourSearch("cuda"), random_cell(rng)
    for _ in range(5):
        positions = rng.normal(size=(60, 3)) * 3
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(1_000_000)
            found = search(positions, cell, np.ones(3, bool), CUTOFF)
            rows = as_set(found)
        assert rows == as_set(NeighbourSearch("cpu")(positions, cell, np.ones(3, bool), CUTOFF))
    assert search.method in CUDA_METHODS


def test_order_of_a_list_does_not_depend_on_who_found_a_pair_first(rng: np.random.Generator) -> None:
    """Images of an atom on both sides of it, and shifts of atoms that have walked far."""
    cell = np.diag([2.5, 3.0, 9.0])
    positions = rng.uniform(-1, 1, (4, 3)) + rng.integers(-4000, 4000, (4, 3)) @ cell
    found = NeighbourSearch(torch.device("cpu"))(positions, cell, np.array([True] * 3), CUTOFF)
    first = by_receiver(_in_order(found))
    assert as_set(first) == as_set(found)
    for _ in range(3):
        shuffle = torch.from_numpy(rng.permutation(found.edge_index.shape[1]))
        again = by_receiver(_in_order(Neighbours(found.edge_index[:, shuffle], found.shifts[shuffle])))
        assert torch.equal(again.edge_index, first.edge_index) and torch.equal(again.shifts, first.shifts)


def by_receiver(found: Neighbours) -> Neighbours:
    order = torch.argsort(found.edge_index[1], stable=True)
    return Neighbours(found.edge_index[:, order], found.shifts[order])
