"""Which modules of a model are understood, what replaces them, and why the others stay or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mace_fast.errors import UnsupportedModuleError
from mace_fast.patch.blocks.base import FastModule
from mace_fast.patch.blocks.interaction import (
    FastRealAgnosticAttResidualInteraction,
    FastRealAgnosticDensityInteraction,
    FastRealAgnosticDensityResidualInteraction,
    FastRealAgnosticInteraction,
    FastRealAgnosticResidualInteraction,
    FastRealAgnosticResidualNonLinearInteraction,
)
from mace_fast.patch.blocks.product import FastEquivariantProductBasis
from mace_fast.patch.blocks.tensor_product import FastTensorProduct
from mace_fast.patch.understand import TENSOR_PRODUCTS, ancestor_names, class_name, foreign_accelerator

Status = Literal["replace", "keep", "refuse"]

_BLOCKS = "mace.modules.blocks."

MACE_BLOCKS: dict[str, type[FastModule[Any]]] = {
    _BLOCKS + "RealAgnosticInteractionBlock": FastRealAgnosticInteraction,
    _BLOCKS + "RealAgnosticResidualInteractionBlock": FastRealAgnosticResidualInteraction,
    _BLOCKS + "RealAgnosticDensityInteractionBlock": FastRealAgnosticDensityInteraction,
    _BLOCKS + "RealAgnosticDensityResidualInteractionBlock": FastRealAgnosticDensityResidualInteraction,
    _BLOCKS + "RealAgnosticAttResidualInteractionBlock": FastRealAgnosticAttResidualInteraction,
    _BLOCKS + "RealAgnosticResidualNonLinearInteractionBlock": FastRealAgnosticResidualNonLinearInteraction,
    _BLOCKS + "EquivariantProductBasisBlock": FastEquivariantProductBasis,
}
"""The blocks of MACE by the full name of their class; a model with another block of their kind is refused."""

_FAMILIES = {
    _BLOCKS + "InteractionBlock": "an interaction block",
    _BLOCKS + "EquivariantProductBasisBlock": "a product block",
}
_LEAVES = ("e3nn.o3.", "e3nn.math.")


@dataclass(frozen=True)
class Match:
    """What becomes of one module.

    Attributes:
        name: its dotted name in the model, "" for the model itself.
        module_class: full name of its class.
        status: "replace" by a fast module, "keep" as it is, or "refuse": the model cannot be converted.
        reason: why.
        kernel: what runs for it afterwards.
        fast, plan: the class of the fast module and what it computes, for "replace".
    """

    name: str
    module_class: str
    status: Status
    reason: str
    kernel: str
    fast: type[FastModule[Any]] | None = field(default=None, repr=False, compare=False)
    plan: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"{self.name or '(model)'}: {self.module_class.rpartition('.')[2]}: {self.status} "
            f"({self.reason}) -> {self.kernel}"
        )


def match(model: torch.nn.Module) -> list[Match]:
    """Look at every module of ``model``, changing nothing.

    Returns:
        One entry for each block that is replaced or refused, and for each module of mace-torch or e3nn
        outside of those blocks; in the order of ``model.named_modules()``.
    """
    return list(_visit("", model, set(), False))


def _visit(name: str, module: torch.nn.Module, seen: set[int], kept: bool) -> Iterator[Match]:
    """``kept``: a module around this one is reported as kept already."""
    if id(module) in seen:
        return
    seen.add(id(module))
    found = class_name(module)
    if isinstance(module, FastModule):
        yield Match(name, found, "keep", "is fast already", module.kernels())
        return
    refusal = _refusal(name, module)
    if refusal is not None:
        yield Match(name, found, "refuse", refusal, "none")
        return
    if found in MACE_BLOCKS:
        yield _plan(name, module, MACE_BLOCKS[found])
        return
    if found in TENSOR_PRODUCTS:
        yield _plan_or_keep(name, module)
        return
    package = found.partition(".")[0]
    if name and not kept and package in ("mace", "e3nn"):
        kept = True
        yield Match(name, found, "keep", "no kernel of its own; small beside the blocks", package)
    if not found.startswith(_LEAVES):
        for child_name, child in module.named_children():
            yield from _visit(f"{name}.{child_name}" if name else child_name, child, seen, kept)


def _refusal(name: str, module: torch.nn.Module) -> str | None:
    """Why a module makes the whole model unconvertible, whatever is in it; None if it does not."""
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        if not name or any(block.endswith("." + original) for block in MACE_BLOCKS):
            return f"it is TorchScript ({original}), whose modules cannot be read or replaced; give the eager model"
        return None
    if class_name(module) in MACE_BLOCKS:
        return None
    for family, words in _FAMILIES.items():
        if family in ancestor_names(module):
            return (
                f"it is {words} that mace_fast does not know; known are "
                f"{', '.join(n.rpartition('.')[2] for n in MACE_BLOCKS)}"
            )
    return foreign_accelerator(module)


def _plan(name: str, module: torch.nn.Module, fast: type[FastModule[Any]]) -> Match:
    try:
        plan = fast.plan(module)
    except UnsupportedModuleError as error:
        return Match(name, class_name(module), "refuse", str(error), "none")
    return Match(name, class_name(module), "replace", "understood", fast.kernels_of(plan), fast, plan)


def _plan_or_keep(name: str, module: torch.nn.Module) -> Match:
    """A tensor product outside of MACE's blocks may stay with e3nn: nothing depends on its being replaced."""
    matched = _plan(name, module, FastTensorProduct)
    if matched.status == "refuse":
        return Match(name, matched.module_class, "keep", matched.reason, "e3nn")
    return matched
