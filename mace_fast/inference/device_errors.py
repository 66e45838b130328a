"""What an error of a GPU means for the process that it happened in."""

from __future__ import annotations

import torch

from mace_fast.errors import MaceFastError

_MARKS = ("CUDA error", "CUDA_ERROR", "cudaError", "CUBLAS_STATUS")


def is_device_error(error: Exception) -> bool:
    """Whether the GPU reported it. Lack of memory is not meant: torch says so itself, and the device works on."""
    if isinstance(error, (MaceFastError, torch.cuda.OutOfMemoryError)):
        return False
    return any(mark in str(error) for mark in _MARKS)


def explain_device_error(error: Exception, device: torch.device) -> str:
    """The first line of the error, and what can be done after it."""
    said = str(error).splitlines()[0]
    if _is_lost(device):
        remedy = (
            "No further work on this GPU is possible in this process: save what you have and start a new one. Kernels "
            "report late, so the cause may lie before this call; CUDA_LAUNCH_BLOCKING=1 names the place"
        )
    else:
        remedy = "The device works on; graphs and neighbour lists were dropped, and the next call makes new ones"
    return f"{device} reported: {said}. {remedy}"


def _is_lost(device: torch.device) -> bool:
    """After an illegal access, a failed assertion or a hardware fault, every later call fails too."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
