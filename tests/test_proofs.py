"""Proofs that are kept: a model is proven once on a machine, and again as soon as anything about it is different."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mace_fast.calculators.models as models_module
from mace_fast import zoo
from mace_fast.calculators import MACEFastCalculator, proofs
from mace_fast.cli.running import make_calculator
from mace_fast.errors import CacheError, VerificationError
from mace_fast.kernels.build import default_cache_dir
from mace_fast.loading import load_model
from mace_fast.verification import EquivalenceReport, QuantityRow


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory without proofs for each test; kernels that are compiled already are linked."""
    directory = tmp_path / "cache"
    directory.mkdir()
    for entry in default_cache_dir().glob("c*-*"):  # cpu-, cuda-
        (directory / entry.name).symlink_to(entry)
    monkeypatch.setenv("MACE_FAST_CACHE", str(directory))
    return directory


@pytest.fixture
def model() -> torch.nn.Module:
    return zoo.build(zoo.small_variants()["base"], seed=3, dtype=torch.float32)


@pytest.fixture
def path(model: torch.nn.Module, tmp_path: Path) -> Path:
    """The model's file."""
    torch.save(model, tmp_path / "my.model")
    return tmp_path / "my.model"


def report(passed: bool) -> EquivalenceReport:
    row = QuantityRow("stress", "energy", "float64", "water", 1.0, 1e-15, 0.0, 1e-12, passed)
    return EquivalenceReport(reference="MACE", candidate="MACE", rows=[row])


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compared, by comparisons that pass without being made."""
    made: list[str] = []

    def comparison(what: str) -> Callable[..., EquivalenceReport]:
        return lambda *_: made.append(what) or report(passed=True)  # type: ignore[func-returns-value]

    monkeypatch.setattr(models_module, "verify_converted", comparison("converted"))
    monkeypatch.setattr(models_module, "verify_frozen", comparison("frozen"))
    return made


BOTH = ["converted", "frozen"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_model_is_proven_once(path: Path, device: str) -> None:
    """The comparisons themselves, and their reports on disk."""
    first = MACEFastCalculator(path, device=device).proofs
    second = MACEFastCalculator(path, device=device).proofs
    assert [(proof.what, proof.earlier) for proof in first] == [("converted", False), ("frozen", False)]
    assert [(proof.what, proof.earlier) for proof in second] == [("converted", True), ("frozen", True)]
    for before, after in zip(first, second, strict=True):
        assert before.report == after.report and before.report is not None
        found = json.loads(before.report.read_text())
        assert found["passed"] is True and found["rows"]


def test_the_content_of_a_file_counts_and_not_its_name(path: Path, compared: list[str]) -> None:
    copied = shutil.copy(path, path.with_name("other.model"))
    for given in (path, str(path), copied, [path, copied], str(path.with_name("*.model"))):
        MACEFastCalculator(given)
    assert compared == BOTH
    assert [proof.what for proof in MACEFastCalculator(path, frozen=False).proofs] == ["converted"]
    assert compared == BOTH


def changed_weight(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    return {}


def changed_attribute(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    model.note = "another"
    return {}


def other_dtype(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"default_dtype": "float64"}


def other_version(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(proofs, "describe_environment", lambda device: {"torch": "1"})
    return {}


def other_code(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(proofs, "_code", lambda: "edited")
    return {}


def other_compiler(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(proofs, "toolchain", lambda device: "another")
    return {}


@pytest.mark.parametrize(
    "change", [changed_weight, changed_attribute, other_dtype, other_version, other_code, other_compiler]
)
def test_what_is_different_is_proven_again(
    change: Callable[..., dict[str, Any]],
    model: torch.nn.Module,
    path: Path,
    compared: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(2):
        MACEFastCalculator(path)
    assert compared == BOTH
    settings = change(model, monkeypatch)
    torch.save(model, path)
    MACEFastCalculator(path, **settings)
    assert compared == BOTH * 2


def test_threads_do_not_matter(path: Path, compared: list[str]) -> None:
    threads = torch.get_num_threads()
    MACEFastCalculator(path)
    torch.set_num_threads(threads + 1)
    try:
        MACEFastCalculator(path)
    finally:
        torch.set_num_threads(threads)
    assert compared == BOTH


def test_a_failed_proof_is_not_kept(path: Path, compared: list[str], cache: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_module, "verify_converted", lambda *_: report(passed=False))
        for _ in range(2):
            with pytest.raises(VerificationError):
                MACEFastCalculator(path)
    assert not list(cache.glob("proof*"))
    MACEFastCalculator(path)
    assert compared == BOTH


class Elsewhere(torch.nn.Linear):
    """A module whose code no version tells."""


def no_change(module: torch.nn.Module, inputs: object, output: object) -> None:
    """A hook, which a file holds by its name alone."""


def with_hook(model: torch.nn.Module) -> None:
    model.interactions[0].register_forward_hook(no_change)  # type: ignore[index,union-attr]


def with_class(model: torch.nn.Module) -> None:
    model.extra = Elsewhere(1, 1)


def with_method(model: torch.nn.Module) -> None:
    model.interactions[0].forward = no_change  # type: ignore[index,union-attr]


@pytest.mark.parametrize("strange", [with_hook, with_class, with_method])
def test_code_that_no_file_holds_is_not_covered(
    strange: Callable[[torch.nn.Module], None], model: torch.nn.Module
) -> None:
    assert proofs.is_covered(model)
    strange(model)
    assert not proofs.is_covered(model)


def test_modules_and_files_that_change_meanwhile_are_proven_each_time(
    model: torch.nn.Module, path: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded_while_it_is_written(source: Path, *settings: Any) -> torch.nn.Module:
        found = load_model(source, *settings)
        model.note = f"{len(compared)}"
        torch.save(model, path)
        return found

    once = MACEFastCalculator(models=model)
    monkeypatch.setattr(models_module, "load_model", loaded_while_it_is_written)
    for calculator in (once, MACEFastCalculator(path), MACEFastCalculator(path)):
        assert [(proof.earlier, proof.report) for proof in calculator.proofs] == [(False, None)] * 2
    monkeypatch.setattr(models_module, "load_model", load_model)
    monkeypatch.setattr(models_module, "is_covered", lambda model: False)
    assert MACEFastCalculator(path).proofs[0].report is None
    assert compared == BOTH * 4


def test_a_damaged_proof_is_made_again(path: Path, compared: list[str], caplog: pytest.LogCaptureFixture) -> None:
    first, _ = MACEFastCalculator(path).proofs
    assert first.report is not None
    first.report.write_text("{}")
    with caplog.at_level(logging.WARNING):
        MACEFastCalculator(path)
    assert "is damaged" in caplog.text
    assert compared == [*BOTH, "converted"]
    assert json.loads(first.report.read_text())["passed"] is True


def test_verify_now_never_and_nonsense(path: Path, compared: list[str]) -> None:
    for _ in range(2):
        assert [proof.earlier for proof in MACEFastCalculator(path, verify=True).proofs] == [False, False]
    assert compared == BOTH * 2
    assert MACEFastCalculator(path, verify=False).proofs == []
    assert [proof.earlier for proof in MACEFastCalculator(path, verify="once").proofs] == [True, True]
    assert compared == BOTH * 2
    with pytest.raises(ValueError, match="verify='twice'"):
        MACEFastCalculator(path, verify="twice")  # type: ignore[arg-type]


def test_the_command_line_says_what_is_proven(
    path: Path, compared: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for said in ("frozen: is proven (", "frozen: was proven on this machine before ("):
        calculator = make_calculator(str(path), "cpu", None, None, no_verify=False)
        assert said in capsys.readouterr().err and len(calculator.proofs) == 2
    assert make_calculator(str(path), "cpu", None, None, no_verify=True).proofs == []
    assert compared == BOTH


def test_verification_is_on_by_default() -> None:
    assert MACEFastCalculator.__init__.__kwdefaults__["verify"] == "once"


def test_a_cache_that_cannot_be_used_is_said(path: Path, compared: list[str], cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("a file")
    with pytest.raises(CacheError, match="MACE_FAST_CACHE"):
        MACEFastCalculator(path)
