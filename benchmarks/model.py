"""Energy, forces and stress of whole models at foundation shapes, beside mace-torch and its accelerators.

    python -m benchmarks.model                                      # every row, every backend that is installed
    python -m benchmarks.model --models mp0-medium --sizes 64 1000 --backends e3nn mace_fast_inference

Random weights, graph already on the device, parameters frozen, TF32 off. ``ms`` is the median wall time of one call,
``busy_ms`` the sum of the times of its GPU kernels (some of which overlap in a graph), ``peak_mib`` the memory that one
call takes, ``held_mib`` what torch's allocator holds between calls above the loaded model, graph and its pool of memory
included, ``dE_rel``, ``dF_rel``, ``dS_rel`` the distance from mace-torch in the same dtype.

Backends: e3nn (mace-torch itself), cueq, oeq (mace-torch's own converters), mace_fast (mace_fast.convert, trainable),
mace_fast_inference (the frozen program, replayed as a CUDA graph on a GPU).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import torch
from torch import Tensor

from benchmarks.timing import busy_ms, device_name, peak_memory_mib, release
from benchmarks.turns import my_turn
from mace_fast import zoo
from mace_fast.inference import CapturedMACE, FrozenMACE
from mace_fast.patch.api import convert

Call = Callable[[], dict[str, Any]]
ROWS = (
    ("mp0-medium", "diamond", (64, 1000, 4096)),
    ("mp0-small", "diamond", (64, 1000, 4096)),
    ("mp0-large", "diamond", (64, 1000, 4096)),
    ("mpa0-medium", "diamond", (64, 1000, 4096)),
    ("mh-1", "diamond", (64, 1000, 4096)),
    ("off23-medium", "water", (192, 3000)),
)
BACKENDS = ("e3nn", "cueq", "oeq", "mace_fast", "mace_fast_inference")


def frozen(model: torch.nn.Module) -> FrozenMACE:
    """The frozen program of a model."""
    return FrozenMACE(convert(model, verify=False))


def prepare(
    backend: str, model: torch.nn.Module, device: torch.device
) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """A callable from MACE's input to its output with energy, forces and stress."""
    if backend == "mace_fast_inference":
        program = frozen(model)
        if device.type == "cuda":
            return partial(_captured, program, {})
        return lambda data: program(data, compute_stress=True)
    if backend == "mace_fast":
        model = convert(model, verify=False)
    elif backend == "cueq":
        from mace.cli.convert_e3nn_cueq import run

        model = run(model, device=str(device), return_model=True)
    elif backend == "oeq":
        from mace.cli.convert_e3nn_oeq import run

        model = run(model, device=str(device), return_model=True)
    model = model.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return lambda data: model(dict(data), compute_stress=True)


def _captured(program: FrozenMACE, kept: dict[int, CapturedMACE], data: dict[str, Tensor]) -> dict[str, Any]:
    """Graphs of one size at a time: memory is that of this size alone."""
    atoms = data["positions"].shape[0]
    if atoms not in kept:
        kept.clear()
        kept[atoms] = CapturedMACE(program)
    return kept[atoms](data, compute_stress=True)


def wall_ms(call: Call, device: torch.device, *, budget_s: float) -> float:
    """Median wall time of a call that ends with the results on the device."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(4):
        run()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < budget_s and len(times) < 100):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def seconds(call: Call) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return round(time.perf_counter() - begin, 2)


def structure(kind: str, natoms: int) -> Any:
    return zoo.diamond(natoms) if kind == "diamond" else zoo.water(natoms // 3)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def measure(
    name: str,
    kind: str,
    sizes: list[int],
    backends: list[str],
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    """Rows of one model; results are compared with mace-torch's where that is the first of the backends."""
    base = zoo.build(name, dtype=dtype)
    expected: dict[int, dict[str, Tensor]] = {}
    for backend in backends:
        label = {"model": name, "backend": backend, "kind": kind, "dtype": str(dtype).removeprefix("torch.")}
        try:
            evaluate = prepare(backend, copy.deepcopy(base).to(device), device)
        except Exception as error:  # a peer that is not installed or cannot convert is a row with its error
            if backend.startswith("mace_fast"):
                raise
            yield {**label, "error": f"{type(error).__name__}: {error}"[:200]}
            continue
        release(device)
        loaded = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        for natoms in sizes:
            graph = zoo.graph(structure(kind, natoms), base, dtype=dtype)
            data = {key: value.to(device) for key, value in graph.items()}
            row = {**label, "natoms": natoms, "edges": data["edge_index"].shape[1]}
            call = partial(evaluate, data)
            try:
                if backend != "e3nn":  # which takes most of the memory; others compile while someone is timed
                    try:
                        row["first_s"] = seconds(call)
                    except torch.cuda.OutOfMemoryError:  # beside the one that is timed; again when it is done
                        release(device)
                with my_turn():
                    try:
                        row.setdefault("first_s", seconds(call))
                        row |= measure_row(call, expected, natoms, backend == "e3nn", device, budget_s, loaded)
                    except torch.cuda.OutOfMemoryError:
                        row["error"] = "out of memory"
                    release(device)  # in its turn: the next one may need all of the memory
            except RuntimeError as error:
                if backend.startswith("mace_fast"):
                    raise
                row["error"] = str(error)[:200]
            yield row
            release(device)
        del evaluate
        release(device)


def measure_row(
    call: Call,
    expected: dict[int, dict[str, Tensor]],
    natoms: int,
    is_reference: bool,
    device: torch.device,
    budget_s: float,
    loaded: int,
) -> dict[str, Any]:
    """Difference from mace-torch, memory and time of one evaluation; ``loaded``: bytes held before the first."""
    out = call()
    row: dict[str, Any] = {}
    if is_reference:
        expected[natoms] = {key: out[key].detach() for key in ("energy", "forces", "stress")}
    elif natoms in expected:
        for label, key in (("dE_rel", "energy"), ("dF_rel", "forces"), ("dS_rel", "stress")):
            row[label] = relative(out[key], expected[natoms][key])
    del out
    memory = peak_memory_mib(call, device)
    row["peak_mib"] = None if memory is None else round(memory, 1)
    if device.type == "cuda":
        release(device)
        row["held_mib"] = round((torch.cuda.memory_reserved(device) - loaded) / 2**20, 1)
    row["ms"] = round(wall_ms(call, device, budget_s=budget_s), 4)
    if device.type == "cuda":
        row["busy_ms"] = round(busy_ms(call), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[row[0] for row in ROWS])
    parser.add_argument("--sizes", nargs="+", type=int, default=None, help="numbers of atoms instead of the table's")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds spent timing one row")
    parser.add_argument("--output", type=Path, default=None, help="write JSON rows here")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{device_name(device)}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []
    for name, kind, sizes in ROWS:
        if name in args.models:
            chosen = list(args.sizes or sizes)
            for row in measure(name, kind, chosen, args.backends, getattr(torch, args.dtype), device, args.budget):
                rows.append(row)
                print({key: value for key, value in row.items() if key != "kind"}, flush=True)
                if args.output:  # after each row: a run that is cut short keeps what it has
                    write(args.output, rows, device)


def write(path: Path, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Rows with what they were measured on, and the command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.model", *sys.argv[1:]])
    result = {"command": command, "device": device_name(device), "torch": torch.__version__, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
