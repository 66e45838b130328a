"""How a weighted polynomial is evaluated: straight-line code with few operations, or loops over tables.

The value and the gradient share one nesting. Each monomial of degree two or more is written as a pair (a, b)
of components times the rest, pairs are walked in sections (the pairs of two irreps, or a part of their
terms), and

    value:     P[r, o] += x_a x_b * (sum over the rest of literal * x_c), out[o] += w[r] P[r, o] at the end;
    gradient:  C = sum_r literal * (g[o] w[r]) for each monomial, T = sum_c C x_c,
               dx_c += x_a x_b C,  dx_a += x_b T,  dx_b += x_a T: a reverse sweep, written out.

In both, only the products P or g w of one section are alive at a time, and literals are immediates of the
instructions. Where the straight-line text would take long to compile, the same sums run as loops over tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from mace_fast.kernels.description.polynomial import Term, WeightedPolynomial

__all__ = ["Entry", "Pair", "Section", "SymmetricPlan", "plan_symmetric"]

# Straight-line text of this many operations takes about 3 s to compile (NVRTC for sm_90; g++ twice as long),
# its derivative along a tangent three times that; beyond, it grows faster than the text.
MAX_STRAIGHT_OPERATIONS = 6000

# A section whose terms need more products P or g w than this is divided by the irrep of the third component,
# which forms x_a x_b again and keeps registers free.
MAX_PRODUCTS = 20


@dataclass(frozen=True)
class Entry:
    """One term of a pair: ``coefficient * w[weight] * x[a] x[b] prod x[rest]``, in component ``output``."""

    weight: int
    output: int
    rest: tuple[int, ...]
    coefficient: float


@dataclass(frozen=True)
class Pair:
    """Terms whose monomial begins with components (a, b).

    Attributes:
        shared_products: in the evaluation, form ``x_a x_b x_rest`` once for all (weight, output), which is
            fewer operations than a factored sum for each of them.
    """

    a: int
    b: int
    entries: tuple[Entry, ...]
    shared_products: bool


@dataclass(frozen=True)
class Section:
    """Pairs of components of the same two irreps of x, with all or some of their terms.

    Attributes:
        blocks: indices of the two irreps.
        products: the (weight, output) that occur, ascending.
    """

    blocks: tuple[int, int]
    pairs: tuple[Pair, ...]
    products: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SymmetricPlan:
    """The decision for one polynomial.

    Attributes:
        scheme: "straight" (every operation written out) or "table" (loops over tables of coefficients).
        linear: terms of degree one.
        sections: terms of degree two and more.
        evaluate_operations: fused multiply-adds per node and channel of the evaluation.
        gradient_operations: the same of the gradient with respect to x.
        live_values: numbers alive at once in the gradient: a lower bound of its registers in float32.
    """

    polynomial: WeightedPolynomial
    scheme: str
    linear: tuple[Term, ...]
    sections: tuple[Section, ...]
    evaluate_operations: int
    gradient_operations: int
    live_values: int

    def __str__(self) -> str:
        return (
            f"{self.scheme}: {self.polynomial}; {self.evaluate_operations} operations a channel for the "
            f"value, {self.gradient_operations} for the gradient, about {self.live_values} values alive; "
            f"straight-line up to {MAX_STRAIGHT_OPERATIONS} operations"
        )


@lru_cache(maxsize=256)
def plan_symmetric(polynomial: WeightedPolynomial) -> SymmetricPlan:
    """Choose order and scheme for ``polynomial``."""
    linear = tuple(term for term in polynomial.terms if len(term.monomial) == 1)
    nestings = [_sections(polynomial, descending) for descending in (False, True)]
    sections = min(nestings, key=lambda s: _gradient_operations(linear, s))
    gradient = _gradient_operations(linear, sections)
    products = max((len(section.products) for section in sections), default=0)
    return SymmetricPlan(
        polynomial=polynomial,
        scheme="straight" if gradient <= MAX_STRAIGHT_OPERATIONS else "table",
        linear=linear,
        sections=sections,
        evaluate_operations=_evaluate_operations(linear, sections),
        gradient_operations=gradient,
        live_values=2 * polynomial.num_inputs + polynomial.num_outputs + products + 4,
    )


def _sections(polynomial: WeightedPolynomial, descending: bool) -> tuple[Section, ...]:
    block_of = [block for block, size in enumerate(polynomial.input_blocks) for _ in range(size)]
    classes: dict[tuple[int, ...], list[_Placed]] = defaultdict(list)
    for term in polynomial.terms:
        if len(term.monomial) > 1:
            a, b, *rest = reversed(term.monomial) if descending else term.monomial
            entry = Entry(term.weight, term.output, tuple(rest), term.coefficient)
            classes[tuple(block_of[m] for m in (a, b, *rest[:1]))].append((a, b, entry))
    sections: list[tuple[tuple[int, int], list[_Placed]]] = []
    for irreps, members in sorted(classes.items()):
        blocks = irreps[0], irreps[1]
        together = sections[-1][1] + members if sections and sections[-1][0] == blocks else []
        if together and len(_products(together)) <= MAX_PRODUCTS:
            sections[-1] = blocks, together
        else:
            sections.append((blocks, members))
    return tuple(_section(blocks, members) for blocks, members in sections)


_Placed = tuple[int, int, Entry]


def _products(members: list[_Placed]) -> set[tuple[int, int]]:
    return {(entry.weight, entry.output) for _, _, entry in members}


def _section(blocks: tuple[int, int], members: list[_Placed]) -> Section:
    pairs: dict[tuple[int, int], list[Entry]] = defaultdict(list)
    for a, b, entry in members:
        pairs[a, b].append(entry)
    return Section(
        blocks=blocks,
        pairs=tuple(
            Pair(a, b, tuple(sorted(entries, key=_entry_order)), _sharing_pays(entries))
            for (a, b), entries in sorted(pairs.items())
        ),
        products=tuple(sorted(_products(members))),
    )


def _entry_order(entry: Entry) -> tuple[tuple[int, ...], int, int]:
    return entry.rest, entry.weight, entry.output


def _inner_nodes(rests: Iterable[tuple[int, ...]]) -> int:
    """Number of distinct non-empty prefixes, the rests themselves included."""
    return len({rest[:length] for rest in rests for length in range(1, len(rest) + 1)})


def _sharing_pays(entries: list[Entry]) -> bool:
    """Whether products shared by all (weight, output) take no more operations than a factored sum of each."""
    if any(len(entry.rest) > 1 for entry in entries):
        return True
    return _inner_nodes(e.rest for e in entries) <= len({(e.weight, e.output) for e in entries if e.rest})


def _evaluate_operations(linear: tuple[Term, ...], sections: tuple[Section, ...]) -> int:
    count = 2 * len(linear)
    for section in sections:
        count += len(section.products)
        for pair in section.pairs:
            count += 1 + len(pair.entries)
            if pair.shared_products:
                count += _inner_nodes(e.rest for e in pair.entries)
            else:
                count += len({(e.weight, e.output) for e in pair.entries if e.rest})
    return count


def _gradient_operations(linear: tuple[Term, ...], sections: tuple[Section, ...]) -> int:
    count = 2 * len(linear)
    for section in sections:
        count += len(section.products)
        for pair in section.pairs:
            rests = {e.rest for e in pair.entries}
            inner = {rest[:length] for rest in rests for length in range(1, len(rest))}
            leaves = {rest for rest in rests if rest}
            count += 3 + len(pair.entries) + 2 * len(leaves | inner) + len(inner)
    return count
