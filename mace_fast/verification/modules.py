"""Module by module: the inputs that a module of the reference had are given to both modules of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mace_fast.verification.criterion import (
    MORE_COPIES,
    Part,
    is_doubtful,
    judge_float64,
    judge_tensors_float32,
)
from mace_fast.verification.evaluate import evaluation_context
from mace_fast.verification.graphs import Batch
from mace_fast.verification.report import ModuleRow, dtype_name

_DISPLACEMENT = 0.01

_Values = dict[str, torch.Tensor]


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

    def displaced(self, generator: torch.Generator) -> Argument:
        """The same in other numbers, one in a hundred off; what has no gradient (species, edges) stays."""
        if not self.wants_gradient:
            return self
        noise = torch.randn(self.value.shape, dtype=torch.float64, generator=generator).to(self.value.device)
        return Argument((self.value * (1 + _DISPLACEMENT * noise)).float().double(), True)


@dataclass(frozen=True)
class Call:
    """The first call of a module: arguments with each tensor replaced by an ``Argument``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def displaced(self, generator: torch.Generator) -> Call:
        """The same call with other numbers."""

        def move(value: Any, name: str) -> Any:
            return value.displaced(generator) if isinstance(value, Argument) else value

        return Call(self.name, _map(self.args, move), _map(self.kwargs, move))


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
        exact, rounded = (references[dtype].get_submodule(call.name) for dtype in (torch.float64, torch.float32))

        def sampled(call: Call, exact: torch.nn.Module = exact, rounded: torch.nn.Module = rounded) -> _Known:
            cotangents: _Values = {}
            oracle = _run(exact, call, torch.float64, device, cotangents, generator)
            return _Known(cotangents, oracle, _run(rounded, call, torch.float32, device, cotangents, generator))

        known = sampled(call)
        for dtype, candidate in candidates.items():
            row = _Row(call.name, type(exact).__name__, labels.get(call.name, ""), dtype)
            modules = dict(candidate.named_modules(remove_duplicate=False))
            if call.name not in modules:
                yield row.failed("there is no module of this name in the candidate")
                continue
            module = modules[call.name]
            row.module_class = type(module).__name__
            try:
                samples = [(known, _run(module, call, dtype, device, known.cotangents, generator))]
                judged = row.judged(samples)
                if dtype == torch.float32 and is_doubtful(judged.error, judged.tolerance):
                    for _ in range(MORE_COPIES):
                        moved = call.displaced(generator)
                        there = sampled(moved)
                        samples.append((there, _run(module, moved, dtype, device, there.cotangents, generator)))
                    judged = row.judged(samples)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a candidate raises is a difference, and goes into the report
                yield row.failed(f"raises {type(error).__name__}: {error}")
                continue
            yield judged


class _Known(NamedTuple):
    """Cotangents of the outputs, and what the reference gives in float64 and in float32."""

    cotangents: _Values
    oracle: _Values
    rounded: _Values


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

    def judged(self, samples: Sequence[tuple[_Known, _Values]]) -> ModuleRow:
        """The verdict on one or several evaluations of reference and candidate."""
        for (_, oracle, _), values in samples:
            for name in [*oracle, *values]:
                if name not in values:
                    return self.failed("the candidate does not return it", name)
                if name not in oracle:
                    return self.failed("the reference does not return it", name)
                if oracle[name].shape != values[name].shape:
                    shapes = f"shape {tuple(values[name].shape)} instead of {tuple(oracle[name].shape)}"
                    return self.failed(shapes, name)
            if not oracle:
                return self.failed("neither returns a tensor")
        copies = [
            [Part(name, oracle[name], values[name], reference[name]) for name in oracle]
            for (_, oracle, reference), values in samples
        ]
        if self.dtype == torch.float64:
            _, oracle, reference = samples[0][0]
            noise = [float(torch.linalg.vector_norm(reference[name] - oracle[name])) for name in oracle]
            verdict = judge_float64(copies[0], noise)
        else:
            verdict = judge_tensors_float32([Part.merged(part) for part in zip(*copies, strict=True)])
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
