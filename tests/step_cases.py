"""Walks through configurations, for tests of what is kept from one step to the next, and the reference for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms

from mace_fast import zoo
from mace_fast.inference import FrozenMACE, Structures
from mace_fast.patch.api import convert
from mace_fast.verification.graphs import default_dtype

ELEMENTS = [1, 6, 8]
CUTOFF = 4.5


def build(variant: str = "base", dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    return zoo.build(zoo.small_variants()[variant], seed=seed, dtype=dtype)


def frozen(model: torch.nn.Module, device: str = "cpu") -> FrozenMACE:
    return FrozenMACE(convert(model, verify=False)).to(device)


def crystal(rng: np.random.Generator) -> Atoms:
    """Eight atoms on a distorted lattice, triclinic, of either hand."""
    cell = np.diag(rng.uniform(3.6, 5.0, 3)) + rng.uniform(-0.6, 0.6, (3, 3))
    if rng.random() < 0.5:
        # Not by exchanging vectors: mace-torch puts axes in the place of those that are not periodic, and where the
        # others lie nearly in a plane with such an axis, its list takes hours.
        cell[0] = -cell[0]
    sites = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3, indexing="ij"), -1).reshape(-1, 3)
    atoms = Atoms(rng.permutation([1, 1, 6, 6, 6, 8, 8, 1]), scaled_positions=sites, cell=cell, pbc=True)
    atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
    return atoms


def moves(rng: np.random.Generator) -> Iterator[Atoms]:
    """Dynamics: small steps, with a jump between."""
    atoms = crystal(rng)
    for step in range(6):
        yield atoms.copy()
        atoms.positions += rng.normal(0, 0.06 if step != 3 else 0.3, atoms.positions.shape)


def drift(rng: np.random.Generator) -> Iterator[Atoms]:
    """All atoms fly the same way, out of the cell, while one comes back into it by lattice vectors."""
    atoms = crystal(rng)
    velocity = rng.normal(0, 0.4, 3)
    for step in range(5):
        yield atoms.copy()
        atoms.positions += velocity
        if step == 2:
            atoms.positions[rng.integers(8)] -= 3 * atoms.cell[0] - 2 * atoms.cell[2]


def cells(rng: np.random.Generator) -> Iterator[Atoms]:
    """A barostat: strains with and without the atoms, slow and sudden."""
    atoms = crystal(rng)
    for size, scale in ((0.0, True), (0.004, True), (0.004, True), (0.01, False), (0.08, True), (-0.06, True)):
        strain = np.identity(3) * (1 + size) + size * rng.uniform(-1, 1, (3, 3))
        atoms.set_cell(np.array(atoms.cell) @ strain, scale_atoms=scale)
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        yield atoms.copy()


def numbers(rng: np.random.Generator) -> Iterator[Atoms]:
    """Insertions and removals, one atom and many; back to a size that was there before."""
    atoms = crystal(rng)
    yield atoms.copy()
    for place in ([0.25, 0.3, 0.2], [0.7, 0.8, 0.7]):
        atoms += Atoms("H", positions=[np.array(place) @ np.array(atoms.cell)])
        yield atoms.copy()
    del atoms[int(rng.integers(len(atoms)))]
    yield atoms.copy()
    yield atoms.repeat((2, 1, 1))
    del atoms[1:]
    yield atoms.copy()
    yield crystal(rng)


def species(rng: np.random.Generator) -> Iterator[Atoms]:
    """Elements come and go while nothing moves."""
    atoms = crystal(rng)
    for given in ([1] * 8, [1] * 4 + [6] * 4, [6, 1] * 4, [8, 6, 1, 1] * 2, [1] * 8, [8] * 8):
        atoms.numbers[:] = given
        yield atoms.copy()


def boundaries(rng: np.random.Generator) -> Iterator[Atoms]:
    """Periodic or not along each direction, in turn, and vectors that do not matter."""
    atoms = crystal(rng)
    for pbc in ((1, 1, 0), (1, 0, 1), (0, 0, 1), (0, 0, 0), (1, 1, 1)):
        atoms.pbc = pbc
        yield atoms.copy()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        for axis in range(3):
            if not pbc[axis]:
                atoms.cell[axis] *= 1.3
        yield atoms.copy()


def oddities(rng: np.random.Generator) -> Iterator[Atoms]:
    """The zoo's odd structures one after the other, each moved once."""
    for atoms in zoo.edge_case_structures(ELEMENTS, cutoff=CUTOFF, seed=int(rng.integers(1000))).values():
        yield atoms.copy()
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        yield atoms


WALKS = {walk.__name__: walk for walk in (moves, drift, cells, numbers, species, boundaries, oddities)}


def as_structures(structures: Sequence[Atoms], model: Any, features: dict[str, np.ndarray] | None = None) -> Structures:
    """What a stepper takes."""
    elements = [int(z) for z in model.atomic_numbers]
    sizes = [len(atoms) for atoms in structures]
    return Structures(
        positions=np.concatenate([atoms.positions for atoms in structures]),
        cells=np.stack([np.array(atoms.cell) for atoms in structures]),
        pbc=np.stack([np.array(atoms.pbc) for atoms in structures]),
        species=np.array([elements.index(z) for atoms in structures for z in atoms.numbers]),
        ptr=np.concatenate([[0], np.cumsum(sizes)]),
        features=features or {},
    )


def reference(
    structures: Sequence[Atoms], model: torch.nn.Module, dtype: torch.dtype = torch.float64, head: str | None = None
) -> dict[str, Any]:
    """mace-torch on mace-torch's own input, with torch's default dtype as its calculator sets it: the repulsion of
    nuclei multiplies charges in that."""
    data = zoo.batch(list(structures), model, dtype=dtype, head=head)
    with default_dtype(dtype):
        out = model(dict(data), compute_stress=True)
    return {
        name: out[name].detach().double().numpy() for name in ("energy", "node_energy", "forces", "stress", "virials")
    }


def assert_agree(found: dict[str, Any], expected: dict[str, Any], tolerance: float, what: str) -> None:
    """Every quantity to a tolerance of its largest number; energies to that of the atoms' energies."""
    for name, value in found.items():
        assert value.shape == expected[name].shape, f"{what}: {name}"
        scale = np.abs(expected["node_energy" if "energy" in name else name]).max(initial=0.0)
        error = np.abs(value - expected[name]).max(initial=0.0)
        assert error <= tolerance * max(scale, 1e-2), f"{what}: {name} is off by {error:.1e} of {scale:.1e}"
