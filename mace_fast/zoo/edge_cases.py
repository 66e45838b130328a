"""Named structures that accelerators have got wrong: no edges, odd cells, odd periodicity, odd places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk


def edge_case_structures(elements: Sequence[int], *, cutoff: float = 5.0, seed: int = 0) -> dict[str, Atoms]:
    """Structures that a correct calculator must handle, made of a model's own elements.

    Args:
        elements: atomic numbers to use; each structure draws from all of them.
        cutoff: the model's, angstrom. "no edges" and "thin cell" depend on it.
        seed: of species and displacements.

    Returns:
        isolated atom, dimer, no edges, molecule with a cell, mixed pbc slab, one periodic direction,
        triclinic cell, left-handed cell, thin cell, atoms outside the cell, far from the origin, one atom
        periodic, one isolated among many.

    Raises:
        ValueError: no elements, or a cutoff that is not positive.
    """
    if len(elements) == 0 or cutoff <= 0:
        raise ValueError(f"edge cases need elements and a positive cutoff, got {list(elements)} and {cutoff}")
    rng = np.random.default_rng(seed)

    def species(count: int) -> np.ndarray:
        """Every element once before any comes again, in random order."""
        return rng.permutation(np.resize(rng.permutation(np.asarray(elements)), count))

    def cluster(count: int) -> Atoms:
        """A compact piece of a cubic lattice with distances near 2 angstrom."""
        side = int(np.ceil(count ** (1 / 3)))
        sites = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:count]
        return Atoms(species(count), positions=2.0 * sites + rng.normal(scale=0.1, size=(count, 3)))

    def crystal(repeat: tuple[int, int, int]) -> Atoms:
        atoms = bulk("Cu", "fcc", a=3.9, cubic=True) * repeat
        atoms.numbers = species(len(atoms))
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        return atoms

    cases: dict[str, Atoms] = {}
    cases["isolated atom"] = Atoms(species(1), positions=[[0.3, -0.2, 0.1]])
    cases["dimer"] = Atoms(species(2), positions=[[0, 0, 0], [0.3, -1.2, 1.5]])

    apart = Atoms(
        species(4),
        positions=3.0 * cutoff * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=float),
    )
    cases["no edges"] = apart

    boxed = cluster(7)
    boxed.set_cell([6.0, 7.0, 8.0])
    cases["molecule with a cell"] = boxed

    slab = crystal((2, 1, 2))
    slab.set_cell(slab.cell.array + np.diag([0.0, 0.0, 9.0]))
    slab.pbc = (True, True, False)
    cases["mixed pbc slab"] = slab

    wire = crystal((1, 1, 2))
    wire.set_cell(np.diag([14.0, 13.0, 7.8]))
    wire.pbc = (False, False, True)
    cases["one periodic direction"] = wire

    triclinic = crystal((1, 2, 1))
    shear = np.eye(3) + np.array([[0.03, 0.21, -0.13], [0.05, -0.04, 0.27], [-0.18, 0.08, 0.02]])
    triclinic.set_cell(triclinic.cell.array @ shear, scale_atoms=True)
    cases["triclinic cell"] = triclinic

    left = triclinic.copy()
    left.set_cell(left.cell.array[[1, 0, 2]])
    cases["left-handed cell"] = left

    # Shorter than the cutoff in one direction by a factor: atoms see their own images, several times over.
    thin = Atoms(species(2), positions=[[0.0, 0.0, 0.0], [0.9, 2.1, 2.4]], cell=[0.45 * cutoff, 6.3, 7.1], pbc=True)
    thin.positions += rng.normal(scale=0.05, size=(2, 3))
    cases["thin cell"] = thin

    outside = crystal((1, 1, 2))
    images = rng.integers(-3, 4, size=(len(outside), 3))
    outside.positions += images @ outside.cell.array
    cases["atoms outside the cell"] = outside

    far = crystal((1, 2, 1))
    far.positions += np.array([1234.5, -987.6, 2345.6])
    cases["far from the origin"] = far

    single = bulk("Cu", "fcc", a=3.8)
    single.numbers = species(1)
    single.set_cell(single.cell.array @ shear, scale_atoms=True)
    cases["one atom periodic"] = single

    lonely = cluster(6)
    lonely += Atoms(species(1), positions=[[0.0, 0.0, 4.0 * cutoff]])
    cases["one isolated among many"] = lonely
    return cases
