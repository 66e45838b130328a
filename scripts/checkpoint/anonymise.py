"""A pickled model without the paths of the machine that pickled it.

e3nn pickles its generated code as TorchScript archives, whole, inside the pickle. Each carries debug
records that name source files by their absolute path. TorchScript loads without them; what they serve is
line numbers in error messages.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

_ALIGNMENT = 64
"""Bytes. torch aligns tensors so, which memory-mapped loading relies on."""


def anonymise(source: Path, destination: Path) -> None:
    """Write `source`, a file of torch.save, to `destination` without TorchScript's debug records.

    Every other byte of every record stays: parameters, code, class names.

    Raises:
        RuntimeError: the model's code is pickled in a way that this does not know.
    """
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(destination, "w") as result:
        for entry in archive.infolist():
            record = archive.read(entry)
            if entry.filename.endswith("/data.pkl"):
                record = _without_debug_records(record)
            _write(result, entry.filename, record, zipfile.ZIP_STORED)


def _without_debug_records(pickled: bytes) -> bytes:
    """The pickle with each TorchScript archive in it replaced by a leaner one."""
    operations = list(pickletools.genops(pickled))
    ends = [position for _, _, position in operations[1:]] + [len(pickled)]
    pieces: list[bytes] = []
    for (operation, argument, start), end in zip(operations, ends, strict=True):
        if start is None or end is None:
            raise RuntimeError("the pickle is not seekable")
        piece = pickled[start:end]
        # Pickle protocol 2, torch.save's default, spells bytes as text in latin-1.
        if isinstance(argument, str) and argument.startswith("PK\x03\x04"):
            if operation.name != "BINUNICODE":
                raise RuntimeError(f"a TorchScript archive is pickled with {operation.name}: only BINUNICODE is known")
            text = _lean(argument.encode("latin-1")).decode("latin-1").encode("utf-8")
            piece = piece[:1] + len(text).to_bytes(4, "little") + text
        elif isinstance(argument, bytes) and argument.startswith(b"PK\x03\x04"):
            raise RuntimeError(f"a TorchScript archive is pickled with {operation.name}: only BINUNICODE is known")
        pieces.append(piece)
    return b"".join(pieces)


def _lean(archive_bytes: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive_bytes)) as archive, zipfile.ZipFile(buffer, "w") as result:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                _write(result, entry.filename, archive.read(entry), entry.compress_type)
    return buffer.getvalue()


def _write(result: zipfile.ZipFile, name: str, record: bytes, compression: int) -> None:
    """Add a record whose data starts at a multiple of 64 bytes, padded through an extra field as torch
    does."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = compression
    if result.fp is None:
        raise RuntimeError("the archive is closed")
    header = result.fp.tell() + 30 + len(name.encode()) + 4
    padding = -header % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    result.writestr(entry, record)
