"""Where the commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mace_fast.errors import MaceFastError

# Tables need more than the 80 columns that rich assumes where it does not write to a terminal.
_WIDTH_OF_FILES = 118

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)


def say(message: str) -> None:
    """A line of progress, on standard error."""
    stderr.print(message, style="dim", soft_wrap=True)


def print_json(results: dict[str, Any]) -> None:
    """The one JSON object of a command, on standard output."""
    print(json.dumps(results, indent=2, allow_nan=False))


def progress_bar() -> Progress:
    """A bar on standard error; it takes more fields as ``{task.fields[status]}``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        transient=False,
    )


def require_new(path: Path, force: bool) -> None:
    """Refuse to overwrite, before any work is done.

    Raises:
        MaceFastError: ``path`` exists and ``force`` is not given, or its directory does not exist.
    """
    if path.is_dir():
        raise MaceFastError(f"{path}: is a directory; give the name of a file")
    if path.exists() and not force:
        raise MaceFastError(f"{path}: exists; --force replaces it")
    if not path.parent.is_dir():
        raise MaceFastError(f"{path}: there is no directory {path.parent}")
