"""Forces, energies and stress as sums over edges and atoms, each in one kernel; float64, in a fixed order."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mace_fast.kernels.build import CudaModule, cpu_threads, load_cpu, load_cuda, on_gpu
from mace_fast.kernels.ops.checks import require_like, require_shape, require_values
from mace_fast.kernels.source.totals import (
    ATOM_ENTRIES,
    ATOM_THREADS,
    ENERGIES,
    FORCES,
    FORCES_AND_VIRIALS,
    STRESS,
    STRUCTURE_THREADS,
    totals_cpu,
    totals_cuda,
)

_LIBRARY = torch.library.Library("mace_fast", "FRAGMENT")
_LIBRARY.define(
    "atom_forces(Tensor? vectors, Tensor derivatives, Tensor receiver_row, Tensor sender_order, Tensor sender_row, "
    "int atoms) -> (Tensor, Tensor)"
)
_LIBRARY.define("structure_energies(Tensor values, Tensor order, Tensor row, Tensor base) -> (Tensor, Tensor)")
_LIBRARY.define("structure_stress(Tensor virials, Tensor order, Tensor row, Tensor cells) -> (Tensor, Tensor)")
_CTYPES = {torch.float32: "float", torch.float64: "double"}
_WARP = 32


def atom_forces(
    derivatives: Tensor,
    receiver_row: Tensor,
    sender_order: Tensor,
    sender_row: Tensor,
    atoms: int,
    vectors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forces [atoms, 3], float64, from the derivative of the energy with respect to each edge vector.

    Args:
        derivatives: [E, 3] float32 or float64, edges by receiver; those beyond the last row are not read.
        receiver_row, sender_row: [at least atoms + 1] int32, where the edges that enter and leave an atom begin.
        sender_order: [E] int32, the edges by sender.
        atoms: how many.
        vectors: [E, 3] if virials are wanted.

    Returns:
        Forces, and [atoms, 3, 3] the sum over the edges that enter of vector (x) derivative (empty without vectors).

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    forces, virials = torch.ops.mace_fast.atom_forces(
        vectors, derivatives, receiver_row, sender_order, sender_row, atoms
    )
    return forces, virials


def structure_energies(values: Tensor, order: Tensor, row: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of [N] float64 over structures, and those with base [G] added.

    Args:
        values: [N] float64.
        order, row: int64, the atoms by structure (:func:`mace_fast.kernels.ops.segment.segments`).
        base: [G] float64.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    sums, energies = torch.ops.mace_fast.structure_energies(values, order, row, base)
    return sums, energies


def structure_stress(virials: Tensor, order: Tensor, row: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Virials and stress [G, 3, 3] as mace.modules.utils.compute_forces_virials gives them.

    Args:
        virials: [N, 3, 3] float64, of :func:`atom_forces`.
        order, row: int64, the atoms by structure.
        cells: [G, 3, 3] float64, A; stress that a volume of zero would make is zero.

    Raises:
        TypeError, ValueError: operands that do not fit one another.
    """
    total, stress = torch.ops.mace_fast.structure_stress(virials, order, row, cells)
    return total, stress


def _require(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the other arguments are on {device}; move it")


def _run(entry: str, ctype: str, items: int, arguments: list[Tensor], like: Tensor) -> None:
    if items == 0:
        return
    if on_gpu(like):
        is_atom = entry in ATOM_ENTRIES
        threads = ATOM_THREADS if is_atom else STRUCTURE_THREADS
        blocks = -(-items * _WARP // threads) if is_atom else items
        _cuda(ctype, like.device).launch(entry, (blocks, 1, 1), (threads, 1, 1), 0, (*arguments, items))
    else:
        _function(entry, ctype, len(arguments))(*(t.data_ptr() for t in arguments), items, cpu_threads())


@lru_cache(maxsize=64)
def _cuda(ctype: str, device: torch.device) -> CudaModule:
    return load_cuda(totals_cuda(ctype), device)


@lru_cache(maxsize=64)
def _function(entry: str, ctype: str, pointers: int) -> Any:
    function = getattr(load_cpu(totals_cpu(ctype)), entry)
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_longlong, ctypes.c_int]
    function.restype = None
    return function


def _atom_forces(
    vectors: Tensor | None,
    derivatives: Tensor,
    receiver_row: Tensor,
    sender_order: Tensor,
    sender_row: Tensor,
    atoms: int,
) -> tuple[Tensor, Tensor]:
    forces, virials = _atom_forces_fake(vectors, derivatives, receiver_row, sender_order, sender_row, atoms)
    lists = [derivatives, receiver_row, sender_order, sender_row]
    arguments = [t.contiguous() for t in (lists if vectors is None else [vectors, *lists])] + [forces]
    if vectors is not None:
        arguments.append(virials)
    _run(FORCES if vectors is None else FORCES_AND_VIRIALS, _CTYPES[derivatives.dtype], atoms, arguments, derivatives)
    return forces, virials


def _atom_forces_fake(
    vectors: Tensor | None,
    derivatives: Tensor,
    receiver_row: Tensor,
    sender_order: Tensor,
    sender_row: Tensor,
    atoms: int,
) -> tuple[Tensor, Tensor]:
    op, edges = "atom_forces", derivatives.shape[0]
    require_values(op, "derivatives", derivatives, 2)
    require_shape(op, "derivatives", derivatives, (edges, 3))
    if vectors is not None:
        require_like(op, "vectors", vectors, derivatives, "derivatives")
        require_shape(op, "vectors", vectors, (edges, 3))
    for name, tensor in (("receiver_row", receiver_row), ("sender_row", sender_row), ("sender_order", sender_order)):
        _require(op, name, tensor, torch.int32, derivatives.device)
        least = edges if name == "sender_order" else atoms + 1
        if tensor.dim() != 1 or tensor.shape[0] < least:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must have at least {least} entries")
    forces = torch.empty((atoms, 3), dtype=torch.float64, device=derivatives.device)
    virials = forces.new_empty((0 if vectors is None else atoms, 3, 3))
    return forces, virials


def _check_groups(op: str, values: Tensor, order: Tensor, row: Tensor) -> None:
    for name, tensor in (("order", order), ("row", row)):
        _require(op, name, tensor, torch.int64, values.device)
    require_shape(op, "order", order, (values.shape[0],))
    if row.dim() != 1 or row.shape[0] == 0:
        raise ValueError(f"{op}: row has shape {tuple(row.shape)}; it needs one entry more than structures")


def _structure_energies(values: Tensor, order: Tensor, row: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    sums, energies = _structure_energies_fake(values, order, row, base)
    arguments = [t.contiguous() for t in (values, order, row, base)] + [sums, energies]
    _run(ENERGIES, "double", base.shape[0], arguments, values)
    return sums, energies


def _structure_energies_fake(values: Tensor, order: Tensor, row: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    op = "structure_energies"
    _require(op, "values", values, torch.float64, values.device)
    _require(op, "base", base, torch.float64, values.device)
    require_shape(op, "values", values, (values.shape[0],))
    _check_groups(op, values, order, row)
    require_shape(op, "base", base, (row.shape[0] - 1,))
    return torch.empty_like(base), torch.empty_like(base)


def _structure_stress(virials: Tensor, order: Tensor, row: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    total, stress = _structure_stress_fake(virials, order, row, cells)
    arguments = [t.contiguous() for t in (virials, order, row, cells)] + [total, stress]
    _run(STRESS, "double", cells.shape[0], arguments, virials)
    return total, stress


def _structure_stress_fake(virials: Tensor, order: Tensor, row: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    op = "structure_stress"
    _require(op, "virials", virials, torch.float64, virials.device)
    _require(op, "cells", cells, torch.float64, virials.device)
    require_shape(op, "virials", virials, (virials.shape[0], 3, 3))
    _check_groups(op, virials, order, row)
    require_shape(op, "cells", cells, (row.shape[0] - 1, 3, 3))
    shape = tuple(cells.shape)
    return cells.new_empty(shape), cells.new_empty(shape)


for _name, _function_of, _fake_of in (
    ("atom_forces", _atom_forces, _atom_forces_fake),
    ("structure_energies", _structure_energies, _structure_energies_fake),
    ("structure_stress", _structure_stress, _structure_stress_fake),
):
    _LIBRARY.impl(_name, _function_of, "CPU")
    _LIBRARY.impl(_name, _function_of, "CUDA")
    torch.library.register_fake(f"mace_fast::{_name}", _fake_of, lib=_LIBRARY)
