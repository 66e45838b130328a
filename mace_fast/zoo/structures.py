"""Structures for tests and benchmarks: crystals, water, alloys, molecules, each reproducible from its seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

_WATER_VOLUME = 28.55
"""Cubic angstrom for each molecule, 1.05 g/cm3: the density at which the boxes have the edge counts of
published benchmarks (10852 at 5 angstrom with 64 molecules, 169626 with 1000) to a percent."""

_G2_MOLECULES = tuple("H2O NH3 CH4 C2H2 C2H4 C2H6 HCN CO2 N2 H2CO CH3OH HCOOH N2H4 C6H6".split())


def diamond(natoms: int, *, symbol: str = "C", constant: float = 3.567, rattle: float = 0.05, seed: int = 0) -> Atoms:
    """A cubic supercell of diamond with Gaussian displacements.

    With the defaults, 64, 1000 and 4096 atoms have exactly 10106, 157858 and 646600 edges at 6 angstrom:
    the structures of published benchmarks of MACE accelerators.

    Args:
        natoms: 8 m^3.
        symbol: chemical symbol of all atoms.
        constant: cubic lattice constant, angstrom.
        rattle: standard deviation of each coordinate's displacement, angstrom.
        seed: of the displacements.

    Raises:
        ValueError: natoms is not 8 m^3; the message names the nearest sizes.
    """
    repeats = round((natoms / 8) ** (1 / 3))
    if repeats < 1 or 8 * repeats**3 != natoms:
        near = [8 * m**3 for m in range(max(1, repeats - 1), max(1, repeats) + 2)]
        raise ValueError(f"a cubic supercell of diamond has 8 m^3 atoms, not {natoms}; near it are {near}")
    atoms = bulk(symbol, "diamond", a=constant, cubic=True) * (repeats, repeats, repeats)
    atoms.positions += np.random.default_rng(seed).normal(scale=rattle, size=atoms.positions.shape)
    return atoms


def water(nmolecules: int, *, seed: int = 0) -> Atoms:
    """A periodic cubic box of water at 1.05 g/cm3, molecules on a jittered grid with random orientations.

    No two molecules come closer than about 1.5 angstrom. 64 molecules have about 10.8 thousand edges at 5
    angstrom, 1000 about 170 thousand.

    Args:
        nmolecules: any positive number.
        seed: of places and orientations.

    Raises:
        ValueError: nmolecules below 1.
    """
    if nmolecules < 1:
        raise ValueError(f"nmolecules must be at least 1, got {nmolecules}")
    rng = np.random.default_rng(seed)
    length = (nmolecules * _WATER_VOLUME) ** (1 / 3)
    sites = int(np.ceil(round(nmolecules ** (1 / 3), 9)))
    spacing = length / sites
    grid = np.stack(np.meshgrid(*[np.arange(sites)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * spacing
    oxygens = grid[rng.permutation(len(grid))[:nmolecules]]
    oxygens = oxygens + rng.uniform(-0.08, 0.08, size=oxygens.shape) * spacing
    template = molecule("H2O")
    arms = template.positions[1:] - template.positions[0]

    placed = np.empty((nmolecules, 3, 3))
    for index, oxygen in enumerate(oxygens):
        others = placed[:index].reshape(-1, 3)
        separation = others - oxygen
        separation -= length * np.round(separation / length)
        near = separation[(separation**2).sum(axis=1) < 4.0**2]
        orientations = [arms @ _rotation(rng).T for _ in range(24)]
        best = max(orientations, key=lambda hydrogens: _clearance(hydrogens, near))
        placed[index, 0] = oxygen
        placed[index, 1:] = oxygen + best
    return Atoms("OHH" * nmolecules, positions=placed.reshape(-1, 3), cell=[length] * 3, pbc=True)


def alloy(
    repeat: tuple[int, int, int],
    *,
    symbols: Sequence[str] = ("Cu", "Ag", "Au"),
    constant: float = 3.95,
    rattle: float = 0.05,
    seed: int = 0,
) -> Atoms:
    """An fcc crystal of 4 atoms times `repeat` with species drawn at random; (24, 24, 6) has 13824 atoms.

    Args:
        repeat: of the cubic cell of four atoms.
        symbols: species, all equally likely; every one occurs if there are atoms enough.
        constant: cubic lattice constant, angstrom.
        rattle: standard deviation of each coordinate's displacement, angstrom.
        seed: of species and displacements.

    Raises:
        ValueError: no symbols, or a repeat below 1.
    """
    if not symbols or min(repeat) < 1:
        raise ValueError(f"an alloy needs symbols and repeats of at least 1, got {list(symbols)} and {repeat}")
    rng = np.random.default_rng(seed)
    atoms = bulk(symbols[0], "fcc", a=constant, cubic=True) * repeat
    balanced = [symbols[i % len(symbols)] for i in range(len(atoms))]
    atoms.symbols = rng.permutation(balanced)
    atoms.positions += rng.normal(scale=rattle, size=atoms.positions.shape)
    return atoms


def molecules(count: int, *, rattle: float = 0.05, seed: int = 0) -> list[Atoms]:
    """Small organic molecules of H, C, N and O (3 to 12 atoms; N2 has 2), no periodicity, turned and
    displaced.

    Args:
        count: how many; kinds repeat after 14, each time with other displacements.
        rattle: standard deviation of each coordinate's displacement, angstrom.
        seed: of rotations and displacements.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        atoms = molecule(_G2_MOLECULES[index % len(_G2_MOLECULES)])
        turned = (atoms.positions - atoms.positions.mean(axis=0)) @ _rotation(rng).T
        made.append(Atoms(atoms.symbols, positions=turned + rng.normal(scale=rattle, size=turned.shape)))
    return made


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix, uniform over SO(3): from a uniform unit quaternion."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _clearance(hydrogens: np.ndarray, others: np.ndarray) -> float:
    """Smallest distance between the hydrogens and the atoms already there, both relative to the oxygen."""
    if len(others) == 0:
        return np.inf
    return float(np.linalg.norm(hydrogens[:, None] - others[None], axis=-1).min())
