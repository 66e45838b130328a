"""Structures of Cu, Ag and Au labelled with ASE's EMT potential: what the shipped checkpoint learns from.

The set has to carry a molecular dynamics run at 1000 K, so it reaches well beyond the crystal at rest: hot,
strained, random, ordered, cut open, broken up, and pushed into the repulsive wall. Everything is drawn from
one seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.emt import EMT
from ase.cluster import Icosahedron
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.neighborlist import neighbor_list
from numpy.random import Generator

ELEMENTS: tuple[str, ...] = ("Cu", "Ag", "Au")
LATTICE_CONSTANT = {"Cu": 3.61, "Ag": 4.09, "Au": 4.06}
"""fcc lattice constants in angstrom: starting points, every structure is strained from there."""

LARGEST_FORCE = 25.0
"""eV/angstrom. Beyond it a structure teaches nothing that dynamics visits, and would dominate the squared
loss."""

SHORTEST_DISTANCE = 1.45
"""Angstrom. Atoms at 4000 K do not come closer."""


@dataclass(frozen=True)
class Split:
    """The three parts of the data set, each a list of labelled atoms."""

    train: list[Atoms]
    valid: list[Atoms]
    test: list[Atoms]


def generate(seed: int, scale: float, progress: Callable[[str, int], None]) -> Split:
    """Draw, label and split the data set.

    Args:
        seed: of the one generator that everything is drawn from.
        scale: multiplies the number of structures of every kind (1.0 is what the shipped checkpoint used).
        progress: called with the kind's name and the number of structures kept after each kind.

    Returns:
        Train, valid and test parts (84, 8 and 8 percent of each kind; isolated atoms go to train).
    """
    rng = np.random.default_rng(seed)
    split = Split([], [], [])
    for kind, draw, count in _KINDS:
        wanted = max(3, round(count * scale))
        kept: list[Atoms] = []
        source = draw(rng)
        while len(kept) < wanted:
            labelled = label(next(source), kind)
            if labelled is not None:
                kept.append(labelled)
        order = rng.permutation(len(kept))
        held_out = max(1, round(0.08 * len(kept)))
        split.test.extend(kept[i] for i in order[:held_out])
        split.valid.extend(kept[i] for i in order[held_out : 2 * held_out])
        split.train.extend(kept[i] for i in order[2 * held_out :])
        progress(kind, len(kept))
    for element in ELEMENTS:
        isolated = label(Atoms(element, positions=[[0.0, 0.0, 0.0]]), "IsolatedAtom")
        if isolated is None:
            raise RuntimeError(f"EMT gives no energy for an isolated {element} atom")
        split.train.append(isolated)
    progress("IsolatedAtom", len(ELEMENTS))
    return Split([split.train[i] for i in rng.permutation(len(split.train))], split.valid, split.test)


def label(atoms: Atoms, kind: str) -> Atoms | None:
    """The structure with EMT energy, forces and (if periodic in three directions) stress; None where it is
    out of range."""
    if len(atoms) > 1 and _shortest_distance(atoms) < SHORTEST_DISTANCE:
        return None
    working = atoms.copy()
    working.calc = EMT()
    forces = working.get_forces()
    if not np.isfinite(forces).all() or np.abs(forces).max() > LARGEST_FORCE:
        return None
    labelled = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    labelled.info["config_type"] = kind
    labelled.info["REF_energy"] = float(working.get_potential_energy())
    labelled.arrays["REF_forces"] = forces
    if atoms.pbc.all():
        labelled.info["REF_stress"] = working.get_stress(voigt=False).ravel()
    return labelled


def random_alloy(rng: Generator, repeat: tuple[int, int, int], primitive: bool = False) -> Atoms:
    """An fcc crystal with species drawn from a random composition, at Vegard's lattice constant."""
    cell = bulk("Cu", "fcc", a=1.0, cubic=not primitive) * repeat
    symbols = rng.choice(ELEMENTS, size=len(cell), p=rng.dirichlet([0.8] * len(ELEMENTS)))
    constant = float(np.mean([LATTICE_CONSTANT[symbol] for symbol in symbols]))
    cell.set_cell(cell.cell * constant, scale_atoms=True)
    cell.symbols = symbols
    return cell


def rose_gold(repeat: tuple[int, int, int], seed: int) -> Atoms:
    """An fcc supercell of 18 carat rose gold by atoms: half gold, 30 percent copper, 20 percent silver,
    random sites."""
    atoms = bulk("Au", "fcc", a=3.96, cubic=True) * repeat
    count = len(atoms)
    copper, silver = round(0.3 * count), round(0.2 * count)
    symbols = ["Cu"] * copper + ["Ag"] * silver + ["Au"] * (count - copper - silver)
    atoms.symbols = np.random.default_rng(seed).permutation(symbols)
    return atoms


def _shortest_distance(atoms: Atoms) -> float:
    distances = neighbor_list("d", atoms, 3.0)
    return float(distances.min()) if len(distances) else 3.0


def _strain(rng: Generator, atoms: Atoms, volume: tuple[float, float], shear: float) -> Atoms:
    """Scale all lengths by a factor in `volume`, shear by up to `shear`; atoms move with the cell."""
    deformation = np.eye(3) * rng.uniform(*volume) + rng.uniform(-shear, shear, (3, 3))
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return atoms


def _rattle(rng: Generator, atoms: Atoms, largest: float) -> Atoms:
    atoms.positions += rng.normal(scale=rng.uniform(0.0, largest), size=atoms.positions.shape)
    return atoms


def _trajectory(rng: Generator, atoms: Atoms, kelvin: float, samples: int, stride: int) -> Iterator[Atoms]:
    """Langevin dynamics with EMT; yields a copy every `stride` steps of 4 fs."""
    moving = atoms.copy()
    moving.calc = EMT()
    MaxwellBoltzmannDistribution(moving, temperature_K=1.5 * kelvin, rng=rng)
    dynamics = Langevin(moving, 4 * units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng)
    for _ in range(samples):
        dynamics.run(stride)
        yield moving.copy()


def _alloys(rng: Generator) -> Iterator[Atoms]:
    """Random alloys in small cells, compressed, expanded, sheared and rattled."""
    while True:
        repeat = ((2, 1, 1), (2, 2, 1), (1, 1, 1), (2, 2, 2))[rng.integers(4)]
        atoms = random_alloy(rng, repeat, primitive=repeat == (2, 2, 2))
        yield _rattle(rng, _strain(rng, atoms, (0.86, 1.14), 0.06), 0.25)


def _ordered(rng: Generator) -> Iterator[Atoms]:
    """Pure fcc, bcc, hcp and simple cubic; L1_2, L1_0 and B2 of every pair; strained, some rattled."""
    fcc_sites = [(0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0)]
    while True:
        first, second = (str(s) for s in rng.permutation(ELEMENTS)[:2])
        mean = (LATTICE_CONSTANT[first] + LATTICE_CONSTANT[second]) / 2
        own = LATTICE_CONSTANT[first]
        choices: list[Atoms] = [
            Atoms([first] * 3 + [second], scaled_positions=fcc_sites, cell=[mean] * 3, pbc=True),
            Atoms([first] * 2 + [second] * 2, scaled_positions=fcc_sites, cell=[mean] * 3, pbc=True),
            Atoms(
                [first, second],
                scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5)],
                cell=[0.8 * mean] * 3,
                pbc=True,
            ),
            bulk(first, "fcc", a=own, cubic=True),
            bulk(first, "bcc", a=0.8 * own, cubic=True),
            bulk(first, "hcp", a=own / np.sqrt(2), c=own * 2 / np.sqrt(3)),
            bulk(first, "sc", a=0.63 * own),
        ]
        atoms = choices[rng.integers(len(choices))]
        yield _rattle(rng, _strain(rng, atoms, (0.85, 1.25), 0.03), 0.08)


def _crystal_dynamics(rng: Generator) -> Iterator[Atoms]:
    """Random alloys at 300 to 2500 K (so liquids too), at several densities."""
    while True:
        repeat = ((2, 2, 1), (2, 2, 2), (3, 2, 2))[rng.integers(3)]
        atoms = random_alloy(rng, repeat, primitive=repeat != (2, 2, 1))
        atoms = _strain(rng, atoms, (0.96, 1.08), 0.02)
        yield from _trajectory(rng, atoms, rng.uniform(300, 2500), samples=8, stride=25)


def _warm_crystals(rng: Generator) -> Iterator[Atoms]:
    """Alloys of 32 atoms at 300 to 1400 K near their own density: the region that dynamics samples."""
    while True:
        atoms = _strain(rng, random_alloy(rng, (2, 2, 2)), (0.99, 1.03), 0.01)
        yield from _trajectory(rng, atoms, rng.uniform(300, 1400), samples=6, stride=40)


def _surfaces(rng: Generator) -> Iterator[Atoms]:
    """Slabs of random species, rattled or hot, with vacuum."""
    while True:
        build = (fcc111, fcc100, fcc110)[rng.integers(3)]
        slab = build("Cu", size=(2, 2, int(rng.integers(3, 5))), a=3.9, vacuum=6.0, orthogonal=build is not fcc111)
        slab.symbols = rng.choice(ELEMENTS, len(slab), p=rng.dirichlet([0.8] * len(ELEMENTS)))
        constant = float(np.mean([LATTICE_CONSTANT[s] for s in slab.symbols]))
        slab.set_cell(slab.cell * constant / 3.9, scale_atoms=True)
        slab.set_constraint()
        yield from _trajectory(rng, _rattle(rng, slab, 0.1), rng.uniform(200, 1800), samples=4, stride=25)


def _defects(rng: Generator) -> Iterator[Atoms]:
    """A vacancy, or an atom squeezed in between the others."""
    while True:
        atoms = _rattle(rng, _strain(rng, random_alloy(rng, (2, 2, 1)), (0.98, 1.06), 0.02), 0.12)
        if rng.random() < 0.5:
            del atoms[int(rng.integers(len(atoms)))]
        else:
            site = atoms.positions[rng.integers(len(atoms))] + rng.normal(scale=1.2, size=3)
            atoms += Atoms(str(rng.choice(ELEMENTS)), positions=[site])
        yield atoms


def _clusters(rng: Generator) -> Iterator[Atoms]:
    """Clusters of 4 to 13 atoms without periodicity, hot."""
    while True:
        atoms = Icosahedron("Cu", 2, latticeconstant=3.9)
        atoms = Atoms(atoms.symbols, positions=atoms.positions)
        keep = rng.permutation(len(atoms))[: rng.integers(4, 14)]
        atoms = atoms[keep]
        atoms.symbols = rng.choice(ELEMENTS, len(atoms))
        yield from _trajectory(rng, _rattle(rng, atoms, 0.1), rng.uniform(200, 2000), samples=3, stride=25)


def _few_atoms(rng: Generator) -> Iterator[Atoms]:
    """Dimers of all pairs over the whole range of distance, then also trimers."""
    while True:
        for pair in combinations_with_replacement(ELEMENTS, 2):
            yield Atoms(list(pair), positions=[[0, 0, 0], [0, 0, rng.uniform(SHORTEST_DISTANCE, 5.6)]])
        for trio in combinations(rng.choice(ELEMENTS, 4), 3):
            yield Atoms([str(s) for s in trio], positions=rng.uniform(0.0, 3.6, (3, 3)))


def _close_pairs(rng: Generator) -> Iterator[Atoms]:
    """A crystal in which one atom was pushed into a neighbour: the repulsive wall inside a metal."""
    while True:
        atoms = _rattle(rng, _strain(rng, random_alloy(rng, (2, 2, 1)), (0.95, 1.08), 0.02), 0.1)
        mover = int(rng.integers(len(atoms)))
        others = [i for i in range(len(atoms)) if i != mover]
        vectors = atoms.get_distances(mover, others, mic=True, vector=True)
        nearest = vectors[np.argmin(np.linalg.norm(vectors, axis=1))]
        length = float(np.linalg.norm(nearest))
        atoms.positions[mover] += nearest * (1 - rng.uniform(1.6, 2.4) / length)
        yield atoms


_KINDS: tuple[tuple[str, Callable[[Generator], Iterator[Atoms]], int], ...] = (
    ("alloy", _alloys, 170),
    ("ordered", _ordered, 110),
    ("dynamics", _crystal_dynamics, 200),
    ("warm", _warm_crystals, 84),
    ("surface", _surfaces, 60),
    ("defect", _defects, 50),
    ("cluster", _clusters, 45),
    ("few", _few_atoms, 90),
    ("wall", _close_pairs, 50),
)
