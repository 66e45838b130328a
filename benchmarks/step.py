"""One ASE step, from displaced positions to forces, beside mace-torch's calculator; and the neighbour lists alone.

    python -m benchmarks.step                                          # mp0-medium, 64 and 1000 atoms of diamond
    python -m benchmarks.step --model mpa0-medium --sizes 4096 13824   # larger
    python -m benchmarks.step --sizes 64 --backends mace_fast --soak 100000   # does memory grow?
    python -m benchmarks.step --model cu-ag-au-emt --structure alloy --sizes 32 108 --device cpu

Random weights (or the shipped checkpoint), atoms vibrating about their sites, another configuration each step, forces
alone asked for. Columns:

- ms: median wall time of a step, set positions to forces as a NumPy array; the configurations are there before.
- rebuild: the same where the neighbour list has to be made anew (mace_fast; mace-torch makes it at every step).
- bare: the evaluation alone, on input that is there already; overhead is ms - bare.
- dF_rel: distance of the forces from the first backend's; rebuilds: lists made in the timed steps.

Backends: mace-torch, cueq and oeq (its own switches, where they are installed), mace_fast, no-graph (mace_fast without
CUDA graphs). ``--lists`` times every way to find neighbours that the device has, at the model's cutoff; ``--batch``
times mace_fast.evaluate on so many clusters of water against one cluster by itself.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4 under torch 2.6 and later

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from mace.calculators import MACECalculator

from benchmarks.timing import device_name, release
from benchmarks.turns import my_turn
from mace_fast import zoo
from mace_fast.calculators import MACEFastCalculator
from mace_fast.errors import MissingToolError
from mace_fast.files import published
from mace_fast.inference.neighbours import CPU_METHODS, CUDA_METHODS, NeighbourSearch
from mace_fast.loading import load_model

BACKENDS = ("mace-torch", "cueq", "oeq", "mace_fast", "no-graph")
PEERS = {"mace-torch": {}, "cueq": {"enable_cueq": True}, "oeq": {"enable_oeq": True}}
ALLOYS = {"alloy": (("Cu", "Ag", "Au"), 3.95), "five-metals": (("Cr", "Mn", "Fe", "Co", "Ni"), 3.6)}
"""Species and cubic lattice constant, A, of fcc alloys."""
_AMPLITUDE = 0.06
"""A, standard deviation of each coordinate: carbon at some hundred K."""
_MEMORY = 0.98
"""Correlation of displacements from step to step."""


class Vibration:
    """Configurations one after another, the same for each backend."""

    def __init__(self, atoms: Atoms, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._home = atoms.positions.copy()
        self._away = self._rng.normal(0, _AMPLITUDE, self._home.shape)

    def __call__(self) -> np.ndarray:
        noise = self._rng.normal(0, _AMPLITUDE, self._home.shape)
        self._away = _MEMORY * self._away + np.sqrt(1 - _MEMORY**2) * noise
        return self._home + self._away


def build_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A zoo model with random weights, or the shipped checkpoint."""
    if name == zoo.checkpoint_path().stem:
        return load_model(zoo.checkpoint_path(), "cpu", dtype)
    return zoo.build(name, dtype=dtype)


def structure(kind: str, natoms: int) -> Atoms:
    """About so many atoms of a crystal or a liquid."""
    if kind == "diamond":
        return zoo.diamond(natoms, rattle=0.0)
    if kind in ALLOYS:
        cells = round(natoms / 4)
        sides = [(a, b, cells // (a * b)) for a in range(1, 33) for b in range(a, 33) if cells % (a * b) == 0]
        repeats = min(sides, key=lambda side: max(side) - min(side))
        symbols, constant = ALLOYS[kind]
        return zoo.alloy(repeats, symbols=symbols, constant=constant, rattle=0.0, seed=0)
    return zoo.water(natoms // 3)


def make(backend: str, model: torch.nn.Module, options: argparse.Namespace) -> Calculator:
    """A calculator on the device."""
    if backend in PEERS:
        return MACECalculator(models=[model], device=options.device, default_dtype=options.dtype, **PEERS[backend])
    return MACEFastCalculator(
        models=model,
        device=options.device,
        default_dtype=options.dtype,
        verify=False,
        skin=options.skin,
        cuda_graph=False if backend == "no-graph" else None,
        neighbours=options.neighbours,
    )


def median(
    call: Callable[[], object],
    budget_s: float,
    *,
    before: Callable[[], object] = lambda: None,
    warmup: int = 3,
    at_least: int = 5,
) -> float:
    """Median wall time of a call in ms; what comes ``before`` each is not timed."""
    for _ in range(warmup):
        before()
        call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - started < budget_s and len(times) < 400):
        before()
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure_step(
    backend: str, calculator: Calculator, atoms: Atoms, expected: dict[int, np.ndarray], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one row."""
    atoms = atoms.copy()
    atoms.calc = calculator
    vibration = Vibration(atoms)
    given, shift = atoms.positions.copy(), np.zeros(3)

    def vibrate() -> None:
        given[:] = vibration()

    def step() -> np.ndarray:
        atoms.positions[:] = given
        forces: np.ndarray = atoms.get_forces()
        return forces

    vibrate()
    row: dict[str, Any] = {}
    with my_turn() if backend == "mace-torch" else nullcontext():  # the others compile while someone is timed
        begin = time.perf_counter()
        forces = step()
        row["first_s"] = round(time.perf_counter() - begin, 2)
    reference = expected.setdefault(len(atoms), forces)
    row["dF_rel"] = float(np.linalg.norm(forces - reference) / np.linalg.norm(reference))
    with my_turn():
        stepper = getattr(calculator, "stepper", None)
        made_before = stepper.rebuilds if stepper else 0
        row["ms"] = round(median(step, options.budget, before=vibrate), 4)
        if stepper is not None:
            row["rebuilds"] = stepper.rebuilds - made_before
            row["neighbours"] = stepper.search.method

            def bare() -> None:
                stepper.repeat()
                synchronize(options.device)

            row["bare_ms"] = round(median(bare, options.budget), 4)
            row["overhead_ms"] = round(row["ms"] - row["bare_ms"], 4)
            shift[0] = 2 * options.skin + 0.1

            def move() -> None:
                np.negative(shift, out=shift)
                given[:] = vibration() + shift

            row["rebuild_ms"] = round(median(step, options.budget, before=move), 4)
        if options.device.startswith("cuda"):
            row["reserved_mib"] = round(torch.cuda.memory_reserved() / 2**20, 1)
        return row


def measure_lists(atoms: Atoms, cutoff: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to find the pairs of one structure."""
    on_gpu = options.device.startswith("cuda")
    rows = []
    cell, pbc = np.array(atoms.cell), np.array(atoms.pbc)
    vibration = Vibration(atoms)
    for method in CUDA_METHODS if on_gpu else (*CPU_METHODS, "matscipy"):
        row: dict[str, Any] = {"kind": "list", "method": method, "natoms": len(atoms), "cutoff": cutoff}
        if method == "matscipy":
            from matscipy.neighbours import neighbour_list

            def find() -> int:
                return len(neighbour_list("ijS", positions=vibration(), cell=cell, pbc=pbc, cutoff=cutoff)[0])
        else:
            try:
                search = NeighbourSearch(options.device, method)
            except MissingToolError as error:
                rows.append({**row, "error": str(error)})
                continue

            def find(search: NeighbourSearch = search) -> int:
                found = search(vibration(), cell, pbc, cutoff)
                synchronize(options.device)
                return found.edge_index.shape[1]

        try:
            row["edges"] = find()
            with my_turn():
                row["ms"] = round(median(find, options.budget), 4)
        except RuntimeError as error:
            row["error"] = str(error)[:200]
        rows.append(row)
    return rows


def measure_batch(count: int, calculator: MACEFastCalculator, options: argparse.Namespace) -> dict[str, Any]:
    """``evaluate`` on clusters of seven water molecules, and on one of them; other clusters each time, as in screening,
    so that neighbours have to be found, and once more the same ones."""
    clusters = []
    for seed in range(2 * count):
        atoms = zoo.water(7, seed=seed)
        atoms.pbc = False
        clusters.append(atoms)
    turns = itertools.cycle((0, count))

    def many() -> None:
        first = next(turns)
        calculator.evaluate(clusters[first : first + count])

    def one() -> None:
        first = next(turns)
        calculator.evaluate(clusters[first : first + 1])

    def again() -> None:
        calculator.evaluate(clusters[:count])

    for call in (many, many, one, one):
        call()
    with my_turn():
        together, alone, same = (median(call, options.budget) for call in (many, one, again))
    return {
        "kind": "batch",
        "structures": count,
        "natoms": len(clusters[0]),
        "ms": round(together, 3),
        "one_ms": round(alone, 3),
        "again_ms": round(same, 3),
        "per_second": round(1e3 * count / together, 1),
        "times_one": round(count * alone / together, 2),
    }


def soak(calculator: Calculator, atoms: Atoms, steps: int, device: str) -> dict[str, Any]:
    """Memory of process and GPU along many steps: atoms diffuse, lists and programs are made anew."""
    atoms = atoms.copy()
    atoms.calc = calculator
    vibration = Vibration(atoms)
    marks = []
    begin = time.perf_counter()
    drift = np.zeros(3)
    for step in range(1, steps + 1):
        drift += [0.002, 0.001, 0.0]
        atoms.positions[:] = vibration() + drift
        atoms.get_forces()
        if step % max(1, steps // 10) == 0:
            marks.append({"step": step, "resident_mib": resident_mib(), "reserved_mib": reserved_mib(device)})
            print(marks[-1], file=sys.stderr, flush=True)
    return {
        "kind": "soak",
        "natoms": len(atoms),
        "steps": steps,
        "ms": round(1e3 * (time.perf_counter() - begin) / steps, 4),
        "memory": marks,
    }


def resident_mib() -> float:
    """Memory of this process, from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def reserved_mib(device: str) -> float | None:
    """Memory that torch holds on the GPU."""
    return round(torch.cuda.memory_reserved() / 2**20, 1) if device.startswith("cuda") else None


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def show(row: dict[str, Any]) -> None:
    """One line."""
    what = row.get("backend") or row.get("method") or row["kind"]
    if "error" in row:
        print(f"{row['kind']:<6}{what:<14}{row['natoms']:>7} atoms  {row['error'].splitlines()[0]}", flush=True)
        return
    extra = {"rebuild_ms": "rebuild", "bare_ms": "bare", "overhead_ms": "overhead", "dF_rel": "dF_rel"}
    shown = [f"{label} {row[key]:.3g}" for key, label in extra.items() if key in row]
    shown += [f"{key} {row[key]}" for key in ("rebuilds", "first_s", "per_second", "times_one") if key in row]
    print(f"{row['kind']:<6}{what:<14}{row['natoms']:>7} atoms {row['ms']:>10.3f} ms  {', '.join(shown)}", flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; each is shown, and all are written, as soon as it is there."""
    rows: list[dict[str, Any]] = []
    label = {"model": options.model, "dtype": options.dtype, "structure": options.structure}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        show(row)
        if options.output is not None:
            write(rows, options)

    dtype = getattr(torch, options.dtype)
    cutoff = float(build_model(options.model, dtype).r_max)
    expected: dict[int, np.ndarray] = {}
    for backend in options.backends:
        try:
            calculator = make(backend, build_model(options.model, dtype), options)
        except Exception as error:  # a peer that is not installed, or cannot convert, is a row with its error
            if backend not in PEERS:
                raise
            keep({"kind": "step", "backend": backend, "natoms": 0, **label, "error": f"{error}"[:200]})
            continue
        for natoms in options.sizes:
            atoms = structure(options.structure, natoms)
            row = {"kind": "step", "backend": backend, "natoms": len(atoms), **label, "skin": options.skin}
            try:
                row |= measure_step(backend, calculator, atoms, expected, options)
            except torch.cuda.OutOfMemoryError:
                row["error"] = "out of memory"
            except Exception as error:
                if backend not in PEERS:
                    raise
                row["error"] = str(error)[:200]
            keep(row)
            gc.collect()
        if backend == "mace_fast" and options.soak:
            atoms = structure(options.structure, options.sizes[0])
            with my_turn():
                found = soak(calculator, atoms, options.soak, options.device)
            keep(label | found)
        if backend == "mace_fast" and options.batch:
            keep(label | measure_batch(options.batch, calculator, options))
        del calculator
        release(torch.device(options.device))
    for natoms in options.lists:
        for row in measure_lists(structure("diamond", natoms), cutoff, options):
            keep(row)
    return rows


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Rows with what they were measured on, and the command."""
    result = {
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with published(options.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure and print."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mp0-medium", help=f"of the zoo, or {zoo.checkpoint_path().stem}")
    parser.add_argument("--structure", choices=("diamond", *ALLOYS, "water"), default="diamond")

    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[64, 1000] if on_gpu else [64],
        help="atoms; 8 m^3 of diamond",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["mace-torch", "mace_fast"])
    parser.add_argument("--lists", nargs="*", type=int, default=[64, 1000, 21952], help="atoms; give none to skip")
    parser.add_argument("--batch", type=int, default=0, help="structures; needs a model of H and O")
    parser.add_argument("--soak", type=int, default=0, metavar="STEPS", help="steps of mace_fast at the first size")
    parser.add_argument("--skin", type=float, default=0.5, help="A")
    parser.add_argument("--neighbours", default=None, help="how mace_fast finds neighbours; see the calculator")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds spent timing one figure")
    parser.add_argument("--output", type=Path, default=None, help="JSON file, as benchmarks/results/h100-step.json")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{device_name(torch.device(options.device))}, torch {torch.__version__}", flush=True)
    measure(options)


if __name__ == "__main__":
    main()
