"""Runs that end before their time, and go on as if they had not."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from md_springs import crystal

from mace_fast.errors import RestartError
from mace_fast.md import dynamics as dynamics_module
from mace_fast.md.dynamics import MDResult, require_unused, run
from mace_fast.md.files import locked
from mace_fast.md.restart import RESTART_FILE, load_restart, save_restart
from mace_fast.md.settings import MDSettings

RUNS = {
    "nve": {"ensemble": "nve", "trajectory": "extxyz"},
    "langevin": {"ensemble": "nvt", "thermostat": "langevin", "trajectory": "traj"},
    "nose-hoover": {"ensemble": "nvt", "thermostat": "nose-hoover", "trajectory": "extxyz"},
    "bussi": {"ensemble": "nvt", "thermostat": "bussi", "trajectory": "traj"},
    "npt isotropic": {"ensemble": "npt", "cell": "isotropic", "pressure": 1.0, "trajectory": "extxyz"},
    "npt full": {"ensemble": "npt", "cell": "full", "pressure": 1.0, "trajectory": "traj"},
}
# Not multiples of each other, so that rows, restart points and stops meet in every way.
_INTERVALS = {"log_interval": 3, "restart_interval": 7, "timestep": 2.0}


def settings_of(name: str, steps: int, seed: int) -> MDSettings:
    return MDSettings(steps=steps, seed=seed, **{**_INTERVALS, **RUNS[name]})  # type: ignore[arg-type]


def start(settings: MDSettings, output: Path, existing: str = "continue", **options: object) -> MDResult:
    """Begin or continue, with bonds that are summed in an order that depends on the past (see Springs)."""
    return run(crystal(remembers=True), settings, output, existing=existing, restart_seconds=0, **options)  # type: ignore[arg-type]


def contents(output: Path) -> dict[str, object]:
    """Log and trajectory byte for byte, and the state at the end, without what depends on the clock."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in output.iterdir() if p.name != RESTART_FILE}
    state = asdict(load_restart(output / RESTART_FILE))
    del state["seconds_per_step"]
    found[RESTART_FILE] = _plain(state)
    return found


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return (str(value.dtype), value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def stop_after(calls: int) -> Callable[[], bool]:
    count = iter(range(1, 10**9))
    return lambda: next(count) >= calls


class Killed(BaseException):
    """As sudden as a signal, for a run in this process."""


def dies_at(moment: int) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """A wrapper of functions; the ``moment``-th time that any of them begins or ends is the process's last."""
    count = iter(range(10**9))

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(count) == moment:
                raise Killed
            result = original(*args, **kwargs)
            if next(count) == moment:
                raise Killed
            return result

        return call

    return dying


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments(name: str, seed: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """SIGKILL, again and again, leaves log, trajectory and final state of an uninterrupted run, byte for byte."""
    settings = settings_of(name, 300, seed)
    start(settings, tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mace_fast.md.dynamics", "md_springs"])
    killed_between: list[int] = []
    status: int | None = None
    restart = tmp_path / "killed" / RESTART_FILE
    for attempt in range(9):
        process = context.Process(target=start, args=(settings, tmp_path / "killed"))
        process.start()
        if attempt >= 3:  # the others may be killed before they begin
            before = restart.stat().st_mtime_ns if restart.exists() else 0
            while process.is_alive() and not (restart.exists() and restart.stat().st_mtime_ns > before):
                time.sleep(0.001)
        process.join(rng.uniform(0, 0.1) if attempt < 8 else 100)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        status = process.exitcode
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        if restart.exists():
            killed_between.append(load_restart(restart).step)
    assert status == 0
    assert killed_between, "no process was killed with a run behind it"
    print("killed after the restart points of steps", killed_between)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "killed/log.csv").read_text().splitlines())]
    assert steps == list(range(0, 301, 3))
    frames = ase.io.read(tmp_path / f"killed/trajectory.{settings.trajectory}", index=":")
    assert [frame.info["step"] for frame in frames] == steps


@pytest.mark.parametrize("name", ["nve", "bussi", "npt full"])
def test_dies_between_any_two_writes(name: str, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before and after each write of a row, a frame, a restart file; with a torn write after it."""
    settings = settings_of(name, 16, seed)
    start(settings, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    moment = 0
    while True:
        output = tmp_path / str(moment)
        with monkeypatch.context() as patched:
            dying = dies_at(moment)
            writer = dynamics_module.open_trajectory(tmp_path / f"probe.{settings.trajectory}")
            writer.close()
            patched.setattr(type(writer), "write", dying(type(writer).write))
            patched.setattr(dynamics_module.Log, "write", dying(dynamics_module.Log.write))
            for function in ("save_restart", "cut", "mark"):
                patched.setattr(dynamics_module, function, dying(getattr(dynamics_module, function)))
            try:
                start(settings, output)
            except Killed:
                pass
            else:
                break
        if (output / RESTART_FILE).exists() and load_restart(output / RESTART_FILE).step < settings.steps:
            for path in output.glob("[lt]*"):
                with path.open("ab") as file:
                    file.write(b"half a ro")
        start(settings, output)
        assert contents(output) == expected, moment
        moment += 1
    assert moment > 40


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_continued(name: str, seed: int, tmp_path: Path) -> None:
    """Clean stops at restart points give the same bytes, whatever the calculator remembers."""
    settings = settings_of(name, 60, seed)
    start(settings, tmp_path / "whole")
    first = start(settings, tmp_path / "stopped", stop=stop_after(14))
    assert first.interrupted and first.steps_done == 14
    second = start(settings, tmp_path / "stopped", stop=stop_after(21))
    assert second.interrupted and second.steps_done == 35
    last = start(settings, tmp_path / "stopped")
    assert not last.interrupted and last.steps_done == 60
    assert [sample.step for sample in last.samples] == list(range(0, 61, 3))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_stopped_anywhere(seed: int, tmp_path: Path) -> None:
    """Between restart points too, with a calculator that remembers nothing; its last frame gives way."""
    settings = settings_of("langevin", 40, seed)
    run(crystal(), settings, tmp_path / "whole", restart_seconds=0)
    for at in (1, 2, 10, 20, 39):
        output = tmp_path / str(at)
        first = run(crystal(), settings, output, restart_seconds=0, stop=stop_after(at))
        assert first.samples[-1].step == at
        run(crystal(), settings, output, existing="continue", restart_seconds=0)
        assert contents(output) == contents(tmp_path / "whole"), at


def test_extended(seed: int, tmp_path: Path) -> None:
    """A finished run that is given more steps is the run that had them from the beginning."""
    settings = settings_of("npt full", 56, seed)
    start(settings, tmp_path / "whole")
    start(replace(settings, steps=35), tmp_path / "extended")
    start(settings, tmp_path / "extended")
    assert contents(tmp_path / "extended") == contents(tmp_path / "whole")


def test_finished_run_is_not_run_again(seed: int, tmp_path: Path) -> None:
    settings = settings_of("nve", 9, seed)
    first = start(settings, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = start(settings, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert again.samples == first.samples and again.steps_done == 9 and again.ns_per_day > 0
    assert (first.steps_before, again.steps_before) == (0, 9)


def test_settings_that_nothing_reads_may_differ(unfinished: Path) -> None:
    """Earlier versions took, and wrote down, settings that the dynamics do not read; they are refused now."""
    path = unfinished / RESTART_FILE
    saved = load_restart(path)
    save_restart(path, replace(saved, settings={**saved.settings, "thermostat": "bussi", "friction": 3.0}))
    assert start(settings_of("nve", 20, 1), unfinished).steps_done == 20


def test_rarely_written_restart_file_changes_nothing(seed: int, tmp_path: Path) -> None:
    """Restart points are where they are, whether the clock has one written or not."""
    settings = settings_of("bussi", 60, seed)
    start(settings, tmp_path / "often")
    run(crystal(remembers=True), settings, tmp_path / "rarely", restart_seconds=1e9)
    assert contents(tmp_path / "often") == contents(tmp_path / "rarely")


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run of 20 steps that was stopped after 8."""
    start(settings_of("nve", 20, 1), tmp_path / "run", stop=stop_after(8))
    return tmp_path / "run"


def unchanged_when_refused(output: Path, settings: MDSettings, said: str, atoms: Atoms | None = None) -> None:
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(RestartError, match=said):
        run(atoms or crystal(remembers=True), settings, output, existing="continue", identity=None)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_damaged_restart_file(unfinished: Path, rng: np.random.Generator) -> None:
    """Any byte that is changed or missing is noticed, or belongs to nothing; nothing is written."""
    path = unfinished / RESTART_FILE
    whole = path.read_bytes()
    saved = _plain(asdict(load_restart(path)))
    for _ in range(150):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged))
        try:
            found = load_restart(path)
        except RestartError as exc:
            assert str(path) in str(exc) and "--overwrite" in str(exc)
        else:  # a date in zip's directory, say
            assert _plain(asdict(found)) == saved
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        unchanged_when_refused(unfinished, settings_of("nve", 20, 1), "is damaged or not a restart file")
        with pytest.raises(RestartError, match="damaged"):
            require_unused(unfinished)


def test_file_that_is_no_restart_file(unfinished: Path) -> None:
    path = unfinished / RESTART_FILE
    for content in (b"not a zip", _npz(a=np.zeros(3)), _npz(meta=np.frombuffer(b"[]", dtype=np.uint8))):
        path.write_bytes(content)
        unchanged_when_refused(unfinished, settings_of("nve", 20, 1), "is damaged or not a restart file")


def test_restart_file_without_one_of_its_arrays(unfinished: Path) -> None:
    """Also of those that the integrator makes in its first step, and does not miss before."""
    path = unfinished / RESTART_FILE
    with np.load(path) as file:
        whole = dict(file)
    for missing in whole:
        path.write_bytes(_npz(**{name: value for name, value in whole.items() if name != missing}))
        with pytest.raises(RestartError, match="is damaged or not a restart file"):
            load_restart(path)


def test_later_format(unfinished: Path) -> None:
    meta = json.dumps({"format": 99, "mace_fast": "9.0"}).encode()
    (unfinished / RESTART_FILE).write_bytes(_npz(meta=np.frombuffer(meta, dtype=np.uint8)))
    unchanged_when_refused(unfinished, settings_of("nve", 20, 1), "format 99, written by mace_fast 9.0")


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"timestep": 1.0}, "timestep was 2.0 and is now 1.0"),
        ({"ensemble": "nvt"}, "ensemble was nve and is now nvt"),
        ({"seed": 5, "temperature": 10.0}, "temperature was 300.0 and is now 10.0; seed was 1 and is now 5"),
        ({"trajectory": "traj"}, "trajectory was extxyz and is now traj"),
    ],
)
def test_other_settings(changed: dict[str, object], said: str, unfinished: Path) -> None:
    unchanged_when_refused(unfinished, replace(settings_of("nve", 20, 1), **changed), said)  # type: ignore[arg-type]


def test_other_structure(unfinished: Path) -> None:
    moved, larger = crystal(), crystal(3)
    moved.positions[3, 1] += 1e-6
    for atoms in (moved, larger):
        unchanged_when_refused(unfinished, settings_of("nve", 20, 1), "the structure was Cu32 .* and is now Cu", atoms)


def test_other_model(tmp_path: Path) -> None:
    settings = settings_of("nve", 20, 1)
    start(settings, tmp_path, identity={"model": "a.model (12ab)"}, stop=stop_after(8))
    with pytest.raises(RestartError, match=r"the model was a.model \(12ab\) and is now b.model \(34cd\)"):
        start(settings, tmp_path, identity={"model": "b.model (34cd)"})


@pytest.mark.parametrize("name", ["log.csv", "trajectory.extxyz"])
def test_files_that_are_gone_or_shorter(name: str, unfinished: Path) -> None:
    path = unfinished / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    unchanged_when_refused(unfinished, settings_of("nve", 20, 1), f"{name}: has .* bytes, and had")
    path.unlink()
    unchanged_when_refused(unfinished, settings_of("nve", 20, 1), f"{name}: has 0 bytes")


def test_what_is_there_is_not_overwritten(unfinished: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in unfinished.iterdir()}
    settings = settings_of("nve", 20, 1)
    with pytest.raises(RestartError, match="unfinished run .step 8 of 20.*--restart"):
        start(settings, unfinished, "refuse")
    assert {path: path.read_bytes() for path in unfinished.iterdir()} == before
    start(settings, unfinished)
    with pytest.raises(RestartError, match="finished run of 20 steps.*--overwrite"):
        start(settings, unfinished, "refuse")
    for name in ("log.csv", "trajectory.traj", "trajectory.extxyz"):
        (tmp_path / name).write_text("mine")
        for existing in ("refuse", "continue"):
            with pytest.raises(RestartError, match=f"holds {name} of an earlier run"):
                start(settings, tmp_path, existing)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "file").write_text("mine")
    for existing in ("refuse", "continue", "replace"):
        with pytest.raises(RestartError, match="is a file"):
            start(settings, tmp_path / "file", existing)
    assert (tmp_path / "file").read_text() == "mine"


def test_replaced(unfinished: Path, tmp_path: Path) -> None:
    """Nothing of the old run is left, even if the new one writes another format and dies at once."""
    settings = replace(settings_of("nve", 20, 1), trajectory="traj")
    start(settings, tmp_path / "fresh")
    start(settings, unfinished, "replace")
    assert contents(unfinished) == contents(tmp_path / "fresh")


def test_two_processes(unfinished: Path) -> None:
    settings = settings_of("nve", 20, 1)
    before = {path: path.read_bytes() for path in unfinished.iterdir()}
    with locked(unfinished):
        for existing in ("continue", "replace"):
            with pytest.raises(RestartError, match="another process is writing a run there"):
                start(settings, unfinished, existing)
        assert {path: path.read_bytes() for path in unfinished.iterdir()} == before
    start(settings, unfinished)


def test_nothing_is_left_behind(unfinished: Path) -> None:
    """Halves of restart files that killed processes left are cleared away."""
    (unfinished / f".{RESTART_FILE}.0123abcd.part").write_bytes(b"half")
    start(settings_of("nve", 20, 1), unfinished)
    assert sorted(path.name for path in unfinished.iterdir()) == ["log.csv", RESTART_FILE, "trajectory.extxyz"]


def test_time_is_not_counted_twice(seed: int, tmp_path: Path) -> None:
    """The speed that is shown counts the steps of this process alone."""
    shown: list[tuple[int, float]] = []
    settings = settings_of("nve", 30, seed)
    start(settings, tmp_path, stop=stop_after(15))
    start(settings, tmp_path, on_sample=lambda sample, speed: shown.append((sample.step, speed)))
    assert [step for step, _ in shown] == [15, 18, 21, 24, 27, 30]
    assert shown[0][1] == 0 and all(speed > 0 for _, speed in shown[1:])
