"""C++ text of a weighted polynomial, for the CPU and for CUDA, around headers/symmetric_*.

What is generated is the polynomial: straight-line code, or the tables that headers/symmetric_table.h walks.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np

from mace_fast.kernels.build import CpuSource, CudaSource
from mace_fast.kernels.description.polynomial import WeightedPolynomial
from mace_fast.kernels.plan.symmetric import Entry, Pair, SymmetricPlan, plan_symmetric
from mace_fast.kernels.source.text import header, indent

__all__ = ["THREADS", "symmetric_cpu", "symmetric_cuda", "weights_block"]

THREADS = 128
_PLAIN_SHARED = 48 * 1024  # bytes of shared memory that every block may have

_FLOATS = {"float32": "float", "float64": "double"}
_BYTES = {"float32": 4, "float64": 8}
_IDS = {"int32": "int", "int64": "long long"}
_EVALUATE, _GRADIENT = "evaluate", "gradient"
_BODIES = {"evaluate": _EVALUATE, "gradient": _GRADIENT, "weights": _EVALUATE}


@cache
def symmetric_cpu(polynomial: WeightedPolynomial, kind: str, tangent: bool, values: str, ids: str) -> CpuSource:
    """The function ``symmetric_<kind>`` for the CPU.

    Args:
        kind: "evaluate" (the value), "gradient" (with respect to x) or "weights" (with respect to the
            weights).
        tangent: the derivative of that along a tangent of x.
        values: "float32" or "float64".
        ids: "int32" or "int64", the type of the species ("weights" has them as lists, always int64).
    """
    scalar, integer = _FLOATS[values], _IDS[ids]
    call = f"mf::symmetric_{kind}<mf::Polynomial, {_bool(tangent)}>"
    if kind == "weights":
        entry = f"""
extern "C" void symmetric_weights(const T* x, const T* tangent, const T* grad, const index_t* order,
                                  const index_t* row_ptr, T* partial, T* dw, index_t num_species, index_t
                                  channels, index_t length, int threads) {{
    {call}(x, tangent, grad, order, row_ptr, partial, dw, num_species, channels, length, threads);
}}"""
    else:
        grad, grad_name = ("const T* grad, ", "grad, ") if kind == "gradient" else ("", "")
        entry = f"""
extern "C" void symmetric_{kind}(const T* x, const T* tangent, const T* weights, const {integer}* species,
                                 {grad}T* out, index_t nodes, index_t channels, int threads) {{
    {call}(x, tangent, weights, species, {grad_name}out, nodes, channels, threads);
}}"""
    plan = plan_symmetric(polynomial)
    text = "\n".join(
        [
            *_preamble(plan, kind, tangent, values),
            '#include "symmetric_cpu.h"',
            f"typedef {scalar} T;",
            "using mf::index_t;",
            *_polynomial(plan, _BODIES[kind], values, device=""),
            entry,
            "",
        ]
    )
    name = f"symmetric_{kind}{'_tangent' if tangent else ''}_{values}"
    # Dual<V> drops the vector's permission to be unaligned, which no number in a register needs
    options = ("-Wno-ignored-attributes",)
    return CpuSource(name=name, text=text, headers=_headers("symmetric_cpu.h"), options=options)


@cache
def symmetric_cuda(polynomial: WeightedPolynomial, kind: str, tangent: bool, values: str, ids: str) -> CudaSource:
    """Kernel ``symmetric_<kind>`` for CUDA and, for "weights", ``symmetric_weights_sum``.

    Arguments as for the CPU.
    """
    scalar, integer = _FLOATS[values], _IDS[ids]
    plan = plan_symmetric(polynomial)
    entry_points = [f"symmetric_{kind}"]
    if kind == "weights":
        threads, shared = weights_block(polynomial, values, THREADS)
        entry = f"""
extern "C" __global__ void __launch_bounds__({threads}) symmetric_weights(
    const T* __restrict__ x, const T* __restrict__ tangent, const T* __restrict__ grad,
    const index_t* __restrict__ order, const index_t* __restrict__ row_ptr, T* __restrict__ partial,
    index_t num_species, index_t channels, index_t length) {{
    mf::symmetric_weights<mf::Polynomial, {_bool(tangent)}, {_bool(shared > 0)}>(
        x, tangent, grad, order, row_ptr, partial, num_species, channels, length);
}}
extern "C" __global__ void __launch_bounds__({THREADS}) symmetric_weights_sum(
    const T* __restrict__ partial, const index_t* __restrict__ row_ptr, T* __restrict__ dw, index_t row,
    index_t length) {{
    mf::symmetric_weights_sum(partial, row_ptr, dw, row, length);
}}"""
        entry_points.append("symmetric_weights_sum")
    else:
        grad, grad_name = ("const T* __restrict__ grad, ", "grad, ") if kind == "gradient" else ("", "")
        entry = f"""
extern "C" __global__ void __launch_bounds__({THREADS}) symmetric_{kind}(
    const T* __restrict__ x, const T* __restrict__ tangent, const T* __restrict__ weights,
    const I* __restrict__ species, {grad}T* __restrict__ out, index_t nodes, index_t num_species,
    index_t channels) {{
    mf::symmetric_{kind}<mf::Polynomial, {_bool(tangent)}>(
        x, tangent, weights, species, {grad_name}out, nodes, num_species, channels);
}}"""
    text = "\n".join(
        [
            *_preamble(plan, kind, tangent, values),
            '#include "symmetric_cuda.cuh"',
            f"typedef {scalar} T;",
            f"typedef {integer} I;",
            "using mf::index_t;",
            *_polynomial(plan, _BODIES[kind], values, device="__device__ "),
            entry,
            "",
        ]
    )
    return CudaSource(
        name=f"symmetric_{kind}{'_tangent' if tangent else ''}_{values}",
        text=text,
        headers=_headers("symmetric_cuda.cuh"),
        entry_points=tuple(entry_points),
    )


def weights_block(polynomial: WeightedPolynomial, values: str, channels: int) -> tuple[int, int]:
    """Threads of a block of the CUDA kernel "weights", and its bytes of shared memory, 0 where none."""
    most = min(THREADS, -(-channels // 32) * 32)
    for threads in range(most, 0, -32):
        shared = polynomial.num_weights * threads * _BYTES[values]
        if shared <= _PLAIN_SHARED:
            return threads, shared
    return most, 0


def _headers(driver: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, header(name)) for name in ("number.h", "symmetric_node.h", "symmetric_table.h", driver))


def _preamble(plan: SymmetricPlan, kind: str, tangent: bool, values: str) -> list[str]:
    return [f"// {kind}{', derivative along a tangent of x' if tangent else ''}, {values}", f"// {plan}"]


def _polynomial(plan: SymmetricPlan, body: str, values: str, device: str) -> list[str]:
    """``mf::Polynomial``."""
    if plan.scheme == "table":
        return [
            '#include "symmetric_table.h"',
            "namespace mf {",
            *_tables(plan.polynomial, values, device),
            "}",
        ]
    sizes = _sizes(plan.polynomial)
    if body == _EVALUATE:
        signature = "template <class X, class Sum> static MF_INLINE void evaluate(const X* x, Sum& sum) {"
        lines = _evaluate(plan, values)
    else:
        signature = "template <class X, class P> static MF_INLINE void gradient(const X* x, X* dx, const P& pull) {"
        lines = _gradient(plan, values)
    return [
        "namespace mf {",
        "struct Polynomial {",
        f"    {sizes}",
        f"    {signature}",
        *indent(lines, 8),
        "    }",
        "};",
        "}",
    ]


def _sizes(polynomial: WeightedPolynomial) -> str:
    p = polynomial
    return f"static constexpr int inputs = {p.num_inputs}, outputs = {p.num_outputs}, weights = {p.num_weights};"


def _evaluate(plan: SymmetricPlan, values: str) -> list[str]:
    lines = [
        f"sum.add({t.weight}, {t.output}, {_times(t.coefficient, f'x[{t.monomial[0]}]', values)});" for t in plan.linear
    ]
    for section in plan.sections:
        sums = _Sums()
        lines.append(f"{{  // irreps {section.blocks[0]} and {section.blocks[1]} of x")
        for pair in section.pairs:
            q = f"q_{pair.a}_{pair.b}"
            lines.append(f"const X {q} = x[{pair.a}] * x[{pair.b}];")
            if pair.shared_products:
                lines += _shared_products(pair, q, sums, values)
            else:
                lines += _factored_sums(pair, q, sums, values)
        lines += [f"sum.add({weight}, {output}, p_{weight}_{output});" for weight, output in section.products]
        lines.append("}")
    return lines


class _Sums:
    """Statements that add to the sums ``p_<weight>_<output>``, the first of which declares the sum."""

    def __init__(self) -> None:
        self.known: set[tuple[int, int]] = set()

    def add(self, entry: tuple[int, int], value: str) -> str:
        name = f"p_{entry[0]}_{entry[1]}"
        if entry in self.known:
            return f"{name} += {value};"
        self.known.add(entry)
        return f"X {name} = {value};"


def _shared_products(pair: Pair, q: str, sums: _Sums, values: str) -> list[str]:
    lines = []
    names: dict[tuple[int, ...], str] = {(): q}
    for entry in pair.entries:
        for length in range(1, len(entry.rest) + 1):
            rest = entry.rest[:length]
            if rest not in names:
                names[rest] = "_".join([q, *map(str, rest)])
                lines.append(f"const X {names[rest]} = {names[rest[:-1]]} * x[{rest[-1]}];")
        term = _times(entry.coefficient, names[entry.rest], values)
        lines.append(sums.add((entry.weight, entry.output), term))
    return lines


def _factored_sums(pair: Pair, q: str, sums: _Sums, values: str) -> list[str]:
    lines = []
    factors: dict[tuple[int, int], list[str]] = defaultdict(list)
    for entry in pair.entries:
        place = (entry.weight, entry.output)
        if entry.rest:
            factors[place].append(_times(entry.coefficient, f"x[{entry.rest[0]}]", values))
        else:
            lines.append(sums.add(place, _times(entry.coefficient, q, values)))
    lines += [sums.add(place, f"{q} * ({_sum(parts)})") for place, parts in factors.items()]
    return lines


def _gradient(plan: SymmetricPlan, values: str) -> list[str]:
    lines = [
        f"dx[{t.monomial[0]}] += {_times(t.coefficient, f'pull({t.weight}, {t.output})', values)};" for t in plan.linear
    ]
    for section in plan.sections:
        lines.append(f"{{  // irreps {section.blocks[0]} and {section.blocks[1]} of x")
        lines += [f"const auto h_{w}_{o} = pull({w}, {o});" for w, o in section.products]
        for pair in section.pairs:
            a, b = pair.a, pair.b
            q, t = f"q_{a}_{b}", f"t_{a}_{b}"
            lines.append(f"const X {q} = x[{a}] * x[{b}];")
            lines += _cofactor(pair.entries, 0, q, t, values)
            lines += [f"dx[{a}] += {t} * x[{b}];", f"dx[{b}] += {t} * x[{a}];"]
        lines.append("}")
    return lines


def _cofactor(entries: tuple[Entry, ...], depth: int, q: str, t: str, values: str) -> list[str]:
    """Statements that define `t`, what multiplies `q` in the entries, and add q times its gradient to dx.

    The entries share the first `depth` components of their rest, which are factors of `q`.
    """
    lines: list[str] = []
    branches: dict[int, list[Entry]] = defaultdict(list)
    constant: list[Entry] = []
    for entry in entries:
        if len(entry.rest) == depth:
            constant.append(entry)
        else:
            branches[entry.rest[depth]].append(entry)
    parts = []
    for c, members in branches.items():
        name = f"{t}_{c}"
        if any(len(entry.rest) > depth + 1 for entry in members):
            lines.append(f"const X {q}_{c} = {q} * x[{c}];")
            lines += _cofactor(tuple(members), depth + 1, f"{q}_{c}", name, values)
        else:
            lines.append(f"const auto {name} = {_coefficient(members, values)};")
        lines.append(f"dx[{c}] += {q} * {name};")
        parts.append(f"x[{c}] * {name}")
    if constant:
        parts.append(_coefficient(constant, values) if not parts else f"({_coefficient(constant, values)})")
    lines.append(f"const auto {t} = {_sum(parts)};")
    return lines


def _coefficient(entries: list[Entry], values: str) -> str:
    return _sum([_times(e.coefficient, f"h_{e.weight}_{e.output}", values) for e in entries])


def _tables(polynomial: WeightedPolynomial, values: str, device: str) -> list[str]:
    one = polynomial.num_inputs  # the constant component
    degree = max(polynomial.degree, 2)
    leaves: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for term in sorted(polynomial.terms, key=lambda t: (t.monomial, t.output, t.weight)):
        padded = (one,) * (degree - len(term.monomial)) + term.monomial
        leaves[padded].append(f"{{{_literal(term.coefficient, values)}, {term.weight}, {term.output}}}")
    groups: dict[tuple[int, ...], int] = {}
    leaf_lines, entry_lines = [], []
    entries = 0
    for number, (components, members) in enumerate(sorted(leaves.items())):
        entries += len(members)
        entry_lines.append(", ".join(members) + ",")
        leaf_lines.append(f"{{{components[-1]}, {entries}}},")
        groups[components[:-1]] = number + 1
    group_lines = [f"{{{{{', '.join(map(str, prefix))}}}, {end}}}," for prefix, end in groups.items()]
    scalar = _FLOATS[values]
    return [
        f"static {device}const Entry<{scalar}> symmetric_entries[] = {{",
        *entry_lines,
        "};",
        f"static {device}const Leaf symmetric_leaves[] = {{",
        *leaf_lines,
        "};",
        f"static {device}const Group<{degree - 1}> symmetric_groups[] = {{",
        *group_lines,
        "};",
        "struct Tables {",
        f"    {_sizes(polynomial)}",
        f"    static constexpr int prefix = {degree - 1}, num_groups = {len(groups)};",
        f"    static MF_INLINE const Entry<{scalar}>& entry(int i) {{ return symmetric_entries[i]; }}",
        "    static MF_INLINE const Leaf& leaf(int i) { return symmetric_leaves[i]; }",
        f"    static MF_INLINE const Group<{degree - 1}>& group(int i) {{ return symmetric_groups[i]; }}",
        "};",
        "typedef TablePolynomial<Tables> Polynomial;",
    ]


def _literal(value: float, values: str) -> str:
    return float(np.float32(value)).hex() + "f" if values == "float32" else value.hex()


def _times(coefficient: float, factor: str, values: str) -> str:
    if coefficient == 1.0:
        return factor
    if coefficient == -1.0:
        return f"-{factor}"
    return f"{_literal(coefficient, values)} * {factor}"


def _sum(parts: list[str]) -> str:
    return " + ".join(parts)


def _bool(value: bool) -> str:
    return "true" if value else "false"
