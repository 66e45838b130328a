"""Models: find what can be replaced, replace it, prove it, undo it.

How matching works
    ``match`` walks the loaded model. A module is understood if its class is *exactly* one that is known, by
    full name and not by ``isinstance``, if nobody has replaced its forward or listens to the calls of its
    parts, and if its live state says so: instructions, path weights, weight shapes, irreps and constant
    tables are read from the module, never from a configuration. Each of MACE's blocks is either understood as
    a whole, down to its last part, or refused with the name of the part that is not; a model with a refused
    block is not converted. What lies outside of the blocks (embeddings, readouts, scaling) stays with
    mace-torch and e3nn. A plain ``o3.TensorProduct`` of modes 'uvu', 'uvv', 'uuu' and 'uvw', mixed too, is
    replaced wherever else it is found.

What a fast module is
    A module with the forward signature, the layout at its boundary, and the state of the one it stands in
    for: the same dictionaries of parameters, buffers, submodules and hooks; ``blocks.base`` has the details.

    api         convert, patch, restore, verify, describe
    match       which modules are understood, and why the others are not
    understand  reading e3nn's modules
    blocks      the fast modules
    replace     exchanging modules in containers
    checking    the comparison on conversion; constants: tables that were rounded to float32
"""

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.patch.api import convert, describe, patch, restore, verify
from mace_fast.patch.match import Match, match

__all__ = ["Match", "convert", "describe", "match", "patch", "restore", "verify"]
