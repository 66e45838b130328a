"""ASE calculators."""

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.calculators.ase import MACEFastCalculator

__all__ = ["MACEFastCalculator"]
