"""The six interaction blocks of MACE on the kernels of mace_fast.

All share one flow: node features up, radial network, tensor product summed at the receivers, linear,
normalisation. They differ in the normalisation, in the skip connection, and in what the radial network sees.
Boundaries are MACE's: features come and the skip leaves in ``mul_ir`` order, the message leaves as [nodes,
channels, (lmax+1)^2]. Inside, order is ``ir_mul``; the message is returned as a transposed view of it, which
the fast product block takes without a copy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from mace_fast.errors import UnsupportedModuleError
from mace_fast.kernels.ops.channelwise import channelwise_tp_conv
from mace_fast.kernels.ops.linear import indexed_linear, linear
from mace_fast.kernels.ops.segment import segment_gather, segment_sum
from mace_fast.patch.blocks.base import FastModule, random_one_hot, random_tensor
from mace_fast.patch.blocks.gate import read_gate
from mace_fast.patch.blocks.interaction_plan import (
    AttentionPlan,
    InteractionPlan,
    NonLinearPlan,
    read_common,
)
from mace_fast.patch.blocks.radial import (
    radial_mlps,
    read_fully_connected,
    require_radial_mlp,
)
from mace_fast.patch.blocks.topology import Topology, indexed_weight, without_species_gradient
from mace_fast.patch.understand import (
    read_indexed_linear,
    read_linear,
)


class FastInteraction(FastModule[Any]):
    """What the fast interaction blocks share; each subclass is one MACE block and keeps its forward's
    signature.
    """

    indexes_message: ClassVar[bool] = False  # the species act on the message, and nothing is skipped around the block
    has_density: ClassVar[bool] = False

    linear_up: Any
    conv_tp_weights: Any
    density_fn: Any
    linear: Any
    skip_tp: Any
    avg_num_neighbors: float
    node_attrs_irreps: Any
    edge_feats_irreps: Any

    @classmethod
    def plan(cls, original: torch.nn.Module) -> InteractionPlan:
        common = read_common(original, "linear", "ir_mul")
        side = "ir_mul" if cls.indexes_message else "mul_ir"
        skip, species = read_indexed_linear(original, "skip_tp", x_layout=side, z_layout=side)
        return InteractionPlan(
            **common,
            skip=skip,
            species=species,
            radial=read_fully_connected(original, "conv_tp_weights"),
            density=read_fully_connected(original, "density_fn") if cls.has_density else None,
        )

    @classmethod
    def kernels_of(cls, plan: InteractionPlan) -> str:
        kernels = [f"channelwise_tp_conv ({len(plan.conv.paths)} paths)", "linear"]
        if plan.species:
            kernels.append("indexed_linear")
        if cls.has_density:
            kernels.append("segment_sum")
        return ", ".join(kernels)

    def example(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        nodes, edges = 9, 60
        return {
            "node_attrs": random_one_hot(generator, nodes, self.node_attrs_irreps.dim),
            "node_feats": random_tensor(generator, nodes, self._plan.up.x_dim),
            "edge_attrs": random_tensor(generator, edges, self._plan.conv.y_dim),
            "edge_feats": random_tensor(generator, edges, self.edge_feats_irreps.dim),
            "edge_index": torch.randint(nodes - 1, (2, edges), generator=generator),  # the last node has no edges
            "cutoff": random_tensor(generator, edges, 1),
        }

    def _topology(self, edge_index: torch.Tensor, node_feats: torch.Tensor, lammps_class: object) -> Topology:
        if lammps_class is not None:
            raise UnsupportedModuleError(
                f"{type(self).__name__} was called with lammps_class: exchanging ghost atoms inside the model "
                "is not supported; use the original model (mace_fast.restore) in LAMMPS"
            )
        return self._memo.topology(edge_index, node_feats.shape[0], fresh=self._leads)

    def _convolve(
        self,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        weights: torch.Tensor,
        cutoff: torch.Tensor | None,
        topology: Topology,
    ) -> torch.Tensor:
        """Sum over the edges of each receiver, [N, z_dim] ir_mul, of node features already taken up
        (ir_mul).
        """
        # The product is linear in each factor: the cutoff goes onto 16 harmonics an edge, not onto a thousand
        # weights.
        harmonics = edge_attrs if cutoff is None else edge_attrs * cutoff
        return channelwise_tp_conv(self._plan.conv, node_feats, harmonics, weights, topology.graph)

    def _density(self, edge_feats: torch.Tensor, cutoff: torch.Tensor | None, topology: Topology) -> torch.Tensor:
        """The sum of tanh(f(r)^2) over the edges of each receiver, [N, 1]."""
        edge_density = torch.tanh(self._plan.density(self.density_fn, edge_feats) ** 2)
        return segment_sum(edge_density if cutoff is None else edge_density * cutoff, topology.receivers)

    def _by_species(self, x: torch.Tensor, node_attrs: torch.Tensor) -> torch.Tensor:
        """The species-indexed map ``skip_tp`` of x [N, ...]."""
        plan = self._plan
        species = self._memo.species(node_attrs)
        weight = indexed_weight(self.skip_tp.weight, plan.skip, plan.species, species)
        mixed = indexed_linear(x, weight, species.of_node, plan.skip, species.groups)
        return without_species_gradient(mixed, node_attrs)

    def _shaped(self, message: torch.Tensor) -> torch.Tensor:
        """[N, components * channels] ir_mul as a view [N, channels, components]."""
        return message.view(-1, self._plan.components, self._plan.channels).transpose(1, 2)


class FastRealAgnosticInteraction(FastInteraction):
    """``RealAgnosticInteractionBlock``: mean message, then mixed by species."""

    indexes_message = True

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        lammps_class: Any | None = None,
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and no skip."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        weights = plan.radial(self.conv_tp_weights, edge_feats)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear.weight / self.avg_num_neighbors, plan.down)
        return self._shaped(self._by_species(message, node_attrs)), None


class FastRealAgnosticResidualInteraction(FastInteraction):
    """``RealAgnosticResidualInteractionBlock``: mean message, and a skip mixed by species."""

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_class: Any | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and the skip [N, hidden]."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        skip = self._by_species(node_feats, node_attrs)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        weights = plan.radial(self.conv_tp_weights, edge_feats)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear.weight / self.avg_num_neighbors, plan.down)
        return self._shaped(message), skip


class FastRealAgnosticDensityInteraction(FastInteraction):
    """``RealAgnosticDensityInteractionBlock``: message over a learned density, then mixed by species."""

    indexes_message = True
    has_density = True

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_class: Any | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and no skip."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        weights = plan.radial(self.conv_tp_weights, edge_feats)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear.weight, plan.down) / (self._density(edge_feats, cutoff, topology) + 1)
        return self._shaped(self._by_species(message, node_attrs)), None


class FastRealAgnosticDensityResidualInteraction(FastInteraction):
    """``RealAgnosticDensityResidualInteractionBlock``: message over a learned density, and a skip mixed by
    species.
    """

    has_density = True

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_class: Any | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and the skip [N, hidden]."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        skip = self._by_species(node_feats, node_attrs)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        weights = plan.radial(self.conv_tp_weights, edge_feats)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear.weight, plan.down) / (self._density(edge_feats, cutoff, topology) + 1)
        return self._shaped(message), skip


class FastRealAgnosticAttResidualInteraction(FastInteraction):
    """``RealAgnosticAttResidualInteractionBlock``: the radial network also sees scalars of sender and
    receiver.
    """

    linear_down: Any
    skip_linear: Any

    @classmethod
    def plan(cls, original: torch.nn.Module) -> AttentionPlan:
        return AttentionPlan(
            **read_common(original, "linear", "ir_mul"),
            skip=read_linear(original, "skip_linear", x_layout="mul_ir", z_layout="mul_ir"),
            species=0,
            radial=read_fully_connected(original, "conv_tp_weights"),
            density=None,
            scalars=read_linear(original, "linear_down", x_layout="mul_ir", z_layout="mul_ir"),
        )

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_class: Any | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and the skip [N, hidden]."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        skip = linear(node_feats, self.skip_linear.weight, plan.skip)
        scalars = linear(node_feats, self.linear_down.weight, plan.scalars)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        edge_feats = torch.cat(
            [
                edge_feats,
                segment_gather(scalars, topology.senders),
                segment_gather(scalars, topology.receivers),
            ],
            dim=1,
        )
        weights = plan.radial(self.conv_tp_weights, edge_feats)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear.weight / self.avg_num_neighbors, plan.down)
        return self._shaped(message), skip


class FastRealAgnosticResidualNonLinearInteraction(FastInteraction):
    """``RealAgnosticResidualNonLinearInteractionBlock``: radial network of distance and both species, gated
    message.
    """

    has_density = True

    source_embedding: Any
    target_embedding: Any
    linear_1: Any
    linear_2: Any
    linear_res: Any
    equivariant_nonlin: Any
    alpha: torch.Tensor
    beta: torch.Tensor

    @classmethod
    def plan(cls, original: torch.nn.Module) -> NonLinearPlan:
        nonlinear = read_linear(original, "linear_1")
        gate = read_gate(original, "equivariant_nonlin", nonlinear.z)
        common = read_common(original, "linear_2", "ir_mul", message="linear_1")
        for name in ("conv_tp_weights", "density_fn"):
            require_radial_mlp(original, name)
        return NonLinearPlan(
            **{**common, "down": common["down"].with_layouts("ir_mul", gate.layout)},
            skip=read_linear(original, "skip_tp", x_layout="mul_ir", z_layout="mul_ir"),
            species=0,
            radial=None,
            density=None,
            source=read_linear(original, "source_embedding"),
            target=read_linear(original, "target_embedding"),
            residual=read_linear(original, "linear_res", z_layout=gate.layout).split_x(common["up"].z),
            gate=gate,
            last=read_linear(original, "linear_2", x_layout=gate.layout),
        )

    def forward(
        self,
        node_attrs: torch.Tensor,
        node_feats: torch.Tensor,
        edge_attrs: torch.Tensor,
        edge_feats: torch.Tensor,
        edge_index: torch.Tensor,
        cutoff: torch.Tensor | None = None,
        lammps_class: Any | None = None,
        lammps_natoms: tuple[int, int] = (0, 0),
        first_layer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MACE; returns the message [N, channels, (lmax+1)^2] and the skip [N, hidden]."""
        plan = self._plan
        topology = self._topology(edge_index, node_feats, lammps_class)
        skip = linear(node_feats, self.skip_tp.weight, plan.skip)
        node_feats = linear(node_feats, self.linear_up.weight, plan.up)
        residual = linear(node_feats, self.linear_res.weight, plan.residual)
        weights, edge_density = radial_mlps(
            (self.conv_tp_weights, self.density_fn),
            edge_feats,
            linear(node_attrs, self.source_embedding.weight, plan.source),
            linear(node_attrs, self.target_embedding.weight, plan.target),
            topology.senders,
            topology.receivers,
        )
        edge_density = torch.tanh(edge_density**2)
        density = segment_sum(edge_density if cutoff is None else edge_density * cutoff, topology.receivers)
        message = self._convolve(node_feats, edge_attrs, weights, cutoff, topology)
        message = linear(message, self.linear_1.weight, plan.down) / (density * self.beta + self.alpha) + residual
        message = plan.gate(self.equivariant_nonlin, message)
        return self._shaped(linear(message, self.linear_2.weight, plan.last)), skip
