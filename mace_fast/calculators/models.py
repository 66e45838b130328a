"""From what a user names or gives to converted models and their programs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
from mace.modules import MACE

from mace_fast.errors import UnsupportedModuleError
from mace_fast.inference import FrozenMACE, verify_frozen
from mace_fast.loading import load_model, model_dtype, public_models, require_energy_model
from mace_fast.patch.api import convert, patch


def choose_head(head: str | None, available: list[str]) -> str:
    """The head of that name; of none, the only one or the one that is called default. Raises ValueError."""
    if head is None:
        defaults = available if len(available) == 1 else [name for name in available if name.lower() == "default"]
        if not defaults:
            raise ValueError(f"the model has several heads and none is called default: give head= one of {available}")
        return defaults[0]
    if head not in available:
        raise ValueError(f"head={head!r}: the model's heads are {available}")
    return head


def _expand_paths(model_paths: Any) -> list[str | os.PathLike[str]]:
    if isinstance(model_paths, str):
        if model_paths in public_models() or Path(model_paths).exists():
            return [model_paths]
        matches: list[str | os.PathLike[str]] = [*sorted(glob(model_paths))]
        return matches or [model_paths]  # loading says what is wrong with a path that matches nothing
    if isinstance(model_paths, os.PathLike):
        return [model_paths]
    return list(model_paths)


def converted_models(
    model_paths: Any, models: Any, device: torch.device, dtype: torch.dtype | None, verify: bool
) -> list[MACE]:
    """Converted models, without gradients of parameters, from files or modules; of modules, copies."""
    if models is not None:
        given = [models] if isinstance(models, torch.nn.Module) else list(models)
        given = [model.converted if isinstance(model, FrozenMACE) else model for model in given]
        converted = [
            convert(require_energy_model(load_model(model)), verify=verify, dtype=dtype, device=device)
            for model in given
        ]
    else:
        paths = _expand_paths(model_paths)
        loaded = [require_energy_model(load_model(path, device, dtype)) for path in paths]
        converted = [patch(model, verify=verify) for model in loaded]  # nobody else has these: no copy needed
    if not converted:
        raise ValueError("no model is given")
    for model in converted:
        model.requires_grad_(False)
    return converted


def frozen_program(model: MACE, verify: bool) -> torch.nn.Module:
    """The program of a converted model; the model itself, with a warning, where it has none."""
    try:
        program = FrozenMACE(model)
        if verify:
            verify_frozen(model, program).raise_if_failed()
    except UnsupportedModuleError as exc:
        warnings.warn(
            f"slower than it could be: the model has no frozen form, and its converted form is evaluated ({exc}). "
            "frozen=False asks for that",
            UserWarning,
            stacklevel=3,
        )
        return model
    return program


def require_one_committee(models: Sequence[MACE]) -> None:
    """A committee shares one graph, so its members must agree on what goes into it."""
    for name in ("r_max", "atomic_numbers"):
        values = [getattr(model, name).tolist() for model in models]
        if any(value != values[0] for value in values):
            raise ValueError(f"the models of a committee must have the same {name}, and have {values}")
    for name, values in (
        ("heads", [list(model.heads) for model in models]),
        ("dtype", [model_dtype(model) for model in models]),
    ):
        if any(value != values[0] for value in values):
            raise ValueError(f"the models of a committee must have the same {name}, and have {values}")
