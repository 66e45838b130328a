"""The one place that turns a file, a public model's name or a module into a MACE model, or says why it
cannot.

Model files are pickles: loading one runs code that the file contains, so load only files that you trust.
"""

from __future__ import annotations

import contextlib
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mace_fast._mace  # noqa: F401  (before every other import of mace)

# isort: split
from mace.calculators import foundations_models
from mace.modules import MACE, AtomicDielectricMACE, AtomicDipolesMACE, EnergyDipolesMACE, ScaleShiftMACE
from mace.tools.utils import get_cache_dir

from mace_fast.copying import copy_module
from mace_fast.errors import MissingToolError, ModelFileError, UnsupportedModuleError

_DTYPES = {"float32": torch.float32, "float64": torch.float64}

# Attributes that models pickled by mace-torch <= 0.3.6 lack and that today's code reads without a fallback.
_ADDED_ATTRIBUTES = {"heads": ("Default",)}

# What mace-torch's run_train writes into its checkpoints/ folder: weights and optimizer, no architecture.
_TRAINING_CHECKPOINT_KEYS = {"model", "optimizer"}


@dataclass(frozen=True)
class PublicModel:
    """A model that mace-torch knows how to download: where it comes from, where it is kept, and how to
    fetch it.
    """

    name: str
    url: str
    cached_as: Path
    fetch: Callable[[], str | torch.nn.Module]


def public_models() -> dict[str, PublicModel]:
    """Public energy models by the name that is accepted wherever a file is, from the installed mace-torch's
    own lists.

    The names of the MACE-MP family are mace-torch's (``small``, ``medium-mpa-0``, ``mh-1`` ...);
    MACE-OFF23's are ``off23-small``, ``off23-medium``, ``off23-large``.
    """
    cache = Path(get_cache_dir())
    models = {}
    for name, url in foundations_models.mace_mp_urls.items():
        file_name = "".join(c for c in os.path.basename(url) if c.isalnum() or c == "_")
        fetch = partial(foundations_models.download_mace_mp_checkpoint, name)
        models[name] = PublicModel(name, url, cache / file_name, fetch)
    for size, url in foundations_models.mace_off_urls.items():
        # mace_off has no function that only downloads, so the module is taken as it loads it, on the CPU.
        fetch = partial(foundations_models.mace_off, model=size, device="cpu", return_raw_model=True)
        models[f"off23-{size}"] = PublicModel(f"off23-{size}", url, cache / os.path.basename(url), fetch)
    return models


def resolve_device(device: str | torch.device) -> torch.device:
    """``device`` as a :class:`torch.device` that exists on this machine.

    Raises:
        MissingToolError: a CUDA device is asked for and torch sees none, or not that many.
        ValueError: neither a CPU nor a CUDA device, the two that mace_fast has kernels for.
    """
    try:
        resolved = torch.device(device)
    except RuntimeError as exc:
        raise ValueError(f"device={device!r} is not a device; use 'cpu', 'cuda' or 'cuda:1'") from exc
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise ValueError(f"device={device!r}: mace_fast has kernels for 'cpu' and 'cuda' only")
    if not torch.cuda.is_available():
        build = f"this torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        remedy = "check that nvidia-smi lists a GPU and that its driver is recent enough for that CUDA version"
        if torch.version.cuda is None:
            build = f"this torch {torch.__version__} is built without CUDA"
            remedy = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        raise MissingToolError(
            f"device={str(device)!r} was asked for and torch sees no CUDA device: {build}; "
            f"{remedy}, or use device='cpu'"
        )
    if resolved.index is not None and resolved.index >= torch.cuda.device_count():
        raise MissingToolError(f"device={str(device)!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """``"float32"``, ``"float64"`` or the torch dtypes; None and ``""`` (mace-torch's "as the model is")
    give None.

    Raises:
        ValueError: any other dtype.
    """
    if dtype is None or dtype == "":
        return None
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: a MACE model computes in 'float32' or 'float64'")
    return resolved


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """The floating-point dtype of a model's parameters."""
    return next(model.parameters()).dtype


def load_model(
    source: str | os.PathLike[str] | torch.nn.Module,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> torch.nn.Module:
    """A MACE model, original or converted, in eval mode on ``device``.

    Args:
        source: the path of a ``.model`` file, a public model's name (:func:`public_models`), or a module. A
            name wins over a file of the same name; write ``./small`` for the file. A module is never
            changed: it is returned as it is where device and dtype already fit, else a copy.
        device: where its tensors are put.
        dtype: float32 or float64; None keeps the file's.

    Raises:
        ModelFileError: the file is missing, truncated or something else than a model; a download failed.
        MissingToolError: ``device`` does not exist here.
        ValueError: a device or dtype that no model has.
    """
    target_device, target_dtype = resolve_device(device), resolve_dtype(dtype)
    if isinstance(source, torch.nn.Module):
        model = _check_module(source, f"the given {type(source).__name__}")
        same_device = all(_is_on(t, target_device) for t in (*model.parameters(), *model.buffers()))
        complete = all(name in model.__dict__ for name in _ADDED_ATTRIBUTES)
        if same_device and complete and target_dtype in (None, model_dtype(model)):
            return model
        model = copy_module(model)
    else:
        # A loaded file is ours alone; eval mode because nobody trains on what a calculator or a converter
        # loads.
        model = _load_file_or_name(source, target_device).eval()
    _add_missing_attributes(model)
    return model.to(device=target_device, dtype=target_dtype)


def model_file(source: str | os.PathLike[str]) -> Path:
    """The file that :func:`load_model` reads for a path or a public model's name, which may not be there yet."""
    public = public_models().get(source) if isinstance(source, str) else None
    return Path(source).expanduser() if public is None else public.cached_as


def require_energy_model(model: torch.nn.Module) -> MACE:
    """``model`` if it is a :class:`MACE` or :class:`ScaleShiftMACE`, the two that give energies and forces
    alone.

    Raises:
        UnsupportedModuleError: dipole, polarizability, long-range and other models.
    """
    if type(model) not in (MACE, ScaleShiftMACE):
        raise UnsupportedModuleError(
            f"{type(model).__name__} is not an energy model that mace_fast evaluates (MACE, ScaleShiftMACE); "
            "use mace.calculators.MACECalculator for it"
        )
    return model


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _load_file_or_name(source: str | os.PathLike[str], device: torch.device) -> torch.nn.Module:
    public = public_models().get(source) if isinstance(source, str) else None
    if public is None:
        path = Path(source).expanduser()
        if not path.exists():
            known = ", ".join(public_models())
            raise ModelFileError(f"{source}: no such file, and not the name of a public model ({known})")
        return _load_file(path, device)
    fetched = _fetch(public)
    if isinstance(fetched, torch.nn.Module):
        return _check_module(fetched, public.name)
    return _load_file(Path(fetched), device)


def _fetch(public: PublicModel) -> str | torch.nn.Module:
    try:
        # mace-torch reports its download with print; standard output belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            return public.fetch()
    except (OSError, RuntimeError) as exc:
        cause = exc.__cause__ or exc
        if public.cached_as.is_file():
            raise ModelFileError(
                f"{public.name}: the cached file {public.cached_as} cannot be loaded "
                f"({_one_line(cause)}); delete it to "
                "download it again"
            ) from exc
        raise ModelFileError(
            f"{public.name}: not in the cache and the download failed ({_one_line(cause)}). "
            "Without a network, fetch "
            f"{public.url} on another machine and copy it to {public.cached_as}"
        ) from exc


def _load_file(path: Path, device: torch.device) -> torch.nn.Module:
    _refuse_other_files(path)
    try:
        # A model file is a pickled module, which weights_only refuses by design.
        loaded = torch.load(path, map_location=device, weights_only=False)
    except ModuleNotFoundError as exc:
        raise ModelFileError(
            f"{path}: needs the Python package {exc.name!r}, which is not installed here (pip install {exc.name})"
        ) from exc
    except AttributeError as exc:
        raise ModelFileError(
            f"{path}: refers to a class that the installed mace-torch does not have ({_one_line(exc)}); "
            "load it with the "
            "mace-torch that wrote it"
        ) from exc
    except Exception as exc:  # unpickling runs the file's own code and can raise anything
        if "CUDA" in str(exc) and not torch.cuda.is_available():
            raise ModelFileError(
                f"{path}: was saved from a GPU with compiled parts that only load where there is "
                "one; on that machine run "
                "torch.save(torch.load(path, weights_only=False).cpu(), path), or train with --save_cpu"
            ) from exc
        raise ModelFileError(f"{path}: is not a MACE model, or is damaged ({_one_line(exc)})") from exc
    return _check_module(loaded, str(path))


def _refuse_other_files(path: Path) -> None:
    """Name the common wrong files before torch sees them, whose own messages say little."""
    if path.is_dir():
        raise ModelFileError(f"{path}: is a directory; give the .model file in it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exc:
        raise ModelFileError(f"{path}: cannot be read ({exc.strerror})") from exc
    if not head:
        raise ModelFileError(f"{path}: is empty")
    if head.startswith(b"PK\x03\x04"):
        _refuse_other_archives(path)
    elif not head.startswith(b"\x80"):  # as every pickle of protocol 2 and later does, torch's old format too
        kind = "a text file" if head.isascii() and b"\0" not in head else "not a torch file"
        raise ModelFileError(f"{path}: is {kind}, not a MACE model")


def _refuse_other_archives(path: Path) -> None:
    """Zip archives: torch's own files are some, and so are NumPy's and TorchScript's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as exc:
        raise ModelFileError(f"{path}: is truncated (an incomplete zip archive); copy or download it again") from exc
    if any(name.endswith(".npy") for name in names):
        raise ModelFileError(f"{path}: is a NumPy archive, not a MACE model")
    if any(name.endswith("constants.pkl") for name in names):
        raise ModelFileError(
            f"{path}: is a compiled TorchScript file (as made for LAMMPS), from which modules cannot be "
            "converted; give the .model file that it was made from"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ModelFileError(f"{path}: is a zip archive, not a MACE model")


def _check_module(loaded: Any, name: str) -> torch.nn.Module:
    if isinstance(loaded, (MACE, AtomicDipolesMACE, AtomicDielectricMACE, EnergyDipolesMACE)):
        return loaded
    if isinstance(loaded, Mapping):
        if _TRAINING_CHECKPOINT_KEYS <= set(loaded):
            raise ModelFileError(
                f"{name}: is a training checkpoint (weights and optimizer state without the model); "
                "give the .model "
                "file that mace_run_train writes when it ends"
            )
        if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ModelFileError(
                f"{name}: is a state dict (weights without the model); save the whole model with "
                "torch.save(model, path)"
            )
    if isinstance(loaded, torch.nn.Module) and isinstance(getattr(loaded, "model", None), MACE):
        raise ModelFileError(
            f"{name}: is a {type(loaded).__name__} wrapper for LAMMPS; give the model that it was made from"
        )
    raise ModelFileError(f"{name}: holds a {type(loaded).__module__}.{type(loaded).__qualname__}, not a MACE model")


def _add_missing_attributes(model: MACE) -> None:
    for name, value in _ADDED_ATTRIBUTES.items():
        if name not in model.__dict__:
            setattr(model, name, list(value))


def _one_line(exc: BaseException) -> str:
    text = str(exc).strip() or type(exc).__name__
    return text.splitlines()[0][:300]
