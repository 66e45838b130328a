"""The plan of a channelwise tensor product on a GPU.

The decision is made once, from the description and stated limits alone, and prints itself.
"""

from __future__ import annotations

from functools import lru_cache

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.plan.layout import THREAD_REGISTERS, ChannelwisePlan, Role, Schedule, lay_out
from mace_fast.kernels.plan.preferences import preferred, preferred_clusters


@lru_cache(maxsize=512)
def plan(
    description: ChannelwiseTensorProduct, item_bytes: int, role: Role, schedule: Schedule | None = None
) -> ChannelwisePlan:
    """The plan for one description and role. ``item_bytes`` is 4 or 8; without a schedule the best known is chosen.

    Raises:
        ValueError: the schedule's channels a thread do not fit the multiplicities.
    """
    if schedule is not None:
        return lay_out(description, item_bytes, role, schedule)
    best = _best(description, item_bytes, role)
    if best is not None:
        return best
    plain = [lay_out(description, item_bytes, role, Schedule(1, budget, False)) for budget in (80, 54, 40, 27, 16)]
    return next((p for p in plain if p.most_registers <= THREAD_REGISTERS), plain[-1])


@lru_cache(maxsize=512)
def sums_beside_gradients(description: ChannelwiseTensorProduct, item_bytes: int) -> bool:
    """Whether one kernel makes both tangents that gradients of gradients need, those of sums at receivers and those of
    gradients: it reads operands and their tangents once, where threads have the registers for it."""
    return _best(description, item_bytes, Role(dual=True, backward=True, sums=True)) is not None


@lru_cache(maxsize=512)
def clustered(description: ChannelwiseTensorProduct, item_bytes: int, role: Role, most_shared: int) -> Schedule | None:
    """How to go through clusters of ``CLUSTER`` receivers, where a graph lists them and that is faster.

    Args:
        most_shared: bytes of shared memory that a block may have.
    """
    for preference in preferred_clusters(role, item_bytes) if most_shared else ():
        layout = _attempt(description, item_bytes, role, preference.schedule)
        if layout is None or not preference.suits(layout):
            continue
        if max(layout.shared_bytes(segment, want_y=True) for segment in layout.segments) <= most_shared:
            return preference.schedule
    return None


def _best(description: ChannelwiseTensorProduct, item_bytes: int, role: Role) -> ChannelwisePlan | None:
    """The plan of the first preference that suits; None where none does."""
    for preference in preferred(role, item_bytes):
        layout = _attempt(description, item_bytes, role, preference.schedule)
        if layout is not None and preference.suits(layout):
            return layout
    return None


def _attempt(
    description: ChannelwiseTensorProduct, item_bytes: int, role: Role, schedule: Schedule
) -> ChannelwisePlan | None:
    """The plan; None where the schedule does not fit the product."""
    try:
        return lay_out(description, item_bytes, role, schedule)
    except ValueError:
        return None
