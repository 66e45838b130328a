"""Torch's process-wide state, changed for the length of one block and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype inside the block; the one from before afterwards, also when the block raises.

    mace-torch builds models and graphs in the default dtype and takes no argument for it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Torch's CPU generator seeded inside the block; its state from before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
