"""Every parameter and buffer accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of the state that one model has and the other lacks, or that differs; ``problem`` says how."""

    name: str
    problem: str


def compare_tensors(reference: torch.nn.Module, candidate: torch.nn.Module) -> tuple[int, list[TensorDifference]]:
    """Compare state dictionaries, and buffers that are not in them, key by key and bit by bit.

    Floating-point values of different precision are compared in the lower one.

    Returns:
        The number of tensors of the reference, and the differences in the reference's order.
    """
    ours, theirs = _tensors(reference), _tensors(candidate)
    saved = set(candidate.state_dict())
    differences = []
    for name, tensor in ours.items():
        if name not in theirs:
            differences.append(TensorDifference(name, "missing in the candidate"))
        elif problem := _difference(tensor, theirs[name]):
            differences.append(TensorDifference(name, problem))
    # A candidate may keep tables of its own as buffers that are not saved; what is saved must be the
    # reference's.
    differences.extend(
        TensorDifference(name, "not in the reference") for name in theirs if name not in ours and name in saved
    )
    return len(ours), differences


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_buffers(remove_duplicate=False))
    tensors.update((name, value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor))
    return tensors


def _difference(reference: torch.Tensor, candidate: torch.Tensor) -> str | None:
    if reference.shape != candidate.shape:
        return f"shape {tuple(candidate.shape)} instead of {tuple(reference.shape)}"
    floating = reference.is_floating_point(), candidate.is_floating_point()
    if floating[0] != floating[1] or (not floating[0] and reference.dtype != candidate.dtype):
        return f"dtype {candidate.dtype} instead of {reference.dtype}"
    common = reference.dtype
    if all(floating) and torch.finfo(candidate.dtype).bits < torch.finfo(reference.dtype).bits:
        common = candidate.dtype
    a, b = reference.detach().to("cpu", common), candidate.detach().to("cpu", common)
    same = (a == b) | ((a != a) & (b != b))
    different = int((~same).sum())
    if different:
        return f"{different} of {a.numel()} values differ"
    return None
