"""What ``md`` and ``relax`` share: their calculator, a clean stop, what identifies a model."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from mace_fast.cli.console import say
from mace_fast.cli.options import Precision, choose_device, usage_errors

if TYPE_CHECKING:
    from ase import Atoms

    from mace_fast.calculators import MACEFastCalculator

INTERRUPTED = 130

Overwrite = Annotated[
    bool, typer.Option("--overwrite", "--force", help="Replace what an earlier run left in the directory.")
]
Structure = Annotated[Path, typer.Argument(help="Any file that ASE reads (cif, xyz, POSCAR ...); its last structure.")]
Repeat = Annotated[int, typer.Option(min=1, help="Repeat the cell so many times along each vector.")]


def make_calculator(
    model: str, device: str | None, dtype: Precision | None, head: str | None, no_verify: bool
) -> MACEFastCalculator:
    """The calculator that the shared options describe."""
    from mace_fast.calculators import MACEFastCalculator

    place = choose_device(device)
    say(f"loading and converting {model}" + ("" if no_verify else ", verifying the conversion if it is new here"))
    with usage_errors():
        calculator = MACEFastCalculator(
            model,
            device=place,
            default_dtype="" if dtype is None else dtype.value,
            head=head,
            verify=False if no_verify else "once",
        )
    say_what_is_proven(calculator)
    return calculator


def require_own_features(atoms: Atoms, calculator: MACEFastCalculator, repeat: int) -> None:
    """A charge or spin, or another further input of the model, is that of the structure in the file.

    Raises:
        typer.BadParameter: the structure has one that is not the default, and is repeated.
    """
    from mace_fast.calculators.graph import FEATURE_DEFAULTS

    if repeat == 1:
        return
    for name, spec in (getattr(calculator.models[0], "embedding_specs", None) or {}).items():
        key = calculator.info_keys.get(name, name)
        if spec["per"] != "atom" and key in atoms.info and atoms.info[key] != FEATURE_DEFAULTS.get(name):
            raise typer.BadParameter(
                f"--repeat {repeat} makes {repeat**3} copies, and {key}={atoms.info[key]} ({name}) is that of one: "
                "write the supercell to a file with its own, and leave --repeat out"
            )


def say_what_is_proven(calculator: MACEFastCalculator) -> None:
    """Whether the model was proven now or before, and where the reports are."""
    for proof in calculator.proofs:
        when = "was proven on this machine before" if proof.earlier else "is proven"
        say(f"{proof.what}: {when}" + ("" if proof.report is None else f" ({proof.report})"))


def model_identity(model: str, calculator: MACEFastCalculator) -> dict[str, str]:
    """What must be the same for a run to go on with this model: its bytes (or public name), dtype and head."""
    from mace_fast.calculators.proofs import file_digest

    path = Path(model)
    digest = file_digest(path)
    name = model if digest is None else f"{path.name} ({digest[:12]})"
    return {"model": name, "dtype": calculator.default_dtype, "head": calculator.head}


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM set a flag, which the yielded function reads; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
