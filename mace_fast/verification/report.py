"""The equivalence report: what was compared, how far apart, and whether that is close enough."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mace_fast.errors import VerificationError
from mace_fast.verification.tensors import TensorDifference

_WIDTH = 118
_MOST_DETAILS = 12
_QUANTITY_NAMES = {
    "energy": "energy",
    "interaction_energy": "interaction energy",
    "node_energy": "per-atom energy",
    "forces": "forces",
    "stress": "stress",
    "virials": "virials",
    "hessian": "Hessian",
    "node_feats": "descriptors",
}


def dtype_name(dtype: torch.dtype) -> str:
    """float64 for torch.float64."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class QuantityRow:
    """One quantity in one mode and dtype. Errors and tolerance are relative to ``scale``.

    Attributes:
        mode: how the model was called ("stress", "forces", "training" ...).
        quantity: key of MACE's output dictionary, "parameter gradients", or "call" where the candidate
            raised.
        dtype: the dtype in which the candidate was evaluated.
        worst: structure, or parameter, that is furthest off.
        scale: norm of the reference; eV, eV/A, eV/A^3 and so on.
        error: the candidate's distance to the reference in float64.
        reference_error: in float32, the reference's own distance to itself in float64; in float64, 0.
        tolerance: largest ``error`` that passes.
        passed: whether it does.
        note: what is peculiar about a failure.
    """

    mode: str
    quantity: str
    dtype: str
    worst: str
    scale: float
    error: float
    reference_error: float
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ModuleRow:
    """One module in one dtype, given the inputs that the reference's had; fields as in ``QuantityRow``.

    Attributes:
        kernel: which kernel runs for it, as the caller of ``compare`` labelled it.
        worst: output, or input whose gradient, is furthest off.
    """

    name: str
    reference_class: str
    module_class: str
    kernel: str
    dtype: str
    worst: str
    scale: float
    error: float
    reference_error: float
    tolerance: float
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class StructureInfo:
    """A structure on which the models were compared."""

    name: str
    formula: str
    pbc: tuple[bool, bool, bool]
    head: str
    num_atoms: int
    num_edges: int


@dataclass
class EquivalenceReport:
    """Whether a candidate computes what a reference computes.

    Attributes:
        reference, candidate: names of the classes.
        rows: whole-model comparisons.
        modules: module-by-module comparisons, in order of execution.
        tensors: differences of parameters and buffers.
        num_tensors: how many were compared.
        structures: what the models were evaluated on.
        seed: of structures and random cotangents; pass it to ``compare`` to repeat a failure.
        dtypes: in which the candidate was evaluated.
        device: on which everything ran.
        repeatable: whether the candidate, called twice, gave the same bits; None if not tried. Not part of
            ``passed``.
        environment: versions of libraries, device name, precision settings.
        seconds: time of the parts and in "total".
        not_compared: what was left out, and why.
    """

    reference: str
    candidate: str
    rows: list[QuantityRow] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)
    num_tensors: int = 0
    structures: list[StructureInfo] = field(default_factory=list)
    seed: int = 0
    dtypes: list[str] = field(default_factory=list)
    device: str = "cpu"
    repeatable: bool | None = None
    environment: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """All quantities, modules and tensors agree, and something was compared."""
        return bool(self.rows) and not self.failures() and not self.tensors

    def failures(self) -> list[QuantityRow | ModuleRow]:
        """Rows that did not pass, the worst quantity first, then modules in order of execution."""
        quantities = sorted((row for row in self.rows if not row.passed), key=_badness, reverse=True)
        return [*quantities, *(row for row in self.modules if not row.passed)]

    def first_differing_module(self) -> ModuleRow | None:
        """The first module, in order of execution, whose outputs or gradients differ."""
        return next((row for row in self.modules if not row.passed), None)

    def raise_if_failed(self) -> None:
        """Raise VerificationError, with this report as its ``report``, unless ``passed``."""
        if not self.passed:
            raise VerificationError(self._message(), self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries; not-finite numbers as strings."""
        plain: dict[str, Any] = _plain({"passed": self.passed, **asdict(self)})
        return plain

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        return self.render(width=_WIDTH, color=False)

    def render(self, width: int = _WIDTH, color: bool = False) -> str:
        """The report as text, with terminal colours if asked for."""
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            width=width,
            force_terminal=color,
            color_system="standard" if color else None,
            highlight=False,
        )
        console.print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._headline(), _quantity_table(self.rows)]
        if self.modules:
            parts.append(_module_table(self.modules))
        parts.extend(self._details())
        parts.append(Padding(Text(self._footer(), style="dim"), (1, 0, 0, 0)))
        return Group(*parts)

    def _headline(self) -> Text:
        verdict = Text("PASSED", style="bold green") if self.passed else Text("FAILED", style="bold red")
        atoms, edges = sum(s.num_atoms for s in self.structures), sum(s.num_edges for s in self.structures)
        tensors = f"{self.num_tensors} tensors" + (f", {len(self.tensors)} differ" if self.tensors else " equal")
        return Text.assemble(
            "Equivalence ",
            verdict,
            f": {self.candidate} against {self.reference}, {' and '.join(self.dtypes)}, {self.device}\n",
            f"{len(self.structures)} structures, {atoms} atoms, {edges} edges; {tensors}; "
            f"{self.seconds.get('total', 0.0):.1f} s",
        )

    def _details(self) -> list[RenderableType]:
        """What differs: tensors, modules in order of execution, and of each quantity the worst mode."""
        lines = [f"{difference.name}: {difference.problem}" for difference in self.tensors[:_MOST_DETAILS]]
        if len(self.tensors) > _MOST_DETAILS:
            lines.append(f"and {len(self.tensors) - _MOST_DETAILS} more tensors")
        modules = [row for row in self.modules if not row.passed][:_MOST_DETAILS]
        lines += [f"{row.name} ({row.module_class}), {row.dtype}: {_details(row)}" for row in modules]
        worst: dict[tuple[str, str], list[QuantityRow]] = {}
        for row in self.failures():
            if isinstance(row, QuantityRow):
                worst.setdefault((row.quantity, row.dtype), []).append(row)
        for (quantity, dtype), rows in worst.items():
            more = f" (also in modes {', '.join(row.mode for row in rows[1:])})" if len(rows) > 1 else ""
            lines.append(f"{_quantity_name(quantity)}, {dtype}, mode {rows[0].mode}: {_details(rows[0])}{more}")
        if not lines:
            return []
        return [
            Text("What differs", style="bold red"),
            *(Padding(Text(line), (0, 0, 0, 2)) for line in lines),
        ]

    def _footer(self) -> str:
        lines = [f"not compared: {what}" for what in self.not_compared]
        if self.repeatable is not None:
            lines.append(f"called twice, the candidate gave {'the same bits' if self.repeatable else 'different bits'}")
        lines.append(f"seed {self.seed}; " + ", ".join(f"{name} {value}" for name, value in self.environment.items()))
        return "\n".join(lines)

    def _message(self) -> str:
        lines = [f"the candidate ({self.candidate}) does not compute what the reference ({self.reference}) does."]
        if self.tensors:
            first = self.tensors[0]
            lines.append(f"{len(self.tensors)} parameters or buffers differ, the first: {first.name}: {first.problem}.")
        module = self.first_differing_module()
        if module is not None:
            kernel = f", kernel {module.kernel}" if module.kernel else ""
            where = f"{module.name} ({module.module_class}{kernel}), {module.dtype}"
            lines.append(f"The first module that differs is {where}: {_details(module)}.")
        elif self.modules:
            lines.append("Each module by itself agrees: look between them (layout, arguments, heads, geometry).")
        worst = next((row for row in self.failures() if isinstance(row, QuantityRow)), None)
        if worst is not None:
            which = f"{_quantity_name(worst.quantity)} ({worst.mode}, {worst.dtype})"
            lines.append(f"The worst quantity is {which}: {_details(worst)}.")
        if not self.rows:
            lines.append("Nothing was compared.")
        lines.append(
            "Do not use the candidate. This error's .report holds the whole comparison (print it); "
            f"seed={self.seed} repeats the comparison."
        )
        return "\n".join(lines)


def _quantity_name(quantity: str) -> str:
    return _QUANTITY_NAMES.get(quantity, quantity)


def _details(row: QuantityRow | ModuleRow) -> str:
    note = f"; {row.note}" if row.note else ""
    if math.isinf(row.error) and row.tolerance == 0.0:
        return f"{row.worst}{': ' if row.worst else ''}{row.note}"
    allowed = f"relative error {_number(row.error)} where {_number(row.tolerance)} is allowed"
    return f"{allowed}, worst in {row.worst}{note}"


def _badness(row: QuantityRow | ModuleRow) -> float:
    """Error over tolerance."""
    if not row.passed and (not math.isfinite(row.error) or row.tolerance == 0.0):
        return math.inf
    return row.error / row.tolerance if row.tolerance > 0.0 else 0.0


def _number(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}"


def _mark(passed: bool) -> Text:
    return Text("ok", style="green") if passed else Text("FAILED", style="bold red")


def _quantity_table(rows: Sequence[QuantityRow]) -> Table:
    """One line for each quantity and dtype: the mode that is worst."""
    table = _table("quantity", "dtype", ">error", ">mace-torch's own", ">allowed", "worst in", ">modes", "")
    groups: dict[tuple[str, str], list[QuantityRow]] = {}
    for row in rows:
        groups.setdefault((row.quantity, row.dtype), []).append(row)
    order = [*_QUANTITY_NAMES, *(quantity for quantity, _ in groups if quantity not in _QUANTITY_NAMES)]
    for quantity, dtype in sorted(groups, key=lambda key: (order.index(key[0]), key[1] != "float64")):
        group = groups[quantity, dtype]
        worst = max(group, key=lambda row: (not row.passed, _badness(row)))
        table.add_row(
            _quantity_name(quantity),
            dtype,
            _number(worst.error),
            _number(worst.reference_error) if worst.dtype != "float64" else "",
            _number(worst.tolerance),
            f"{worst.worst} ({worst.mode})" if worst.error > 0.0 else "",
            f"{sum(row.passed for row in group)}/{len(group)}",
            _mark(all(row.passed for row in group)),
        )
    return table


def _module_table(rows: Sequence[ModuleRow]) -> Table:
    """One line for each module: what runs for it, then error and tolerance in each dtype."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    labelled = any(row.kernel for row in rows)
    errors = [name for dtype in dtypes for name in (f">{dtype}", ">allowed")]
    table = _table("module", "kernel" if labelled else "class", *errors, "")
    groups: dict[str, list[ModuleRow]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    for name, group in groups.items():
        numbers = [
            _number(value)
            for dtype in dtypes
            for row in group
            if row.dtype == dtype
            for value in (row.error, row.tolerance)
        ]
        ran = group[0].kernel if labelled else group[0].module_class
        table.add_row(name, ran, *numbers, _mark(all(row.passed for row in group)))
    return table


def _table(*columns: str) -> Table:
    """An empty table; a column whose name begins with > is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
