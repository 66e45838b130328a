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
