"""mace_fast: MACE at the speed of the hardware.

    from mace_fast import MACEFastCalculator, convert, evaluate, freeze, patch, restore, verify

``convert`` gives a fast copy of a MACE model, proven equal; ``patch`` and ``restore`` do it in place; ``freeze`` gives
the fastest form, for inference alone. ``MACEFastCalculator`` is an ASE calculator for any of them, ``evaluate``
computes many structures at once.

The name ``mace_fast.patch`` is the function; the package of that name is reached by ``from mace_fast.patch.api import``
and its like.
"""

from mace_fast.calculators import MACEFastCalculator, evaluate
from mace_fast.inference import freeze
from mace_fast.patch.api import convert, patch, restore, verify

__version__ = "0.1.0"

__all__ = ["MACEFastCalculator", "convert", "evaluate", "freeze", "patch", "restore", "verify"]
