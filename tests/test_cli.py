"""The command line: what it prints where, what it writes, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch

from mace_fast import zoo
from mace_fast.cli import main
from mace_fast.loading import load_model, model_dtype
from mace_fast.patch import api
from mace_fast.patch.api import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its converted form, one with a weight that is off, and a structure."""
    path = tmp_path_factory.mktemp("cli")
    model = zoo.build(zoo.small_variants()["base"], seed=1)
    torch.save(model, path / "my.model")
    torch.save(zoo.build(zoo.small_variants()["nonlinear_foundation"]), path / "other.model")
    fast = convert(model, verify=False)
    torch.save(fast, path / "fast.model")
    with torch.no_grad():
        fast.interactions[0].conv_tp_weights.layer0.weight.mul_(1.001)
    torch.save(fast, path / "broken.model")
    (path / "text.model").write_text("not a model")
    ase.io.write(path / "water.xyz", zoo.edge_case_structures([1, 6, 8], cutoff=4.5)["triclinic cell"])
    ase.io.write(path / "iron.xyz", ase.Atoms("Fe2", positions=[[0, 0, 0], [0, 0, 2]]))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    else:
        status = 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The results of a command that must succeed; anything but one JSON object on standard output fails."""
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.mark.parametrize("command", ["convert", "verify", "info", "bench", "md", "relax"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"Example: mace-fast {command}" in out
    assert "--json" in out


@pytest.mark.parametrize("command", ["convert", "verify", "bench", "md", "relax"])
def test_help_shows_the_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that are no values: rich would take their brackets for its markup, and drop them."""
    _, out, _ = run(capsys, command, "--help")
    shown = " ".join(out.replace("│", " ").split())
    expected = ["[default: the model's]", "[default: cuda if there is one, else cpu]"]
    if command == "bench":
        expected += ["[default: 64, 256]", "[default: a crystal of the model's elements]", "[default: 10]"]
    if command == "md":
        expected += ["[default: 1000]", "[default: langevin]"]
    for default in expected:
        assert default in shown


def test_help_says_where_charge_and_spin_are(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("md", "relax"):
        assert "charge=1 spin=2" in run(capsys, command, "--help")[1]


def test_as_a_program(folder: Path) -> None:
    """One run through a fresh interpreter: nothing but JSON on standard output, whatever imports print."""
    command = [sys.executable, "-m", "mace_fast.cli"]
    done = subprocess.run(
        [*command, "info", str(folder / "my.model"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["elements"] == ["H", "C", "O"]


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "info", folder / "my.model")
    assert facts["elements"] == ["H", "C", "O"]
    assert facts["r_max"] == 4.5
    assert facts["heads"] == ["Default"]
    assert facts["dtype"] == "float64"
    assert facts["correlation"] == [2, 2]
    replaced = [module["name"] for module in facts["modules"] if module["status"] == "replace"]
    assert {"interactions.0", "products.0", "interactions.1", "products.1"} <= set(replaced)
    status, out, _ = run(capsys, "info", folder / "my.model")
    assert status == 0 and "H C O" in out and "interactions.1" in out


@pytest.mark.parametrize("variant", ["nonlinear_foundation", "embeddings", "layers1", "mace", "correlation1"])
def test_info_of_every_kind(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(zoo.build(zoo.small_variants()[variant]), tmp_path / "a.model")
    assert run_json(capsys, "info", tmp_path / "a.model")["modules"]
    assert run_json(capsys, "info", tmp_path / "a.model")["class"] in ("MACE", "ScaleShiftMACE")


@pytest.mark.parametrize("command", ["md", "relax"])
def test_the_charge_of_one_cell_is_not_that_of_several(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(zoo.build(zoo.small_variants()["embeddings"]), tmp_path / "a.model")
    atoms = zoo.water(1)
    monkeypatch.chdir(tmp_path)
    made = []
    for charge in (1, 0):
        atoms.info = {"charge": charge, "spin": 1}
        ase.io.write("a.xyz", atoms)
        options = ("a.xyz", "-m", "a.model", "--no-verify", "--device", "cpu", "-o", f"out{charge}", "--steps", 1)
        made.append(run(capsys, command, *options, "--repeat", 2))
    assert made[0][0] == 2 and "makes 8 copies" in made[0][2] and not Path("out1").exists()
    assert "copies" not in made[1][2] and Path("out0").exists()


def test_info_says_where_charge_and_spin_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(zoo.build(zoo.small_variants()["embeddings"]), tmp_path / "a.model")
    assert run_json(capsys, "info", tmp_path / "a.model")["further_inputs"] == ["total_charge", "total_spin"]
    _, out, _ = run(capsys, "info", tmp_path / "a.model")
    assert "total_charge (charge=)" in out and "total_spin (spin=)" in out


def test_convert_verifies_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "fast.model"
    result = run_json(capsys, "convert", folder / "my.model", "-o", output)
    assert result["verified"] and result["report"]["passed"]
    atoms = ase.io.read(folder / "water.xyz")
    original, fast = load_model(folder / "my.model"), load_model(output)
    graph = zoo.graph(atoms, original)
    assert float(fast(zoo.copy_graph(graph))["energy"]) == pytest.approx(float(original(graph)["energy"]), rel=1e-12)


def test_convert_to_float32(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "fast.model"
    status, out, _ = run(capsys, "convert", folder / "my.model", "-o", output, "--dtype", "float32", "--no-verify")
    assert status == 0 and "not verified" in out and str(output) in out.replace("\n", "")
    assert model_dtype(load_model(output)) == torch.float32


def test_convert_does_not_overwrite(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mine.model"
    output.write_bytes(b"precious")
    arguments = ("convert", folder / "my.model", "-o", output, "--no-verify")
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "--force" in err and output.read_bytes() == b"precious"
    assert run(capsys, *arguments, "--force")[0] == 0
    assert load_model(output) is not None


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("failed writing file data/7")])
def test_convert_leaves_nothing_when_writing_fails(
    error: Exception, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own writer raises a RuntimeError on a full disk."""

    def fail(model: object, path: Path) -> None:
        path.write_bytes(b"half a model")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    arguments = ("convert", folder / "my.model", "-o", tmp_path / "fast.model", "--no-verify")
    status, _, err = run(capsys, *arguments)
    assert status == 1 and "error:" in err and str(error) in err and "Make room" in err
    assert list(tmp_path.iterdir()) == []


def test_convert_asks_first_whether_it_can_write(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a verification of minutes. /proc takes no files, not even from root."""
    monkeypatch.setattr(api, "convert", lambda model, verify: pytest.fail("it was converted first"))
    status, _, err = run(capsys, "convert", folder / "my.model", "-o", "/proc/fast.model")
    assert status == 1 and "no file can be written in /proc" in err and "Traceback" not in err


def test_convert_writes_nothing_that_is_not_equal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = load_model(folder / "broken.model")
    monkeypatch.setattr(api, "convert", lambda model, verify: broken)
    status, out, err = run(capsys, "convert", folder / "my.model", "-o", tmp_path / "fast.model", "--json")
    assert status == 1 and out == "" and "error:" in err
    assert list(tmp_path.iterdir()) == []


def test_verify_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("verify", folder / "my.model", folder / "fast.model", "-s", folder / "water.xyz")
    report = run_json(capsys, *arguments)
    assert report["passed"] and [s["num_atoms"] for s in report["structures"]] == [8]


def test_verify_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("verify", folder / "my.model", folder / "broken.model", "-s", folder / "water.xyz")
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 1 and "does not compute" in err
    assert json.loads(out)["passed"] is False
    status, out, _ = run(capsys, *arguments)
    assert status == 1 and "FAILED" in out


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("fast", "my", "give the converted or patched model second"),
        ("my", "my", "give the converted or patched model second"),
        ("other", "fast", "not the same model"),
    ],
)
def test_verify_of_two_files_that_do_not_belong_together(
    first: str, second: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "verify", folder / f"{first}.model", folder / f"{second}.model")
    assert status == 2 and said in " ".join(err.replace("│", " ").split()) and "Traceback" not in err


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", folder / "my.model", "-n", "8", "--steps", "2", "--no-verify")
    result = run_json(capsys, *arguments)
    (row,) = result["results"]
    assert row["atoms"] == 8 and row["mace_fast_ms"] > 0 and row["mace_torch_ms"] > 0
    assert row["largest_force_difference"] < 1e-8 * max(row["largest_force"], 1)
    structured = run_json(capsys, "bench", folder / "my.model", "-s", folder / "water.xyz", "--steps", "1")
    assert structured["results"][0]["atoms"] == 8
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "mace-torch" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("info", "{}/text.model"), "a text file"),
        (("info", "{}/nowhere.model"), "no such file"),
        (("convert", "{}/nowhere.model", "-o", "{}/out.model"), "no such file"),
        (("convert", "{}/my.model", "-o", "{}/no/folder/out.model"), "there is no directory"),
        (("convert", "{}/my.model", "-o", "{}"), "is a directory"),
        (("md", "{}/nowhere.cif", "-m", "{}/my.model"), "no such structure file"),
        (("md", "{}/text.model", "-m", "{}/my.model"), "ASE cannot read it"),
        (("relax", "{}/nowhere.cif", "-m", "{}/my.model"), "no such structure file"),
        (("relax", "{}/iron.xyz", "-m", "{}/my.model", "--no-verify", "-o", "{}/iron"), "does not know Fe"),
        (("md", "{}/iron.xyz", "-m", "{}/my.model", "--no-verify", "-o", "{}/iron"), "does not know Fe"),
        (("verify", "{}/text.model"), "a text file"),
    ],
)
def test_errors_are_one_line_and_status_1(
    arguments: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    status, out, err = run(capsys, *(argument.format(folder) for argument in arguments))
    assert status == 1 and out == ""
    assert said in err and "error:" in err and "Traceback" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("info",),
        ("convert", "a"),
        ("md", "x.cif"),
        ("md", "x.cif", "-m", "y", "--steps", "0"),
        ("md", "x.cif", "-m", "y", "--temperature", "-1"),
        ("md", "x.cif", "-m", "y", "--temperature", "nan"),
        ("md", "x.cif", "-m", "y", "--temperature", "0", "--thermostat", "bussi"),
        ("md", "x.cif", "-m", "y", "--ensemble", "nvp"),
        ("md", "x.cif", "-m", "y", "--seed", "-1"),
        ("md", "x.cif", "-m", "y", "--restart", "--overwrite"),
        ("relax", "x.cif"),
        ("relax", "x.cif", "-m", "y", "--fmax", "0"),
        ("relax", "x.cif", "-m", "y", "--cell", "round"),
        ("relax", "x.cif", "-m", "y", "--pressure", "5"),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("md", ("--pressure", "10", "--cell", "full"), "pressure=10.0 does nothing with nvt and thermostat langevin"),
        ("md", ("--pressure", "0.0001"), "--pressure does nothing here: it is of npt"),
        ("md", ("--ensemble", "nve", "--thermostat", "bussi"), "thermostat=bussi does nothing with nve: it is of nvt"),
        ("md", ("--ensemble", "nve", "--thermostat", "langevin"), "--thermostat does nothing here"),
        ("md", ("--thermostat", "bussi", "--friction", "3"), "friction=3.0 does nothing with nvt and thermostat bussi"),
        ("md", ("--thermostat-time", "100"), "--thermostat-time does nothing here"),
        ("bench", ("--atoms", "30", "--structure", "cu.cif"), "--atoms does nothing with --structure"),
    ],
)
def test_options_without_effect_are_refused(
    command: str, options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("bench", "y") if command == "bench" else ("md", "x.cif", "-m", "y")
    status, _, err = run(capsys, *arguments, *options)
    assert status == 2 and said in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("options", [("--head", "surface"), ("--device", "mps")])
def test_arguments_that_the_model_refuses(
    options: tuple[str, str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("md", folder / "water.xyz", "-m", folder / "my.model", "--no-verify", "-o", tmp_path / "out")
    status, _, err = run(capsys, *command, *options)
    assert status == 2 and options[1] in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_gpu_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run(capsys, "verify", folder / "my.model", "--device", "cuda")
    assert status == 1 and "device='cuda'" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.startswith("mace-fast ")
