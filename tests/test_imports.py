"""What is imported when: little for help, mace-torch quietly and first for the rest, and a name with two meanings."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mace_fast

HEAVY = ("torch", "mace", "e3nn", "ase", "numpy", "matplotlib")


def in_a_fresh_interpreter(code: str) -> str:
    """Standard output of code that must succeed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["md", "--help"], ["md", "x", "--model", "m", "--steps", "0"]])
def test_help_and_wrong_usage_wait_for_nothing(arguments: list[str]) -> None:
    code = (
        "import contextlib, io, sys\n"
        "from mace_fast.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        f"    try: main({arguments})\n"
        "    except SystemExit as exc: status = exc.code\n"
        f"print(status, [name for name in {HEAVY} if name in sys.modules])"
    )
    assert in_a_fresh_interpreter(code) == f"{2 if '--steps' in arguments else 0} []\n"


@pytest.mark.parametrize(
    "package",
    [
        "calculators",
        "inference",
        "kernels",
        "loading",
        "md.dynamics",
        "patch.blocks.interaction",
        "verification",
        "zoo",
    ],
)
def test_every_package_may_be_the_first(package: str) -> None:
    """As for a converted model that torch.load meets. Nothing is printed, e3nn's constants are read."""
    assert in_a_fresh_interpreter(f"import mace_fast.{package}") == ""


@pytest.mark.parametrize(
    "before",
    ["pass", "import mace_fast.patch", "from mace_fast.patch.match import match", "import mace_fast.calculators"],
)
def test_patch_is_the_function_whatever_came_before(before: str) -> None:
    code = f"{before}\nimport mace_fast\nfrom mace_fast import patch\nfrom mace_fast.patch.api import patch as meant"
    assert in_a_fresh_interpreter(f"{code}\nprint(patch is meant is mace_fast.patch)") == "True\n"


def test_public_names() -> None:
    for name in mace_fast.__all__:
        assert callable(getattr(mace_fast, name)) and name in dir(mace_fast)
    with pytest.raises(AttributeError, match="no attribute 'acccelerate'"):
        mace_fast.acccelerate  # noqa: B018


def test_nothing_optional_is_needed_on_a_cpu() -> None:
    """Without any package for GPUs, and without those that other calculators and accelerators bring: every public name
    is there, and a structure is evaluated."""
    script = """
import importlib, sys
blocked = ("cuda", "nvidia", "cupy", "cuequivariance", "openequivariance", "torch_sim", "torchsim", "nvalchemi")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith(blocked):
            raise ModuleNotFoundError(name + " is blocked", name=name)
sys.meta_path.insert(0, Block())
names = 0
packages = ("calculators", "inference", "kernels", "kernels.build", "md", "patch", "verification", "zoo", "cli")
for package in ("mace_fast", *("mace_fast." + each for each in packages)):
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
        names += 1
assert names > 50, names
from mace_fast import MACEFastCalculator, zoo
atoms = zoo.edge_case_structures([1, 6, 8], cutoff=4.5)["molecule with a cell"]
model = zoo.build(zoo.small_variants()["base"])
atoms.calc = MACEFastCalculator(models=model, verify=False)
assert atoms.calc.stepper is not None
print(bool(abs(atoms.get_forces()).max() > 1e-3))
"""
    assert in_a_fresh_interpreter(script) == "True\n"
