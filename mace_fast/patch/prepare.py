"""The kernels of a converted model, compiled side by side before its first call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

import torch

from mace_fast.kernels.build.together import Done
from mace_fast.kernels.ops.prepare import Description, Source, compile_sources, sources, target
from mace_fast.patch.replace import fast_modules


def prepare_model(
    fast: torch.nn.Module,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    order: int = 2,
    done: Done | None = None,
) -> None:
    """Compile what a converted or patched model will need in these dtypes.

    Args:
        fast: the model.
        dtypes: float32, float64 or both.
        device: on which it will run.
        order: of the highest derivative that will be asked for: 1 for forces, 2 for training on them.
        done: called with the number of kernels that are compiled, and of all.

    Raises:
        BuildError, MissingToolError, CacheError: as the first call of the model would.
    """
    arch = target(device)
    compile_sources(model_sources(fast, dtypes, arch, order), arch, done)


def model_sources(fast: torch.nn.Module, dtypes: Sequence[torch.dtype], arch: str | None, order: int) -> list[Source]:
    """What ``prepare_model`` compiles, for an architecture such as ``"sm_90"``, or for the CPU."""
    descriptions = dict.fromkeys(d for module in fast_modules(fast).values() for d in _descriptions(module._plan))
    return [s for dtype in dtypes for d in descriptions for s in sources(d, dtype, arch, order)]


def _descriptions(plan: object) -> Iterator[Description]:
    """The descriptions of contractions in a module's plan, however deep."""
    if isinstance(plan, Description):
        yield plan
    elif isinstance(plan, tuple):
        for item in plan:
            yield from _descriptions(item)
    elif is_dataclass(plan):
        for field in fields(plan):
            yield from _descriptions(getattr(plan, field.name))
