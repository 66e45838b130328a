"""``freeze``: from a MACE model to a verified frozen program."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence

import ase
import numpy as np
import torch

from mace_fast.inference.frozen import FrozenMACE
from mace_fast.inference.pairs import compare_pairs, compared_pairs, name_what_is_left
from mace_fast.inference.radial import depends_on_species
from mace_fast.patch.api import convert
from mace_fast.patch.constants import with_fast_constants
from mace_fast.patch.replace import put_back
from mace_fast.verification import EquivalenceReport, Progress, compare
from mace_fast.verification.structures import default_structures

_MODES = ("stress", "energy", "forces", "virials", "displacement", "no edges")
_ELEMENTS = 2
"""Elements in the structures of the verification, where each pair of species has tables of its own."""
_SECONDS = 10.0
"""For other pairs of elements."""


def freeze(
    model: torch.nn.Module,
    *,
    verify: bool = True,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    structures: Sequence[ase.Atoms] | None = None,
    progress: Progress | None = None,
) -> FrozenMACE:
    """A copy of a MACE energy model as one program for inference: energies, forces and stress, no training.

    The radial networks become splines of the distance whose error is bounded when they are made, so that the weights of
    the convolutions, the largest tensors of a model, are never written.

    Args:
        model: a MACE or ScaleShiftMACE, converted or not. It is not touched.
        verify: compare the converted model with the original, and the program with the original too.
        dtype, device: of the program; the model's by default.
        structures: to verify on, instead of some made up from the model's elements. ``verify_frozen`` says which pairs
            of elements those made up hold, where tables depend on the two elements of an edge.
        progress: called with what is being verified, the number of steps done, and of steps known.

    Returns:
        The program, callable like the model.

    Raises:
        UnsupportedModuleError: a block is not understood, or its radial weights are no functions of the distance.
        VerificationError: the program does not compute what the model does; ``.report`` says where.
    """
    fast = convert(model, verify=verify, dtype=dtype, device=device, structures=structures, progress=progress)
    frozen = FrozenMACE(fast)
    if verify:
        verify_frozen(model, frozen, structures=structures, progress=progress).raise_if_failed()
    return frozen


def verify_frozen(
    model: torch.nn.Module,
    frozen: FrozenMACE,
    *,
    structures: Sequence[ase.Atoms] | None = None,
    progress: Progress | None = None,
) -> EquivalenceReport:
    """Compare a program with the model that it was made from, in every mode but training and the Hessian.

    Where tables depend on the two elements of an edge, structures that are made up hold two elements in all modes.
    Clusters of up to four elements follow, for energies and forces in the program's dtype, until every pair of elements
    was within the cutoff; after ten seconds no other cluster is begun. That reaches all pairs of a model of few
    elements; of one of 89 it reaches some, others each time. The report's ``not_compared`` names the rest, for which
    there is the bound on the error of a table, which is checked when it is made, for whatever pair.

    Args:
        model: the original, converted or not.
        frozen: the program.
        structures: to compare on instead. Pairs of elements that are not in them are named, and not compared.
        progress: as for ``freeze``.

    Returns:
        The report; ``report.raise_if_failed()`` raises VerificationError.
    """
    dtypes = tuple(dict.fromkeys((torch.float64, next(frozen.parameters()).dtype)))
    reference = with_fast_constants(put_back(copy.deepcopy(model)), frozen.converted)
    exact = with_fast_constants(frozen.converted, frozen.converted)
    candidate = frozen if exact is frozen.converted else FrozenMACE(exact)
    by_pair, seed = depends_on_species(frozen), secrets.randbits(31)
    chosen = list(structures or ())
    if structures is None:
        chosen = default_structures(reference, seed=seed)
        if by_pair:
            numbers = reference.get_buffer("atomic_numbers").cpu().numpy()
            chosen = [_of_few_elements(atoms, numbers) for atoms in chosen]
    report = compare(reference, candidate, structures=chosen, dtypes=dtypes, modes=_MODES, seed=seed, progress=progress)
    if by_pair:
        seen = compared_pairs(reference, chosen)
        if structures is None:
            seen = compare_pairs(report, reference, candidate, seen, dtypes[-1], _SECONDS, progress)
        name_what_is_left(report, reference, seen)
    return report


def _of_few_elements(atoms: ase.Atoms, numbers: np.ndarray) -> ase.Atoms:
    chosen = numbers[:: max(1, len(numbers) // _ELEMENTS)][:_ELEMENTS]
    few = atoms.copy()
    few.numbers = chosen[np.arange(len(atoms)) % len(chosen)]
    return few
