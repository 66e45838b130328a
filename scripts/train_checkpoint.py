#!/usr/bin/env python
"""Make the checkpoint that mace_fast ships, from nothing.

Structures, EMT labels, training, errors, dynamics, publication.

Each stage leaves its results in the working directory and is skipped when they are there already, so an
interrupted run goes on where it stopped; remove the directory to start over. About an hour on one idle core.

Example:  python scripts/train_checkpoint.py --work work/checkpoint --output my-checkpoint
Quick:    python scripts/train_checkpoint.py --work quick --output quick/out --scale 0.05 --epochs 2
          --picoseconds 2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# e3nn 0.4 reads its constants with torch.load; torch 2.6 and later need this before its first import.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "mace_fast" / "zoo" / "checkpoints" / "cu-ag-au-emt"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Imported here so that --help answers at once.
    import torch
    from checkpoint import publication, structures, training

    torch.set_num_threads(options.threads)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:7.0f} s] {text}", flush=True)

    if not all((work / f"{part}.xyz").is_file() for part in ("train", "valid", "test")):
        say("drawing structures and labelling them with EMT")
        split = structures.generate(options.seed, options.scale, lambda kind, count: say(f"  {kind}: {count}"))
        training.write_data(split, work)

    model = work / f"{training.NAME}_stagetwo.model"
    if not model.is_file():
        say(f"training {options.epochs} epochs with mace_run_train")
        model = training.train(work, options.epochs, options.seed, options.threads, lambda line: say(f"  {line}"))
    say(f"model: {model.stat().st_size} bytes")

    measured = work / "report.json"
    if not measured.is_file():
        measured.write_text(json.dumps(measure(model, options, say), indent=1) + "\n", encoding="utf-8")
    report = json.loads(measured.read_text(encoding="utf-8"))
    test = report["errors"]["test"]["all"]
    say(f"test: energy {test['energy_mae']} meV/atom, forces {test['forces_mae']} meV/A")

    publication.publish(work, model, options.output, options.seed, report)
    say(f"published to {options.output}")
    print(json.dumps({"model": str(options.output / f"{training.NAME}.model"), "test": test}))
    return 0


def measure(model: Path, options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Errors against EMT on all data, and molecular dynamics with the model: what errors.json holds."""
    import torch
    from checkpoint import dynamics, evaluation

    trained = torch.load(model, map_location="cpu", weights_only=False)
    say("errors against EMT")
    report: dict[str, Any] = {
        "seed": options.seed,
        "epochs": options.epochs,
        "versions": {package: version(package) for package in ("mace-torch", "e3nn", "torch", "ase")},
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "units": "errors: meV/atom, meV/angstrom, meV/angstrom^3; dynamics: eV, angstrom, K, ps",
        "errors": evaluation.errors(model, options.work),
        "constant_temperature": [],
    }
    for kelvin, share in ((1000.0, 1.0), (300.0, 0.25), (2000.0, 0.25)):
        say(f"dynamics at {kelvin:.0f} K")
        report["constant_temperature"].append(
            dynamics.constant_temperature(
                model,
                kelvin=kelvin,
                picoseconds=share * options.picoseconds,
                repeat=(3, 3, 3),
                seed=options.seed,
                progress=lambda line: say(f"  {line}"),
            )
        )
    say("dynamics without thermostat at 300 K")
    report["constant_energy"] = dynamics.constant_energy(
        model,
        kelvin=300.0,
        picoseconds=0.4 * options.picoseconds,
        repeat=(2, 2, 2),
        seed=options.seed,
        progress=lambda line: say(f"  {line}"),
    )
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("checkpoint-work"), help="working directory (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help="where the checkpoint goes (default: into the package)",
    )
    parser.add_argument("--epochs", type=int, default=26, help="of training in all (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the number of structures (default: %(default)s)"
    )
    parser.add_argument("--picoseconds", type=float, default=20.0, help="of the run at 1000 K (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2024, help="of data, training and dynamics (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
