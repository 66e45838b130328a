"""What a compiled CUDA kernel uses, read from the log of ``ptxas -v``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """Resources of one entry point. registers: per thread. The others in bytes; static_shared per block.

    spill_stores, spill_loads and stack include the functions that were not inlined into the kernel.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


def parse_resources(log: str) -> dict[str, KernelResources]:
    """Resources per entry point; an entry point without a complete report is left out."""
    result: dict[str, KernelResources] = {}
    _, *parts = _ENTRY.split(log)
    for entry, report in zip(parts[::2], parts[1::2], strict=True):
        frames = [tuple(map(int, frame)) for frame in _FRAME.findall(report)]
        registers = _REGISTERS.search(report)
        if not frames or registers is None:
            continue
        shared = _SHARED.search(report)
        result[entry] = KernelResources(
            registers=int(registers[1]),
            spill_stores=sum(frame[1] for frame in frames),
            spill_loads=sum(frame[2] for frame in frames),
            stack=sum(frame[0] for frame in frames),
            static_shared=int(shared[1]) if shared else 0,
        )
    return result
