"""The trained model that is shipped with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mace_fast.errors import ModelFileError

CHECKPOINT_NAME = "cu-ag-au-emt"


def checkpoint_path() -> Path:
    """Path of the shipped checkpoint: a small MACE of Cu, Ag and Au, trained by ``mace_run_train`` on ASE's
    EMT potential.

    A full pickled model as mace-torch saves it (float32 parameters). Its README, training log and errors
    lie beside it.

    Raises:
        ModelFileError: the package was installed without its data files.
    """
    path = Path(str(files("mace_fast.zoo"))) / "checkpoints" / CHECKPOINT_NAME / f"{CHECKPOINT_NAME}.model"
    if not path.is_file():
        raise ModelFileError(
            f"the shipped checkpoint is not at {path}: install mace_fast with its data files, "
            "or make the checkpoint with scripts/train_checkpoint.py"
        )
    return path
