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
from mace_fast.patch.understand import ancestor_names
from mace_fast.verification import EquivalenceReport, Progress, QuantityRow, compare
from mace_fast.verification.modules import Argument, Call, compare_modules
from mace_fast.verification.report import dtype_name
from mace_fast.verification.tensors import compare_tensors

_ENERGY_MODEL = "mace.modules.models.MACE"
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
        ValueError: ``fast`` holds no fast module.
    """
    found = fast_modules(fast)
    if not found:
        raise ValueError(
            f"this {type(fast).__name__} holds no module of mace_fast; give the converted or patched model second"
        )
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
    if structures is not None:
        raise ValueError(
            f"structures are for MACE models; this is a {type(model).__name__}, whose modules get random inputs"
        )
    return _compare_modules(reference, candidate, labels, dtypes, device)


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
