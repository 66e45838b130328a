"""From the outputs of two models to rows of the report: one for each quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mace_fast.verification.criterion import (
    FLOAT64_TOLERANCE,
    Part,
    Verdict,
    judge_float32,
    judge_float64,
    judge_tensors_float32,
    reference_error_float32,
)
from mace_fast.verification.evaluate import PARAMETER_GRADIENT, Outputs
from mace_fast.verification.graphs import Batch
from mace_fast.verification.report import QuantityRow, dtype_name
from mace_fast.verification.terms import TermScales

ReferenceIn = Callable[[torch.dtype], Outputs]
"""The reference's outputs in a dtype, evaluated when first asked for."""


@dataclass(frozen=True)
class Sample:
    """What reference and candidate give for one batch; further samples are of displaced copies of the first."""

    batch: Batch
    reference: ReferenceIn
    outputs: Outputs


def call_failed(mode: str, dtype: torch.dtype, error: Exception) -> QuantityRow:
    """The candidate raised where the reference gave results."""
    return _failed(mode, "call", dtype, f"the candidate raises {type(error).__name__}: {error}")


def compare_quantities(
    mode: str,
    terms: TermScales,
    dtype: torch.dtype,
    samples: Sequence[Sample],
    typical: Callable[[str], float],
) -> Iterator[QuantityRow]:
    """A row for each output of the reference, and one for all parameter gradients together.

    Several samples are judged as one. ``typical`` gives the reference's relative float32 error of a quantity
    over all structures.
    """
    oracle = samples[0].reference(torch.float64)
    prefix = f"{PARAMETER_GRADIENT}:"

    def problem_of(key: str) -> str | None:
        found = (_shape_problem(oracle, sample.outputs, key) for sample in samples)
        return next((problem for problem in found if problem), None)

    for quantity in oracle:
        if quantity.startswith(prefix):
            continue
        problem = problem_of(quantity)
        if problem:
            yield _failed(mode, quantity, dtype, problem)
        elif dtype == torch.float32:
            copies = [_parts(quantity, terms, sample, torch.float32) for sample in samples]
            parts = [Part.merged(part) for part in zip(*copies, strict=True)]
            yield _row(mode, quantity, dtype, judge_float32(parts, typical(quantity)))
        else:
            parts = _parts(quantity, terms, samples[0], None)
            verdict = judge_float64(parts)
            if not verdict.passed:
                verdict = judge_float64(parts, _errors(_parts(quantity, terms, samples[0], torch.float32)))
            yield _row(mode, quantity, dtype, verdict)
    names = [key for key in oracle if key.startswith(prefix)]
    problems = [f"{key.removeprefix(prefix)}: {problem}" for key in names if (problem := problem_of(key))]
    if problems:
        yield _failed(mode, PARAMETER_GRADIENT, dtype, f"{len(problems)} differ, the first: {problems[0]}")
    elif any(oracle[key].numel() for key in names):
        yield _row(mode, PARAMETER_GRADIENT, dtype, _judge_gradients(names, prefix, dtype, samples))


def reference_errors(batch: Batch, terms: TermScales, oracle: Outputs, float32: Outputs) -> dict[str, float]:
    """The reference's relative float32 error of each quantity over all structures of a batch."""
    sample = Sample(batch, {torch.float64: oracle, torch.float32: float32}.__getitem__, float32)
    errors = {quantity: reference_error_float32(_parts(quantity, terms, sample, torch.float32)) for quantity in oracle}
    # Second derivatives round no less than first ones, and there is but one small Hessian to measure them by.
    return {**errors, "hessian": errors.get("forces", 0.0)}


def _parts(quantity: str, terms: TermScales, sample: Sample, noisy: torch.dtype | None) -> list[Part]:
    """A part for each structure, with what the reference computes in the dtype ``noisy``, if that is given."""
    batch, outputs = sample.batch, sample.outputs
    oracle = sample.reference(torch.float64)
    rows = _rows_of_structures(oracle[quantity], batch)
    reference = None if noisy is None else sample.reference(noisy)[quantity]
    if rows is None:
        name = batch.graphs[0].name if batch.num_graphs == 1 else "all structures"
        return [Part(name, oracle[quantity], outputs[quantity], reference)]
    return [
        Part(
            graph.name,
            oracle[quantity][index],
            outputs[quantity][index],
            None if reference is None else reference[index],
            float(scale),
        )
        for graph, index, scale in zip(batch.graphs, rows, terms.of_quantity(quantity), strict=True)
    ]


def _judge_gradients(names: list[str], prefix: str, dtype: torch.dtype, samples: Sequence[Sample]) -> Verdict:
    oracle = samples[0].reference(torch.float64)
    filled = [key for key in names if oracle[key].numel()]
    largest = max(float(oracle[key].square().mean().sqrt()) for key in filled)

    def terms(key: str) -> float:
        # A gradient that vanishes by symmetry is the rounding of sums that cancel. Their terms are as large
        # as other gradients: the weights of e3nn are all of order one.
        like_the_largest = largest * oracle[key].numel() ** 0.5
        vanishes = float(torch.linalg.vector_norm(oracle[key])) < FLOAT64_TOLERANCE * like_the_largest
        return like_the_largest if vanishes else 0.0

    def parts(sample: Sample, noisy: torch.dtype | None) -> list[Part]:
        exact = sample.reference(torch.float64)
        reference = None if noisy is None else sample.reference(noisy)
        return [
            Part(
                key.removeprefix(prefix),
                exact[key],
                sample.outputs[key],
                None if reference is None else reference[key],
                terms(key),
            )
            for key in filled
        ]

    if dtype == torch.float32:
        copies = [parts(sample, torch.float32) for sample in samples]
        merged = [Part.merged(part) for part in zip(*copies, strict=True)]
        return judge_tensors_float32(merged, independent=False)
    verdict = judge_float64(parts(samples[0], None))
    if not verdict.passed:
        verdict = judge_float64(parts(samples[0], None), _errors(parts(samples[0], torch.float32)))
    return verdict


def _errors(parts: list[Part]) -> list[float]:
    """Distance of the reference's float32 to its float64, part by part."""
    return [
        float(torch.linalg.vector_norm(part.reference - part.oracle)) for part in parts if part.reference is not None
    ]


def _rows_of_structures(values: torch.Tensor, batch: Batch) -> list[torch.Tensor] | None:
    """Which rows belong to each structure; None where rows are neither atoms nor structures."""
    owner = batch.tensors["batch"]
    if values.dim() == 0:
        return None
    if values.shape[0] == owner.shape[0]:
        return [torch.nonzero(owner == index).flatten() for index in range(batch.num_graphs)]
    if values.shape[0] == batch.num_graphs:
        return [torch.tensor([index]) for index in range(batch.num_graphs)]
    return None


def _shape_problem(oracle: Outputs, outputs: Outputs, key: str) -> str | None:
    if key not in outputs:
        if key.startswith(PARAMETER_GRADIENT):
            return "no parameter of this name requires a gradient in the candidate"
        return "the candidate does not return it"
    if outputs[key].shape != oracle[key].shape:
        return f"shape {tuple(outputs[key].shape)} instead of {tuple(oracle[key].shape)}"
    return None


def _row(mode: str, quantity: str, dtype: torch.dtype, verdict: Verdict) -> QuantityRow:
    return QuantityRow(mode=mode, quantity=quantity, dtype=dtype_name(dtype), **vars(verdict))


def _failed(mode: str, quantity: str, dtype: torch.dtype, note: str) -> QuantityRow:
    return QuantityRow(mode, quantity, dtype_name(dtype), "", 0.0, float("inf"), 0.0, 0.0, False, note)
