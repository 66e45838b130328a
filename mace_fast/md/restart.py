"""The restart file: everything that a run needs to go on as if it had not been stopped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase import Atoms
from ase.io.jsonio import encode

import mace_fast
from mace_fast.errors import RestartError
from mace_fast.files import published
from mace_fast.md.files import Mark
from mace_fast.md.settings import MDSettings

RESTART_FILE = "restart.npz"
_FORMAT = 1
_INTEGRATOR = "integrator:"


@dataclass(frozen=True)
class Restart:
    """The state of a run after a step.

    Attributes:
        step: steps done.
        settings: of the run, as a dictionary.
        identity: what else must be the same when it goes on: the structure, the model.
        seconds_per_step: median so far; NaN before the first step.
        log, trajectory: how much of these files belongs to the steps before.
        positions, momenta: [N, 3] A and ASE's units, exact.
        cell: [3, 3] A, exact.
        integrator: see :func:`mace_fast.md.integrators.integrator_state`.
    """

    step: int
    settings: Mapping[str, Any]
    identity: Mapping[str, str]
    seconds_per_step: float
    log: Mark
    trajectory: Mark
    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    integrator: Mapping[str, np.ndarray]

    def put_into(self, atoms: Atoms) -> None:
        """Give ``atoms`` this state, bit for bit."""
        atoms.set_cell(self.cell, apply_constraint=False)
        atoms.set_positions(self.positions, apply_constraint=False)
        atoms.set_momenta(self.momenta, apply_constraint=False)

    def require_same(self, settings: MDSettings, identity: Mapping[str, str], path: Path) -> None:
        """Refuse to go on with another structure, model or setting; ``steps`` alone may change, and
        what the dynamics do not read.

        Raises:
            RestartError: names every difference.
        """
        now, unread = asdict(settings), settings.without_effect()
        differences = [
            f"{name} was {self.settings.get(name)} and is now {now[name]}"
            for name in now
            if name != "steps" and name not in unread and self.settings.get(name) != now[name]
        ]
        for name in sorted({*self.identity, *identity}):
            before, given = self.identity.get(name, "not recorded"), identity.get(name, "not given")
            if before != given:
                differences.append(f"the {name} was {before} and is now {given}")
        if differences:
            raise RestartError(
                f"{path}: is of another run: {'; '.join(differences)}. Continue it with what it was started with, name "
                "another directory with --output, or replace it with --overwrite"
            )


def save_restart(path: Path, restart: Restart) -> None:
    """Write the restart file whole: a reader finds the old one or the new one, whenever this is killed."""
    meta = {
        "format": _FORMAT,
        "mace_fast": mace_fast.__version__,
        "ase": ase.__version__,
        "step": restart.step,
        "settings": dict(restart.settings),
        "identity": dict(restart.identity),
        "seconds_per_step": restart.seconds_per_step,
        "files": {
            name: {"size": place.size, "header": place.header.hex()}
            for name, place in (("log", restart.log), ("trajectory", restart.trajectory))
        },
        "integrator": sorted(restart.integrator),
    }
    arrays = {
        "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        "positions": restart.positions,
        "momenta": restart.momenta,
        "cell": restart.cell,
        **{_INTEGRATOR + name: value for name, value in restart.integrator.items()},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its allow_pickle is no array, and no name of ours
    with published(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_restart(path: Path) -> Restart:
    """Read a restart file; what is read is checked against the checksums in it.

    Raises:
        RestartError: it is not a whole restart file, or one of a later version.
    """
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["format"] == _FORMAT:
            return _restart(meta, arrays)
    except Exception as exc:  # a damaged byte raises whatever zipfile, NumPy or JSON meet first
        raise RestartError(
            f"{path}: is damaged or not a restart file ({type(exc).__name__}: {exc}); the run cannot be continued: "
            "--overwrite starts anew, --output names another directory"
        ) from exc
    raise RestartError(
        f"{path}: has format {meta['format']}, written by mace_fast {meta['mace_fast']}; continue with that version"
    )


def _restart(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Restart:
    integrator = {key.removeprefix(_INTEGRATOR): value for key, value in arrays.items() if key.startswith(_INTEGRATOR)}
    if sorted(integrator) != meta["integrator"]:  # NumPy checks the arrays that it finds, not that it finds all
        raise ValueError(f"it has {', '.join(integrator)} where {', '.join(meta['integrator'])} were written")
    marks = {name: Mark(int(place["size"]), bytes.fromhex(place["header"])) for name, place in meta["files"].items()}
    return Restart(
        step=int(meta["step"]),
        settings=meta["settings"],
        identity=meta["identity"],
        seconds_per_step=float(meta["seconds_per_step"]),
        log=marks["log"],
        trajectory=marks["trajectory"],
        positions=arrays["positions"],
        momenta=arrays["momenta"],
        cell=arrays["cell"],
        integrator=integrator,
    )


def structure_identity(atoms: Atoms) -> str:
    """Formula and digest of a structure: every array, cell, boundary conditions, constraints, and numbers in
    ``info``.
    """
    digest = hashlib.sha256()
    for name in sorted(atoms.arrays):
        values = atoms.arrays[name]
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes() if values.dtype != object else str(values).encode())
    digest.update(np.array(atoms.cell).tobytes() + np.array(atoms.pbc).tobytes())
    info = {name: value for name, value in sorted(atoms.info.items()) if isinstance(value, (int, float, str))}
    digest.update(encode([[constraint.todict() for constraint in atoms.constraints], info]).encode())
    return f"{atoms.get_chemical_formula()} ({digest.hexdigest()[:12]})"
