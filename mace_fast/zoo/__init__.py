"""Models and structures for tests and benchmarks, and a trained checkpoint.

architectures()           the public foundation models, as data
small_variants()          small architectures over every block and option of mace-torch
build(architecture, ...)  a model with random weights
graph(atoms, model)       a model's input for one structure; batch() for several; copy_graph() for a second call
checkpoint_path()         the shipped trained model

Structures: diamond, water, alloy, molecules, edge_case_structures.
"""

from __future__ import annotations

import mace_fast._mace  # noqa: F401  (before every other import of mace)

from .architectures import Architecture, architectures
from .checkpoint import checkpoint_path
from .edge_cases import edge_case_structures
from .graphs import batch, copy_graph, graph
from .models import build
from .structures import alloy, diamond, molecules, water
from .variants import INTERACTION_BLOCKS, small_variants

__all__ = [
    "INTERACTION_BLOCKS",
    "Architecture",
    "alloy",
    "architectures",
    "batch",
    "build",
    "checkpoint_path",
    "copy_graph",
    "diamond",
    "edge_case_structures",
    "graph",
    "molecules",
    "small_variants",
    "water",
]
