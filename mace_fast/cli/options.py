"""Arguments and options that several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mace_fast.cli.console import say
from mace_fast.errors import StructureError

if TYPE_CHECKING:
    import torch
    from ase import Atoms


class Precision(str, Enum):
    """The dtypes that a model computes in."""

    float32 = "float32"
    float64 = "float64"


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A MACE model file, or a public model's name (medium-mpa-0, small, ...)."),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="A MACE model file, or a public model's name (medium-mpa-0, small, ...)."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ...  \\[default: cuda if there is one, else cpu]", show_default=False),
]
Dtype = Annotated[Precision | None, typer.Option(help="Precision.  \\[default: the model's]", show_default=False)]
Head = Annotated[str | None, typer.Option(help="The model's head, if it has several.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Results as one JSON object on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the proof that the converted model computes the same.")
]


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Within the block a ValueError is one of the arguments: the command ends with exit status 2 and its
    message.
    """
    try:
        yield
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the best there is, which is then said."""
    import torch

    from mace_fast.loading import resolve_device

    if device is not None:
        with usage_errors():
            return resolve_device(device)
    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"device: {chosen}" + (f" ({torch.cuda.get_device_name(chosen)})" if chosen.type == "cuda" else ""))
    return chosen


def read_structure(path: Path) -> Atoms:
    """The last structure of any file that ASE reads.

    Raises:
        StructureError: the file is missing or not understood.
    """
    from ase import Atoms
    from ase.io import read

    if not path.is_file():
        raise StructureError(f"{path}: no such structure file")
    try:
        atoms = read(path, index=-1)
    except Exception as exc:  # each of ASE's many readers raises errors of its own
        raise StructureError(f"{path}: ASE cannot read it ({type(exc).__name__}: {exc})") from exc
    assert isinstance(atoms, Atoms)
    return atoms
