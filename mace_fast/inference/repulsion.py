"""The repulsion of nuclei that a model adds, as the kernel takes it."""

from __future__ import annotations

from typing import Any

import torch
from mace.modules.radial import ZBLBasis

from mace_fast.kernels.ops.repulsion import Repulsion


def freeze_repulsion(model: Any) -> Repulsion | None:
    """The form of the model's pair repulsion; None where it has none, or one that is not mace-torch's own."""
    block: Any = model._modules.get("pair_repulsion_fn")
    if type(block) is not ZBLBasis:
        return None
    like, numbers = next(model.parameters()), model.atomic_numbers
    columns = (numbers, torch.pow(numbers, block.a_exp), block.covalent_radii[numbers])
    a, b, c, d = block.c.tolist()
    return Repulsion(
        torch.stack([column.detach().to(like) for column in columns], dim=1),
        (a, b, c, d),
        float(block.a_prefactor * 0.529),
        int(block.p),
    )
