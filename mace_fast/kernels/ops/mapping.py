"""``torch.vmap`` of ops: one call for each entry of the batch. Hessians of MACE are computed so."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def map_one_by_one(*names: str) -> None:
    """Give ops of this package, of tensors and constants, a rule for ``torch.vmap``.

    torch does the same where there is none, with a warning for each op that tells users to complain. Before version 2.5
    it takes no rules.
    """
    register = getattr(torch.library, "register_vmap", None)
    if register is None:
        return
    for name in names:
        register(f"mace_fast::{name}", partial(_one_by_one, name))


def _one_by_one(name: str, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    op = getattr(torch.ops.mace_fast, name)
    results = [
        op(*(arg if dim is None else arg.select(dim, entry) for arg, dim in zip(args, in_dims, strict=True)))
        for entry in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
