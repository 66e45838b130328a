"""The source of a convolution for one target: a plan that the target's compiler fits into registers.

How many registers a kernel takes is known after compiling alone, and differs between targets by a tenth. So the report is
read back: where the preferred plan spills, others are tried, nearest first. On sm_90 schedules were measured; there
nothing is tried but to let fewer blocks share a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from mace_fast.kernels.build import CudaSource, compile_cuda
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.plan.channelwise import clustered, plan
from mace_fast.kernels.plan.layout import THREAD_REGISTERS, ChannelwisePlan, Schedule
from mace_fast.kernels.source.channelwise import Variant, cuda_source

_MEASURED = "sm_90"
_NARROWER = (Schedule(2, 80, False), Schedule(2, 54, False), Schedule(1, 80, False), Schedule(1, 54, False))
"""Fewer channels a thread, then fewer outputs; nothing loaded ahead."""

_OF_ONE_SCHEDULE = 2
"""Candidates that come first and have the preferred schedule."""

Fitted = tuple[CudaSource, ChannelwisePlan]


@lru_cache(maxsize=512)
def fitted_source(
    description: ChannelwiseTensorProduct, item_bytes: int, variant: Variant, arch: str, of_clusters: int = 0
) -> Fitted:
    """The source to compile for ``arch`` (such as ``"sm_86"``), and its plan.

    The preferred one if it does not spill there; else the first that does not, or the one that spills the fewest bytes.

    Args:
        of_clusters: bytes of shared memory that a block may have for going through clusters of receivers; 0 where the
            graph has no lists of them.
    """
    schedule = clustered(description, item_bytes, variant.role, of_clusters) if variant.want_x else None
    if schedule is not None:
        source = cuda_source(description, item_bytes, variant, schedule)
        if arch == _MEASURED or _spilled(source, arch) == 0:
            return source, plan(description, item_bytes, variant.role, schedule)
    candidates = _candidates(description, item_bytes, variant)
    if arch == _MEASURED:
        candidates = islice(candidates, _OF_ONE_SCHEDULE)
    best = next(candidates)
    fewest = _spilled(best[0], arch)
    while fewest > 0 and (candidate := next(candidates, None)) is not None:
        spilled = _spilled(candidate[0], arch)
        if spilled < fewest:
            best, fewest = candidate, spilled
    return best


def _spilled(source: CudaSource, arch: str) -> int:
    """Bytes a thread, of all kernels of the source."""
    return sum(resources.spill_stores for resources in compile_cuda(source, arch).resources.values())


def _candidates(description: ChannelwiseTensorProduct, item_bytes: int, variant: Variant) -> Iterator[Fitted]:
    preferred = plan(description, item_bytes, variant.role)
    yield cuda_source(description, item_bytes, variant), preferred
    # Left to itself, the compiler spills a few numbers to let more blocks share a multiprocessor.
    yield cuda_source(description, item_bytes, variant, resident=1), preferred
    for schedule in _NARROWER:
        if schedule.vector > preferred.schedule.vector or schedule == preferred.schedule:
            continue
        layout = plan(description, item_bytes, variant.role, schedule)
        if layout.together and layout.most_registers <= THREAD_REGISTERS:
            yield cuda_source(description, item_bytes, variant, schedule), layout
