"""Benchmarks that get ready side by side and are timed one at a time.

Building models and compiling kernels takes most of a benchmark, and a borrowed GPU is paid for by the minute. Processes
that are started together with the same ``MACE_FAST_BENCH_LOCK`` (a file) wait for each other wherever they time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def my_turn() -> Iterator[None]:
    """The GPU to oneself, as far as other benchmarks go; at once where ``MACE_FAST_BENCH_LOCK`` is not set."""
    path = os.environ.get("MACE_FAST_BENCH_LOCK")
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
