"""``mace-fast md`` and ``mace-fast relax`` with the trained checkpoint, end to end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch

from mace_fast import zoo
from mace_fast.cli import main
from mace_fast.cli.running import interrupt_flag
from mace_fast.md.restart import RESTART_FILE, load_restart


@pytest.fixture(scope="module")
def crystal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CIF of 32 atoms, none at rest."""
    path = tmp_path_factory.mktemp("structure") / "alloy.cif"
    ase.io.write(path, zoo.alloy((2, 2, 2), rattle=0.05, seed=2))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    capsys.readouterr()
    status = 0
    try:
        main(arguments_of(*arguments))
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are compared with: BLAS rounds differently with two, on some processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments_of(command: str, structure: Path, *options: object) -> list[str]:
    model = ("--model", zoo.checkpoint_path(), "--dtype", "float32", "--no-verify", "--device", "cpu")
    return [str(part) for part in (command, structure, *model, *options)]


def process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mace_fast.cli", *arguments_of(*arguments)]  # type: ignore[arg-type]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_rows(child: subprocess.Popen[str], log: Path, rows: int) -> None:
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > rows):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)


def same_run(first: Path, second: Path) -> None:
    """Log and trajectory byte for byte, and the final state bit for bit."""
    for path in (first / "log.csv", first / "trajectory.extxyz"):
        assert path.read_bytes() == (second / path.name).read_bytes()
    one, two = load_restart(first / RESTART_FILE), load_restart(second / RESTART_FILE)
    assert one.step == two.step
    for name in ("positions", "momenta", "cell"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ensemble", "nve"), "meV/atom/ps"),
        (("--thermostat", "nose-hoover"), "meV/atom/ps"),
        (("--thermostat", "bussi", "--trajectory", "traj"), "meV/atom/ps"),
        (("--ensemble", "npt", "--pressure", "1"), "GPa"),
        (("--ensemble", "npt", "--cell", "full"), "GPa"),
    ],
)
def test_md(
    options: tuple[str, ...], said: str, crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    status, out, err = run(capsys, "md", crystal, *options, "--steps", 13, "--log-interval", 5, "-o", output, "--json")
    assert status == 0, err
    result: dict[str, Any] = json.loads(out)
    assert result["steps"] == 13 and result["atoms"] == 32 and result["interrupted"] is False
    assert result["ns_per_day"] > 0 and result["milliseconds_per_step"] > 0
    assert (result["mean_pressure_GPa"] is not None) == ("npt" in options)
    assert result["drift_meV_per_atom_ps"] is not None
    trajectory = "trajectory.traj" if "traj" in options else "trajectory.extxyz"
    assert sorted(path.name for path in output.iterdir()) == ["log.csv", "picture.png", RESTART_FILE, trajectory]
    rows = list(csv.DictReader((output / "log.csv").read_text().splitlines()))
    frames = ase.io.read(output / trajectory, index=":")
    assert [frame.info["step"] for frame in frames] == [int(row["step"]) for row in rows] == [0, 5, 10, 13]
    for row, frame in zip(rows, frames, strict=True):
        assert float(row["potential_energy"]) == pytest.approx(frame.get_potential_energy())
    status, out, err = run(capsys, "md", crystal, *options, "--steps", 14, "-o", output, "--overwrite")
    assert status == 0 and said in out and "14 of 1.0 fs" in out


def test_progress_is_shown(crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "md", crystal, "--steps", 5, "-o", tmp_path / "out")
    assert status == 0
    for part in ("5/5", " K ", "eV/atom", "ns/day", "left"):
        assert part in err
    assert "ns/day" in out and "5/5" not in out


def test_killed_and_continued(
    crystal: Path, seed: int, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the program at a random moment; then the same command with --restart."""
    options = ("--steps", 60, "--log-interval", 3, "--restart-interval", 10, "--temperature", 500, "--seed", seed)
    child = process("md", crystal, *options, "-o", tmp_path / "killed")
    wait_for_rows(child, tmp_path / "killed/log.csv", int(rng.integers(1, 12)))
    child.kill()
    child.communicate()
    status, _, err = run(capsys, "md", crystal, *options, "-o", tmp_path / "killed")
    assert status == 1 and "unfinished run" in err and "--restart" in err
    status, out, err = run(capsys, "md", crystal, *options, "-o", tmp_path / "killed", "--restart", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 60
    assert run(capsys, "md", crystal, *options, "-o", tmp_path / "whole")[0] == 0
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_set_a_flag(number: signal.Signals) -> None:
    """The first one; a second one does not wait for the step to end."""
    before = signal.getsignal(number)
    with interrupt_flag() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_stopped_and_continued(crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C: status 130, the way on, every frame whole, the summary and the picture; and then the rest of the run."""
    options = ("--ensemble", "npt", "--timestep", 2, "-o", tmp_path / "stopped")
    child = process("md", crystal, *options, "--steps", 100000, "--json")
    wait_for_rows(child, tmp_path / "stopped/log.csv", 2)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "the same command with --restart continues" in err.replace("\n", " ")
    result = json.loads(out)
    assert result["interrupted"] is True
    assert ase.io.read(tmp_path / "stopped/trajectory.extxyz").info["step"] == result["steps"]
    assert (tmp_path / "stopped/picture.png").exists()
    steps = result["steps"] + 7
    status, _, err = run(capsys, "md", crystal, *options, "--steps", steps, "--restart")
    assert status == 0, err
    assert run(capsys, "md", crystal, *options[:-1], tmp_path / "whole", "--steps", steps)[0] == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_restart_of_another_run(crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    status, _, err = run(capsys, "md", crystal, "--steps", 5, "-o", output, "--restart")
    assert status == 0 and "no run to continue" in err
    for steps in (5, 3):
        status, _, err = run(capsys, "md", crystal, "--steps", steps, "-o", output, "--restart")
        assert status == 0 and f"no step was made: the run has 5 steps, and --steps {steps} counts" in err
    status, _, err = run(capsys, "relax", crystal, "-o", output)
    assert status == 1 and "holds an MD run (step 5 of 5)" in err and "--restart" not in err
    before = {path: path.read_bytes() for path in output.iterdir()}
    for options, said in (
        (("--temperature", 310), "temperature was 300.0 and is now 310.0"),
        (("--repeat", 2), "the structure was"),
        (("--dtype", "float64"), "the dtype was float32 and is now float64"),
    ):
        status, out, err = run(capsys, "md", crystal, "--steps", 9, "-o", output, "--restart", *options)
        assert status == 1 and out == "" and said in err and "Traceback" not in err
    for extra, said in (((), "finished run of 5 steps"), (("--restart",), "is damaged")):
        if extra:
            (output / RESTART_FILE).write_bytes(before[output / RESTART_FILE][:-30])
        status, _, err = run(capsys, "md", crystal, "--steps", 9, "-o", output, *extra)
        assert status == 1 and said in err
    (output / RESTART_FILE).write_bytes(before[output / RESTART_FILE])
    assert {path: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("command", ["md", "relax"])
def test_output_that_is_a_file(command: str, crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    for options in ((), ("--overwrite",)):
        status, _, err = run(capsys, command, crystal, "-o", tmp_path / "mine", *options)
        assert status == 1 and "is a file" in err
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("cell", ["fixed", "full"])
def test_relax(cell: str, crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = ("relax", crystal, "--cell", cell, "--fmax", 0.05, "-o", output)
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["converged"] is True and result["largest_force"] <= 0.05 and result["energy_gained"] > 0
    assert (result["volume"] == result["first_volume"]) == (cell == "fixed")
    names = ["log.csv", "picture.png", "relaxed.cif", "relaxed.extxyz", "trajectory.extxyz"]
    assert sorted(path.name for path in output.iterdir()) == names
    relaxed = ase.io.read(output / "relaxed.extxyz")
    assert relaxed.get_potential_energy() == pytest.approx(result["energy"])
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "--overwrite" in err
    status, out, _ = run(capsys, *arguments, "--overwrite")
    assert status == 0 and "converged" in out and "yes" in out
    assert all(name in out for name in names)


def test_relax_that_does_not_converge(crystal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "relax", crystal, "--steps", 1, "-o", tmp_path / "out", "--json")
    assert status == 1 and "not converged after 1 steps" in err and "relaxed.extxyz" in err
    assert json.loads(out)["converged"] is False
    assert (tmp_path / "out/relaxed.extxyz").exists()
