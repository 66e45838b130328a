"""Timing and bandwidth on a GPU or CPU: medians after warm-up, measured ceilings, device names."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_SPIN_HZ = 2e9
"""Cycles of a spinning kernel to the second: about the highest clock of an H100, so that it spins long enough."""


def device_name(device: torch.device) -> str:
    """What a figure is reported beside."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def median_ms(call: Callable[[], object], device: torch.device, *, budget_s: float = 1.0, warmup: int = 3) -> float:
    """Median time of ``call`` in ms: CUDA events around it, or the wall clock on a CPU.

    On a GPU it is the time of the device alone: each call is queued behind a kernel that spins for longer than the host
    needs to launch it. :func:`loop_ms` has what the host adds.
    """
    for _ in range(warmup):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        launched = time.perf_counter() - started
        torch.cuda.synchronize(device)
        once = time.perf_counter() - started
        spin = int((2 * launched + 1e-4) * _SPIN_HZ)
        count = int(min(50, max(5, budget_s / (once + 2 * launched))))
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in marks:
            torch.cuda._sleep(spin)
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in marks)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget_s and len(times) < 50):
        begin_s = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin_s) * 1e3)
    return statistics.median(times)


def loop_ms(call: Callable[[], object], device: torch.device, *, budget_s: float = 0.3) -> float:
    """Time of one call in ms where many follow one another and only the last is waited for: host or device, whichever
    is slower, as in a training loop that does nothing else."""
    call()
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    count = int(min(100, max(5, budget_s / (time.perf_counter() - started))))
    started = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - started) / count * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device-to-device copy, bytes read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (median_ms(lambda: target.copy_(source), device) * 1e-3)


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Device memory that ``call`` takes above what is allocated before it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def release(device: torch.device) -> None:
    """Give memory that nothing uses back: to others, and so that one row does not count another's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernel_times(call: Callable[[], object], *, warmup: int = 5, repeats: int = 10) -> dict[str, tuple[float, float]]:
    """For each kernel and copy of a call on a GPU: its time in us and how often it runs, both per call."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time
            counts[event.name] += 1
    return {name: (us / repeats, counts[name] / repeats) for name, us in times.items()}


def busy_ms(call: Callable[[], object], *, times: int = 5) -> float:
    """Median of the time that kernels and copies of one call take; another process on the GPU disturbs few calls."""
    return statistics.median(
        sum(us for us, _ in kernel_times(call, warmup=1, repeats=1).values()) / 1e3 for _ in range(times)
    )


def float32_peak(device: torch.device) -> float | None:
    """Operations per second of all float32 units at the highest clock; None where torch does not tell the clock."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", None)
    return None if clock_khz is None else properties.multi_processor_count * 128 * 2 * clock_khz * 1e3
