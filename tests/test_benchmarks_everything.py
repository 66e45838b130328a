"""The driver of all benchmarks: what it starts exists, runs side by side, and what was measured is not lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import everything

PROGRAM = """
import json, sys, time
where, seconds, status = sys.argv[-1], float(sys.argv[1]), int(sys.argv[2])
json.dump({{"command": "{name}", "device": sys.argv[3], "torch": "2", "rows": [{{"ms": seconds}}]}}, open(where, "w"))
time.sleep(seconds)
print("what went wrong")
sys.exit(status)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Benchmarks that sleep: SECONDS STATUS DEVICE."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("a", "b"):
        (package / f"{name}.py").write_text(PROGRAM.format(name=name))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def test_rows_of_all_commands_are_one_file(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        everything, "COMMANDS", {"x": (("a", "0", "0", "H"), ("b", "1", "0", "H")), "y": (("a", "2", "0", "H"),)}
    )
    assert everything.run_all(["x", "y"], "h100", fake, 2, None) == []
    merged = json.loads((fake / "h100-x.json").read_text())
    assert merged["rows"] == [{"ms": 0.0, "command": "a"}, {"ms": 1.0, "command": "b"}] and merged["device"] == "H"
    assert json.loads((fake / "h100-y.json").read_text())["rows"] == [{"ms": 2.0}]


def test_failures_and_what_was_stopped_are_told_and_rows_kept(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {"x": (("a", "0", "3", "H"), ("b", "60", "0", "H"), ("a", "0", "0", "H"), ("b", "60", "0", "H"))}
    monkeypatch.setattr(everything, "COMMANDS", commands)
    failed, *others = everything.run_all(["x"], "h100", fake, 2, 5.0)
    assert failed.startswith("failed, see ") and "what went wrong" in (fake / "h100-x-0.log").read_text()
    assert len(others) == 2 and all("stopped" in line for line in others)
    assert [row["ms"] for row in json.loads((fake / "h100-x.json").read_text())["rows"]] == [0.0, 60.0, 0.0, 60.0]


def test_different_devices_are_not_mixed(tmp_path: Path) -> None:
    for number, device in enumerate(("H100", "H200")):
        (tmp_path / f"{number}.json").write_text(
            json.dumps({"command": "", "device": device, "torch": "2", "rows": []})
        )
    with pytest.raises(ValueError, match="H200"):
        everything.merge([tmp_path / "0.json", tmp_path / "1.json"])


@pytest.mark.parametrize("name", everything.COMMANDS)
def test_every_command_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module's own parser takes the arguments; --help ends it before anything is measured."""
    import importlib

    for module, *arguments in everything.COMMANDS[name]:
        monkeypatch.setattr(sys, "argv", [module, *arguments, "--output", "x.json", "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"benchmarks.{module}").main()
        assert ended.value.code == 0
