"""MACE's product basis: the symmetric contraction of the message with itself, and a linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mace_fast.errors import UnsupportedDescriptionError, UnsupportedModuleError
from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.description.polynomial import SymmetricContraction
from mace_fast.kernels.ops.linear import linear
from mace_fast.kernels.ops.symmetric import symmetric_contraction
from mace_fast.patch.blocks.base import FastModule, random_one_hot, random_tensor
from mace_fast.patch.blocks.topology import without_species_gradient
from mace_fast.patch.understand import read_linear, require_class, require_own_forward, submodule

SYMMETRIC_CONTRACTION = "mace.modules.symmetric_contraction.SymmetricContraction"
_CONTRACTION = "mace.modules.symmetric_contraction.Contraction"


@dataclass(frozen=True)
class ProductPlan:
    """What the product block computes.

    Attributes:
        contraction: the polynomial of each species.
        channels: number of channels.
        species: how many species have weights; 1 in an agnostic product.
        agnostic: whether the species of a node is ignored.
        last: the linear, from ir_mul to mul_ir.
    """

    contraction: SymmetricContraction
    channels: int
    species: int
    agnostic: bool
    last: Linear


class FastEquivariantProductBasis(FastModule[ProductPlan]):
    """``EquivariantProductBasisBlock``; a message that is a transposed view of ir_mul is taken as it is."""

    symmetric_contractions: Any
    linear: Any
    use_sc: bool

    @classmethod
    def plan(cls, original: torch.nn.Module) -> ProductPlan:
        block: Any = original
        require_own_forward("block", block)
        config = block.__dict__.get("cueq_config")  # absent in models pickled by mace-torch <= 0.3.10
        if config is not None and config.enabled:
            raise UnsupportedModuleError(
                "it was converted to cuEquivariance: convert it back first, with mace.cli.convert_cueq_e3nn.run"
            )
        contractions: Any = submodule(block, "symmetric_contractions")
        require_class("symmetric_contractions", contractions, SYMMETRIC_CONTRACTION)
        for number, contraction in enumerate(contractions.contractions):
            require_class(f"symmetric_contractions.contractions.{number}", contraction, _CONTRACTION)
        first = contractions.contractions[0]
        species, _, channels = first.weights_max.shape
        agnostic = bool(block.__dict__.get("use_agnostic_product", False))  # absent up to mace-torch 0.3.13
        if agnostic and species != 1:
            raise UnsupportedModuleError(f"it ignores the species, but has weights for {species}")
        last = read_linear(block, "linear", x_layout="ir_mul", z_layout="mul_ir")
        if list(last.x) != [(channels, ir.l) for _, ir in contractions.irreps_out]:
            raise UnsupportedModuleError(
                f"its linear takes {block.linear.irreps_in}, but its contraction gives {channels} channels "
                f"of {contractions.irreps_out}"
            )
        return ProductPlan(_describe(contractions), channels, species, agnostic, last)

    @property
    def contraction(self) -> SymmetricContraction:
        """What the contraction computes."""
        return self._plan.contraction

    @classmethod
    def kernels_of(cls, plan: ProductPlan) -> str:
        return (
            f"symmetric_contraction ({plan.contraction.num_paths} paths, degree "
            f"{plan.contraction.polynomial.degree}), linear"
        )

    def example(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        plan, nodes = self._plan, 12
        return {
            "node_feats": random_tensor(generator, nodes, plan.channels, plan.contraction.num_inputs),
            "sc": random_tensor(generator, nodes, plan.last.z_dim),
            "node_attrs": random_one_hot(generator, nodes, plan.species),
        }

    def forward(self, node_feats: torch.Tensor, sc: torch.Tensor | None, node_attrs: torch.Tensor) -> torch.Tensor:
        """See MACE.

        Args:
            node_feats: [N, channels, (lmax+1)^2].
            sc: the skip [N, target], or None.
            node_attrs: one-hot [N, Z].

        Returns:
            [N, target] in mul_ir order.
        """
        plan = self._plan
        tables = contraction_weights(self.symmetric_contractions)
        if plan.agnostic:
            of_node = torch.zeros(node_feats.shape[0], dtype=torch.int64, device=node_feats.device)
        else:
            species = self._memo.species(node_attrs)
            of_node = species.of_node
            tables = [species.rows_of(table) for table in tables]
            node_feats = without_species_gradient(node_feats, node_attrs)
        weights = torch.cat(tables, dim=1)
        x = node_feats.transpose(1, 2)
        out = symmetric_contraction(plan.contraction, x, weights, of_node)
        out = linear(out.flatten(1), self.linear.weight, plan.last)
        return out + sc if self.use_sc and sc is not None else out


def contraction_weights(contractions: Any) -> list[torch.Tensor]:
    """Weights [Z, K, C] of a ``SymmetricContraction`` in the order of its description."""
    return [weight for c in contractions.contractions for weight in (c.weights_max, *c.weights)]


def u_matrices(contractions: Any) -> list[list[torch.Tensor]]:
    """The live U matrices of a ``SymmetricContraction``: for each output, for nu = correlation, ..., 1."""
    return [[c.U_tensors(nu) for nu in range(c.correlation, 0, -1)] for c in contractions.contractions]


def as_stored(matrix: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """A constant table in the precision in which it was made, whatever its model has been cast to since.

    A float64 table whose every entry is a float32 number was rounded to float32 once; descriptions remove
    that rounding.
    """
    values: np.ndarray[Any, np.dtype[Any]] = matrix.detach().cpu().double().numpy()
    rounded = values.astype(np.float32)
    return rounded if np.array_equal(rounded, values) else values


def _describe(contractions: Any) -> SymmetricContraction:
    matrices = [[as_stored(matrix) for matrix in column] for column in u_matrices(contractions)]
    try:
        return SymmetricContraction.from_u_matrices(
            matrices,
            input_blocks=[ir.dim for _, ir in contractions.contractions[0].coupling_irreps],
            output_blocks=[ir.dim for _, ir in contractions.irreps_out],
        )
    except UnsupportedDescriptionError as error:
        raise UnsupportedModuleError(f"its symmetric_contractions has no kernel: {error}") from error
