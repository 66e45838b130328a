"""Atoms to the input dictionary of a MACE model, through mace-torch's own data classes."""

from __future__ import annotations

from collections.abc import Sequence

import mace.data
import mace.modules
import mace.tools
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from mace.tools import torch_geometric

from mace_fast.errors import StructureError

from ._defaults import default_dtype


def graph(
    atoms: Atoms,
    model: mace.modules.MACE,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    head: str | None = None,
) -> dict[str, torch.Tensor]:
    """The input of `model` for one structure; :func:`batch` with one element."""
    return batch([atoms], model, dtype=dtype, device=device, head=head)


def batch(
    structures: Sequence[Atoms],
    model: mace.modules.MACE,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    head: str | Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The input of `model` for several structures at once, as ``MACECalculator`` makes it.

    Total charge and spin are read from ``atoms.info["charge"]`` and ``["spin"]`` (0 and 1 without). A model
    writes into the dictionary that it is given (with stress, "positions" and "shifts" are replaced): hand
    each call its own :func:`copy_graph`.

    Args:
        structures: at least one; edges run from atom i (row 0) to j (row 1) at ``r_j - r_i + S @ cell``.
        model: gives the cutoff, the elements and the heads.
        dtype: of the floating tensors; the model's own without.
        device: the model's own without.
        head: name of the head of all structures, or one for each; the model's first head without.

    Returns:
        positions [N, 3], node_attrs [N, Z], edge_index [2, E], shifts and unit_shifts [E, 3], cell [3 G, 3],
        pbc [G, 3], batch [N], ptr [G + 1], head [G], total_charge and total_spin [G], and the labels that
        mace-torch adds.

    Raises:
        StructureError: no structures, no atoms, an element or head that the model does not have, positions
            or cell that are not finite, a periodic direction without a cell vector.
    """
    if len(structures) == 0:
        raise StructureError("no structures: a batch needs at least one")
    parameter = next(model.parameters())
    names = _heads(model)
    chosen = [head or names[0]] * len(structures) if head is None or isinstance(head, str) else list(head)
    if len(chosen) != len(structures):
        raise StructureError(f"{len(chosen)} heads for {len(structures)} structures: give one for each, or one name")
    elements = [int(number) for number in model.atomic_numbers]
    table = mace.tools.AtomicNumberTable(elements)
    keys = mace.data.KeySpecification(info_keys={"total_spin": "spin", "total_charge": "charge"}, arrays_keys={})
    data = []
    with default_dtype(dtype or parameter.dtype):
        for index, (atoms, name) in enumerate(zip(structures, chosen, strict=True)):
            _check(atoms, index, elements)
            if name not in names:
                raise StructureError(f"no head {name!r} in the model; it has {', '.join(names)}")
            config = mace.data.config_from_atoms(atoms, key_specification=keys, head_name=name)
            data.append(mace.data.AtomicData.from_config(config, z_table=table, cutoff=float(model.r_max), heads=names))
        collated: dict[str, torch.Tensor] = torch_geometric.Batch.from_data_list(data).to_dict()
    target = parameter.device if device is None else torch.device(device)
    return {key: value.to(target) for key, value in collated.items() if isinstance(value, torch.Tensor)}


def copy_graph(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph with tensors of its own and no autograd history: what to hand to a model that writes into its
    input."""
    return {key: value.detach().clone() for key, value in data.items()}


def _heads(model: mace.modules.MACE) -> list[str]:
    # Models pickled by mace-torch 0.3.6 and before have no heads.
    return list(getattr(model, "heads", None) or ["Default"])


def _check(atoms: Atoms, index: int, elements: list[int]) -> None:
    if len(atoms) == 0:
        raise StructureError(f"structure {index} has no atoms")
    unknown = sorted(set(atoms.numbers.tolist()) - set(elements))
    if unknown:
        missing = ", ".join(f"{chemical_symbols[z]} ({z})" for z in unknown)
        have = ", ".join(chemical_symbols[z] for z in elements)
        raise StructureError(f"structure {index} contains {missing}, which the model does not know; it knows {have}")
    if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        raise StructureError(f"structure {index} has positions or a cell that are not finite numbers")
    lengths = np.linalg.norm(atoms.cell.array, axis=1)
    if bool((atoms.pbc & (lengths == 0.0)).any()):
        raise StructureError(f"structure {index} is periodic along a direction whose cell vector is zero")
    if atoms.pbc.all() and abs(float(np.linalg.det(atoms.cell.array))) < 1e-9:
        raise StructureError(f"structure {index} is periodic but its cell has no volume")
