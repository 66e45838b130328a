"""Small helpers for emitting C++ text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import resources


@cache
def header(name: str) -> str:
    """The text of a header that ships with the package."""
    return (resources.files("mace_fast.kernels.source") / "headers" / name).read_text(encoding="utf-8")


def indent(lines: Iterable[str], spaces: int) -> list[str]:
    """Lines moved to the right."""
    return [" " * spaces + line for line in lines]
