"""How long the kernels of a model take to compile, and to load once they are in the cache.

    python -m benchmarks.compile_time --output benchmarks/results/cpu-compile.json

Each row is a process of its own, with an empty cache the first time and with what that left there the second time.
``cpu``: a converted model (energy, forces and stress, then a training step, which needs second derivatives), or a
frozen one, evaluated on eight atoms; seconds are those spent compiling or loading, not evaluating. ``cuda``: the
sources that the same calls would load on a GPU, compiled by NVRTC, which needs none, for ``--arch``, one after the
other as a first call does; loading is reading machine code from the cache. ``cpu_s`` is processor time, which a busy
machine changes less than the wall time.

``conv``: the four kernels of each convolution problem of benchmarks/problems.py (the product, its gradients, and both
with tangents, for second derivatives), compiled side by side as ``mace_fast.kernels.prepare`` does it, again where one
spills and has another form; with the registers and the bytes of spilled stores of each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import torch

from benchmarks.problems import PROBLEMS, TABLE
from benchmarks.timing import device_name
from mace_fast import convert, zoo
from mace_fast.files import published
from mace_fast.inference import FrozenMACE
from mace_fast.kernels.build import CompiledCuda, CpuSource, CudaSource, compile_cuda, side_by_side
from mace_fast.kernels.ops import channelwise_run, harmonics, linear, linear_cuda, segment, symmetric
from mace_fast.kernels.source.channelwise import Variant, gpu_passes
from mace_fast.kernels.source.fitted import fitted_source
from mace_fast.kernels.source.segment import segment_lists_cuda

_MODULES = (channelwise_run, harmonics, linear, linear_cuda, segment, symmetric)
# That which sorts edges stays with the CPU: what it makes is read by the host.
_CUDA_OPS = (
    ("segment_sum", segment._segment_sum_cuda),
    ("segment_gather", segment._segment_gather_cuda),
    ("linear", linear._linear_cuda),
    ("indexed_linear", linear._indexed_cuda),
    ("indexed_linear_weight_grad", linear._indexed_weight_grad_cuda),
)


class Clock:
    """Wall and processor time, children's included, spent in the calls of some functions."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.sources: dict[CpuSource | CudaSource, float] = {}

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(source, ...)``, timed."""

        def timed(source: CpuSource | CudaSource, *arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), _processor_time()
            result = function(source, *arguments)
            seconds = time.perf_counter() - wall
            self.wall += seconds
            self.cpu += _processor_time() - cpu
            self.sources[source] = max(seconds, self.sources.get(source, 0.0))
            return result

        return timed

    def row(self) -> dict[str, Any]:
        slowest = max(self.sources, key=lambda source: self.sources[source])
        return {
            "sources": len(self.sources),
            "wall_s": round(self.wall, 3),
            "cpu_s": round(self.cpu, 3),
            "slowest": slowest.name,
            "slowest_wall_s": round(self.sources[slowest], 3),
        }


def _processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Unlaunched:
    """In place of a module that is loaded on a GPU: results stay as they were allocated."""

    def launch(self, *arguments: Any) -> None:
        """Nothing."""


def evaluate(model_name: str, form: str, dtype: torch.dtype) -> None:
    """Everything that loads kernels: convert or freeze, evaluate; train, if it is to be trained."""
    model = zoo.build(model_name).to(dtype)
    crystal = zoo.diamond(8)
    data = zoo.graph(crystal, model, dtype=dtype, device="cpu")
    torch.set_default_dtype(dtype)
    fast = convert(model, verify=False)
    if form == "frozen":
        FrozenMACE(fast)(data, compute_stress=True)
        return
    fast(zoo.copy_graph(data), compute_stress=True)
    fast(zoo.copy_graph(data), training=True, compute_stress=True)["forces"].square().sum().backward()


def cpu_row(model_name: str, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """Times of the host compiler."""
    clock = Clock()
    for module in _MODULES:
        if hasattr(module, "load_cpu"):
            module.load_cpu = clock.around(module.load_cpu)  # type: ignore[attr-defined]
    evaluate(model_name, form, dtype)
    return clock.row()


def cuda_row(model_name: str, form: str, dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """Times of NVRTC."""
    sources: dict[CudaSource, None] = {}

    def record(source: CudaSource, device: torch.device | str) -> Unlaunched:
        sources[source] = None
        return Unlaunched()

    library = torch.library.Library("mace_fast", "IMPL")  # noqa: TOR901
    for module in _MODULES:
        if hasattr(module, "load_cuda"):
            module.load_cuda = record  # type: ignore[attr-defined]
        if hasattr(module, "on_gpu"):
            module.on_gpu = lambda tensor: True  # type: ignore[attr-defined]
    for name, function in _CUDA_OPS:
        library.impl(name, function, "CPU", allow_override=True)
    evaluate(model_name, form, dtype)
    sources[segment_lists_cuda("int32")] = None
    clock = Clock()
    for source in sources:
        clock.around(lambda source: compile_cuda(source, arch))(source)
    return clock.row()


def conv_row(problem: str, dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """Times of NVRTC for one convolution, and what its kernels use."""
    description = PROBLEMS[problem].description()
    passes = gpu_passes(description, dtype.itemsize)
    wall, cpu = time.perf_counter(), _processor_time()

    def compile_fitted(variant: Variant) -> CompiledCuda:
        return compile_cuda(fitted_source(description, dtype.itemsize, variant, arch)[0], arch)

    compiled = side_by_side([partial(compile_fitted, variant) for variant in reversed(passes)])[::-1]
    used = [max(c.resources.values(), key=lambda r: r.registers) for c in compiled]
    return {
        "sources": len(passes),
        "wall_s": round(time.perf_counter() - wall, 3),
        "cpu_s": round(_processor_time() - cpu, 3),
        "registers": [r.registers for r in used],
        "spill_stores": [sum(r.spill_stores for r in c.resources.values()) for c in compiled],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mp0-medium", help="a name of mace_fast.zoo.architectures()")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--kinds", nargs="+", default=["cpu", "cuda", "conv"], choices=["cpu", "cuda", "conv"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--row", nargs=2, metavar=("KIND", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.row:
        kind, form = arguments.row
        if kind == "cpu":
            print(json.dumps(cpu_row(arguments.model, form, dtype)))
        elif kind == "cuda":
            print(json.dumps(cuda_row(arguments.model, form, dtype, arguments.arch)))
        else:
            print(json.dumps(conv_row(form, dtype, arguments.arch)))
        return
    rows = []
    forms = {"cpu": ["converted", "frozen"], "cuda": ["converted", "frozen"], "conv": list(TABLE)}
    for kind in arguments.kinds:
        for form in forms[kind]:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "cached"):
                    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compile_time", "--row", kind, form]
                    command += ["--model", arguments.model, "--arch", arguments.arch, "--dtype", arguments.dtype]
                    environment = {**os.environ, "MACE_FAST_CACHE": cache}
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    rows.append(
                        {"kind": kind, "form": form, "cache": state, **json.loads(done.stdout.splitlines()[-1])}
                    )
                    print(rows[-1], flush=True)
    report = {
        "command": "python " + " ".join(["-m benchmarks.compile_time", *sys.argv[1:]]),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "arch": arguments.arch,
        "device": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "rows": rows,
    }
    if arguments.output:
        with published(arguments.output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
