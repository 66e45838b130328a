"""Which comparison models get: as a whole in MACE's signature, or each fast module on random inputs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ase
import torch

from mace_fast.copying import copy_module
from mace_fast.patch.blocks.base import FastModule
from mace_fast.patch.constants import with_fast_constants
from mace_fast.patch.prepare import prepare_model
from mace_fast.patch.replace import fast_modules, put_back
from mace_fast.patch.understand import ancestor_names, class_name
from mace_fast.verification import EquivalenceReport, Progress, QuantityRow, compare
from mace_fast.verification.modules import Argument, Call, compare_modules
from mace_fast.verification.report import dtype_name
from mace_fast.verification.tensors import compare_tensors

_ENERGY_MODEL = "mace.modules.models.MACE"
_FROZEN = "mace_fast.inference.frozen.FrozenMACE"
_RANDOM_INPUTS = "random inputs"


def check_equivalence(
    model: torch.nn.Module,
    fast: torch.nn.Module,
    *,
    structures: Sequence[ase.Atoms] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    progress: Progress | None = None,
) -> EquivalenceReport:
    """Compare ``fast`` with ``model``; see ``mace_fast.verify``.

    Raises:
        TypeError, ValueError: see ``require_comparable``.
    """
    require_comparable(model, fast, with_structures=structures is not None)
    found = fast_modules(fast)
    labels = {name: module.kernels() for name, module in found.items()}
    if dtypes is None:
        tensors: list[torch.Tensor] = [*fast.parameters()] or [*fast.buffers()]
        dtypes = tuple(dict.fromkeys((torch.float64, *(t.dtype for t in tensors if t.is_floating_point()))))
    if fast_modules(model):
        model = put_back(copy_module(model))
    reference = with_fast_constants(model, fast)
    candidate = with_fast_constants(fast, fast)
    device = next((t.device for t in candidate.state_dict().values()), torch.device("cpu"))
    prepare_model(candidate, dtypes, device, done=None if progress is None else partial(progress, "compiling kernels"))
    if _ENERGY_MODEL in ancestor_names(reference):
        report = compare(reference, candidate, structures=structures, dtypes=dtypes, modules=labels, progress=progress)
        if reference is not model:
            report.environment["constants"] = "of float32 precision in the model, exact in this comparison"
        return report
    return _compare_modules(reference, candidate, labels, dtypes, device)


def require_comparable(model: torch.nn.Module, fast: torch.nn.Module, *, with_structures: bool = False) -> None:
    """``fast`` may be the fast form of ``model``: it is one of some model, and has the same tensors.

    Args:
        model, fast: the original, and the converted or patched model.
        with_structures: whether they are to be compared on structures.

    Raises:
        TypeError: ``fast`` is a frozen model.
        ValueError: ``fast`` holds no fast module; the two are not the same model; structures for a model that takes
            none.
    """
    if class_name(fast) == _FROZEN:
        raise TypeError(
            "a frozen model has no Hessian and no training to compare; use mace_fast.inference.verify_frozen(model, "
            "frozen), which compares all else"
        )
    if not fast_modules(fast):
        raise ValueError(
            f"this {type(fast).__name__} holds no module of mace_fast; give the converted or patched model second"
        )
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, fast))
    if ours != theirs:
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        first = names[0]
        raise ValueError(
            f"these are not the same model: {len(names)} of {len({**ours, **theirs})} tensors are missing in one of "
            f"them or have another shape. {first}: {_shape(ours, first)} in the original, {_shape(theirs, first)} in "
            "the other. Give the model that was converted first, and what became of it second"
        )
    if with_structures and _ENERGY_MODEL not in ancestor_names(model):
        raise ValueError(
            f"structures are for MACE models; this is a {type(model).__name__}, whose modules get random inputs"
        )


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "no such tensor"


def _compare_modules(
    reference: torch.nn.Module,
    candidate: torch.nn.Module,
    labels: dict[str, str],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> EquivalenceReport:
    """Outputs and gradients of each replaced module, where nothing is known about the model around them."""
    start = time.perf_counter()
    seed = secrets.randbits(31)
    generator = torch.Generator().manual_seed(seed)
    calls = [_example_call(name, module, generator) for name, module in fast_modules(candidate).items()]
    report = EquivalenceReport(
        reference=type(reference).__name__,
        candidate=type(candidate).__name__,
        seed=seed,
        dtypes=[dtype_name(dtype) for dtype in dtypes],
        device=str(device),
        not_compared=[
            f"the model around the replaced modules: a {type(reference).__name__} is no energy model of mace-torch"
        ],
    )
    report.num_tensors, report.tensors = compare_tensors(reference, candidate)
    references = {dtype: copy_module(reference).to(dtype) for dtype in (torch.float64, torch.float32)}
    candidates = {dtype: copy_module(candidate).to(dtype) for dtype in dtypes}
    report.modules = list(compare_modules(calls, references, candidates, labels, device, generator))
    report.rows = [
        QuantityRow(
            _RANDOM_INPUTS,
            row.name or "output",
            row.dtype,
            row.worst,
            row.scale,
            row.error,
            row.reference_error,
            row.tolerance,
            row.passed,
            row.note,
        )
        for row in report.modules
    ]
    report.seconds["total"] = time.perf_counter() - start
    return report


def _example_call(name: str, module: FastModule[Any], generator: torch.Generator) -> Call:
    # Rounded to float32, so that every dtype is given the same numbers.
    arguments = {
        key: Argument(value.detach().float().double() if value.is_floating_point() else value, value.requires_grad)
        for key, value in module.example(generator).items()
    }
    return Call(name, (), arguments)
