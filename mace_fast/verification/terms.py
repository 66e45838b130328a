"""How large the terms are that a quantity is a sum of: the scale of its rounding where the sum cancels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from mace_fast.verification.evaluate import Outputs
from mace_fast.verification.graphs import Batch


@dataclass(frozen=True)
class TermScales:
    """Norms of the terms of each structure [n_graphs], float64 on the CPU.

    Attributes:
        energy: sum over atoms of the sizes of isolated-atom and interaction energies, which may cancel. eV.
        node_energy: the same, of one atom, times the square root of the number of atoms. eV.
        interaction_energy: an atom's, as large as it is on average over all structures, times the square root
            of the number of atoms: a sum of numbers of either sign that is small in one structure is so by
            chance. eV.
        forces: sqrt(2 sum over edges of |dE/dr|^2); each edge pulls at two atoms. eV/A.
        virials: sqrt(sum over edges of |r|^2 |dE/dr|^2 + sum over atoms of |x|^2 |F|^2). MACE differentiates
            positions and shifts with respect to the strain, so that far from the origin large numbers x F
            cancel. eV.
        stress: virials over the volume of the cell. eV/A^3.
    """

    energy: torch.Tensor
    node_energy: torch.Tensor
    interaction_energy: torch.Tensor
    forces: torch.Tensor
    virials: torch.Tensor
    stress: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, outputs: Outputs, edge_forces: torch.Tensor) -> TermScales:
        """From the energies of the reference and dE/dr of each edge [E, 3]."""
        tensors = batch.tensors
        owner = tensors["batch"]
        sender, receiver = tensors["edge_index"]
        vectors = tensors["positions"][receiver] - tensors["positions"][sender] + tensors["shifts"]
        atoms = torch.bincount(owner, minlength=batch.num_graphs).double()

        def per_graph(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return torch.zeros(batch.num_graphs, dtype=torch.float64).index_add_(0, index, values)

        edge_force = edge_forces.square().sum(-1)
        atom_forces = torch.zeros_like(tensors["positions"])
        atom_forces.index_add_(0, sender, edge_forces).index_add_(0, receiver, -edge_forces)
        lever = tensors["positions"].square().sum(-1) * atom_forces.square().sum(-1)
        virials = (per_graph(vectors.square().sum(-1) * edge_force, owner[receiver]) + per_graph(lever, owner)).sqrt()
        volume = torch.linalg.det(tensors["cell"].view(-1, 3, 3)).abs()
        total = outputs["energy"]
        interaction = outputs.get("interaction_energy", torch.zeros_like(total))
        energy = interaction.abs() + (total - interaction).abs()
        if "node_energy" in outputs:
            energy = torch.maximum(energy, per_graph(outputs["node_energy"].abs(), owner))
        return cls(
            energy=energy,
            node_energy=energy / atoms.sqrt(),
            interaction_energy=(interaction.square() / atoms).mean().sqrt() * atoms.sqrt(),
            forces=(2.0 * per_graph(edge_force, owner[receiver])).sqrt(),
            virials=virials,
            stress=torch.where(volume > 0.0, virials / volume, torch.zeros_like(volume)),
        )

    def select(self, indices: Sequence[int]) -> TermScales:
        """Those of some of the structures."""
        chosen = torch.tensor(indices)
        return TermScales(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def of_quantity(self, quantity: str) -> torch.Tensor:
        """Norms of the terms of one output of MACE [n_graphs]; 0 where its own norm says it."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return known.get(quantity, torch.zeros_like(self.energy))
