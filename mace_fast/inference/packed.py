"""Arrays that a GPU gets from the host together: side by side in one piece of memory, brought over by one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes. Kernels read 16 at once, and lines of a cache are 128."""


def has_own_memory(device: torch.device) -> bool:
    """Whether arrays have to be brought to a device. Asked here, so that tests can have a GPU's memory emulated."""
    return device.type == "cuda"


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, from the host by a copy that is not waited for."""
    if tensor.is_cuda or device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Packed:
    """Zeros of given shapes, on a device and in pinned memory of the host; on the CPU both are the same memory.

    Args:
        parts: name -> (shape, dtype), in the order in which they lie.
        device: the CPU or a GPU.

    Attributes:
        parts: as given.
        on_device: the arrays by name.
    """

    def __init__(self, parts: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device) -> None:
        self.parts = dict(parts)
        self._starts: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in parts.items():
            self._starts[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._apart = has_own_memory(device)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.on_device = self._views(self._device)

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        for name, (shape, dtype) in self.parts.items():
            start = self._starts[name]
            flat = memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype)
            views[name] = flat.view(tuple(shape))
        return views

    @cached_property
    def _host(self) -> Tensor:
        if not self._apart:
            return self._device
        return torch.zeros(self._device.shape, dtype=torch.uint8, pin_memory=self._device.is_cuda)

    @cached_property
    def on_host(self) -> dict[str, Tensor]:
        """The arrays by name. Their memory is taken when they are first asked for."""
        return self._views(self._host)

    def upload(self) -> None:
        """Copy everything to the device. Does not wait: what is written on the host before the device has been waited
        for may or may not arrive."""
        if self._apart:
            self._device.copy_(self._host, non_blocking=True)
