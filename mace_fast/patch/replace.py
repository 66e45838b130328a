"""Putting fast modules in the place of others, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mace_fast.patch.blocks.base import FastModule
from mace_fast.patch.blocks.interaction import FastInteraction
from mace_fast.patch.blocks.topology import TopologyMemo
from mace_fast.patch.match import Match


def replace(model: torch.nn.Module, matches: Sequence[Match]) -> torch.nn.Module:
    """Put a fast module wherever ``matches`` says so, in every container that holds the original.

    Args:
        model: changed in place, except where it is itself what is replaced.
        matches: of this model or of a deep copy of it.

    Returns:
        The model, or the fast module that stands in for it.
    """
    stand_ins: dict[int, torch.nn.Module] = {}
    for match in matches:
        if match.fast is not None:
            original = model.get_submodule(match.name)
            stand_ins[id(original)] = match.fast(original, match.plan)
    model = _exchange(model, stand_ins)
    _share_memos(model)
    return model


def put_back(model: torch.nn.Module) -> torch.nn.Module:
    """Put every original module back, with the state of its stand-in; the inverse of ``replace``."""
    originals = {id(module): module.give_back() for module in model.modules() if isinstance(module, FastModule)}
    return _exchange(model, originals)


def fast_modules(model: torch.nn.Module) -> dict[str, FastModule[Any]]:
    """The fast modules of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FastModule)}


def _exchange(model: torch.nn.Module, stand_ins: dict[int, torch.nn.Module]) -> torch.nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in stand_ins:
                parent._modules[name] = stand_ins[id(child)]
    return stand_ins.get(id(model), model)


def _share_memos(model: torch.nn.Module) -> None:
    """One memo for the blocks of each MACE model; its first interaction is the one that sees a structure
    first.
    """
    memos: dict[str, TopologyMemo] = {}
    led: set[str] = set()
    for name, module in fast_modules(model).items():
        owner = ".".join(name.split(".")[:-2])  # of <owner>.interactions.0
        module._memo = memos.setdefault(owner, TopologyMemo())
        module._leads = isinstance(module, FastInteraction) and owner not in led
        if module._leads:
            led.add(owner)
