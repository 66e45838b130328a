"""Whether two models of MACE's signature compute the same thing.

``compare`` evaluates both on structures of the model's own elements, in every mode and dtype, and returns an
``EquivalenceReport``. It knows nothing of how the candidate was made.
"""

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.verification.compare import Progress, compare
from mace_fast.verification.report import EquivalenceReport, ModuleRow, QuantityRow, StructureInfo
from mace_fast.verification.structures import default_structures
from mace_fast.verification.tensors import TensorDifference

__all__ = [
    "EquivalenceReport",
    "ModuleRow",
    "Progress",
    "QuantityRow",
    "StructureInfo",
    "TensorDifference",
    "compare",
    "default_structures",
]
