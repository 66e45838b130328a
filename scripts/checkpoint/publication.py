"""What is shipped beside the model: its training log without this machine's paths, its errors, its README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .anonymise import anonymise
from .structures import ELEMENTS
from .training import ARCHITECTURE, NAME, log_file

LARGEST_FILE = 2_000_000
"""Bytes that the model may have at most."""


def publish(work: Path, model: Path, destination: Path, seed: int, report: dict[str, Any]) -> None:
    """Write the model without this machine's paths, and training.log, errors.json, README.md beside it.

    Raises:
        RuntimeError: the model is larger than may be shipped. Nothing is written then.
    """
    size = model.stat().st_size
    if size > LARGEST_FILE:
        raise RuntimeError(f"{model.name} has {size} bytes; at most {LARGEST_FILE} may be shipped")
    destination.mkdir(parents=True, exist_ok=True)
    anonymise(model, destination / f"{NAME}.model")
    log = log_file(work, seed).read_text(encoding="utf-8")
    (destination / "training.log").write_text(without_paths(log), encoding="utf-8")
    (destination / "errors.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (destination / "README.md").write_text(_readme(size, report), encoding="utf-8")


def without_paths(log: str) -> str:
    """The log with every absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+-]+/)+([\w.+-]+)", r"\1", log)


def _readme(size: int, report: dict[str, Any]) -> str:
    template = Path(__file__).with_name("readme_template.md").read_text(encoding="utf-8")
    errors = report["errors"]
    rows = [_error_row(part, "all", errors[part]["all"]) for part in errors]
    rows += [_error_row("test", kind, values) for kind, values in errors["test"].items() if kind != "all"]
    return template.format(
        name=NAME,
        elements=", ".join(ELEMENTS),
        megabytes=f"{size / 1e6:.2f}",
        parameters=report["parameters"],
        architecture="\n".join(f"| {key} | {value} |" for key, value in ARCHITECTURE.items()),
        seed=report["seed"],
        epochs=report["epochs"],
        versions=", ".join(f"{package} {version}" for package, version in report["versions"].items()),
        structures=round(errors["train"]["all"]["structures"]),
        errors="\n".join(rows),
        runs="\n".join(_run_row(run) for run in report["constant_temperature"]),
        conservation=_conservation(report["constant_energy"]),
    )


def _error_row(part: str, kind: str, values: dict[str, float]) -> str:
    stress = f"{values['stress_mae']:.2f}" if "stress_mae" in values else "-"
    energy, forces, rmse = (f"{values[key]:.1f}" for key in ("energy_mae", "forces_mae", "forces_rmse"))
    return _row(part, kind, f"{values['structures']:.0f}", energy, forces, rmse, stress)


def _run_row(run: dict[str, float]) -> str:
    return _row(
        f"{run['target_kelvin']:.0f}",
        f"{run['atoms']}",
        f"{run['picoseconds']:.0f}",
        f"{run['mean_kelvin']:.0f} +- {run['std_kelvin']:.0f}",
        f"{run['highest_kelvin']:.0f}",
        f"{run['shortest_distance']:.2f}",
        f"{run['mean_square_displacement']:.2f}",
        f"{1000 * run['force_mae_against_emt']:.0f}",
        f"{1000 * run['energy_error_per_atom_against_emt']:.1f}",
    )


def _conservation(run: dict[str, float]) -> str:
    return (
        f"Without thermostat, float64, {run['kelvin']:.0f} K, {run['atoms']} atoms, "
        f"{run['picoseconds']:.0f} ps:\n"
        f"the total energy drifts by {run['drift_mev_per_atom_per_ps']:+.4f} meV/atom/ps and "
        f"fluctuates by {run['fluctuation_mev_per_atom']:.3f} meV/atom."
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
