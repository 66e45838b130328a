"""What goes wrong for users of accelerated models (the table in README.md beside this file) is covered by tests
that exist; and the traps that have no other place.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_patch_support import small_model, structures

from mace_fast import MACEFastCalculator, convert, zoo

TESTS = Path(__file__).parent
ROOT = TESTS.parent
VARIABLE = re.compile(r"MACE_FAST_[A-Z_]+")


def _tests_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_of_the_table_exists() -> None:
    rows = re.findall(r"^\| (\d+)\. .*? \| (.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 23))
    missing = []
    for number, cell in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert names, f"trap {number} has no test"
        for file, test in names:
            if not (TESTS / file).is_file() or test not in _tests_of(TESTS / file):
                missing.append(f"{number}: {file}::{test}")
    assert not missing


def _variables_in(paths: list[Path]) -> set[str]:
    return {name for path in paths for name in VARIABLE.findall(path.read_text())}


def test_variables_of_the_documentation_are_those_that_are_read() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    read = _variables_in([*(ROOT / "mace_fast").rglob("*.py"), *scripts])
    assert read and _variables_in([ROOT / "README.md"]) == read


@pytest.mark.parametrize(
    "devices",
    [
        ("cpu", torch.device("cpu")),
        pytest.param(("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)), marks=pytest.mark.gpu),
    ],
    ids=["cpu", "cuda"],
)
def test_a_device_is_a_string_or_a_device(devices: tuple[str | torch.device, ...], rng: np.random.Generator) -> None:
    """And the kernels of that device run for either: on a GPU in static programs, captured."""
    atoms = zoo.alloy((2, 1, 1), seed=int(rng.integers(2**31)))
    model = small_model(atomic_numbers=tuple(sorted(set(atoms.numbers.tolist()))))
    forces = []
    for device in devices:
        kind = torch.device(device).type
        calculator = atoms.calc = MACEFastCalculator(models=model, device=device, verify=False)
        forces.append(atoms.get_forces())
        stepper = calculator.stepper
        assert stepper is not None and calculator.device.type == stepper.device.type == kind
        assert all(p.device.type == kind for each in stepper.models for p in each.parameters())
        programs = list(stepper._programs.values())
        assert [(each.device.type, each.captured) for each in programs] == [("cuda", True)] * (kind == "cuda")
        assert (stepper._exact is not None) == (kind == "cpu")
    assert forces[0].any()
    assert all(np.array_equal(each, forces[0]) for each in forces[1:])


class _Kept:
    """Bytes of the storages that autograd keeps for the backward pass, each counted once."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.sizes: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        self.known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(tensor)  # alive, so that no address is given out twice
        return tensor

    @classmethod
    def by(cls, model: torch.nn.Module, data: dict[str, torch.Tensor]) -> int:
        kept = cls(model)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            model(zoo.copy_graph(data), compute_force=False)
        return sum(kept.sizes.values())


@pytest.mark.parametrize("variant", ["L1_lmax3", "L2_lmax3"])
def test_less_is_kept_for_the_backward_pass(variant: str, rng: np.random.Generator) -> None:
    """No message of an edge: of what mace-torch keeps, a third is left, radial weights mostly."""
    model = small_model(variant)
    data = structures(model, rng)
    fast = convert(model, verify=False)
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = _Kept.by(model, data), _Kept.by(fast, data)
    finally:
        torch.set_default_dtype(torch.float32)
    edges = data["edge_index"].shape[1]
    messages = 8 * edges * sum(block.conv_tp.irreps_out.dim for block in model.interactions)
    assert theirs > messages, (theirs, messages)
    assert ours < theirs / 3, (ours, theirs)


_EVALUATE = """
import logging, sys
import ase.build
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from mace_fast import MACEFastCalculator
atoms = ase.build.bulk("Cu", cubic=True)
atoms.rattle(0.05, seed=1)
atoms.calc = MACEFastCalculator(sys.argv[1], device="cpu")
atoms.get_forces()
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Neither for the program nor for its proof, whatever order Python gives to its sets."""
    checkpoint = zoo.checkpoint_path()
    environment = {**os.environ, "MACE_FAST_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    compiled = []
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-c", _EVALUATE, str(checkpoint)]
        done = subprocess.run(
            command, env={**environment, "PYTHONHASHSEED": hash_seed}, stdout=subprocess.PIPE, text=True, check=True
        )
        compiled.append([line for line in done.stdout.splitlines() if line.startswith("compiled ")])
    assert compiled[0] and not compiled[1]
