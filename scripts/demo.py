"""The main job with the shipped checkpoint: convert, prove, run molecular dynamics, and time it beside
mace-torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from rich.rule import Rule

import mace_fast
from mace_fast import MACEFastCalculator, convert, freeze, verify
from mace_fast.cli.console import progress_bar
from mace_fast.cli.console import stdout as console
from mace_fast.cli.md import status_line, summary_table
from mace_fast.cli.models import match_table
from mace_fast.cli.running import interrupt_flag
from mace_fast.errors import MaceFastError
from mace_fast.files import published
from mace_fast.inference import FrozenMACE, verify_frozen
from mace_fast.loading import load_model
from mace_fast.md.dynamics import MDResult, run
from mace_fast.md.files import Sample
from mace_fast.md.picture import draw_run
from mace_fast.md.settings import MDSettings
from mace_fast.md.speed import Timing, time_steps
from mace_fast.patch.match import match
from mace_fast.verification import EquivalenceReport
from mace_fast.zoo import alloy, checkpoint_path


def main() -> None:
    """Run the demo; exit status 0 if the conversion is proven and both programs agree."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console.print(
        f"[bold]mace_fast {mace_fast.__version__}[/] on {where}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )

    console.print(Rule("1. Convert a trained MACE model, and prove the copy equal", align="left"))
    original = load_model(checkpoint_path(), device, "float32")
    console.print(f"model: {checkpoint_path().name}, trained by mace_run_train on ASE's EMT potential of Cu, Ag and Au")
    console.print(match_table(match(original)))
    report = _verified(original, convert(original, verify=False))
    frozen = freeze(original, verify=False)
    frozen_report = _frozen_verified(original, frozen)

    console.print(Rule("2. The same MD steps with mace_fast and with mace-torch, in turns", align="left"))
    crystal = alloy((options.size,) * 3, rattle=0.0, seed=1)
    settings = MDSettings(options.steps, "nvt", options.temperature, options.timestep, log_interval=5, seed=7)
    fast = MACEFastCalculator(models=frozen, device=device, verify=False)  # proven just now
    timings = _timed(crystal, original, fast, settings, options.timed_steps)

    console.print(Rule(f"3. NVT molecular dynamics at {options.temperature:g} K", align="left"))
    result = _dynamics(crystal, fast, settings, options.output)

    speeds = {name: timing.median for name, timing in timings.items()}
    title = f"{crystal.get_chemical_formula()}, NVT at {options.temperature:g} K, mace_fast on {where}"
    with published(options.output / "picture.png") as temporary:
        draw_run(result, temporary, title=title, speeds=speeds)
    summary = _summary(crystal, where, report, timings, result)
    details = {**summary, "verification": report.to_dict(), "verification_frozen": frozen_report.to_dict()}
    with published(options.output / "report.json") as temporary:
        temporary.write_text(json.dumps(details, indent=2), encoding="utf-8")
    _print_summary(summary, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--size", type=int, default=4, help="the crystal has 4 x size^3 atoms (default: 4, 256 atoms)")
    parser.add_argument("--steps", type=int, default=500, help="MD steps (default: 500)")
    parser.add_argument("--timed-steps", type=int, default=20, help="steps in the comparison of speeds (default: 20)")
    parser.add_argument("--temperature", type=float, default=600.0, help="K (default: 600)")
    parser.add_argument("--timestep", type=float, default=2.0, help="fs (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="directory (default: demo-output)")
    return parser.parse_args()


def _verified(original: torch.nn.Module, fast: torch.nn.Module) -> EquivalenceReport:
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=None, status="")
        report = verify(
            original,
            fast,
            progress=lambda what, done, known: bar.update(task, completed=done, total=known, status=what),
        )
    console.print(report)
    report.raise_if_failed()
    return report


def _frozen_verified(original: torch.nn.Module, frozen: FrozenMACE) -> EquivalenceReport:
    """The program that runs the dynamics, compared with mace-torch as the converted model was."""
    with progress_bar() as bar:
        task = bar.add_task("verifying the frozen program", total=None, status="")
        report = verify_frozen(
            original,
            frozen,
            progress=lambda what, done, known: bar.update(task, completed=done, total=known, status=what),
        )
    report.raise_if_failed()
    worst = max(report.rows, key=lambda row: row.error / row.tolerance)
    console.print(
        f"frozen for inference: {len(report.rows)} comparisons passed, the worst ({worst.quantity}, {worst.dtype}) "
        f"with an error of {worst.error:.1e} where {worst.tolerance:.1e} is allowed"
    )
    return report


def _timed(
    crystal: Atoms, original: torch.nn.Module, fast: MACEFastCalculator, settings: MDSettings, steps: int
) -> dict[str, Timing]:
    """Both calculators' steps from the same start; their trajectories must stay together."""
    calculators = {
        "mace-torch": MACECalculator(models=copy.deepcopy(original), device=str(fast.device), default_dtype="float32"),
        "mace_fast": fast,
    }
    timed = MDSettings(steps, settings.ensemble, settings.temperature, settings.timestep, seed=settings.seed)
    with progress_bar() as bar:
        task = bar.add_task("timing", total=2 * (steps + 2), status="")
        timings = time_steps(crystal, calculators, timed, on_step=lambda name: bar.update(task, advance=1, status=name))
    for name, timing in timings.items():
        console.print(f"{name:<12}{1000 * timing.median:8.1f} ms a step (median of {steps})")
    return timings


def _dynamics(crystal: Atoms, calculator: MACEFastCalculator, settings: MDSettings, output: Path) -> MDResult:
    atoms = crystal.copy()
    atoms.calc = calculator
    with progress_bar() as bar, interrupt_flag() as interrupted:
        task = bar.add_task(atoms.get_chemical_formula(), total=settings.steps, status="")

        def show(sample: Sample, ns_per_day: float) -> None:
            bar.update(task, completed=sample.step, status=status_line(sample, len(atoms), ns_per_day))

        result = run(atoms, settings, output, existing="replace", on_sample=show, stop=interrupted)
    console.print(summary_table(result, output))
    return result


def _summary(
    crystal: Atoms, where: str, report: EquivalenceReport, timings: dict[str, Timing], result: MDResult
) -> dict[str, Any]:
    fast, reference = timings["mace_fast"], timings["mace-torch"]
    energies = np.subtract(fast.energies, reference.energies)
    return {
        "mace_fast": mace_fast.__version__,
        "torch": torch.__version__,
        "device": where,
        "structure": crystal.get_chemical_formula(),
        "atoms": len(crystal),
        "proven_equal": report.passed,
        "comparison": {
            "steps": len(fast.seconds),
            "mace_fast_ms_per_step": 1000 * fast.median,
            "mace_torch_ms_per_step": 1000 * reference.median,
            "speedup": reference.median / fast.median,
            "largest_energy_difference_meV_per_atom": float(1000 * np.abs(energies).max() / len(crystal)),
            "largest_force_difference_eV_per_A": float(np.abs(fast.forces - reference.forces).max()),
            "largest_force_eV_per_A": float(np.abs(reference.forces).max()),
        },
        "dynamics": result.summary(),
    }


def _print_summary(summary: dict[str, Any], output: Path) -> None:
    comparison, dynamics = summary["comparison"], summary["dynamics"]
    fast, reference = comparison["mace_fast_ms_per_step"], comparison["mace_torch_ms_per_step"]
    lines = {
        "conversion": "proven equal to mace-torch",
        "speed": f"{fast:.1f} ms a step; mace-torch {reference:.1f} ms: "
        f"[bold green]{comparison['speedup']:.1f} times faster[/] ({summary['atoms']} atoms, "
        f"medians of the same {comparison['steps']} steps in the same run)",
        "agreement": "over these steps energies within "
        f"{comparison['largest_energy_difference_meV_per_atom']:.1e} meV/atom, forces at the end within "
        f"{comparison['largest_force_difference_eV_per_A']:.1e} eV/A "
        f"of {comparison['largest_force_eV_per_A']:.2f}",
        "dynamics": f"{dynamics['steps']} steps, mean temperature {dynamics['mean_temperature']:.0f} K, "
        f"{dynamics['ns_per_day']:.2f} ns/day",
        "files": f"{output}/: trajectory.extxyz, log.csv, restart.npz, picture.png, report.json",
    }
    console.print(Rule("Summary", align="left"))
    for name, text in lines.items():
        console.print(f"{name:<13}{text}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except MaceFastError as exc:
        sys.exit(f"error: {exc}")
