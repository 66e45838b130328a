"""Arguments of CUDA kernels: from Python values to the memory that the driver reads them from.

A launch is as quick as this is. So the C types are worked out once for each combination of Python types, and
the memory is kept: a launch takes a slot of it, writes all values with one call of struct, and gives it back.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Int32(int):
    """A kernel argument of C type int. Raises OverflowError for what does not fit."""

    def __new__(cls, value: int) -> Int32:
        if not -(2**31) <= value < 2**31:
            raise OverflowError(f"{value} does not fit a 32-bit kernel argument")
        return super().__new__(cls, value)


class Float32(float):
    """A kernel argument of C type float."""


_POINTER = "P"
_SCALARS: dict[type, str] = {int: "q", float: "d", Int32: "i", Float32: "f"}  # as the module struct has them


def _code(kind: type) -> str | None:
    """The code of a Python type in the module struct; None if a kernel takes no such argument."""
    if issubclass(kind, torch.Tensor) or kind is type(None):
        return _POINTER
    return _SCALARS.get(kind)


class Slot:
    """Memory for the arguments of one launch. address: of the array of pointers to them (kernelParams)."""

    def __init__(self, codes: tuple[str, ...]) -> None:
        layout = struct.Struct("".join(codes))  # native sizes and alignments
        self._memory = ctypes.create_string_buffer(layout.size)
        start = ctypes.addressof(self._memory)
        # A layout ends with its last member, so the beginning of each follows from the layout up to it.
        ends = (struct.calcsize("".join(codes[: count + 1])) for count in range(len(codes)))
        starts = (start + end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True))
        self._pointers = (ctypes.c_void_p * len(codes))(*starts)
        self.address = ctypes.addressof(self._pointers)
        self.pack: Callable[..., None] = functools.partial(layout.pack_into, self._memory, 0)


class Signature:
    """One combination of argument types of one kernel.

    tensors: the positions of tensors. nulls: the positions of None. free: slots that no launch is using;
    taking and giving back are single operations of a list, so that threads need no lock.
    Raises TypeError for types that a kernel cannot take, or that are not of the `sizes` of its parameters.
    """

    def __init__(self, kernel: str, kinds: tuple[type, ...], sizes: tuple[int, ...] | None) -> None:
        codes = []
        for position, kind in enumerate(kinds):
            code = _code(kind)
            if code is None:
                raise TypeError(
                    f"kernel {kernel!r}, argument {position}: a {kind.__name__} cannot be passed; it takes "
                    f"tensors, None, int, float, Int32 and Float32"
                )
            codes.append(code)
        given = tuple(struct.calcsize(code) for code in codes)
        if sizes is not None and given != sizes:
            raise TypeError(
                f"kernel {kernel!r} has parameters of {list(sizes)} bytes, the arguments have {list(given)} "
                f"(an int is passed as long long and a float as double; wrap them in Int32 and Float32)"
            )
        self.tensors = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, torch.Tensor))
        self.nulls = tuple(i for i, kind in enumerate(kinds) if kind is type(None))
        self.free: list[Slot] = []
        self._codes = tuple(codes)

    def slot(self) -> Slot:
        """A slot that nobody else is using; to be appended to `free` after the launch."""
        try:
            return self.free.pop()
        except IndexError:
            return Slot(self._codes)

    def values(self, kernel: str, args: Sequence[Any], index: int) -> list[Any]:
        """The numbers to pack. Raises ValueError for a tensor that is not on cuda:`index`."""
        values = list(args)
        for position in self.tensors:
            tensor = args[position]
            if tensor.get_device() != index:
                raise ValueError(
                    f"kernel {kernel!r}, argument {position}: the tensor is on {tensor.device}, the kernel "
                    f"on cuda:{index}"
                )
            values[position] = tensor.data_ptr()
        for position in self.nulls:
            values[position] = 0
        return values
