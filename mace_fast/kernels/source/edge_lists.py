"""C++ text for the lists of edges of structures whose neighbours are found on the CPU."""

from __future__ import annotations

from functools import cache

from mace_fast.kernels.build import CpuSource
from mace_fast.kernels.source.text import header

EDGE_LISTS = "edge_lists"
IMAGE_BITS = 14
"""Images of one atom inside a cutoff differ in the last 14 bits of a shift."""


@cache
def edge_lists_cpu() -> CpuSource:
    """The function ``edge_lists``, which returns 0 where a pair names an atom that is not there."""
    text = f"""#define IMAGE_MASK {(1 << IMAGE_BITS) - 1}
#include "edge_lists.h"
using mf::index_t;

extern "C" int {EDGE_LISTS}(
    const long long* atoms, const int* images, index_t pairs, const double* positions, const double* cells,
    const long long* graph, index_t nodes, const long long* species, const int* place, int present,
    int* sender, int* receiver, int* row, int* sender_order, int* sender_species, int* table,
    int* edge_images, double* shifts) {{
    return mf::edge_lists({{atoms, images, pairs, positions, cells, graph}}, nodes, species, place, present, sender,
        receiver, row, sender_order, sender_species, table, edge_images, shifts);
}}
"""
    headers = tuple((name, header(name)) for name in ("number.h", "edge_lists.h"))
    # Lengths rounded as torch's separate operations round them: the order of a list does not depend on who made it.
    return CpuSource(EDGE_LISTS, text, headers, ("-ffp-contract=off",))
