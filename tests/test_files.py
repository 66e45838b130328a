"""Files are published whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mace_fast.files import published


def test_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with published(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old", "readers see the old file until the new one is complete"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [True, False])
def test_failure_leaves_nothing(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "result.bin"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), published(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert [entry.name for entry in tmp_path.iterdir()] == (["result.bin"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    with published(tmp_path / "result") as temporary:
        temporary.write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"x")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("result", "other")]
    assert modes[0] == modes[1]
