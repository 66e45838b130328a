"""Every pair of elements of a frozen model whose radial tables are those of a pair: what no few structures can reach.

Tables are made for the elements of a structure when it is evaluated. For 89 elements there are 4005 pairs, whose tables
would take hours and more memory than there is: pairs are compared for a bounded time, and the others are named.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import ase
import numpy as np
import torch
from ase.data import chemical_symbols

from mace_fast.verification import EquivalenceReport, Progress, QuantityRow, compare
from mace_fast.verification.graphs import build_graphs
from mace_fast.verification.structures import cluster, elements_and_cutoff

Pair = tuple[int, int]
"""Atomic numbers, the smaller first."""

_WHAT = "pairs of elements"
_MODE = "pairs"
_MOST_NAMES = 20


def compared_pairs(model: torch.nn.Module, structures: Sequence[ase.Atoms]) -> set[Pair]:
    """The pairs of elements that are within the cutoff of each other in some structure."""
    found: set[Pair] = set()
    numbers, _ = elements_and_cutoff(model)
    for graph in build_graphs(model, structures):
        species = numbers[graph.data["node_attrs"].argmax(dim=1).numpy()]
        ends = np.unique(np.sort(species[graph.data["edge_index"].numpy()], axis=0), axis=1)
        found.update((int(a), int(b)) for a, b in ends.T)
    return found


def compare_pairs(
    report: EquivalenceReport,
    reference: torch.nn.Module,
    candidate: torch.nn.Module,
    done: set[Pair],
    dtype: torch.dtype,
    seconds: float,
    progress: Progress | None,
) -> set[Pair]:
    """Compare energies and forces of clusters of up to four elements, until every pair has been seen.

    Rows of the report get the mode "pairs": the worst of each quantity, and each that failed.

    Args:
        report: gets rows, structures, seconds.
        reference, candidate: the original, and the frozen model.
        done: pairs that were compared before.
        dtype: to compare in, the frozen model's: not every model has tables in float64.
        seconds: after which no other cluster is begun.
        progress: as for ``compare``; steps are clusters.

    Returns:
        The pairs that were compared, ``done`` among them.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(report.seed)
    numbers, _ = elements_and_cutoff(reference)
    groups = list(_groups(rng.permutation(numbers)))
    seen = set(done)
    rows: list[QuantityRow] = []
    for count, place in enumerate(rng.permutation(len(groups))):
        group = groups[place]
        if _pairs(group) <= seen:
            continue
        if time.perf_counter() - start > seconds:
            break
        if progress is not None:
            progress(_WHAT, count, len(groups))
        structure = cluster(reference, group, rng)
        found = compare(
            reference, candidate, structures=[structure], dtypes=(dtype,), modes=("forces",), seed=report.seed
        )
        rows += [replace(row, mode=_MODE) for row in found.rows]
        report.structures += found.structures
        seen |= compared_pairs(reference, [structure])
    report.rows += _worst(rows)
    took = time.perf_counter() - start
    report.seconds[_WHAT] = took
    report.seconds["total"] = report.seconds.get("total", 0.0) + took
    return seen


def name_what_is_left(report: EquivalenceReport, model: torch.nn.Module, seen: set[Pair]) -> None:
    """Say in ``not_compared`` of which elements no pair was compared, and which pairs of the others were not."""
    numbers = [int(number) for number in elements_and_cutoff(model)[0]]
    everything = _pairs(numbers)
    left = everything - seen
    if not left:
        return
    known = {number for pair in seen for number in pair}
    untouched = [number for number in numbers if number not in known]
    others = sorted(pair for pair in left if set(pair) <= known)
    named = [f"all pairs with {', '.join(chemical_symbols[number] for number in untouched)}"] if untouched else []
    if others:
        more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
        shown = ", ".join(f"{chemical_symbols[a]}-{chemical_symbols[b]}" for a, b in others[:_MOST_NAMES])
        named.append(shown + more)
    report.not_compared.append(
        f"{len(left)} of {len(everything)} {_WHAT}, which have tables of their own ({'; '.join(named)}): pass "
        "structures that hold those that matter"
    )


def _groups(numbers: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Up to four elements each, so that every pair is in one of them."""
    blocks = [tuple(int(number) for number in numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
    if len(blocks) == 1:
        yield blocks[0]
    for first, second in combinations(blocks, 2):
        yield first + second


def _pairs(numbers: Iterable[int]) -> set[Pair]:
    ordered = sorted(numbers)
    return {(a, b) for i, a in enumerate(ordered) for b in ordered[i:]}


def _worst(rows: Sequence[QuantityRow]) -> list[QuantityRow]:
    worst: dict[str, QuantityRow] = {}
    for row in rows:
        before = worst.get(row.quantity)
        if row.passed and (before is None or row.error * before.tolerance > before.error * row.tolerance):
            worst[row.quantity] = row
    return [*worst.values(), *(row for row in rows if not row.passed)]
