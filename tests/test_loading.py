"""Loading: what comes out of good files and names, and what is said about bad ones."""

from __future__ import annotations

import copy
import re
import sys
import types
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mace.calculators import foundations_models
from mace.modules import blocks

from mace_fast import zoo
from mace_fast.errors import MissingToolError, ModelFileError, UnsupportedModuleError
from mace_fast.loading import (
    load_model,
    model_dtype,
    public_models,
    require_energy_model,
    resolve_device,
    resolve_dtype,
)
from mace_fast.patch.api import convert


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return zoo.build(zoo.small_variants()["base"], seed=3)


@pytest.fixture
def model_file(model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "good.model"
    torch.save(model, path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a download that fails as one without a network does. Returns the cache."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(foundations_models, "_urlretrieve_with_timeout", refuse)
    return tmp_path / "cache" / "mace"


def energy(model: torch.nn.Module) -> float:
    atoms = zoo.edge_case_structures([1, 6, 8], cutoff=4.5)["triclinic cell"]
    return float(model(zoo.graph(atoms, model))["energy"])


@pytest.mark.parametrize("dtype", [None, "", "float32", torch.float64])
def test_file(model: torch.nn.Module, model_file: Path, dtype: str | torch.dtype | None) -> None:
    default = torch.get_default_dtype()
    loaded = load_model(model_file, "cpu", dtype)
    assert torch.get_default_dtype() == default
    assert not loaded.training
    assert model_dtype(loaded) == (torch.float32 if dtype == "float32" else torch.float64)
    assert energy(loaded) == pytest.approx(energy(model), rel=1e-5 if dtype == "float32" else 1e-14)


def test_converted_file(model: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(convert(model, verify=False), tmp_path / "fast.model")
    assert energy(load_model(tmp_path / "fast.model")) == pytest.approx(energy(model), rel=1e-12)


def test_module_is_returned_or_copied_never_changed(model: torch.nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    assert load_model(model) is model
    assert load_model(model, "cpu", "float64") is model
    headless = copy.deepcopy(model)
    del headless.heads
    assert load_model(headless).heads == ["Default"] and "heads" not in headless.__dict__
    single = load_model(model, "cpu", "float32")
    assert single is not model and model_dtype(single) == torch.float32
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# What pickles of earlier mace-torch versions do not have, by the kind of module that has it today.
_ADDED_SINCE = {
    "ScaleShiftMACE": ["heads", "lammps_mliap", "apply_cutoff", "edge_irreps", "use_reduced_cg", "use_so3"]
    + ["use_agnostic_product", "use_last_readout_only", "use_edge_irreps_first"],
    "RealAgnosticResidualInteractionBlock": ["cueq_config", "oeq_config", "edge_irreps"],
    "reshape_irreps": ["cueq_config"],
    "EquivariantProductBasisBlock": ["cueq_config", "oeq_config", "use_agnostic_product"],
    "RadialEmbeddingBlock": ["apply_cutoff"],
    "NonLinearReadoutBlock": ["num_heads"],
}


def test_old_pickle(model: torch.nn.Module, tmp_path: Path) -> None:
    """A file without what mace-torch has added since its first versions still loads, and converts."""
    old = copy.deepcopy(model)
    for module in old.modules():
        for name in _ADDED_SINCE.get(type(module).__name__, []):
            module.__dict__.pop(name, None)
    torch.save(old, tmp_path / "old.model")
    loaded = load_model(tmp_path / "old.model")
    assert loaded.heads == ["Default"]
    assert energy(loaded) == energy(model)
    assert energy(convert(loaded, verify=False)) == pytest.approx(energy(model), rel=1e-12)


def write_text(path: Path, model: torch.nn.Module) -> None:
    path.write_text("elements: H C O\nr_max: 4.5\n")


def write_npz(path: Path, model: torch.nn.Module) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.zeros(3))


def write_bytes(path: Path, model: torch.nn.Module) -> None:
    path.write_bytes(b"\x7fELF" + bytes(range(200)))


def write_state_dict(path: Path, model: torch.nn.Module) -> None:
    torch.save(model.state_dict(), path)


def write_checkpoint(path: Path, model: torch.nn.Module) -> None:
    torch.save({"model": model.state_dict(), "optimizer": {}, "lr_scheduler": {}}, path)


def write_torchscript(path: Path, model: torch.nn.Module) -> None:
    torch.jit.script(torch.nn.Linear(3, 2)).save(path)


def write_other_module(path: Path, model: torch.nn.Module) -> None:
    torch.save(torch.nn.Linear(3, 2), path)


def write_tensor(path: Path, model: torch.nn.Module) -> None:
    torch.save(torch.zeros(3), path)


def write_removed_class(path: Path, model: torch.nn.Module) -> None:
    """A block that an earlier mace-torch had: the class is gone when the file is read."""
    gone = type("AgnosticNonlinearInteractionBlock", (torch.nn.Module,), {"__module__": blocks.__name__})
    blocks.AgnosticNonlinearInteractionBlock = gone
    try:
        torch.save(gone(), path)
    finally:
        del blocks.AgnosticNonlinearInteractionBlock


def write_missing_package(path: Path, model: torch.nn.Module) -> None:
    package = types.ModuleType("a_package_that_is_not_here")
    package.Block = type("Block", (torch.nn.Module,), {"__module__": package.__name__})  # type: ignore[attr-defined]
    sys.modules[package.__name__] = package
    try:
        torch.save(package.Block(), path)
    finally:
        del sys.modules[package.__name__]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_text, "a text file"),
        (write_npz, "NumPy archive"),
        (write_bytes, "not a torch file"),
        (write_state_dict, "state dict"),
        (write_checkpoint, "training checkpoint"),
        (write_torchscript, "TorchScript"),
        (write_other_module, "Linear, not a MACE model"),
        (write_tensor, "Tensor, not a MACE model"),
        (write_removed_class, "AgnosticNonlinearInteractionBlock"),
        (write_missing_package, "a_package_that_is_not_here"),
        (lambda path, model: path.touch(), "is empty"),
        (lambda path, model: path.mkdir(), "is a directory"),
    ],
)
def test_wrong_files(
    model: torch.nn.Module, tmp_path: Path, write: Callable[[Path, torch.nn.Module], None], said: str
) -> None:
    path = tmp_path / "wrong.model"
    write(path, model)
    with pytest.raises(ModelFileError, match=said) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_file_saved_from_a_gpu_says_how_to_move_it(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled parts in a pickle go back to the device that they were on; torch's advice, map_location, is what was
    given."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False. Please use "
            "torch.load with map_location=torch.device('cpu') to map your storages to the CPU."
        )

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelFileError, match=r"good\.model: was saved from a GPU.*--save_cpu") as caught:
        load_model(model_file)
    assert "torch.save(torch.load(path, weights_only=False).cpu(), path)" in str(caught.value)
    assert "damaged" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelFileError, match="is not a MACE model, or is damaged"):
        load_model(model_file)


def test_truncated_anywhere(model_file: Path, rng: np.random.Generator) -> None:
    whole = model_file.read_bytes()
    # Where the archive of a compiled part ends, what is left of the file ends like a complete archive.
    ends = [match.end() for match in re.finditer(rb"PK\x05\x06.{18}", whole, flags=re.DOTALL)][:2]
    assert len(ends) == 2
    for length in (30, len(whole) // 2, len(whole) - 1, *ends, int(rng.integers(30, len(whole)))):
        model_file.write_bytes(whole[:length])
        with pytest.raises(ModelFileError, match=f"{model_file}: is truncated"):
            load_model(model_file)


def test_missing_file_lists_public_names() -> None:
    with pytest.raises(ModelFileError, match=r"nowhere\.model: no such file.*medium-mpa-0.*off23-medium"):
        load_model("nowhere.model")


@pytest.mark.parametrize("name", ["small", "medium-mpa-0", "mh-1", "off23-medium"])
def test_name_without_network(name: str, no_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = public_models()[name]
    with pytest.raises(ModelFileError) as caught:
        load_model(name)
    for part in (name, public.url, str(public.cached_as), "Name or service not known"):
        assert part in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["medium-mpa-0", "off23-small"])
def test_name_in_the_cache(
    name: str, model: torch.nn.Module, no_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_network.mkdir(parents=True)
    torch.save(model, public_models()[name].cached_as)
    assert energy(load_model(name)) == energy(model)
    assert capsys.readouterr().out == ""


def test_name_wins_over_a_file_and_a_path_does_not(
    model_file: Path, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_file.parent)
    model_file.rename("small")
    with pytest.raises(ModelFileError, match="download failed"):
        load_model("small")
    assert model_dtype(load_model("./small")) == torch.float64
    assert model_dtype(load_model(Path("small"))) == torch.float64


def test_energy_models_only(model: torch.nn.Module) -> None:
    assert require_energy_model(model) is model
    with pytest.raises(UnsupportedModuleError, match="Linear is not an energy model"):
        require_energy_model(torch.nn.Linear(2, 2))


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingToolError, match=r"device='cuda'.*use device='cpu'"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MissingToolError, match="has 1 CUDA device"):
        resolve_device("cuda:3")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("device", ["mps", "nonsense"])
def test_device_that_has_no_kernels(device: str) -> None:
    with pytest.raises(ValueError, match=device):
        resolve_device(device)


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "double"])
def test_dtype_that_models_do_not_have(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="float32"):
        resolve_dtype(dtype)
