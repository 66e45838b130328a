"""What a model computes beside energies and their first derivatives: Hessians and descriptors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mace.modules import MACE
from mace.modules.utils import extract_invariant


def hessian(model: MACE, graph: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Second derivatives of the energy of a structure of N atoms, [3N, N, 3] in the model's units."""
    data = fresh(graph)
    positions = data["positions"]
    with torch.enable_grad():
        forces = model(data, training=True, compute_force=True)["forces"]
    rows = [
        torch.autograd.grad(-component, positions, retain_graph=True)[0].cpu().numpy()
        for component in forces.reshape(-1)
    ]
    return np.stack(rows)


def descriptors(
    models: Sequence[MACE], graph: Mapping[str, torch.Tensor], invariants_only: bool, num_layers: int
) -> list[np.ndarray]:
    """Node features [N, features] of each model of a committee; ``num_layers`` from the first, -1 for all."""
    with torch.no_grad():
        found = [model(fresh(graph), compute_force=False)["node_feats"] for model in models]
    # The columns follow MACECalculator.get_descriptors: every layer as wide as the first, the last one
    # its scalars.
    num_interactions = int(models[0].num_interactions)
    layers = num_interactions if num_layers == -1 else num_layers
    irreps = models[0].products[0].linear.irreps_out
    scalars = irreps.dim // (irreps.lmax + 1) ** 2
    widths = [irreps.dim] * (num_interactions - 1) + [scalars]
    if invariants_only:
        found = [extract_invariant(d, num_layers=layers, num_features=scalars, l_max=irreps.lmax) for d in found]
    return [d[:, : sum(widths[:layers])].cpu().numpy() for d in found]


def fresh(graph: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that a model may write into, as MACE's forward does; positions are a leaf of their own."""
    return {**graph, "positions": graph["positions"].detach().clone()}
