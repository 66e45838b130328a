"""Training with mace-torch's own command line, `mace_run_train` (mace.cli.run_train), in a process of its
own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ase import Atoms
from ase.io import write

from .structures import Split

NAME = "cu-ag-au-emt"

ARCHITECTURE: dict[str, str] = {
    "model": "ScaleShiftMACE",
    "interaction_first": "RealAgnosticResidualInteractionBlock",
    "interaction": "RealAgnosticResidualInteractionBlock",
    "num_interactions": "2",
    "hidden_irreps": "32x0e + 32x1o",
    "max_ell": "2",
    "correlation": "3",
    "r_max": "5.0",
    "num_radial_basis": "8",
    "num_cutoff_basis": "5",
    "radial_MLP": "[64, 64, 64]",
    "MLP_irreps": "16x0e",
}

OPTIMISATION: dict[str, str] = {
    "scaling": "rms_forces_scaling",
    "E0s": "IsolatedAtom",
    "loss": "stress",
    "energy_weight": "40",
    "forces_weight": "100",
    "stress_weight": "1000",
    "stage_two_energy_weight": "1000",
    "stage_two_forces_weight": "100",
    "stage_two_stress_weight": "2000",
    "stage_two_lr": "5e-4",
    "lr": "0.01",
    "scheduler": "ExponentialLR",
    "ema_decay": "0.995",
    "batch_size": "5",
    "valid_batch_size": "10",
    "clip_grad": "10.0",
    "config_type_weights": '{"Default": 1.0, "few": 0.3, "wall": 0.5}',
}


def write_data(split: Split, folder: Path) -> None:
    """Write train.xyz, valid.xyz and test.xyz (extended xyz, keys REF_energy, REF_forces, REF_stress)."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Atoms]] = {"train": split.train, "valid": split.valid, "test": split.test}
    for part, structures in parts.items():
        write(folder / f"{part}.xyz", structures, format="extxyz")


def command(epochs: int, seed: int) -> list[str]:
    """The `mace_run_train` command line, with paths relative to the working directory."""
    # A decay to a twentieth over the first four fifths; the last fifth is stage two with its own rate and
    # weights.
    stage_two = max(1, round(0.8 * epochs))
    decay = 0.05 ** (1.0 / stage_two)
    arguments = {
        "name": NAME,
        "seed": str(seed),
        "train_file": "train.xyz",
        "valid_file": "valid.xyz",
        "test_file": "test.xyz",
        "default_dtype": "float32",
        "device": "cpu",
        "compute_stress": "True",
        "error_table": "PerAtomMAEstressvirials",
        "plot": "False",
        "max_num_epochs": str(epochs),
        "start_stage_two": str(stage_two),
        "lr_scheduler_gamma": f"{decay:.5f}",
        "eval_interval": "2",
        **ARCHITECTURE,
        **OPTIMISATION,
    }
    flags = ["--stage_two", "--ema", "--amsgrad", "--save_cpu"]
    return [sys.executable, "-m", "mace.cli.run_train", *(f"--{k}={v}" for k, v in arguments.items()), *flags]


def train(folder: Path, epochs: int, seed: int, threads: int, progress: Callable[[str], None]) -> Path:
    """Run the training in `folder`, where the data lies, and return the path of the stage-two model.

    Args:
        folder: holds train.xyz, valid.xyz, test.xyz; everything the training writes goes there too.
        epochs: in all, stage two included.
        seed: of mace_run_train.
        threads: OMP_NUM_THREADS of the training process.
        progress: called with each line that tells the state of the training.

    Raises:
        RuntimeError: the training failed or left no model; the end of its output is in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    tail: list[str] = []
    with subprocess.Popen(
        command(epochs, seed),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        if process.stdout is None:
            raise RuntimeError("the training process has no output pipe")
        for line in process.stdout:
            tail = [*tail[-40:], line]
            if re.search(r"Epoch \d+|Initial:|Changing loss|ERROR|Error", line):
                progress(line.rstrip())
    model = folder / f"{NAME}_stagetwo.model"
    if process.returncode != 0 or not model.is_file():
        raise RuntimeError(f"mace_run_train ended with status {process.returncode}:\n{''.join(tail)}")
    return model


def log_file(folder: Path, seed: int) -> Path:
    """The log that mace_run_train wrote."""
    return folder / "logs" / f"{NAME}_run-{seed}.log"
