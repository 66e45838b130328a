"""What a report was made with."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

_PACKAGES = (
    "mace-fast",
    "mace-torch",
    "torch",
    "e3nn",
    "ase",
    "numpy",
    "cuequivariance-torch",
    "openequivariance",
)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions of what is installed, the device by name, and the settings that change float32 arithmetic."""
    described = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        described["GPU"] = torch.cuda.get_device_name(device)
        described["CUDA"] = str(torch.version.cuda)
        described["TF32"] = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    else:
        described["CPU"] = platform.machine()
        described["threads"] = str(torch.get_num_threads())
    return described
