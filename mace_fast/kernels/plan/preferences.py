"""Which schedules are best for which plans, as measured: what the planner chooses from."""

from __future__ import annotations

from dataclasses import dataclass

from mace_fast.kernels.plan.layout import CLUSTER, THREAD_REGISTERS, ChannelwisePlan, Role, Schedule


@dataclass(frozen=True)
class Preference:
    """A schedule with the plans that it is the best choice for.

    Attributes:
        schedule: itself.
        registers: the most that a thread may need, by the plan's estimate.
        segments: the most that there may be.
        alone: the registers instead, where one warp has all channels of a receiver.
        least: registers; products that need fewer have better choices.
    """

    schedule: Schedule
    registers: int
    segments: int = 1000
    alone: int | None = None
    least: int = 0

    def suits(self, layout: ChannelwisePlan) -> bool:
        """Whether this is the choice for a product that is laid out so."""
        limit = self.alone if self.alone is not None and layout.warps == 1 else self.registers
        fits = self.least <= layout.most_registers <= limit
        return layout.together and fits and len(layout.segments) <= self.segments


def preferred(role: Role, item_bytes: int) -> tuple[Preference, ...]:
    """Best first.

    Read off benchmarks/results/h100-tune*.json, for splines h200-tune-splines.json. Segments that have to follow one
    another lost everywhere, and so did most that spill. Sums over channels (backward) gain from many registers and few
    segments; what only streams weights (forward) from a ring of edges in shared memory, which leaves the registers to
    the outputs, or from loading ahead where one warp works alone on a receiver; splines from wide loads, and from a
    stream of coefficients but where a thread has gradients of many outputs to hold.
    """
    ahead, most = Schedule(2, 80, True), THREAD_REGISTERS
    if role.sums:
        return _preferred_sums(item_bytes)
    if item_bytes == 8:
        return _preferred_double(role)
    if role.spline and role.backward:
        return (
            Preference(Schedule(4, 80, True), 200, segments=1),
            Preference(Schedule(4, 120, False), most),
            Preference(Schedule(2, 80, False), 210),
        )
    if role.spline:
        return (
            Preference(Schedule(4, 80, True), 150, segments=1),
            Preference(Schedule(4, 120, True), 210),
            Preference(ahead, 200),
        )
    if role.backward and role.dual:
        return (
            Preference(Schedule(2, 80, False), 160),
            Preference(Schedule(2, 80, False, 4), 230),
            Preference(Schedule(1, 54, False, 3), 170, segments=1),
            Preference(Schedule(1, 80, True), 245),
        )
    if role.backward:
        return (
            Preference(ahead, 150, alone=most),
            Preference(Schedule(2, 80, False, 3), 180),
            Preference(Schedule(1, 80, False, 4), 180),
            Preference(ahead, most),
            Preference(Schedule(1, 80, True), most),
        )
    if role.dual:
        return (
            Preference(ahead, 160, alone=200),
            Preference(Schedule(1, 54, False, 3), 150),
            Preference(Schedule(1, 54, False), 150),
        )
    return (
        Preference(ahead, 100, alone=200),
        Preference(Schedule(1, 54, False, 3), 100, segments=1),
        Preference(Schedule(2, 80, False, 4), 150),
        Preference(Schedule(1, 80, False, 3), 140),
        Preference(Schedule(2, 54, False), 130),
    )


def _preferred_double(role: Role) -> tuple[Preference, ...]:
    """The same in float64, where a number takes two registers: threads mostly hold one channel.

    Read off benchmarks/results/h100-tune-float64.json. Segments of 110 registers hold all paths of one block of x at
    l = 3, so that none has to add to what another wrote. Compilers need fewer registers for tangents than is estimated.
    """
    whole = Schedule(1, 110, False)
    if role.backward and role.spline:
        return (Preference(Schedule(2, 80, False), 210),)
    if role.spline:
        return (Preference(Schedule(2, 80, False), 130),)
    if role.backward and role.dual:
        return (
            Preference(Schedule(2, 80, False, 3), 220, segments=1),
            Preference(Schedule(1, 80, False), 256),
            Preference(Schedule(1, 54, False, 3), 210),
            Preference(Schedule(1, 54, False), 210),
            Preference(whole, 300),
        )
    if role.backward:
        return (
            Preference(Schedule(1, 80, False, 3), 190),
            Preference(Schedule(1, 80, True), THREAD_REGISTERS),
            Preference(whole, THREAD_REGISTERS),
        )
    if role.dual:
        return (
            Preference(Schedule(2, 80, False, 3), 210, segments=1),
            Preference(Schedule(1, 80, False), 256),
            Preference(Schedule(1, 54, False), 210),
            Preference(whole, 330),
        )
    return (
        Preference(Schedule(2, 80, False), 130),
        Preference(Schedule(1, 80, False, 3), 150),
        Preference(Schedule(1, 80, False), 150),
        Preference(whole, THREAD_REGISTERS),
    )


def _preferred_sums(item_bytes: int) -> tuple[Preference, ...]:
    """The same for tangents of gradients and of sums by one kernel; read off benchmarks/results/h200-tune-sums*.json.

    Where one warp has all channels, rings lost to loading ahead.
    """
    if item_bytes == 8:
        return (
            Preference(Schedule(2, 80, False, 3, tile=16), 285, segments=1),
            Preference(Schedule(1, 54, False, 3), 250),
        )
    return (
        Preference(Schedule(4, 80, False, 3, tile=16), 250, segments=1),
        Preference(Schedule(2, 54, False, 3), 220, alone=0),
        Preference(Schedule(1, 54, True), 245),
        Preference(Schedule(1, 54, False), 210),
    )


def preferred_clusters(role: Role, item_bytes: int) -> tuple[Preference, ...]:
    """The same for clusters of receivers; read off benchmarks/results/h100-tune-clusters.json and, for products of many
    segments, h200-tune-clusters-nequip-l.json."""
    if not role.backward or role.spline or role.sums:
        return ()
    two = Schedule(2, 160, False, 0, CLUSTER)
    ahead = Schedule(2 if item_bytes == 8 else 4, 160, True, 0, CLUSTER)
    if item_bytes == 8 and role.dual:
        one = Schedule(1, 80, False, 0, CLUSTER)
        return (Preference(two, 270, least=240), Preference(one, 232, segments=1, least=200))
    if item_bytes == 8:
        return (Preference(ahead, 230), Preference(two, 210))
    if role.dual:
        return (
            Preference(Schedule(4, 160, False, 0, CLUSTER), 150, segments=1),
            Preference(two, 230, segments=1),
            Preference(Schedule(1, 80, False, 0, CLUSTER), 130),
        )
    return (Preference(ahead, 205), Preference(two, 140, segments=1), Preference(two, 120))
