"""The neighbour list against a brute-force search of every image, the model inputs against mace-torch's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.geometry import complete_cell

from mace_fast import zoo
from mace_fast.calculators.graph import GraphBuilder, find_edges
from mace_fast.errors import StructureError

CUTOFF = 4.5


def brute_force(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> set[tuple[int, ...]]:
    """(sender, receiver, shift) of every pair, by trying every image that could be near enough."""
    periodic = complete_cell(np.where(pbc[:, None], cell, 0.0))
    inverse = np.linalg.inv(periodic)
    fractional = positions @ inverse
    reach = np.ceil(cutoff * np.linalg.norm(inverse, axis=0) + np.ptp(fractional, axis=0)).astype(int)
    images = [range(-n, n + 1) if p else range(1) for n, p in zip(reach, pbc, strict=True)]
    found = set()
    for image in itertools.product(*images):
        vectors = positions[None] - positions[:, None] + np.array(image) @ periodic
        for sender, receiver in np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff):
            if sender != receiver or any(image):
                found.add((int(sender), int(receiver), *image))
    return found


def as_set(edges: np.ndarray, shifts: np.ndarray) -> set[tuple[int, ...]]:
    rows = [(*pair, *shift) for pair, shift in zip(edges.T.tolist(), shifts.tolist(), strict=True)]
    assert len(rows) == len(set(rows)), "an edge is there twice"
    return {tuple(map(int, row)) for row in rows}


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
def test_edges_are_all_there(pbc: tuple[bool, bool, bool], rng: np.random.Generator) -> None:
    for _ in range(3):
        cell = rng.normal(size=(3, 3)) * rng.uniform(2, 8)  # triclinic, either hand, often thinner than the cutoff
        if abs(np.linalg.det(cell)) < 0.1 * np.prod(np.linalg.norm(cell, axis=1)):
            continue
        positions = rng.normal(size=(rng.integers(1, 8), 3)) * rng.choice([2, 12])
        edges = find_edges(positions, cell, np.array(pbc), CUTOFF)
        assert edges.index.dtype == np.int64
        assert as_set(edges.index, edges.shifts) == brute_force(positions, cell, np.array(pbc), CUTOFF)
        assert (np.diff(edges.index[1]) >= 0).all(), "edges are grouped by receiver"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return zoo.build(zoo.small_variants()["base"])


@pytest.mark.parametrize("case", list(zoo.edge_case_structures([1, 6, 8])))
def test_inputs_are_those_of_mace_torch(case: str, model: torch.nn.Module) -> None:
    """Same edges, vectors, cell, species; mace-torch's AtomicData is what ``zoo.graph`` makes."""
    atoms = zoo.edge_case_structures([1, 6, 8], cutoff=CUTOFF)[case]
    builder = GraphBuilder([1, 6, 8], CUTOFF, torch.device("cpu"), torch.float64, 0, {}, {}, {})
    ours, theirs = builder(atoms), zoo.graph(atoms, model)
    for name in ("node_attrs", "batch", "ptr", "head", "cell"):
        torch.testing.assert_close(ours[name], theirs[name].to(ours[name].dtype), msg=name)

    def edges(data: dict[str, torch.Tensor]) -> dict[tuple[int, ...], list[float]]:
        sender, receiver = data["edge_index"]
        vectors = data["positions"][receiver] - data["positions"][sender] + data["shifts"]
        keys = torch.cat([data["edge_index"], data["unit_shifts"].T.to(torch.int64)]).T.tolist()
        return {tuple(key): vector for key, vector in zip(keys, vectors.tolist(), strict=True)}

    mine, reference = edges(ours), edges(theirs)
    assert mine.keys() == reference.keys()
    for key, vector in reference.items():
        np.testing.assert_allclose(mine[key], vector, atol=1e-9)


def test_far_from_the_origin_keeps_float32_digits() -> None:
    atoms = zoo.edge_case_structures([1, 6, 8], cutoff=CUTOFF)["triclinic cell"]
    builder = GraphBuilder([1, 6, 8], CUTOFF, torch.device("cpu"), torch.float32, 0, {}, {}, {})
    near = builder(atoms)["positions"]
    atoms.positions += 12345.0
    torch.testing.assert_close(builder(atoms)["positions"], near, atol=1e-6, rtol=0)


def test_species_tensors_follow_the_structure() -> None:
    builder = GraphBuilder([1, 6, 8], CUTOFF, torch.device("cpu"), torch.float64, 0, {}, {}, {})
    for formula in ("H2O", "H2O", "CO2", "OH2", "C"):
        atoms = Atoms(formula, positions=np.arange(3 * len(Atoms(formula))).reshape(-1, 3))
        expected = [[1, 6, 8].index(z) for z in atoms.numbers]
        assert builder(atoms)["node_attrs"].argmax(1).tolist() == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda atoms: atoms.__delitem__(slice(None)), "no atoms"),
        (lambda atoms: atoms.numbers.__setitem__(1, 26), "does not know Fe; it was trained on H C O"),
        (lambda atoms: atoms.positions.__setitem__((2, 1), np.nan), "position of atom 2"),
        (lambda atoms: atoms.positions.__setitem__((0, 0), np.inf), "position of atom 0"),
        (lambda atoms: atoms.cell.__setitem__(1, 0.0), "span nothing"),
        (lambda atoms: atoms.cell.__setitem__(1, atoms.cell[0]), "span nothing"),
        (lambda atoms: atoms.cell.__setitem__((1, 1), np.nan), "cell is not finite"),
    ],
)
def test_structures_that_cannot_be(change, said: str) -> None:  # type: ignore[no-untyped-def]
    atoms = Atoms("H2O", positions=[[0, 0, 0], [1, 0, 0], [0, 1, 0]], cell=[4, 5, 6], pbc=True)
    change(atoms)
    builder = GraphBuilder([1, 6, 8], CUTOFF, torch.device("cpu"), torch.float64, 0, {}, {}, {})
    with pytest.raises(StructureError, match=said):
        builder(atoms)


def test_missing_feature_is_named() -> None:
    specs = {"external": {"per": "graph"}, "site": {"per": "atom"}}
    builder = GraphBuilder([1], CUTOFF, torch.device("cpu"), torch.float64, 0, specs, {"external": "field"}, {})
    atoms = Atoms("H")
    with pytest.raises(StructureError, match=r"atoms\.info\['field'\]"):
        builder(atoms)
    atoms.info["field"] = 2.0
    with pytest.raises(StructureError, match=r"atoms\.arrays\['site'\]"):
        builder(atoms)
    atoms.arrays["site"] = np.array([3.0])
    data = builder(atoms)
    assert data["external"].tolist() == [2.0] and data["site"].tolist() == [[3.0]]


@pytest.mark.parametrize("kind", ["continuous", "categorical"])
def test_features_of_atoms_are_checked(kind: str) -> None:
    specs = {"site": {"per": "atom", "type": kind, "num_classes": 3, "offset": 1, "in_dim": 1}}
    builder = GraphBuilder([1], CUTOFF, torch.device("cpu"), torch.float64, 0, specs, {}, {"site": "mine"})
    atoms = Atoms("H2", positions=[[0, 0, 0], [1, 0, 0]])
    atoms.arrays["mine"] = np.array([-1.0, 1.0])
    assert builder(atoms)["site"].tolist() == [[-1.0], [1.0]]
    for value in (np.nan, np.inf, 2.0, 0.5) if kind == "categorical" else (np.nan, np.inf):
        atoms.arrays["mine"] = np.array([0.0, value])
        with pytest.raises(StructureError, match=r"site of atom 1 \(atoms.arrays\['mine'\]\) is .*; the model takes"):
            builder(atoms)
    atoms.arrays["mine"] = np.array(["a", "b"])
    with pytest.raises(StructureError, match="numbers for each atom"):
        builder(atoms)
