"""mace_fast: MACE at the speed of the hardware.

    from mace_fast import MACEFastCalculator, convert, evaluate, freeze, patch, restore, verify

``convert`` gives a fast copy of a MACE model, proven equal; ``patch`` and ``restore`` do it in place; ``freeze`` gives
the fastest form, for inference alone. ``MACEFastCalculator`` is an ASE calculator for any of them, ``evaluate``
computes many structures at once.

The name ``mace_fast.patch`` is the function; the package of that name is reached by ``from mace_fast.patch.api import``
and its like.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mace_fast.calculators import MACEFastCalculator, evaluate
    from mace_fast.inference import freeze
    from mace_fast.patch.api import convert, patch, restore, verify

__version__ = "0.1.0"

__all__ = ["MACEFastCalculator", "convert", "evaluate", "freeze", "patch", "restore", "verify"]

_HOMES = {
    "MACEFastCalculator": "mace_fast.calculators",
    "evaluate": "mace_fast.calculators",
    "freeze": "mace_fast.inference",
    "convert": "mace_fast.patch.api",
    "restore": "mace_fast.patch.api",
    "verify": "mace_fast.patch.api",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch and mace-torch take seconds, and mace-fast --help needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This module's class, for the one name that is a function and a package."""

    @property
    def patch(self) -> Any:
        return importlib.import_module("mace_fast.patch.api").patch

    @patch.setter
    def patch(self, package: ModuleType) -> None:
        """Importing the package would put it here."""


sys.modules[__name__].__class__ = _Package
