"""A fast calculator for tests of the MD driver: bonds between the nearest atoms of a crystal."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress


class Springs(Calculator):
    """Anharmonic bonds between fixed pairs; conserves momentum, knows stress, takes 0.1 ms.

    Args:
        atoms: the crystal whose nearest neighbours are bonded, at rest.
        remembers: sums over the bonds in an order that depends on where the atoms were at the first evaluation, as a
            neighbour list that is kept between steps does: results depend on the past in the last bits, until
            ``reset()``.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, atoms: Atoms, remembers: bool = False) -> None:
        super().__init__()
        self.length = float(np.min(atoms.get_all_distances(mic=True)[0, 1:]))
        self.i, self.j, self.shifts = neighbor_list("ijS", atoms, 1.1 * self.length)
        self.remembers = remembers
        self.order: np.ndarray | None = None
        self.evaluations = 0

    def reset(self) -> None:
        super().reset()
        self.order = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: object = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms)
        self.evaluations += 1
        order = slice(None)
        if self.remembers:
            if self.order is None:
                self.order = np.argsort(np.linalg.norm(self._vectors(), axis=1))
            order = self.order
        vectors = self._vectors()[order]
        distances = np.linalg.norm(vectors, axis=1)
        stretch = distances - self.length
        stiffness, cubic, quartic = 2.0, -3.0, 3.0  # eV/A^2, eV/A^3, eV/A^4: about a metal's phonons
        energy = 0.5 * np.sum(stiffness / 2 * stretch**2 + cubic / 3 * stretch**3 + quartic / 4 * stretch**4)
        pull = stiffness * stretch + cubic * stretch**2 + quartic * stretch**3
        on_i = (pull / distances)[:, None] * vectors
        # Each sum runs over the bonds in their order, which shows in its last bits.
        forces = np.stack([np.bincount(self.i[order], on_i[:, k], len(self.atoms)) for k in range(3)], axis=1)
        stress = 0.5 * vectors.T @ on_i / self.atoms.get_volume()
        self.results = {
            "energy": float(energy),
            "free_energy": float(energy),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(stress),
        }

    def _vectors(self) -> np.ndarray:
        positions = self.atoms.positions
        return positions[self.j] - positions[self.i] + self.shifts @ np.array(self.atoms.cell)


def crystal(repeats: int = 2, remembers: bool = False) -> Atoms:
    """A copper lattice of 4 * repeats^3 atoms held by :class:`Springs`."""
    atoms = bulk("Cu", cubic=True).repeat(repeats)
    atoms.calc = Springs(atoms, remembers)
    return atoms
