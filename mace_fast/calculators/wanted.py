"""What has to be evaluated for the properties that ASE asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# What must be evaluated for each property that ASE asks for; the energy comes with everything.
_FORCES = frozenset({"forces", "forces_comm"})
_STRESS = frozenset({"stress", "stress_var"})
_ATOMIC_STRESSES = frozenset({"stresses", "virials"})


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated beside the energies."""

    forces: bool
    stress: bool
    atomic_stresses: bool

    @staticmethod
    @lru_cache(maxsize=64)  # a step asks for what the last one asked for
    def of(properties: frozenset[str], offers_atomic_stresses: bool) -> Wanted:
        atomic_stresses = offers_atomic_stresses and bool(properties & _ATOMIC_STRESSES)
        stress = bool(properties & _STRESS)
        return Wanted(stress or atomic_stresses or bool(properties & _FORCES), stress, atomic_stresses)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs of a model, without the energy."""
        return (
            "node_energy",
            *(("forces",) if self.forces else ()),
            *(("stress",) if self.stress else ()),
            *(("atomic_stresses", "atomic_virials") if self.atomic_stresses else ()),
        )
