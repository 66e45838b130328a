"""The cache on disk, of kernels and of proofs: content-addressed, published atomically, free of locks.

An entry is a directory ``<label>-<sha256 of everything that made it>`` holding the build's files and a
manifest with the size and sha256 of each. It is made under a temporary name in the same directory, flushed to
disk, and renamed into place: other processes see a whole entry or none. Of two processes that build the same
entry, the second finds the name taken and uses the first's. Nothing waits for anybody, so nothing that dies
can block the others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mace_fast.errors import CacheError

_LOG = logging.getLogger(__name__)
_FORMAT = 1  # raise it when the layout of an entry changes
_MANIFEST = "manifest.json"
_STAGING = ".staging-"
_STALE_SECONDS = 24 * 3600
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_REMEDY = "set the environment variable MACE_FAST_CACHE to a directory that can be written"


class _DamagedError(Exception):
    """An entry does not hold what its manifest says."""


@dataclass(frozen=True)
class CacheEntry:
    """A verified entry: its directory, the bytes of its files, and whether it was there before."""

    path: Path
    files: Mapping[str, bytes]
    from_cache: bool


def default_cache_dir() -> Path:
    """The directory of compiled kernels: $MACE_FAST_CACHE, or mace_fast in the user's cache directory.

    Raises CacheError where there is neither the variable nor a home directory.
    """
    chosen = os.environ.get("MACE_FAST_CACHE")
    try:
        if chosen:
            return Path(os.path.abspath(Path(chosen).expanduser()))
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mace_fast"
        base = os.environ.get("XDG_CACHE_HOME")
        # The XDG specification has relative paths ignored.
        return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "mace_fast"
    except RuntimeError as error:
        raise CacheError(f"no home directory to keep compiled kernels in ({error}); {_REMEDY}") from error


def cache_key(inputs: Mapping[str, object]) -> str:
    """sha256 over everything that decides a build's result, as hexadecimal; `inputs` must be JSON."""
    text = json.dumps({"format": _FORMAT, **inputs}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find(label: str, inputs: Mapping[str, object]) -> CacheEntry | None:
    """The entry for `inputs`, if it is there and whole. Raises CacheError if the cache cannot be read."""
    root = default_cache_dir()
    with _cache_errors(root):
        return _read(_target(root, label, inputs), from_cache=True)


def get_or_build(label: str, inputs: Mapping[str, object], build: Callable[[Path], None]) -> CacheEntry:
    """The entry for `inputs`, built by ``build(directory)`` if it is not there or not whole.

    `build` leaves in the directory exactly the files to keep. What it raises passes through (an OSError as a
    CacheError), with nothing left behind. Raises CacheError if the cache cannot be read or written.
    """
    root = default_cache_dir()
    target = _target(root, label, inputs)
    with _cache_errors(root):
        found = _read(target, from_cache=True)
        if found is not None:
            return found
        _remove_stale(root)
        staging = _make_staging(root)
        try:
            build(staging)
            _seal(staging)
            return _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _target(root: Path, label: str, inputs: Mapping[str, object]) -> Path:
    return root / f"{label}-{cache_key(inputs)}"


@contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    """Within the block an OSError is one of the cache in ``root``, and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            message = f"no space left for compiled kernels in {root} ({error}); free some, or {_REMEDY}"
        else:
            message = f"the kernel cache {root} cannot be used ({error}); {_REMEDY}"
        raise CacheError(message) from error


def _staging_path(root: Path) -> Path:
    return root / f"{_STAGING}{uuid.uuid4().hex}"


def _make_staging(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its mode 0700 would lock the others out of a cache that a group shares.
    staging = _staging_path(root)
    staging.mkdir()
    return staging


def _remove_stale(root: Path) -> None:
    """Remove what killed builds left behind: what is more than a day old. A running build is younger."""
    if not root.is_dir():
        return
    limit = time.time() - _STALE_SECONDS
    for path in root.glob(f"{_STAGING}*"):
        try:
            stale = path.stat().st_mtime < limit
        except FileNotFoundError:  # its owner has just finished
            continue
        if stale:
            _LOG.info("removing %s, left behind by a build that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems know no fsync of a directory; the manifest still tells a torn entry from a whole.
        if not (path.is_dir() and error.errno in _NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(handle)


def _seal(staging: Path) -> None:
    """Write the manifest and flush everything to disk."""
    files: dict[str, dict[str, object]] = {}
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(staging).as_posix()
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _sync(path)
    manifest = staging / _MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n")
    _sync(manifest)
    _sync(staging)


def _publish(staging: Path, target: Path) -> CacheEntry:
    files = _contents(staging)
    try:
        os.rename(staging, target)
    except OSError:
        # Another process was first; or, on NFS, our own rename worked and its answer was lost.
        winner = _read(target, from_cache=False)
        if winner is not None:
            return winner
        os.rename(staging, target)  # what was in the way was damaged, and is gone
    _sync(target.parent)
    return CacheEntry(target, files, from_cache=False)


def _read(path: Path, *, from_cache: bool) -> CacheEntry | None:
    """The entry, if it is there and whole. One that is damaged is removed, with a warning."""
    if not path.is_dir():
        return None
    try:
        return CacheEntry(path, _contents(path), from_cache)
    except _DamagedError as damage:
        _LOG.warning("the cached %s is damaged (%s); making it again", path, damage)
    # Renamed before it is deleted, so that no other process sees a part of it.
    aside = _staging_path(path.parent)
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process has just done the same
        return None
    shutil.rmtree(aside, ignore_errors=True)
    return None


def _contents(path: Path) -> dict[str, bytes]:
    """The bytes of every file of an entry. Raises _DamagedError unless they are what the manifest says."""
    contents = {}
    try:
        for name, facts in json.loads((path / _MANIFEST).read_bytes())["files"].items():
            data = (path / name).read_bytes()
            if len(data) != facts["size"]:
                raise _DamagedError(f"{name} has {len(data)} bytes, not {facts['size']}")
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise _DamagedError(f"the content of {name} has changed")
            contents[name] = data
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    return contents
