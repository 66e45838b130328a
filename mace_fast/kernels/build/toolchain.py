"""What makes kernels for a device: part of the identity of whatever was found out about them."""

from __future__ import annotations

import torch

from mace_fast.kernels.build.host import host_compiler
from mace_fast.kernels.build.launch import architecture
from mace_fast.kernels.build.nvrtc import load_nvrtc


def toolchain(device: torch.device) -> str:
    """The compiler and the processor that it compiles for.

    Raises:
        MissingToolError: there is no compiler.
    """
    if device.type == "cuda":
        return f"{load_nvrtc().identity}, {architecture(device)}"
    return host_compiler().identity
