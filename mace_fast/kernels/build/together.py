"""Compiling side by side: compilers leave Python's lock alone, so threads are enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")

Done = Callable[[int, int], None]
"""Called with the number of builds that are done, and of all."""


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(builds: Iterable[Callable[[], Result]], done: Done | None = None) -> list[Result]:
    """The results of ``builds`` in their order, made on all processors.

    Raises what the first of those that fail raises, once all others are done.
    """
    calls = list(builds)
    with ThreadPoolExecutor(max_workers=max(1, min(len(calls), processors()))) as threads:
        running = [threads.submit(call) for call in calls]
        for number, _ in enumerate(as_completed(running), start=1):
            if done is not None:
                done(number, len(running))
    return [future.result() for future in running]
