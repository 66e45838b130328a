"""Convolution kernels beside their peers, in one process: forward, backward and double backward.

    python -m benchmarks.conv                         # all problems on the diamond graph, every peer that is installed
    python -m benchmarks.conv --problems medium-L2 --backends mace_fast e3nn --dtypes float64 --graphs star
    python -m benchmarks.conv --output conv.json --plot conv.png   # the picture: roofline of the forward pass

    python -m benchmarks.conv --problems diffdock-l1 diffdock-l2     # fully connected, on 2000 nodes with 20 edges each
    python -m benchmarks.conv --problems diffdock-l1 --graphs complexes-small --device cpu

Problems beyond the table: the families of NequIP, mixed multiplicities, and DiffDock's fully connected ('uvw')
products, whose weights are thousands of numbers an edge. Rows say how many nodes and edges they were measured with.

Backend mace_fast-clusters is mace_fast with graphs that list clusters of receivers too (``edge_graph(clusters=True)``);
``graph_ms`` is what making the graph took, once, before.

``*_ms`` is the device's time of a call, ``*_loop_ms`` that of one of many calls in a row, the host's work included.
Each backend's results are compared with mace_fast's in the same run before anything is timed; one that differs is not
timed, its row says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import torch
from e3nn import o3
from torch import Tensor

from benchmarks.graphs import GRAPHS
from benchmarks.peers import BACKENDS, Conv, Peer, peer
from benchmarks.problems import DIFFDOCK, PROBLEMS, TABLE, FullyConnectedProblem, Problem, forward_operations
from benchmarks.roofline import plot_roofline
from benchmarks.timing import (
    copy_bandwidth,
    device_name,
    float32_peak,
    kernel_times,
    loop_ms,
    median_ms,
    peak_memory_mib,
    release,
)
from benchmarks.turns import my_turn
from mace_fast.kernels import FullyConnectedTensorProduct, channelwise_tp_conv, edge_graph, fully_connected_tp_conv

ALL = {**PROBLEMS, **DIFFDOCK}


class DifferentResultError(RuntimeError):
    """A peer computes something else than mace_fast."""


OURS = {"mace_fast": False, "mace_fast-clusters": True}
"""Whether the graph, which is made before anything is timed, lists clusters of receivers."""


def _ours(
    problem: Problem | FullyConnectedProblem, nodes: int, sender: Tensor, receiver: Tensor, *, clusters: bool
) -> Conv:
    description = problem.description()
    graph = edge_graph(sender, receiver, nodes, nodes, clusters=clusters)
    if isinstance(description, FullyConnectedTensorProduct):
        if clusters:
            raise NotImplementedError("fully connected products have no use for clusters of receivers")
        return lambda x, y, w: fully_connected_tp_conv(description, x, y, w, graph)
    return lambda x, y, w: channelwise_tp_conv(description, x, y, w, graph)


def _to_mul_ir(x: Tensor, irreps: o3.Irreps) -> Tensor:
    """ir_mul -> mul_ir, for comparing and for feeding peers the same numbers."""
    blocks = [
        x[:, s].reshape(-1, ir.dim, mul).transpose(1, 2).reshape(x.shape[0], -1)
        for (mul, ir), s in zip(irreps, irreps.slices(), strict=True)
    ]
    return torch.cat(blocks, 1)


def measure(
    problem: Problem | FullyConnectedProblem,
    backend: str,
    graph: str,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    turn: ExitStack,
) -> dict[str, Any]:
    """One row: times in ms, peak memory and the difference from mace_fast. Takes its ``turn`` when it is ready."""
    nodes, sender, receiver = GRAPHS[graph]()
    sender, receiver = sender.to(device), receiver.to(device)
    d, edges = problem.description(), sender.shape[0]
    row: dict[str, Any] = {
        "problem": problem.name,
        "backend": backend,
        "graph": graph,
        "dtype": str(dtype).removeprefix("torch."),
        "nodes": nodes,
        "edges": edges,
        "weight_numel": d.weight_numel,
    }
    torch.manual_seed(0)
    ours = _ours(problem, nodes, sender, receiver, clusters=OURS.get(backend, False))
    mine = backend in OURS
    conv, weights = Peer(ours, lambda w: w) if mine else peer(backend, problem, nodes, sender, receiver, dtype)
    if not mine:
        turn.enter_context(my_turn())
    x = torch.randn(nodes, d.x_dim, dtype=dtype, device=device)
    y, w = (torch.randn(edges, n, dtype=dtype, device=device) for n in (d.y_dim, d.weight_numel))
    if not mine:
        expected = ours(x, y, w)
        if backend != "cueq":
            x, expected = (
                _to_mul_ir(x, o3.Irreps(problem.node_irreps)),
                _to_mul_ir(expected, problem.instructions()[0]),
            )
        w = weights(w)
        got = conv(x, y, w)
        difference = float((got - expected).norm() / expected.norm())
        row["rel_difference"] = difference
        if not difference < (1e-5 if dtype == torch.float32 else 1e-12):
            raise DifferentResultError(f"{backend} and mace_fast differ by {difference:.1e} on {problem.name}")
        del got, expected
    x, y, w = (t.detach().requires_grad_() for t in (x, y, w))
    g = torch.randn(nodes, d.z_dim, dtype=dtype, device=device, requires_grad=True)
    a, b, c = (torch.randn_like(t) for t in (x, y, w))

    def forward() -> Tensor:
        with torch.no_grad():
            return conv(x, y, w)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(conv(x, y, w), (x, y, w), g.detach())

    def double_backward() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(conv(x, y, w), (x, y, w), g, create_graph=True)
        return torch.autograd.grad(first, (x, y, w, g), (a, b, c))

    if mine:
        double_backward()  # compiles while others are timed
        turn.enter_context(my_turn())
        row["graph_ms"] = round(
            loop_ms(lambda: edge_graph(sender, receiver, nodes, nodes, clusters=OURS[backend]), device), 3
        )
    for key, call in (("fwd", forward), ("fwdbwd", backward), ("fwdbwdbwd", double_backward)):
        try:
            row[f"{key}_ms"] = round(median_ms(call, device, budget_s=budget_s), 4)
            row[f"{key}_loop_ms"] = round(loop_ms(call, device, budget_s=budget_s), 4)
            if mine and device.type == "cuda":
                times = kernel_times(call, warmup=1, repeats=5)
                row[f"{key}_kernels_us"] = {_short(name): round(us, 1) for name, (us, _) in times.items()}
            memory = peak_memory_mib(call, device)
            row[f"{key}_mib"] = None if memory is None else round(memory, 1)
        except torch.cuda.OutOfMemoryError:
            row["error"] = f"out of memory in {key}"
            break
    return row


def _short(kernel: str) -> str:
    """A kernel's name without its arguments and template."""
    return kernel.removeprefix("void ").split("(")[0].split("<")[0][:60]


def floor_ms(
    problem: Problem | FullyConnectedProblem, nodes: int, edges: int, dtype: torch.dtype, bandwidth: float
) -> dict[str, float]:
    """Time of the bytes that must move: every input read once and every output written once in each pass."""
    d = problem.description()
    x, y, w, z = nodes * d.x_dim, edges * d.y_dim, edges * d.weight_numel, nodes * d.z_dim
    inputs = x + y + w
    forward = inputs + z
    backward = inputs + z + inputs
    double = (inputs + z) + inputs + inputs + z
    unit = dtype.itemsize / bandwidth * 1e3
    return {
        "fwd": forward * unit,
        "fwdbwd": (forward + backward) * unit,
        "fwdbwdbwd": (forward + backward + double) * unit,
    }


def write(path: Path, rows: list[dict[str, Any]], device: torch.device, bandwidth: float) -> None:
    """Rows with what they were measured on, and the command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": " ".join(["python -m benchmarks.conv", *sys.argv[1:]]),
        "device": device_name(device),
        "torch": torch.__version__,
        "copy_TBs": round(bandwidth / 1e12, 3),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(TABLE), choices=list(ALL))
    choices = [*OURS, *BACKENDS]
    parser.add_argument("--backends", nargs="+", default=["mace_fast", *BACKENDS], choices=choices)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float64"])
    parser.add_argument("--graphs", nargs="+", default=[], choices=list(GRAPHS), help="instead of the problem's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds spent timing one figure")
    parser.add_argument("--output", type=Path, default=None, help="write JSON rows here")
    parser.add_argument("--plot", type=Path, default=None, help="draw the roofline here (PNG)")
    args = parser.parse_args()
    device = (
        torch.device(args.device, 0 if args.device == "cuda" else None) if args.device != "cpu" else torch.device("cpu")
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    with my_turn():
        bandwidth, peak = copy_bandwidth(device), float32_peak(device)
    print(f"{device_name(device)}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = []
    differs = False
    for name in args.problems:
        for graph in args.graphs or [ALL[name].graph]:
            for dtype_name in args.dtypes:
                for backend in args.backends:
                    dtype = getattr(torch, dtype_name)
                    try:
                        with ExitStack() as turn:
                            row = measure(ALL[name], backend, graph, dtype, device, args.budget, turn)
                            release(device)
                    except (ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                        if backend == "mace_fast":
                            raise
                        differs = differs or isinstance(error, DifferentResultError)
                        row = {
                            "problem": name,
                            "backend": backend,
                            "graph": graph,
                            "dtype": dtype_name,
                            "error": str(error)[:200],
                        }
                    if "fwd_ms" in row:
                        floors = floor_ms(ALL[name], int(row["nodes"]), int(row["edges"]), dtype, bandwidth)
                        row["floor_fraction"] = {
                            k: round(v / float(row[f"{k}_ms"]), 3) for k, v in floors.items() if f"{k}_ms" in row
                        }
                        operations = forward_operations(ALL[name].description()) * int(row["edges"])
                        rate = operations / (float(row["fwd_ms"]) * 1e-3)
                        row["fwd_TFLOPs"] = float(f"{rate / 1e12:.4g}")
                        row["fwd_operations_per_byte"] = round(operations / (floors["fwd"] * 1e-3 * bandwidth), 3)
                        if peak is not None and dtype == torch.float32:
                            row["fwd_peak_fraction"] = float(f"{rate / peak:.3g}")
                    rows.append(row)
                    print(
                        f"{graph:10} {name:12} {dtype_name:8} {backend:10} "
                        f"{row.get('nodes', '-')!s:>6} nodes {row.get('edges', '-')!s:>7} edges  "
                        + "  ".join(f"{k} {row.get(k + '_ms', '-')!s:>8}" for k in ("fwd", "fwdbwd", "fwdbwdbwd"))
                        + f"  floor {row.get('floor_fraction', row.get('error', ''))}",
                        flush=True,
                    )
                    if args.output:  # after each row: a run that is cut short keeps what it has
                        write(args.output, rows, device, bandwidth)
    if args.plot:
        plot_roofline(rows, device_name(device), bandwidth, peak, args.plot)
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
