"""Every benchmark that needs a GPU, beside the peers that are installed; results merged into one file a name.

    python -m benchmarks.everything                          # all but tuning, one by one: over an hour with peers
    python -m benchmarks.everything model step               # some of them
    python -m benchmarks.everything --side-by-side 6         # for a GPU paid by the minute
    python -m benchmarks.everything --side-by-side 6 --limit 560 --output results

Side by side, processes prepare (build models, compile kernels) together and are timed one at a time. What ends within
the limit is kept: rows are written as they come, and <gpu>-<name>.json holds those of all commands of a name, each
with its command. The exit status is 1 if a command failed or was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.graphs import GRAPHS
from benchmarks.model import ROWS
from benchmarks.problems import DIFFDOCK, FAMILIES, TABLE
from mace_fast.files import published

_OTHER_GRAPHS = ("molecules", "water", "star")
assert set(_OTHER_GRAPHS) < set(GRAPHS)


def _each(line: str, values: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The command with each of the values in the place of ``%``."""
    return tuple(tuple(line.replace("%", value).split()) for value in values)


def _one(line: str) -> tuple[tuple[str, ...], ...]:
    return (tuple(line.split()),)


_PEERS = "e3nn mace_fast_inference cueq oeq"
_KERNELS = "mace_fast mace_fast-clusters cueq oeq oeq-det"
_BESIDE_PEERS = (
    "mp0-medium --sizes 64 1000",
    "mp0-small --sizes 64 1000",
    "mp0-large --sizes 1000 4096",
    "mpa0-medium --sizes 4096",
    "mh-1 --sizes 1000",
    "off23-medium --sizes 3000",
)
"""Models and sizes that are measured beside every peer; "model-sizes" has the others, which peers need minutes for."""

COMMANDS = {
    "model": _each(f"model --models % --backends {_PEERS} --budget 0.3", _BESIDE_PEERS),
    "model-sizes": _each("model --models % --backends mace_fast_inference --budget 0.3", (name for name, *_ in ROWS)),
    "model-float64": _one(f"model --models mp0-medium --sizes 1000 --dtype float64 --backends {_PEERS} --budget 0.3"),
    "step": _each(
        "step --sizes % --budget 1 --backends mace-torch cueq oeq mace_fast no-graph --lists", ("64", "1000")
    ),
    "conv": _each(f"conv --problems % --budget 0.2 --backends {_KERNELS}", TABLE),
    "conv-e3nn": _each("conv --problems % --backends e3nn mace_fast", TABLE),
    "conv-float64": _each(f"conv --problems % --dtypes float64 --budget 0.2 --backends {_KERNELS}", TABLE),
    "alloy": _one("step --model mpa0-medium --structure five-metals --sizes 13824 --backends mace_fast --lists"),
    "batch": _one("step --model off23-medium --structure water --sizes 192 --backends mace_fast --lists --batch 64"),
    "conv-graphs": _each(f"conv --problems medium-L2 --graphs % --budget 0.2 --backends {_KERNELS}", _OTHER_GRAPHS),
    "conv-families": _each("conv --problems %", (*FAMILIES, *DIFFDOCK)),
    "lists": _one("step --sizes 64 --backends mace_fast"),
    "largest": _one("model --models mp0-medium --sizes 262144 --backends mace_fast_inference"),
    "soak": _one("step --sizes 64 --backends mace_fast --lists --soak 100000"),
    "profile-mp0-medium-64": _one("profile_step --atoms 64"),
    "profile-mp0-medium-1000": _one("profile_step"),
    "tune": _one("tune_conv"),
    "tune-clusters": _each(
        "tune_conv --problems medium-L1 medium-L2 large-L2 nequip-s --roles backward backward_tangent "
        "--registers 54 80 160 --rings 0 --clusters 4 --at-senders --dtype %",
        ("float32", "float64"),
    ),
}
"""For each name the arguments of its processes, the module first. The order is that in which they are started."""


@dataclass
class Running:
    """A process and where it writes."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    output: Path
    log: Path
    started: float


def merge(outputs: Sequence[Path]) -> dict[str, Any]:
    """The rows of several runs on one device as one result; each row of more than one run names its command.

    Raises:
        ValueError: the runs were on different devices or with different versions of torch.
    """
    runs = [json.loads(path.read_text()) for path in outputs]
    for run in runs:
        run["command"] = run["command"].partition(" --output ")[0]
    if len(runs) == 1:
        only: dict[str, Any] = runs[0]
        return only
    same = {(run["device"], run["torch"]) for run in runs}
    if len(same) != 1:
        raise ValueError(f"results of {len(same)} devices or versions of torch cannot be one: {sorted(same)}")
    shared = {key: value for key, value in runs[0].items() if key not in ("command", "rows")}
    rows = [{**row, "command": run["command"]} for run in runs for row in run["rows"]]
    return {"command": "python -m benchmarks.everything; each row names its own", **shared, "rows": rows}


def publish(outputs: Sequence[Path], target: Path) -> None:
    """Write what there is of several runs, whole or not at all."""
    there = [path for path in outputs if path.exists()]
    if there:
        with published(target) as temporary:
            temporary.write_text(json.dumps(merge(there), indent=1) + "\n")


def run_all(names: Sequence[str], prefix: str, directory: Path, side_by_side: int, limit_s: float | None) -> list[str]:
    """Run the commands of these names and merge what they write.

    Returns:
        A line for each command that failed or was stopped.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    waiting = [(name, number, command) for name in names for number, command in enumerate(COMMANDS[name])]
    waiting.reverse()
    running: list[Running] = []
    outputs: dict[str, list[Path]] = {name: [] for name in names}
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mace_fast_bench_") as scratch:
        environment = dict(os.environ)
        if side_by_side > 1:
            environment["MACE_FAST_BENCH_LOCK"] = str(Path(scratch) / "turn")
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // side_by_side)))
        while waiting or running:
            late = limit_s is not None and time.monotonic() - begin > limit_s
            if late:
                bad += [f"not started: {' '.join(command)}" for _, _, command in reversed(waiting)]
                waiting.clear()
                for one in running:
                    one.process.terminate()
            while waiting and len(running) < side_by_side:
                name, number, command = waiting.pop()
                output = Path(scratch) / f"{name}-{number}.json"
                outputs[name].append(output)
                running.append(start(name, command, output, environment))
            for one in [each for each in running if each.process.poll() is not None]:
                running.remove(one)
                seconds = time.monotonic() - one.started
                status = one.process.returncode
                print(f"{' '.join(one.command)}: {seconds:.0f} s, exit status {status}", flush=True)
                if status != 0:
                    kept = directory / f"{prefix}-{one.output.stem}.log"
                    kept.write_bytes(one.log.read_bytes())
                    bad.append(f"{'stopped' if late else 'failed'}, see {kept}: {' '.join(one.command)}")
                publish(outputs[one.name], directory / f"{prefix}-{one.name}.json")
            time.sleep(0.2)
    return bad


def start(name: str, command: tuple[str, ...], output: Path, environment: dict[str, str]) -> Running:
    """Start one benchmark; what it prints goes beside its output."""
    log = output.with_suffix(".log")
    module, *arguments = command
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--output", str(output)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return Running(name, command, process, output, log, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[], help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="so many processes at once")
    parser.add_argument("--limit", type=float, default=None, metavar="SECONDS", help="stop what is not done by then")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIRECTORY")
    options = parser.parse_args()
    unknown = set(options.names) - set(COMMANDS)
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"error: torch {torch.__version__} sees no CUDA device (nvidia-smi shows it)")
    prefix = torch.cuda.get_device_name().split()[1].lower()
    names = options.names or [name for name in COMMANDS if not name.startswith("tune")]
    bad = run_all(names, prefix, options.output, max(1, options.side_by_side), options.limit)
    print(*bad, sep="\n", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
