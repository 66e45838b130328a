"""Calculators: for ASE, for many structures at once, and (``mace_fast.calculators.torchsim``) for torch-sim."""

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.calculators.ase import MACEFastCalculator
from mace_fast.calculators.screening import evaluate

__all__ = ["MACEFastCalculator", "evaluate"]
