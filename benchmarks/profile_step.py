"""Where the time of one evaluation goes.

    python -m benchmarks.profile_step --model mp0-medium --atoms 1000
    python -m benchmarks.profile_step --backend cueq        # kernels alone, of another backend

``busy`` is the sum of the times of all kernels of an evaluation as it runs (replayed as a CUDA graph by mace_fast). The
operations of the frozen program are then run one by one, each waited for, and every one above a share of the time is
listed with its kernels, its floor (see benchmarks/floors.py) and the fraction of the floor that it reaches. On a CPU,
which has no kernels, times are those of the operations.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.floors import Operation, Recorder
from benchmarks.model import BACKENDS, frozen, prepare, structure
from benchmarks.step import ALLOYS
from benchmarks.step import structure as of_step
from benchmarks.timing import copy_bandwidth, device_name, float32_peak, kernel_times
from benchmarks.turns import my_turn
from mace_fast import zoo
from mace_fast.inference import CapturedMACE

_MARK = "operation "


def by_operation(call: Callable[[], object], device: torch.device) -> tuple[list[Operation], list[dict[str, float]]]:
    """The operations of a call, and for each its kernels and their times in us."""
    times: list[float] = []
    recorder = Recorder(_marked if device.type == "cuda" else _timed(times))
    if device.type != "cuda":
        with recorder:
            call()
        return recorder.operations, [{"": us} for us in times]
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded, recorder:
        call()
    kernels: list[dict[str, float]] = [{} for _ in recorder.operations]
    events = list(recorded.events())
    ranges = sorted(
        (event.time_range.start, event.time_range.end, int(event.name.removeprefix(_MARK)))
        for event in events
        if event.device_type == DeviceType.CPU and event.name.startswith(_MARK)
    )
    for event in events:
        if event.device_type != DeviceType.CUDA or event.name.startswith(_MARK):
            continue
        at = event.time_range.start
        number = next((number for start, end, number in ranges if start <= at <= end), None)
        if number is not None:
            kernels[number][event.name] = kernels[number].get(event.name, 0.0) + event.device_time
    return recorder.operations, kernels


@contextmanager
def _marked(number: int, name: str) -> Iterator[None]:
    with record_function(f"{_MARK}{number}"):
        yield
        # Kernels then lie inside the range of the operation that launched them.
        torch.cuda.synchronize()


def _timed(times: list[float]) -> Callable[[int, str], Any]:
    @contextmanager
    def around(number: int, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        times.append((time.perf_counter() - begin) * 1e6)

    return around


def listed(
    operations: list[Operation],
    kernels: list[dict[str, float]],
    bandwidth: float,
    peak: float | None,
    share: float,
) -> list[dict[str, Any]]:
    """Rows of the operations that take more than a share of the time, most first."""
    total = sum(sum(each.values()) for each in kernels)
    rows = []
    for operation, mine in zip(operations, kernels, strict=True):
        us = sum(mine.values())
        if us < share * total:
            continue
        floor = 1e6 * operation.floor_s(bandwidth, peak)
        bytes_alone = operation.bytes / bandwidth * 1e6
        rows.append(
            {
                "operation": operation.name,
                "shape": list(operation.shape),
                "kernels": [name for name in mine if name],
                "us": round(us, 1),
                "share": round(us / total, 4),
                "floor_us": round(floor, 1),
                "bound": "bytes" if floor == bytes_alone else "arithmetic",
                "of_floor": round(floor / us, 3) if us else None,
            }
        )
    return sorted(rows, key=lambda row: -row["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mp0-medium")
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--kind", default="diamond", choices=["diamond", "water", *ALLOYS])
    parser.add_argument("--backend", default="mace_fast_inference", choices=BACKENDS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--share", type=float, default=0.02, help="smallest share of the time that is listed")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = zoo.build(args.model, dtype=dtype)
    atoms = (of_step if args.kind in ALLOYS else structure)(args.kind, args.atoms)
    data = {k: v.to(device) for k, v in zoo.graph(atoms, model, dtype=dtype).items()}
    model = model.to(device)
    result = {
        "command": " ".join(["python -m benchmarks.profile_step", *sys.argv[1:]]),
        "device": device_name(device),
        "torch": torch.__version__,
        "model": args.model,
        "kind": args.kind,
        "natoms": len(atoms),
        "edges": data["edge_index"].shape[1],
        "dtype": args.dtype,
        "backend": args.backend,
    }
    print(f"{result['device']}, {args.model}, {args.atoms} atoms, {args.dtype}, {args.backend}")
    if device.type == "cuda":
        call = prepare(args.backend, model, device)
        call(data)  # compiles while others are timed
        with my_turn():
            kernels = kernel_times(lambda: call(data))
        busy = sum(us for us, _ in kernels.values())
        result |= {"busy_ms": round(busy / 1e3, 4), "launches": round(sum(count for _, count in kernels.values()))}
        print(f"GPU busy {busy / 1e3:.3f} ms in {result['launches']} kernels and copies")
        result["kernels"] = [
            {"kernel": name, "us": round(us, 1), "calls": count, "share": round(us / busy, 4)}
            for name, (us, count) in sorted(kernels.items(), key=lambda item: -item[1][0])
            if us >= args.share * busy
        ]
        for row in result["kernels"]:
            print(f"{row['share']:7.1%} {row['us']:9.1f} us {row['calls']:5.1f} x  {row['kernel'][:90]}")
    if args.backend == "mace_fast_inference":
        program = CapturedMACE(frozen(model), capture=False)

        def step() -> dict[str, Tensor]:
            return program(data, compute_stress=True)

        for _ in range(3):
            step()
        with my_turn():
            bandwidth = copy_bandwidth(device)
            peak = float32_peak(device) if dtype == torch.float32 else None
            operations = median_of(step, device)
        result["copy_GBps"] = round(bandwidth / 1e9, 1)
        result["operations"] = listed(*operations, bandwidth, peak, args.share)
        print(f"one by one; floors at {bandwidth / 1e9:.0f} GB/s" + (f", {peak / 1e12:.1f} TFLOP/s" if peak else ""))
        for row in result["operations"]:
            shape = "x".join(map(str, row["shape"]))
            print(
                f"{row['share']:7.1%} {row['us']:9.1f} us, floor {row['floor_us']:9.1f} us ({row['bound']:10}) "
                f"{row['of_floor']:6.1%}  {row['operation'].removeprefix('mace_fast.')} {shape}"
            )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def median_of(
    call: Callable[[], object], device: torch.device, repeats: int = 5
) -> tuple[list[Operation], list[dict[str, float]]]:
    """As :func:`by_operation`, with each kernel's median over several calls."""
    runs = [by_operation(call, device) for _ in range(repeats)]
    operations = runs[0][0]
    if any([o.name for o in other] != [o.name for o in operations] for other, _ in runs):
        raise RuntimeError("two evaluations ran different operations; warm up longer")
    kernels: list[dict[str, float]] = []
    for number in range(len(operations)):
        found: dict[str, list[float]] = defaultdict(list)
        for _, each in runs:
            for name, us in each[number].items():
                found[name].append(us)
        kernels.append({name: sorted(values)[len(values) // 2] for name, values in found.items()})
    return operations, kernels


if __name__ == "__main__":
    main()
