"""The atoms of the last results, kept at every step and asked for rarely, and what changed since."""

from __future__ import annotations

import copy

from ase import Atoms
from ase.calculators.calculator import all_changes

from mace_fast.inference.arrays import same


class Snapshot:
    """What ``atoms.copy()`` holds, in a tenth of its time; the Atoms themselves are made by :meth:`restore`.

    Attributes:
        arrays, cell, pbc, info: copies, under the names that they have in Atoms.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.arrays = {name: values.copy() for name, values in atoms.arrays.items()}
        self.cell, self.pbc, self.info = atoms.cell.copy(), atoms.pbc.copy(), dict(atoms.info)
        self._displacement = atoms.get_celldisp()
        self._constraints = copy.deepcopy(atoms.constraints) if atoms.constraints else []

    @staticmethod
    def of(atoms: Atoms) -> Snapshot | Atoms:
        """A copy of the atoms; subclasses may have their own way to make one."""
        return Snapshot(atoms) if type(atoms) is Atoms else atoms.copy()

    def restore(self) -> Atoms:
        """The atoms, which take over what is kept here."""
        atoms = Atoms(cell=self.cell, pbc=self.pbc, info=self.info, celldisp=self._displacement)
        atoms.arrays = self.arrays
        atoms.constraints = self._constraints
        return atoms


def changes_since(old: Snapshot | Atoms | None, new: Atoms) -> list[str]:
    """What ASE's ``compare_atoms`` names, for exact comparison."""
    if old is None:
        return list(all_changes)
    changes = [name for name in ("positions", "numbers") if not same(old.arrays[name], new.arrays[name])]
    changes += [] if same(old.cell.array, new.cell.array) else ["cell"]
    changes += [] if same(old.pbc, new.pbc) else ["pbc"]
    for name in ("initial_charges", "initial_magmoms"):
        before, now = old.arrays.get(name), new.arrays.get(name)
        if before is None and now is None:
            continue
        if before is None or now is None or not same(before, now):
            changes.append(name)
    return changes
