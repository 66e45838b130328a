"""Times of one convolution kernel under every schedule that its plan could follow: what the planner's rule rests on.

    python -m benchmarks.tune_conv --problems medium-L2 --roles forward backward
    python -m benchmarks.tune_conv --output benchmarks/results/h100-tune.json

Each schedule's results are compared with those of the plainest one before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import torch
from torch import Tensor

from benchmarks.graphs import GRAPHS
from benchmarks.problems import PROBLEMS
from benchmarks.timing import copy_bandwidth, device_name, median_ms
from mace_fast.kernels import ChannelwiseTensorProduct, edge_graph
from mace_fast.kernels.build import compile_cuda
from mace_fast.kernels.ops.channelwise_run import NO_SPLINE, Call, Spline, gradient_rows, run_kernel
from mace_fast.kernels.ops.clusters import find_clusters
from mace_fast.kernels.ops.segment import sum_on_gpu
from mace_fast.kernels.plan.channelwise import plan
from mace_fast.kernels.plan.layout import Schedule
from mace_fast.kernels.source.channelwise import BOTH, Variant, cuda_source

ORDER, INTERVALS = 6, 256
"""Of splines, as most models have them."""
ROLES = {
    "forward": Variant(False, False),
    "backward": Variant(False, True, True, True, True),
    "tangent": Variant(True, False),
    "backward_tangent": Variant(True, True, True, True, True),
    "both_tangents": BOTH,
    "spline": Variant(False, False, order=ORDER),
    "spline_backward": Variant(False, True, True, True, False, ORDER),
    "spline_backward_y": Variant(False, True, False, True, False, ORDER),
}
REGISTERS = (27, 40, 54, 80, 120)


RINGS = (0, 3, 4, 6)
CLUSTERS = (0, 2, 4, 8)


def schedules(
    d: ChannelwiseTensorProduct,
    item_bytes: int,
    variant: Variant,
    rings: Sequence[int] = RINGS,
    budgets: Sequence[int] = REGISTERS,
    clusters: Sequence[int] = (0,),
    tiles: Sequence[int] = (32,),
) -> list[Schedule]:
    """The plan's own, and others that differ in the kernels they lead to and may fit the registers."""
    chosen = plan(d, item_bytes, variant.role).schedule
    found: dict[object, Schedule] = {}
    choices = itertools.product((1, 2, 4), budgets, (False, True), rings, clusters, tiles)
    for schedule in (chosen, *(Schedule(*choice) for choice in choices)):
        vector, prefetch, ring, cluster = schedule.vector, schedule.prefetch, schedule.ring, schedule.cluster
        try:
            layout = plan(d, item_bytes, variant.role, schedule)
        except ValueError:
            continue
        # Compilers need fewer for tangents than is estimated.
        if schedule == chosen or layout.most_registers <= (300 if variant.dual else 250):
            found.setdefault((vector, prefetch, ring, cluster, layout.segments), schedule)
    return list(found.values())


def compiled(job: tuple[ChannelwiseTensorProduct, int, Variant, Schedule, str]) -> tuple[int, int]:
    """(most registers, most bytes spilt) of its kernels; leaves them in the cache on disk."""
    d, item_bytes, variant, schedule, arch = job
    resources = compile_cuda(cuda_source(d, item_bytes, variant, schedule), arch).resources.values()
    return max(r.registers for r in resources), max(r.spill_stores for r in resources)


class Case:
    """One kernel on one graph."""

    def __init__(self, d: ChannelwiseTensorProduct, graph: str, dtype: torch.dtype, device: torch.device) -> None:
        nodes, sender, receiver = GRAPHS[graph]()
        sender, receiver = sender.to(device), receiver.to(device)
        # By receiver, as in the graphs of a calculator.
        order = torch.argsort(receiver, stable=True)
        self.graph = edge_graph(sender[order], receiver[order], nodes, nodes)
        found = {n: find_clusters(*self.graph[:2], nodes, nodes, n) if n else None for n in CLUSTERS}
        self.graphs = {count: self.graph._replace(clusters=lists) for count, lists in found.items()}
        self.d, self.edges, self.nodes = d, sender.shape[0], nodes
        torch.manual_seed(0)
        options = {"dtype": dtype, "device": device}
        self.x, self.y, self.w = (
            torch.randn(n, m, **options)
            for n, m in ((nodes, d.x_dim), (self.edges, d.y_dim), (self.edges, d.weight_numel))
        )
        self.tangents = tuple(torch.randn_like(t) for t in (self.x, self.y, self.w))
        self.g = torch.randn(nodes, d.z_dim, **options)
        self.rows = torch.randn(INTERVALS + 1, ORDER, d.weight_numel, **options)
        # Lengths rise within a receiver, as a calculator sorts them.
        place = torch.arange(self.edges, device=device) - self.graph.row[self.graph.receiver.long()]
        self.radius = (place / (place.max() + 1)).to(dtype)

    def __call__(self, variant: Variant, schedule: Schedule, *, at_senders: bool = False) -> list[Tensor]:
        """Its results; with ``at_senders`` gradients of x are summed there, by another kernel."""
        operands = (self.x, self.y, None if variant.order else self.w)
        tangents = self.tangents if variant.dual else (None, None, None)
        spline: Spline = (self.radius, None, self.rows, INTERVALS, float(INTERVALS)) if variant.order else NO_SPLINE
        d, key = self.d, self.d.key
        results: list[Tensor]
        if variant.backward:
            graph = self.graphs[schedule.cluster]
            parts, _ = gradient_rows(key, self.x, variant, graph.lists, schedule)
            dx = self.x.new_empty(self.edges, d.x_dim) if variant.want_x else self.x.new_empty(0)
            dy = self.x.new_empty(parts, self.edges, d.y_dim + (variant.order > 0))
            dw = torch.empty_like(self.w) if variant.want_w else self.x.new_empty(0)
            z = self.x.new_empty(self.nodes, d.z_dim)
            sums = (z, d.z_dim) if variant.want_z else ()
            outputs = (self.g, d.z_dim, dx, dy, dw if variant.want_w else None, 0, self.edges, *sums)
            run_kernel(Call(key, variant, operands, graph.lists, outputs, tangents, spline, schedule))
            if at_senders and variant.want_x:
                lists = graph[4:6] if graph.clusters is None else graph.clusters[2:]
                dx = sum_on_gpu(dx, *lists, all_listed=graph.clusters is None)
            results = [dx, dy[0] if parts == 1 else dy.sum(0), dw, *sums[:1]]
        else:
            results = [self.x.new_empty(self.nodes, d.z_dim)]
            outputs = (results[0], d.z_dim)
            run_kernel(Call(key, variant, operands, self.graph.lists, outputs, tangents, spline, schedule))
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--roles", nargs="+", default=list(ROLES), choices=list(ROLES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--rings", nargs="+", type=int, default=list(RINGS), help="lengths of rings; 0 is none")
    parser.add_argument("--registers", nargs="+", type=int, default=list(REGISTERS), help="of a segment, at most")
    parser.add_argument("--clusters", nargs="+", type=int, default=[0], choices=CLUSTERS, help="receivers of a cluster")
    parser.add_argument("--tiles", nargs="+", type=int, default=[32], help="most edges of a tile")
    parser.add_argument(
        "--at-senders", action="store_true", help="time the sums of the gradients of x at senders too; clusters need it"
    )
    parser.add_argument("--graph", default="diamond", choices=list(GRAPHS))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at a time")
    parser.add_argument("--output", type=Path, default=None, help="write JSON rows here")
    args = parser.parse_args()
    if any(args.clusters) and not args.at_senders:
        parser.error("--clusters needs --at-senders: their gradients of x can be compared as sums alone")
    device, dtype = torch.device("cuda", 0), getattr(torch, args.dtype)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    jobs = []
    for name in args.problems:
        for role in args.roles:
            d, variant = PROBLEMS[name].description(), ROLES[role]
            mine = schedules(d, dtype.itemsize, variant, args.rings, args.registers, args.clusters, args.tiles)
            jobs += [((d, dtype.itemsize, variant, s, arch), name, role) for s in mine]
    with ProcessPoolExecutor(args.processes) as pool:
        resources = list(pool.map(compiled, [job for job, _, _ in jobs]))
    rows = []
    case = current = None
    for ((d, item_bytes, variant, schedule, _), name, role), (registers, spilt) in zip(jobs, resources, strict=True):
        if current != name:
            case, current = Case(d, args.graph, dtype, device), name
        assert case is not None
        expected = case(variant, Schedule(1, 54, False), at_senders=args.at_senders)
        difference = max(
            float((a - b).norm() / b.norm()) if b.numel() else 0.0
            for a, b in zip(case(variant, schedule, at_senders=args.at_senders), expected, strict=True)
        )
        if not difference < (1e-5 if dtype == torch.float32 else 1e-12):
            raise AssertionError(f"{name} {role} {schedule} is off by {difference:.1e}")
        del expected
        run = partial(case, variant, schedule, at_senders=args.at_senders)
        ms = median_ms(run, device, budget_s=0.04)
        layout = plan(d, item_bytes, variant.role, schedule)
        chosen = plan(d, item_bytes, variant.role).schedule == schedule
        rows.append(
            {
                "problem": name,
                "role": role,
                "vector": schedule.vector,
                "registers": schedule.registers,
                "prefetch": schedule.prefetch,
                "ring": schedule.ring,
                "cluster": schedule.cluster,
                "tile": schedule.tile,
                "segments": len(layout.segments),
                "together": layout.together,
                "used_registers": registers,
                "estimated_registers": layout.most_registers,
                "spilt_bytes": spilt,
                "chosen": chosen,
                "ms": round(ms, 4),
            }
        )
    for name in args.problems:
        for role in args.roles:
            found = sorted((r for r in rows if r["problem"] == name and r["role"] == role), key=lambda r: r["ms"])
            for place, row in enumerate(found):
                if place < 4 or row["chosen"]:
                    shown = " ".join(f"{k} {row[k]}" for k in list(row)[2:-2])
                    print(f"{name:10} {role:17} {row['ms']:8.4f} ms  {shown}{'  <- plan' if row['chosen'] else ''}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m benchmarks.tune_conv", *sys.argv[1:]])
        result = {"device": device_name(device), "torch": torch.__version__, "command": command, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
