"""Import mace-torch quietly. Import this module before any other that imports mace.

mace.tools.cg prints on standard output, which belongs to results, that another accelerator is not installed.
e3nn 0.4 reads its constants in a way that torch >= 2.6 refuses, or warns about if mace set a variable before.
"""

from __future__ import annotations

import contextlib
import io
import warnings

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected")
    import mace.calculators  # noqa: F401
