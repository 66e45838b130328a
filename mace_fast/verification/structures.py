"""Small structures, made of a model's own elements, on which two models are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np
import torch
from numpy.typing import NDArray

from mace_fast.errors import StructureError

_Array = NDArray[np.float64]

# A thin crystal with every element: few neighbours each, since 89 elements need 89 atoms.
_NEIGHBOURS_OF_EVERY_ELEMENT = 12.0
_NEIGHBOURS = 18.0


def default_structures(model: torch.nn.Module, *, seed: int | None = None) -> list[ase.Atoms]:
    """Structures that reach every element, every head and every geometric special case of ``model``.

    They are periodic and not: a crystal that holds each element at least once, triclinic and left-handed
    cells, a slab and a wire (mixed periodicity), a cell thinner than the cutoff, molecules without a cell and
    with one that does not count, a dimer, an isolated atom, two atoms beyond the cutoff, a crystal far from
    the origin, atoms outside their cell. Distances scale with the model's cutoff, so the number of edges
    (about 2000 for 89 elements) does not depend on it.

    Args:
        model: a MACE model; its ``atomic_numbers``, ``r_max``, ``heads`` and ``embedding_specs`` are read.
        seed: of the random numbers; a fresh one if None.

    Returns:
        Structures in A. ``atoms.info`` holds ``name``, ``head``, and a value for each graph-level embedding
        (total charge, spin), ``atoms.arrays`` one for each atom-level embedding.

    Raises:
        StructureError: the model has no ``atomic_numbers`` or no ``r_max``.
    """
    rng = np.random.default_rng(seed)
    numbers, r_max = elements_and_cutoff(model)
    structures = _geometries(rng, numbers, r_max)
    heads = model_heads(model)
    for missing in range(len(heads) - len(structures)):
        structures.append(_molecule(rng, numbers, r_max, 3, f"molecule {missing + 2}"))
    for index, atoms in enumerate(structures):
        atoms.info["head"] = heads[index % len(heads)]
    _add_embeddings(rng, structures, embedding_specs(model))
    return structures


def with_every_head(model: torch.nn.Module, structures: Sequence[ase.Atoms]) -> list[ase.Atoms]:
    """Copies of the structures with a head each; those without one take turns, so that each head has one."""
    copies = [atoms.copy() for atoms in structures]
    free = [atoms for atoms in copies if "head" not in atoms.info]
    taken = {atoms.info["head"] for atoms in copies if "head" in atoms.info}
    missing = [head for head in model_heads(model) if head not in taken]
    heads = missing or model_heads(model)
    for index, atoms in enumerate(free):
        atoms.info["head"] = heads[index % len(heads)]
    if free:
        smallest = min(free, key=len)
        for head in missing[len(free) :]:
            copies.append(smallest.copy())
            copies[-1].info.update(head=head)
    return copies


def cluster(model: torch.nn.Module, numbers: Sequence[int], rng: np.random.Generator) -> ase.Atoms:
    """Two atoms of each of up to four elements, all within the cutoff of one another: every pair is there.

    Args:
        model: whose cutoff, heads and additional inputs are read.
        numbers: atomic numbers, 1 to 4 of them.
        rng: places the atoms, and picks a head.

    Returns:
        A structure in A without a cell, named by its elements.
    """
    _, r_max = elements_and_cutoff(model)
    species = np.repeat(np.asarray(numbers), 2)
    # The longest diagonal of displaced sites is 2.36 spacings.
    sites = rng.permutation(_sites(rng, np.array([2, 2, 2])))[: len(species)] * 2.0 * 0.4 * r_max
    atoms = ase.Atoms(species, positions=sites)
    atoms.info["name"] = f"cluster of {', '.join(dict.fromkeys(atoms.get_chemical_symbols()))}"
    atoms.info["head"] = str(rng.choice(model_heads(model)))
    _add_embeddings(rng, [atoms], embedding_specs(model))
    return atoms


def elements_and_cutoff(model: torch.nn.Module) -> tuple[NDArray[np.int64], float]:
    """Atomic numbers [Z] in the model's order, and its cutoff in A."""
    numbers = getattr(model, "atomic_numbers", None)
    r_max = getattr(model, "r_max", None)
    if numbers is None or r_max is None:
        raise StructureError(
            f"the reference, a {type(model).__name__}, has no atomic_numbers or no r_max: it is not a MACE "
            "model. Pass the MACE model itself as the reference."
        )
    return torch.as_tensor(numbers).cpu().numpy().astype(np.int64), float(r_max)


def model_heads(model: torch.nn.Module) -> list[str]:
    """Names of the model's heads; models of mace-torch before 0.3.6 have one and no such attribute."""
    return list(getattr(model, "heads", None) or ["Default"])


def embedding_specs(model: torch.nn.Module) -> Mapping[str, Mapping[str, Any]]:
    """MACE's specification of each additional input (charge, spin); empty where the model takes none."""
    return getattr(model, "embedding_specs", None) or {}


def _geometries(rng: np.random.Generator, numbers: NDArray[np.int64], r_max: float) -> list[ase.Atoms]:
    triclinic = _triclinic_cell(r_max)
    left_handed = triclinic[[1, 0, 2]]
    size = 1.6 * _spacing(r_max, _NEIGHBOURS)
    box = np.diag([1.0, 1.1, 1.2]) * size
    thin = np.diag([0.42, 0.93, 1.07]) * r_max
    outside = _crystal(rng, numbers, triclinic, 3, "atoms outside the cell")
    outside.positions += rng.integers(-2, 3, (3, 3)) @ triclinic
    far = _crystal(rng, numbers, triclinic, 3, "far from the origin")
    far.positions += np.array([310.0, -480.0, 220.0])
    spacing = _spacing(r_max, _NEIGHBOURS)
    with_cell = _molecule(rng, numbers, r_max, 4, "molecule in a cell")
    with_cell.cell = 0.8 * spacing * np.eye(3)  # smaller than the molecule: no periodic image may be seen
    return [
        _every_element(rng, numbers, r_max),
        _crystal(rng, numbers, triclinic, 4, "triclinic cell"),
        _crystal(rng, numbers, left_handed, 4, "left-handed cell"),
        _crystal(rng, numbers, box, 4, "slab", pbc=(True, True, False)),
        _crystal(rng, numbers, box, 3, "wire", pbc=(False, True, False)),
        _crystal(rng, numbers, thin, 2, "cell thinner than the cutoff"),
        _molecule(rng, numbers, r_max, 5, "molecule"),
        with_cell,
        _atoms(rng, numbers, _dimer(rng, 0.3 * r_max), "dimer"),
        _atoms(rng, numbers, rng.normal(size=(1, 3)), "isolated atom"),
        _atoms(
            rng,
            numbers,
            rng.normal(size=(1, 3)),
            "isolated atom in a cell",
            cell=2.5 * r_max * np.eye(3),
            pbc=(True,) * 3,
        ),
        _atoms(rng, numbers, _dimer(rng, 1.5 * r_max), "two atoms beyond the cutoff"),
        far,
        outside,
    ]


def _spacing(r_max: float, neighbours: float) -> float:
    """Distance in A between the sites of a simple cubic lattice with so many sites within the cutoff."""
    return float((4.0 / 3.0 * np.pi / neighbours) ** (1.0 / 3.0) * r_max)


def _triclinic_cell(r_max: float) -> _Array:
    shape = np.array([[1.0, 0.1, 0.0], [0.35, 1.05, -0.1], [-0.25, 0.3, 0.95]])
    return np.asarray(shape * 1.6 * _spacing(r_max, _NEIGHBOURS))


def _every_element(rng: np.random.Generator, numbers: NDArray[np.int64], r_max: float) -> ase.Atoms:
    """Orthorhombic crystal with each element on at least one site; at least eight sites."""
    sites = max(len(numbers), 8)
    longest = int(np.ceil(sites ** (1.0 / 3.0))) + 2
    triples = [(a, b, c) for a in range(2, longest) for b in range(2, a + 1) for c in range(2, b + 1)]
    counts = np.array(min((abc for abc in triples if np.prod(abc) >= sites), key=lambda abc: (np.prod(abc), abc[0])))
    cell = np.diag(counts * _spacing(r_max, _NEIGHBOURS_OF_EVERY_ELEMENT))
    fractional = _sites(rng, counts)
    species = np.concatenate([numbers, rng.choice(numbers, len(fractional) - len(numbers))])
    return ase.Atoms(
        rng.permutation(species),
        scaled_positions=fractional,
        cell=cell,
        pbc=True,
        info={"name": "crystal, every element"},
    )


def _sites(rng: np.random.Generator, counts: NDArray[np.int64]) -> _Array:
    """Fractional sites [n, 3] of a simple lattice, displaced by up to 0.18 spacings: no symmetry is left."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), axis=-1).reshape(-1, 3)
    return np.asarray((grid + 0.5 + rng.uniform(-0.18, 0.18, grid.shape)) / counts)


def _crystal(
    rng: np.random.Generator,
    numbers: NDArray[np.int64],
    cell: _Array,
    count: int,
    name: str,
    pbc: tuple[bool, bool, bool] = (True, True, True),
) -> ase.Atoms:
    """``count`` (at most 4) atoms on random sites of a 2 x 2 x 1 grid, random elements."""
    fractional = rng.permutation(_sites(rng, np.array([2, 2, 1])))[:count]
    return _atoms(rng, numbers, fractional @ cell, name, cell=cell, pbc=pbc)


def _molecule(rng: np.random.Generator, numbers: NDArray[np.int64], r_max: float, count: int, name: str) -> ase.Atoms:
    sites = rng.permutation(_sites(rng, np.array([2, 2, 2])))[:count]
    return _atoms(rng, numbers, sites * 2.0 * 0.8 * _spacing(r_max, _NEIGHBOURS), name)


def _dimer(rng: np.random.Generator, distance: float) -> _Array:
    direction = rng.normal(size=3)
    return np.stack([np.zeros(3), direction * distance / np.linalg.norm(direction)])


def _atoms(
    rng: np.random.Generator,
    numbers: NDArray[np.int64],
    positions: _Array,
    name: str,
    cell: _Array | None = None,
    pbc: tuple[bool, ...] = (False, False, False),
) -> ase.Atoms:
    species = rng.choice(numbers, len(positions))
    return ase.Atoms(species, positions=positions, cell=cell, pbc=pbc, info={"name": name})


def _add_embeddings(
    rng: np.random.Generator, structures: Sequence[ase.Atoms], specs: Mapping[str, Mapping[str, Any]]
) -> None:
    """A value of each additional input for each structure or atom; categories are dealt, see ``_dealt``."""
    for name, spec in specs.items():
        per_graph = spec["per"] == "graph"
        counts = [1 if per_graph else len(atoms) for atoms in structures]
        if spec["type"] == "categorical":
            values = _dealt(rng, int(spec["num_classes"]), sum(counts))[:, None] - int(spec.get("offset", 0))
        else:
            values = rng.normal(size=(sum(counts), int(spec.get("in_dim", 1))))
        for atoms, own in zip(structures, np.split(values, np.cumsum(counts)[:-1]), strict=True):
            if per_graph:
                atoms.info[name] = own[0, 0].item()
            else:
                atoms.arrays[name] = own


def _dealt(rng: np.random.Generator, classes: int, count: int) -> NDArray[Any]:
    """``count`` categories in random order, none again before every other: no luck decides which are compared."""
    decks = [rng.permutation(classes) for _ in range(-(-count // classes))]
    return np.concatenate(decks)[:count]
