"""Where the time of one evaluation goes: every GPU kernel above a share of the total.

python -m benchmarks.profile_step --model mp0-medium --atoms 1000 --backend mace_fast_inference
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.model import BACKENDS, prepare, structure
from benchmarks.timing import device_name
from mace_fast import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mp0-medium")
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--kind", default="diamond", choices=["diamond", "water"])
    parser.add_argument("--backend", default="mace_fast_inference", choices=BACKENDS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--share", type=float, default=0.02, help="smallest share of the time that is listed")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    device, dtype = torch.device("cuda:0"), getattr(torch, args.dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = zoo.build(args.model, dtype=dtype)
    data = {k: v.to(device) for k, v in zoo.graph(structure(args.kind, args.atoms), model, dtype=dtype).items()}
    call = prepare(args.backend, model.to(device), device)
    for _ in range(5):
        call(data)
    torch.cuda.synchronize()
    repeats = 10
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats):
            call(data)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time
            counts[event.name] += 1
    total = sum(times.values())
    print(
        f"{device_name(device)}, {args.model}, {args.atoms} atoms, {args.backend}: "
        f"GPU busy {total / repeats / 1e3:.3f} ms"
    )
    rows = [
        {
            "kernel": name,
            "us": round(us / repeats, 1),
            "calls": counts[name] / repeats,
            "share": round(us / total, 4),
        }
        for name, us in sorted(times.items(), key=lambda item: -item[1])
        if us / total >= args.share
    ]
    for row in rows:
        print(f"{row['share']:7.1%} {row['us']:9.1f} us {row['calls']:5.1f} x  {row['kernel'][:90]}")
    if args.output:
        result = {
            "device": device_name(device),
            "model": args.model,
            "natoms": args.atoms,
            "backend": args.backend,
        }
        result |= {"busy_ms": round(total / repeats / 1e3, 4), "kernels": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
