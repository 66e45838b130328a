"""Sources on disk: for a compiler to read, and for the user to look at when a compiler refuses them."""

from __future__ import annotations

import tempfile
from pathlib import Path


def write_source(directory: Path, file_name: str, text: str, headers: tuple[tuple[str, str], ...]) -> None:
    """Write a source and its headers, so that ``-I directory`` finds the headers by their names."""
    for name, content in ((file_name, text), *headers):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def keep_failed_source(file_name: str, text: str, headers: tuple[tuple[str, str], ...], log: str) -> str:
    """Write source, headers and log to a new temporary directory; a sentence that says where."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="mace_fast_failed_"))
        write_source(directory, file_name, text, headers)
        (directory / "log.txt").write_text(log)
    except OSError as error:  # the compiler's log matters more than this
        return f"The source could not be kept ({error})."
    return f"The source is kept in {directory}."
