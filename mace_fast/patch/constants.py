"""Constant tables of a model that were rounded to float32, and the same model with the tables that mace_fast
computes with.

e3nn and mace-torch keep Clebsch-Gordan tables and U matrices as buffers of the dtype in which a model was
made, and a model that was ever in float32 keeps that rounding when it is moved to float64: it then computes
with constants that are 1e-8 off. mace_fast takes exact tables, and U matrices free of that rounding. In
float32 this makes no difference. To compare in float64, the reference is given the same tables; each must lie
within float32 rounding of the one it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mace_fast.copying import copy_module
from mace_fast.errors import UnsupportedModuleError
from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.description.polynomial import SymmetricContraction
from mace_fast.kernels.description.symmetric_basis import symmetrise
from mace_fast.patch.blocks.product import FastEquivariantProductBasis, as_stored
from mace_fast.patch.replace import fast_modules
from mace_fast.patch.understand import coupling_buffers

_EXACT = 1e-14
_FLOAT32_ROUNDING = 3e-6  # of sums of six rounded entries, relative to the largest


def with_fast_constants(model: torch.nn.Module, fast: torch.nn.Module) -> torch.nn.Module:
    """``model`` itself where its constant tables are those of ``fast``, else a float64 copy that has them.

    Args:
        model: the reference, or ``fast`` itself (whose tables are kept for its state dict and not used).
        fast: the model that states which U matrices it computes with.

    Raises:
        UnsupportedModuleError: a table is further off than float32 rounding.
    """
    changes = [*_couplings(model), *_u_matrices(model, fast)]
    if not changes:
        return model
    copied = copy_module(model).to(torch.float64)
    with torch.no_grad():
        for name, table in changes:
            copied.get_buffer(name).copy_(table)
    return copied


def _couplings(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, degrees in coupling_buffers(model).items():
        exact = clebsch_gordan(*degrees)
        live = model.get_buffer(name).detach().cpu().double().numpy()
        if not np.allclose(live, exact, rtol=0.0, atol=_EXACT):
            _require_rounding(name, live, exact)
            yield name, torch.from_numpy(exact.copy())


def _u_matrices(model: torch.nn.Module, fast: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for block_name, block in fast_modules(fast).items():
        if isinstance(block, FastEquivariantProductBasis):
            prefix = f"{block_name}.symmetric_contractions" if block_name else "symmetric_contractions"
            contractions: Any = model.get_submodule(prefix)
            description = block.contraction
            first_output = first_path = 0
            for number, contraction in enumerate(contractions.contractions):
                outputs = range(first_output, first_output + description.polynomial.output_blocks[number])
                for nu in range(contraction.correlation, 0, -1):
                    name = f"{prefix}.contractions.{number}.U_matrix_{nu}"
                    matrix = model.get_buffer(name)
                    if as_stored(matrix).dtype == np.float32:
                        table = _unrounded(name, matrix, description, outputs, nu, first_path)
                        if table is not None:
                            yield name, table
                    first_path += matrix.shape[-1]
                first_output = outputs.stop


def _unrounded(
    name: str,
    matrix: torch.Tensor,
    description: SymmetricContraction,
    outputs: range,
    nu: int,
    first_path: int,
) -> torch.Tensor | None:
    """The U matrix whose polynomials are those of the description; None where it is the one that is there.

    What it lacks goes onto one entry of each monomial.
    """
    u = matrix.detach().cpu().double().numpy().copy()
    polynomial = description.polynomial
    full = u.reshape(len(outputs), *(polynomial.num_inputs,) * nu, u.shape[-1])
    paths, places = symmetrise(full)
    column = {tuple(place): index for index, place in enumerate(places.tolist())}
    fold = description.fold[first_path : first_path + u.shape[-1]]
    target = np.zeros_like(paths)
    for term in polynomial.terms:
        if term.output in outputs and len(term.monomial) == nu:
            place = (term.output - outputs.start, *term.monomial)
            target[:, column[place]] += fold[:, term.weight] * term.coefficient
    _require_rounding(name, paths, target)
    if np.allclose(paths, target, rtol=0.0, atol=_EXACT * np.abs(paths).max(initial=0.0)):
        return None
    full[tuple(places.T)] += (target - paths).T
    return torch.from_numpy(u)


def _require_rounding(name: str, live: Any, wanted: Any) -> None:
    size = np.abs(live).max(initial=0.0)
    difference = np.abs(live - wanted).max(initial=0.0)
    if difference > _FLOAT32_ROUNDING * size:
        raise UnsupportedModuleError(
            f"{name} is {difference / size:.1e} (relative) from the table that mace_fast computes with; "
            f"float32 rounding explains {_FLOAT32_ROUNDING:.0e}. If these are two models, they are not the same model; "
            "if one was converted from the other and mace-torch made it, this is a fault of mace_fast: please report it"
        )
