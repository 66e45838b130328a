"""Module by module: the inputs that a module of the reference had are given to both modules of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mace_fast.verification.criterion import Part, judge_float64, judge_tensors_float32
from mace_fast.verification.evaluate import evaluation_context
from mace_fast.verification.graphs import Batch
from mace_fast.verification.report import ModuleRow, dtype_name


@dataclass(frozen=True)
class Argument:
    """A tensor that a module was called with, and whether a gradient with respect to it was wanted."""

    value: torch.Tensor
    wants_gradient: bool

    def materialise(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A fresh copy; the dtype is that of floating-point values only."""
        if not self.value.is_floating_point():
            return self.value.to(device, copy=True)
        return self.value.to(device, dtype, copy=True).requires_grad_(self.wants_gradient)


@dataclass(frozen=True)
class Call:
    """The first call of a module: arguments with each tensor replaced by an ``Argument``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_calls(model: torch.nn.Module, batch: Batch, names: Sequence[str], device: torch.device) -> list[Call]:
    """The first call of each named module, in order of execution; ``model`` (float64) computes energies.

    Floating-point inputs are rounded to float32, so that every dtype is given the same numbers.
    """
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = Call(name, _map(args, _capture), _map(kwargs, _capture))

        return record

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [
        modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names if name in modules
    ]
    try:
        with evaluation_context(torch.float64, device):
            model(batch.inputs(torch.float64, device), compute_force=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def compare_modules(
    calls: Sequence[Call],
    references: Mapping[torch.dtype, torch.nn.Module],
    candidates: Mapping[torch.dtype, torch.nn.Module],
    labels: Mapping[str, str],
    device: torch.device,
    generator: torch.Generator,
) -> Iterator[ModuleRow]:
    """One row for each module and dtype of ``candidates``.

    Compared are the outputs, and the gradients of the inputs for a random cotangent. ``references`` holds the
    reference in float64 and in float32.
    """
    for call in calls:
        oracle_module = references[torch.float64].get_submodule(call.name)
        cotangents: dict[str, torch.Tensor] = {}
        oracle = _run(oracle_module, call, torch.float64, device, cotangents, generator)
        reference = _run(
            references[torch.float32].get_submodule(call.name),
            call,
            torch.float32,
            device,
            cotangents,
            generator,
        )
        for dtype, candidate in candidates.items():
            row = _Row(call.name, type(oracle_module).__name__, labels.get(call.name, ""), dtype)
            modules = dict(candidate.named_modules(remove_duplicate=False))
            if call.name not in modules:
                yield row.failed("there is no module of this name in the candidate")
                continue
            row.module_class = type(modules[call.name]).__name__
            try:
                values = _run(modules[call.name], call, dtype, device, cotangents, generator)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a candidate raises is a difference, and goes into the report
                yield row.failed(f"raises {type(error).__name__}: {error}")
                continue
            yield row.judged(oracle, reference, values)


class _Row:
    def __init__(self, name: str, reference_class: str, kernel: str, dtype: torch.dtype) -> None:
        self.name = name
        self.reference_class = reference_class
        self.module_class = reference_class
        self.kernel = kernel
        self.dtype = dtype

    def failed(self, note: str, worst: str = "") -> ModuleRow:
        infinite = float("inf")
        return self._row(worst, 0.0, infinite, 0.0, 0.0, False, note)

    def judged(
        self,
        oracle: dict[str, torch.Tensor],
        reference: dict[str, torch.Tensor],
        values: dict[str, torch.Tensor],
    ) -> ModuleRow:
        for name in [*oracle, *values]:
            if name not in values:
                return self.failed("the candidate does not return it", name)
            if name not in oracle:
                return self.failed("the reference does not return it", name)
            if oracle[name].shape != values[name].shape:
                return self.failed(f"shape {tuple(values[name].shape)} instead of {tuple(oracle[name].shape)}", name)
        if not oracle:
            return self.failed("neither returns a tensor")
        if self.dtype == torch.float64:
            parts = [Part(name, oracle[name], values[name], None) for name in oracle]
            noise = [float(torch.linalg.vector_norm(reference[name] - oracle[name])) for name in oracle]
            verdict = judge_float64(parts, noise)
        else:
            verdict = judge_tensors_float32(
                [Part(name, oracle[name], values[name], reference[name]) for name in oracle]
            )
        return self._row(
            verdict.worst,
            verdict.scale,
            verdict.error,
            verdict.reference_error,
            verdict.tolerance,
            verdict.passed,
            verdict.note,
        )

    def _row(
        self,
        worst: str,
        scale: float,
        error: float,
        reference_error: float,
        tolerance: float,
        passed: bool,
        note: str,
    ) -> ModuleRow:
        return ModuleRow(
            name=self.name,
            reference_class=self.reference_class,
            module_class=self.module_class,
            kernel=self.kernel,
            dtype=dtype_name(self.dtype),
            worst=worst,
            scale=scale,
            error=error,
            reference_error=reference_error,
            tolerance=tolerance,
            passed=passed,
            note=note,
        )


def _run(
    module: torch.nn.Module,
    call: Call,
    dtype: torch.dtype,
    device: torch.device,
    cotangents: dict[str, torch.Tensor],
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Outputs and input gradients by name; a missing cotangent is drawn and kept for the other models."""
    with evaluation_context(dtype, device):
        leaves: dict[str, torch.Tensor] = {}

        def materialise(value: Any, name: str) -> Any:
            if not isinstance(value, Argument):
                return value
            leaves[name] = value.materialise(dtype, device)
            return leaves[name]

        args = tuple(_map(value, materialise, f"argument {index}") for index, value in enumerate(call.args))
        kwargs = {key: _map(value, materialise, key) for key, value in call.kwargs.items()}
        outputs = dict(_flatten(module(*args, **kwargs), "output"))
        results = {name: value.detach().to("cpu", torch.float64) for name, value in outputs.items()}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        differentiable = {name: value for name, value in outputs.items() if value.requires_grad}
        if wanted and differentiable:
            for name, value in differentiable.items():
                if name not in cotangents:
                    cotangents[name] = torch.randn(value.shape, dtype=torch.float64, generator=generator)
            gradients = torch.autograd.grad(
                list(differentiable.values()),
                list(wanted.values()),
                [cotangents[name].to(value) for name, value in differentiable.items()],
                allow_unused=True,
            )
            for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
                value = torch.zeros_like(leaf) if gradient is None else gradient
                results[f"gradient of {name}"] = value.detach().to("cpu", torch.float64)
        elif wanted:
            for name, leaf in wanted.items():
                results[f"gradient of {name}"] = torch.zeros(leaf.shape, dtype=torch.float64)
    return results


def _capture(value: Any, name: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    if copy.is_floating_point():
        return Argument(copy.to(torch.float32).to(torch.float64), value.requires_grad)
    return Argument(copy, False)


def _map(value: Any, function: Callable[[Any, str], Any], name: str = "") -> Any:
    """``function(leaf, its name)`` on each leaf of nested tuples, lists and dictionaries."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function, f"{name}[{index}]") for index, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function, f"{name}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _map(item, function, f"{name}[{key}]") for key, item in value.items()}
    return function(value, name)


def _flatten(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested tuples, lists and dictionaries with their names; None holds none."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{name}[{key}]")
