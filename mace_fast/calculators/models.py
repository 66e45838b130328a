"""From what a user names or gives to converted models, their programs, and the proofs of both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal

import torch
from mace.modules import MACE

from mace_fast.calculators.proofs import Proof, file_digest, is_covered, proven
from mace_fast.errors import UnsupportedModuleError
from mace_fast.inference import FrozenMACE, verify_frozen
from mace_fast.loading import load_model, model_dtype, model_file, public_models, require_energy_model
from mace_fast.patch.api import convert, patch
from mace_fast.patch.api import verify as verify_converted
from mace_fast.verification import EquivalenceReport


def choose_head(head: str | None, available: list[str]) -> str:
    """The head of that name; of none, the only one or the one that is called default. Raises ValueError."""
    if head is None:
        defaults = available if len(available) == 1 else [name for name in available if name.lower() == "default"]
        if not defaults:
            raise ValueError(
                f"the model has several heads and none is called default: give head= (--head) one of {available}"
            )
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


Verify = bool | Literal["once"]
"""True proves now, "once" what this machine has not proven before, False nothing."""


@dataclass(frozen=True)
class PreparedModel:
    """A model as a calculator uses it.

    Attributes:
        converted: without gradients of parameters.
        program: what evaluates energies, forces and stresses: the frozen program, or the converted model.
        proofs: of both, as far as they were asked for.
    """

    converted: MACE
    program: torch.nn.Module
    proofs: tuple[Proof, ...]


def prepared_models(
    model_paths: Any,
    models: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: Verify,
    *,
    frozen: bool,
) -> list[PreparedModel]:
    """Models from files or modules (of which copies are made), converted, proven and frozen as asked.

    Raises:
        ValueError: no model is given, or ``verify`` is something else.
    """
    if verify not in (True, False, "once"):
        raise ValueError(f"verify={verify!r}: it is 'once', True or False")
    prepared = []
    if models is not None:
        given = [models] if isinstance(models, torch.nn.Module) else list(models)
        originals = [model.converted if isinstance(model, FrozenMACE) else model for model in given]
        for original in [require_energy_model(load_model(model)) for model in originals]:
            converted = convert(original, verify=False, dtype=dtype, device=device)
            prepared.append(_prepared(original, converted, None, device, verify, frozen=frozen))
    else:
        for model, digest in [_loaded(path, device, dtype, verify) for path in _expand_paths(model_paths)]:
            # Nobody else has these: no copy is needed.
            prepared.append(_prepared(model, patch(model, verify=False), digest, device, verify, frozen=frozen))
    if not prepared:
        raise ValueError("no model is given")
    return prepared


def _loaded(
    path: str | os.PathLike[str], device: torch.device, dtype: torch.dtype | None, verify: Verify
) -> tuple[MACE, str | None]:
    """A model, and the digest of its file; None where no proof is asked for, where the file changed meanwhile, or where
    it does not tell all of the model."""
    if not verify:
        return require_energy_model(load_model(path, device, dtype)), None
    file = model_file(path)
    before = file_digest(file)
    model = require_energy_model(load_model(path, device, dtype))
    after = file_digest(file)
    return model, after if before in (None, after) and is_covered(model) else None


def _prepared(
    original: MACE, converted: MACE, digest: str | None, device: torch.device, verify: Verify, *, frozen: bool
) -> PreparedModel:
    """A converted model, proven and frozen as asked; ``digest``: under which proofs of the original are kept."""
    proofs = []

    def prove(what: str, compared: Callable[[], EquivalenceReport]) -> None:
        if verify:
            again = verify is True
            proofs.append(proven(what, digest, device, model_dtype(converted), compared, again=again))

    prove("converted", lambda: verify_converted(original, converted))
    converted.requires_grad_(False)
    program: torch.nn.Module = converted
    if frozen:
        try:
            made = FrozenMACE(converted)
            prove("frozen", lambda: verify_frozen(converted, made))
            program = made
        except UnsupportedModuleError as exc:
            warnings.warn(
                "slower than it could be: the model has no frozen form, and its converted form is evaluated "
                f"({exc}). frozen=False asks for that",
                UserWarning,
                stacklevel=4,
            )
    return PreparedModel(converted, program, tuple(proofs))


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
