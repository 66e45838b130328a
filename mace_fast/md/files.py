"""The files that a run appends to, which can be cut back to where they were at an earlier moment."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Protocol

import ase.io
from ase import Atoms
from ase.io.trajectory import TrajectoryWriter

from mace_fast.errors import RestartError

# A .traj file (ase.io.ulm) begins with magic, version, number of frames and position of the table of frames. They are
# all that is ever written over: cutting the file and putting them back undoes the frames that came later.
_ULM_HEADER = 48


@dataclass(frozen=True)
class Mark:
    """Where a file was: its size in bytes, and the bytes at its beginning that later writes change."""

    size: int
    header: bytes = b""


@dataclass(frozen=True)
class Sample:
    """One row of the log: energies in eV for the whole structure, temperature in K, volume in A^3, pressure in GPa.

    ``conserved_energy`` is None where the dynamics conserves nothing, ``volume`` without a cell, ``pressure`` outside
    NPT, as it costs the evaluation of the stress. ``kinetic_energy`` is that of all momenta, so that the total is
    conserved in NVE; the temperature leaves out a net momentum that is conserved
    (:func:`mace_fast.md.integrators.temperature`).
    """

    step: int
    time_ps: float
    potential_energy: float
    kinetic_energy: float
    total_energy: float
    conserved_energy: float | None
    temperature: float
    volume: float | None
    pressure: float | None


_COLUMNS = tuple(field.name for field in fields(Sample))


class Log:
    """``log.csv``: a header and one line for each :class:`Sample`, with every digit of each number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if self._file.tell() == 0:
            self._writer.writerow(_COLUMNS)

    def write(self, sample: Sample) -> None:
        """Append a row; it is with the operating system when this returns."""
        self._writer.writerow(astuple(sample))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> tuple[Sample, ...]:
    """The rows of ``log.csv``.

    Raises:
        RestartError: it is not such a file.
    """
    samples = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != _COLUMNS:
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            for step, *numbers in rows:
                values = [float(number) if number else None for number in numbers]
                samples.append(Sample(int(step), *values))  # type: ignore[arg-type]
    except (ValueError, TypeError) as exc:
        raise RestartError(f"{path}: is not the log of an MD run ({exc}); --overwrite starts anew") from exc
    return tuple(samples)


class TrajectoryFile(Protocol):
    """A trajectory that frames are appended to."""

    def write(self, frame: Atoms) -> None:
        """Append a frame; it is with the operating system when this returns."""

    def close(self) -> None:
        """Close the file."""


class ExtxyzTrajectory:
    """A trajectory as extended XYZ text."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, frame: Atoms) -> None:
        """Append a frame; it is with the operating system when this returns."""
        ase.io.write(self._file, frame, format="extxyz")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class AseTrajectory:
    """A trajectory in ASE's binary format."""

    def __init__(self, path: Path) -> None:
        self._writer = TrajectoryWriter(str(path), mode="a")

    def write(self, frame: Atoms) -> None:
        """Append a frame; it is with the operating system when this returns."""
        self._writer.write(frame)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_trajectory(path: Path) -> TrajectoryFile:
    """The writer for the format that the path's suffix names: ``.extxyz`` or ``.traj``."""
    return AseTrajectory(path) if path.suffix == ".traj" else ExtxyzTrajectory(path)


def mark(path: Path) -> Mark:
    """Where a file is now. What was written to it is on disk when this returns."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        header = file.read(_ULM_HEADER) if path.suffix == ".traj" else b""
        return Mark(file.seek(0, os.SEEK_END), header)


def require_reaches(path: Path, place: Mark) -> None:
    """Refuse a file that ends before ``place``.

    Raises:
        RestartError: some of it is gone.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < place.size:
        raise RestartError(
            f"{path}: has {size} bytes, and had {place.size} when the restart file was written; put it back, or start "
            "anew with --overwrite"
        )


def require_directory(path: Path) -> None:
    """Refuse a path that is something else than a directory; it may be missing.

    Raises:
        RestartError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise RestartError(f"{path}: is a file; a run writes into a directory: name another with --output")


def cut(path: Path, place: Mark) -> None:
    """Undo what was written to ``path`` after ``place``; a file that is not there yet is none."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.write(place.header)
        file.truncate(place.size)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within the block no other process gets ``directory``; the lock goes with the process, however it ends.

    Raises:
        RestartError: another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise RestartError(f"{directory}: another process is writing a run there; wait for it or stop it") from exc
        except OSError as exc:
            warnings.warn(
                f"{directory}: this file system has no locks ({exc}); see to it that no other run writes there",
                UserWarning,
                stacklevel=3,
            )
        yield
    finally:
        os.close(descriptor)
