"""Fixtures shared by all tests: fresh random seeds that are printed on failure, and the GPU marker."""

from __future__ import annotations

import os
import secrets
from typing import Any

# e3nn 0.4 reads its constants with torch.load; torch 2.6 and later need this before its first import.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
# Workers of pytest-xdist share the cores; left to themselves, each of them would start a thread for every core.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

import numpy as np
import pytest
import torch


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for each run; MACE_FAST_TEST_SEED repeats a failure. pytest shows it when the test fails."""
    value = int(os.environ.get("MACE_FAST_TEST_SEED", secrets.randbits(31)))
    print(f"seed {value} (repeat with MACE_FAST_TEST_SEED={value})")
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """NumPy generator from the printed seed."""
    return np.random.default_rng(seed)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Failures are named as they happen: a long suite on a borrowed GPU may be cut short before its summary."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(FailuresAtOnce(terminal))


class FailuresAtOnce:
    """Prints what failed and why, in a line."""

    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr).splitlines() or [""]
            self._terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {why[0][:300]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, and counted as such, only where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine; run scripts/test-gpu on one that has it")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
