"""Errors that mace_fast raises. Each message names what is wrong and what to do about it."""

from __future__ import annotations


class MaceFastError(Exception):
    """Base of every error that is mace_fast's own."""


class BuildError(MaceFastError):
    """A kernel could not be compiled or loaded. The message carries the compiler's log and the remedy."""


class MissingToolError(BuildError):
    """A compiler, a GPU, a driver or an optional package that the request needs is not there."""


class CacheError(MaceFastError):
    """The kernel cache directory cannot be used (not writable, full, not a directory)."""


class UnsupportedDescriptionError(MaceFastError):
    """A contraction that no kernel of mace_fast can compute. The message says which part."""


class UnsupportedModuleError(MaceFastError):
    """A module of a model that mace_fast does not understand. The message names the module and why."""


class VerificationError(MaceFastError):
    """A converted model does not compute what the original computes. Carries the report as ``.report``."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class ModelFileError(MaceFastError):
    """A file is not a MACE model that can be loaded (missing, truncated, another kind of file)."""


class StructureError(MaceFastError):
    """Atoms that a model cannot evaluate: an element it was not trained on, a degenerate cell, not-a-number."""


class RestartError(MaceFastError):
    """A run that cannot be continued, or would overwrite another: the message names the file and the way out."""


class DeviceError(MaceFastError, RuntimeError):
    """A GPU reported an error during an evaluation. The message says whether the process can go on."""
