"""``convert``, ``patch``, ``restore``, ``verify``, ``describe``: what users call."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import torch

from mace_fast.copying import copy_module
from mace_fast.errors import UnsupportedModuleError
from mace_fast.patch.checking import check_equivalence
from mace_fast.patch.match import Match, match
from mace_fast.patch.replace import fast_modules, put_back, replace
from mace_fast.verification import EquivalenceReport, Progress

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MOST_NAMES = 6


def convert(
    model: torch.nn.Module,
    *,
    verify: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    structures: Sequence[ase.Atoms] | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """A copy of ``model`` that runs on the kernels of mace_fast and computes the same.

    The original is not touched. Parameters, buffers, their names, hooks, train mode and ``requires_grad`` are
    the original's, copied. A model that has been converted or patched before gives a converted copy.

    In a file that ``mace_run_train`` wrote no parameter requires a gradient: to train the copy, call
    ``fast.requires_grad_(True)``. Parameter gradients are compared in any case.

    Args:
        model: a MACE model, or any module that holds e3nn tensor products of modes 'uvu', 'uvv', 'uuu', 'uvw'.
        verify: compare the copy with the original before returning it. Turn it off only for a model that is
            known.
        dtype: of the copy, ``torch.float32`` or ``torch.float64`` (or "float32", "float64"); the original's
            by default, whose parameters must then be of one.
        device: of the copy; the original's by default.
        structures: to verify on, instead of some made up from the model's elements.
        progress: called with what is being verified, the number of steps done, and of steps known.

    Returns:
        The fast model.

    Raises:
        UnsupportedModuleError: a block is not understood, there is nothing to replace, or parameters are of several
            dtypes and none is asked for. The message names each.
        VerificationError: the copy does not compute what the original does; ``.report`` says where.
        ValueError: a dtype that there are no kernels for.
    """
    wanted = _checked_dtype(dtype)
    matches = _convertible(model, one_dtype=wanted is None)
    fast = replace(copy_module(model), matches).to(device=device, dtype=wanted)
    if verify:
        check_equivalence(model, fast, structures=structures, progress=progress).raise_if_failed()
    return fast


def patch(
    model: torch.nn.Module,
    *,
    verify: bool = True,
    structures: Sequence[ase.Atoms] | None = None,
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Put fast modules into ``model`` itself; ``restore`` takes them out again.

    Parameters and buffers stay the very same tensors, so optimisers and references to them remain valid. A
    copy is verified first: when anything fails, the model is as it was. Modules that are fast already stay.

    Args:
        model, verify, structures, progress: as in ``convert``.

    Returns:
        ``model``.

    Raises:
        UnsupportedModuleError, VerificationError: as ``convert``; also if ``model`` itself would have to be
            replaced.
    """
    matches = _convertible(model)
    if any(m.name == "" and m.status == "replace" for m in matches):
        raise UnsupportedModuleError(
            f"a {type(model).__name__} cannot be patched in place, since it is itself what is replaced; use "
            "convert, or patch the module that holds it"
        )
    if verify:
        fast = replace(copy_module(model), matches)
        check_equivalence(model, fast, structures=structures, progress=progress).raise_if_failed()
    return replace(model, matches)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Put the original modules back: the same objects, with whatever state they were given since.

    Args:
        model: a converted or patched model; one without fast modules is left as it is.

    Returns:
        ``model``, changed in place; the original module if ``model`` is itself a fast module.
    """
    return put_back(model)


def verify(
    model: torch.nn.Module,
    fast: torch.nn.Module,
    *,
    structures: Sequence[ase.Atoms] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    progress: Progress | None = None,
) -> EquivalenceReport:
    """Compare a model with its fast form: every result in every mode, and each replaced module by itself.

    Args:
        model: the original. Fast modules in it are left out: it is always mace-torch that is compared with.
        fast: the converted or patched model. A frozen one is compared by ``mace_fast.inference.verify_frozen``.
        structures: to compare on, instead of some made up from the model's elements.
        dtypes: to compare in; float64 and that of ``fast`` by default.
        progress: called with what is being verified, the number of steps done, and of steps known.

    Returns:
        The report, which also says which kernel ran for which module; ``report.raise_if_failed()`` raises
        VerificationError.

    Raises:
        TypeError: ``fast`` is a frozen model.
        ValueError: ``fast`` holds no fast module, or tensors of other names or shapes than ``model``.
    """
    return check_equivalence(model, fast, structures=structures, dtypes=dtypes, progress=progress)


def describe(model: torch.nn.Module) -> str:
    """One line for each module that matters: what it is, what becomes of it or has become of it, and why."""
    return "\n".join(str(m) for m in match(model))


def _convertible(model: torch.nn.Module, *, one_dtype: bool = True) -> list[Match]:
    """The matches of a model that can be converted.

    Args:
        model: the model.
        one_dtype: whether all its parameters must have the same dtype, since nobody gives them one.

    Raises:
        UnsupportedModuleError: something is refused, or there is nothing to do and nothing done before, or
            the model is in a precision without kernels, or in several.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in _DTYPES.values():
            raise UnsupportedModuleError(
                f"{name} is {parameter.dtype}, and there are kernels for float32 and float64. The constants of "
                "this model are rounded as coarsely: give it in the precision in which it was made"
            )
    matches = match(model)
    refused = [f"{m.name or 'the model'} ({m.module_class}): {m.reason}" for m in matches if m.status == "refuse"]
    if refused:
        raise UnsupportedModuleError("mace_fast cannot convert this model:\n  " + "\n  ".join(refused))
    if not any(m.status == "replace" for m in matches) and not fast_modules(model):
        kept = "".join(f"\n  {m}" for m in matches)
        raise UnsupportedModuleError(f"there is nothing to replace in this {type(model).__name__}{kept}")
    if one_dtype:
        _require_one_dtype(model)
    return matches


def _require_one_dtype(model: torch.nn.Module) -> None:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            by_dtype.setdefault(parameter.dtype, []).append(name)
    if len(by_dtype) > 1:
        most, *others = sorted(by_dtype, key=lambda dtype: len(by_dtype[dtype]), reverse=True)
        names = [f"{name} ({dtype})" for dtype in others for name in by_dtype[dtype]]
        named = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES))
        raise UnsupportedModuleError(
            f"the parameters of this {type(model).__name__} are {most}, but for {named}; a kernel takes one dtype. "
            "Give convert or freeze a dtype=, or cast the model first, with model.to(dtype)"
        )


def _checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; there are kernels for torch.float32 and torch.float64")
    return found
