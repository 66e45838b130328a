"""A frozen model as one program: energies, forces and stress with nothing of size edges x weights in memory."""

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.inference.api import freeze, verify_frozen
from mace_fast.inference.captured import CapturedMACE
from mace_fast.inference.frozen import FrozenMACE
from mace_fast.inference.neighbours import NeighbourSearch
from mace_fast.inference.stepper import Stepper
from mace_fast.inference.verlet import Structures

__all__ = ["CapturedMACE", "FrozenMACE", "NeighbourSearch", "Stepper", "Structures", "freeze", "verify_frozen"]
