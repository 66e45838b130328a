"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends, and vanishes if the block
    raises.

    Readers see the old file or the complete new one. The file is on disk before it is renamed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
