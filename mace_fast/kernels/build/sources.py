"""What is handed to a compiler: a kernel's text, its headers and its options, as plain frozen values."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,79}")
_HEADER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")


def _check(name: str, headers: tuple[tuple[str, str], ...], options: tuple[str, ...]) -> None:
    """Refuse names that could not be file names, and lists where tuples are needed for hashing."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: a source's name is a C identifier of at most 80 characters")
    if not isinstance(headers, tuple) or not isinstance(options, tuple):
        raise TypeError(f"source {name!r}: headers and options are tuples, so that a source can be hashed")
    names = [header for header, _ in headers]
    for header in names:
        if not _HEADER.fullmatch(header):
            raise ValueError(f"source {name!r}: header name {header!r} is not a plain relative path")
    if len(set(names)) != len(names):
        raise ValueError(f"source {name!r}: a header is given twice, in {names}")
    for option in options:
        if not isinstance(option, str):
            raise TypeError(f"source {name!r}: option {option!r} is not a string")


@dataclass(frozen=True)
class CudaSource:
    """CUDA C++ for NVRTC.

    name: a C identifier; names the source in compiler messages and in the cache.
    text: the translation unit. NVRTC has no standard headers: builtin types only.
    headers: (name, text) pairs, included from `text` and from one another as ``#include "name"``.
    entry_points: names of the ``extern "C" __global__`` functions.
    options: further NVRTC options, verbatim (``"--maxrregcount=128"``, ``"-DMF_TILE=32"``).
    """

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]
    entry_points: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.name, self.headers, self.options)
        if not isinstance(self.entry_points, tuple) or not self.entry_points:
            raise ValueError(f"source {self.name!r}: entry_points is a tuple of at least one kernel name")
        if len(set(self.entry_points)) != len(self.entry_points):
            raise ValueError(f"source {self.name!r}: an entry point is given twice, in {self.entry_points}")


@dataclass(frozen=True)
class CpuSource:
    """C++17 for the host compiler; the functions that Python calls are ``extern "C"``.

    name, text, headers: as for CudaSource.
    options: further compiler options, verbatim, after the fixed ones.
    """

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.name, self.headers, self.options)
