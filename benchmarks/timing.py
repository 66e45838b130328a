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


def device_name(device: torch.device) -> str:
    """What a figure is reported beside."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def median_ms(call: Callable[[], object], device: torch.device, *, budget_s: float = 1.0, warmup: int = 3) -> float:
    """Median time of ``call`` in ms: CUDA events around calls in a row, or the wall clock on a CPU.

    On a GPU nothing waits between calls, as nothing does in a training loop: what the host needs to launch a call
    counts only where the GPU is done before it.
    """
    for _ in range(warmup):
        call()
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        once = time.perf_counter() - started
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * int(min(50, max(5, budget_s / once))))]
        for begin, end in zip(marks[::2], marks[1::2], strict=True):
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        times = [begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=True)]
        return statistics.median(times)
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget_s and len(times) < 50):
        begin_s = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin_s) * 1e3)
    return statistics.median(times)


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


def float32_peak(device: torch.device) -> float | None:
    """Operations per second of all float32 units at the highest clock; None where torch does not tell the clock."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", None)
    return None if clock_khz is None else properties.multi_processor_count * 128 * 2 * clock_khz * 1e3
