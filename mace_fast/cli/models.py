"""Commands about a model: convert, verify, info."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from mace_fast.cli.console import print_json, progress_bar, require_new, stdout
from mace_fast.cli.options import (
    Device,
    Dtype,
    Force,
    Json,
    Model,
    NoVerify,
    choose_device,
    read_structure,
    usage_errors,
)
from mace_fast.errors import MaceFastError, VerificationError
from mace_fast.files import published

if TYPE_CHECKING:
    import torch
    from ase import Atoms
    from mace.modules import MACE, EquivariantProductBasisBlock

    from mace_fast.patch.match import Match, Status
    from mace_fast.verification import EquivalenceReport


def convert(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    dtype: Dtype = None,
    device: Device = None,
    no_verify: NoVerify = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert a model and write it to a file that MACEFastCalculator reads.

    So does torch.load(file, weights_only=False), where mace_fast is installed. The conversion is verified on the
    device before anything is written. The file does not depend on the device.

    Example: mace-fast convert my.model -o fast.model
    """
    require_new(output, force)
    _require_writable(output)

    from mace_fast.loading import load_model
    from mace_fast.patch.api import convert as convert_model
    from mace_fast.patch.match import match

    place = choose_device(device)
    original = load_model(model, place, dtype)
    fast = convert_model(original, verify=False)
    report = None
    if not no_verify:
        report = _verify(original, fast)
        if not json:
            stdout.print(report)
        report.raise_if_failed()
    _save(fast.cpu(), output)
    matches = match(original)
    if json:
        print_json(
            {
                "model": model,
                "output": str(output),
                "dtype": _dtype_name(fast),
                "verified": report is not None,
                "modules": [match_as_dict(m) for m in matches],
                "report": None if report is None else report.to_dict(),
            }
        )
    else:
        stdout.print(match_table(matches))
        proof = "verified" if report is not None else "not verified"
        stdout.print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB, {_dtype_name(fast)}, {proof})")


def verify(
    model: Model,
    converted: Annotated[
        str | None,
        typer.Argument(metavar="[CONVERTED]", help="A file that convert wrote; else MODEL is converted here."),
    ] = None,
    structures: Annotated[
        list[Path] | None,
        typer.Option("--structure", "-s", help="Compare on these structures; may be given several times."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Prove that a converted model computes what mace-torch computes; exit status 1 if it does not.

    Energies, forces, stresses, descriptors, Hessian and gradients are compared, as a whole and module by
    module.

    Example: mace-fast verify my.model
    """
    from mace_fast.loading import load_model
    from mace_fast.patch.api import convert as convert_model
    from mace_fast.patch.checking import require_comparable

    place = choose_device(device)
    original = load_model(model, place, dtype)
    if converted is None:
        fast = convert_model(original, verify=False)
    else:
        fast = load_model(converted, place, dtype)
    with usage_errors():
        require_comparable(original, fast, with_structures=bool(structures))
    report = _verify(original, fast, [read_structure(path) for path in structures] if structures else None)
    if json:
        print_json(report.to_dict())
    else:
        stdout.print(report)
    if not report.passed:
        raise VerificationError(f"{model}: the converted model does not compute what the original computes", report)


def info(model: Model, json: Json = False) -> None:
    """What a model is, and what mace_fast would replace in it.

    Example: mace-fast info medium-mpa-0
    """
    from mace_fast.loading import load_model
    from mace_fast.patch.match import match

    loaded = load_model(model)
    matches = match(loaded)
    facts = _facts(loaded)
    if json:
        print_json({"model": model, **facts, "modules": [match_as_dict(m) for m in matches]})
        return
    table = Table.grid(padding=(0, 2))
    shown = {**facts, "further_inputs": [_with_key(name) for name in facts["further_inputs"]]}
    for name, value in shown.items():
        table.add_row(name.replace("_", " "), _shown(value))
    stdout.print(table)
    stdout.print(match_table(matches))


def _require_writable(path: Path) -> None:
    """Before any work is done, that a file can be made where ``path`` is to be.

    Raises:
        MaceFastError: it cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        raise MaceFastError(
            f"{path}: no file can be written in {path.parent} ({exc.strerror}); give --output another directory"
        ) from exc


def _save(model: torch.nn.Module, path: Path) -> None:
    """Write a model whole or not at all.

    Raises:
        MaceFastError: it cannot be written, as where the disk is full.
    """
    import torch

    try:
        with published(path) as temporary:
            torch.save(model, temporary)
    except (OSError, RuntimeError) as exc:  # torch's own writer says with a RuntimeError that a disk is full
        raise MaceFastError(
            f"{path}: could not be written, and nothing is there now that was not before ({exc}). Make room on the "
            "disk, or give --output another directory"
        ) from exc


def _verify(
    original: torch.nn.Module, fast: torch.nn.Module, structures: list[Atoms] | None = None
) -> EquivalenceReport:
    from mace_fast.patch.api import verify as verify_models

    with progress_bar() as bar:
        task = bar.add_task("verifying", total=None, status="")

        def show(what: str, done: int, known: int) -> None:
            bar.update(task, completed=done, total=known, status=what)

        return verify_models(original, fast, structures=structures, progress=show)


def _dtype_name(model: torch.nn.Module) -> str:
    from mace_fast.loading import model_dtype

    return str(model_dtype(model)).removeprefix("torch.")


def _facts(model: MACE) -> dict[str, Any]:
    """What there is to say about a MACE model, read from its live modules."""
    from ase.data import chemical_symbols

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "class": type(model).__name__,
        "elements": [chemical_symbols[int(z)] for z in model.atomic_numbers],
        "r_max": float(model.r_max),
        "dtype": _dtype_name(model),
        "parameters": parameters,
        "heads": list(model.heads),
        "interactions": [type(block).__name__ for block in getattr(model, "interactions", [])],
        "node_features": [str(block.linear.irreps_out) for block in getattr(model, "products", [])],
        "edge_attributes": str(model.spherical_harmonics.irreps_out),
        "correlation": [_correlation(block) for block in getattr(model, "products", [])],
        "pair_repulsion": "pair_repulsion_fn" in model._modules,
        "distance_transform": _distance_transform(model),
        "further_inputs": sorted(getattr(model, "embedding_specs", None) or {}),
    }


def _correlation(product: EquivariantProductBasisBlock) -> int | None:
    contraction = next(iter(getattr(product.symmetric_contractions, "contractions", [])), None)
    return None if contraction is None else int(contraction.correlation)


def _distance_transform(model: MACE) -> str | None:
    transform = model.radial_embedding._modules.get("distance_transform")
    return None if transform is None else type(transform).__name__


def _with_key(feature: str) -> str:
    """With the key of a structure's information that it is read from, where that is another name."""
    from mace_fast.calculators.graph import INFO_KEYS

    key = INFO_KEYS.get(feature, feature)
    return feature if key == feature else f"{feature} ({key}=)"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def match_as_dict(found: Match) -> dict[str, str]:
    return {
        "name": found.name,
        "class": found.module_class,
        "status": found.status,
        "reason": found.reason,
        "kernel": found.kernel,
    }


def match_table(matches: list[Match]) -> Table:
    counts = Counter(found.status for found in matches)
    names: dict[Status, str] = {"replace": "replaced by mace_fast", "keep": "kept", "refuse": "refused"}
    styles = {"replace": "green", "refuse": "red"}
    title = "Modules: " + ", ".join(f"{counts[status]} {words}" for status, words in names.items() if counts[status])
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    for column in ("module", "class", "", "what runs, or why not"):
        table.add_column(column, overflow="fold")
    for found in matches:
        detail = found.reason if found.status == "refuse" else f"{found.kernel}"
        table.add_row(
            found.name or "(model)",
            found.module_class.rpartition(".")[2],
            found.status,
            detail,
            style=styles.get(found.status, "dim"),
        )
    return table
