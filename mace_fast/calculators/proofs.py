"""Proofs that are kept: what this machine has proven once, with this code, on such a device, it need not prove again.

A proof that passed is remembered beside the compiled kernels, under everything that decides what was compared: the
bytes of the model's file, the sources of mace_fast and of mace-torch's modules, the versions of what both stand on,
the compiler, the device and the precision. Kernels sum in a fixed order, so nothing else is left to differ.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mace
import torch

import mace_fast
from mace_fast.kernels.build.cache import find, get_or_build
from mace_fast.kernels.build.toolchain import toolchain
from mace_fast.verification import EquivalenceReport
from mace_fast.verification.environment import describe_environment

_LOG = logging.getLogger(__name__)
_REPORT = "report.json"
_SOURCES = (".py", ".h", ".cuh")
_KNOWN = ("torch", "e3nn", "mace", "mace_fast")
"""Packages whose code the key of a proof covers, by version or byte by byte."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Proof:
    """That a model computes what its original does.

    Attributes:
        what: "converted" or "frozen".
        earlier: whether it was made by an earlier call or process, rather than now.
        report: where the report of the comparison lies as JSON; None where a proof cannot be kept.
    """

    what: str
    earlier: bool
    report: Path | None


def file_digest(path: Path) -> str | None:
    """sha256 of a model's file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def is_covered(model: torch.nn.Module) -> bool:
    """Whether a file and versions tell all that a model loaded from it is: no classes of other packages, no hooks, no
    methods of single objects, whose code is elsewhere."""
    for name, module in model.named_modules():
        if (reason := _not_covered(module)) is not None:
            _LOG.info("the proof of this model is not kept: %s, a %s, %s", name, type(module).__qualname__, reason)
            return False
    return True


def _not_covered(module: torch.nn.Module) -> str | None:
    """What a module runs that its pickled form does not hold and no version tells."""
    if type(module).__module__.partition(".")[0] not in _KNOWN:
        return "is of another package"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "has hooks"
    if "forward" in vars(module) and not isinstance(module, torch.jit.ScriptModule):  # which is pickled with its code
        return "has a forward of its own"
    return None


def proven(
    what: str,
    original: str | None,
    device: torch.device,
    dtype: torch.dtype,
    prove: Callable[[], EquivalenceReport],
    *,
    again: bool,
) -> Proof:
    """The proof that is kept, or the one that ``prove`` makes now.

    Args:
        what: "converted" or "frozen".
        original: the digest of its file; None where the proof cannot be kept.
        device, dtype: of the model that is proven.
        prove: compares it with the original.
        again: prove now in any case.

    Raises:
        VerificationError: the proof failed; nothing is kept.
        CacheError: the directory of kernels cannot be used.
    """
    if original is None:
        prove().raise_if_failed()
        return Proof(what, earlier=False, report=None)
    label, key = f"proof-{what}", _key(what, original, device, dtype)
    entry = None if again else find(label, key)
    if entry is not None:
        return Proof(what, earlier=True, report=entry.path / _REPORT)
    report = prove()
    report.raise_if_failed()
    kept = get_or_build(label, key, lambda directory: _write(directory / _REPORT, report))
    return Proof(what, earlier=False, report=kept.path / _REPORT)


def _write(path: Path, report: EquivalenceReport) -> None:
    path.write_text(report.to_json() + "\n", encoding="utf-8")


def _key(what: str, original: str, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    environment = describe_environment(device)
    environment.pop("threads", None)  # at most the last bit depends on them
    return {
        "proof": what,
        "original": original,
        "code": _code(),
        "environment": environment,
        "device": device.type,
        "toolchain": toolchain(device),
        "dtype": str(dtype),
    }


@cache
def _code() -> str:
    """sha256 of the sources of mace_fast and of mace-torch's modules."""
    digest = hashlib.sha256()
    for directory in (Path(mace_fast.__file__).parent, Path(mace.__file__).parent / "modules"):
        for path in sorted(directory.rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(f"{path.relative_to(directory).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
