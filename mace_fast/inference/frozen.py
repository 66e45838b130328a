"""A MACE model frozen for inference: same signature and results, parameters constant, radial networks tabulated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mace_fast.errors import UnsupportedModuleError
from mace_fast.inference.edges import EdgeMemo, SortedEdges, sort_edges
from mace_fast.inference.layers import EdgeInputs, FrozenLayer, freeze_layer
from mace_fast.inference.radial import depends_on_species, radial_weights
from mace_fast.inference.tables import SplineTable, tabulate
from mace_fast.kernels.ops.harmonics import edge_harmonics
from mace_fast.kernels.ops.segment import segment_sum, segments
from mace_fast.patch.blocks.interaction import FastInteraction, FastRealAgnosticAttResidualInteraction
from mace_fast.patch.blocks.product import FastEquivariantProductBasis


@dataclass(frozen=True)
class Prepared:
    """What is computed once from the parameters: the layers, for a set of species where tables depend on them."""

    layers: tuple[FrozenLayer, ...]
    present: tuple[int, ...]
    fingerprint: tuple[object, ...]


class FrozenMACE(torch.nn.Module):
    """A converted MACE or ScaleShiftMACE, frozen.

    It shares all state with the converted model that it is made from: same parameters and state dict, same attributes.
    Tables and prepared weights are made at the first evaluation, and again when a parameter, the device, the dtype or
    the set of species has changed.

    Raises:
        UnsupportedModuleError: a block whose weights are no functions of the distance, or not a MACE energy model.
    """

    _converted: tuple[torch.nn.Module]  # a tuple hides it from torch's registration of submodules
    atomic_energies_fn: Any
    atomic_numbers: Any
    embedding_readout: Any
    embedding_specs: Any
    interactions: Any
    joint_embedding: Any
    node_embedding: Any
    pair_repulsion_fn: Any
    products: Any
    r_max: Any
    readouts: Any
    scale_shift: Any
    spherical_harmonics: Any

    def __init__(self, fast: torch.nn.Module) -> None:
        super().__init__()
        _require_frozen_form(fast)
        self.__dict__.update(fast.__dict__)
        self.__dict__["_converted"] = (fast,)
        self._memo = EdgeMemo()
        self._prepared: Prepared | None = None
        self._parameter_dicts: list[dict[str, Any]] = [module._parameters for module in self.modules()]
        self.table_error: float | None = None

    def __reduce__(self) -> tuple[type[FrozenMACE], tuple[torch.nn.Module]]:
        return FrozenMACE, (self._converted[0],)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenMACE:
        return FrozenMACE(copy.deepcopy(self._converted[0], memo))

    @property
    def converted(self) -> torch.nn.Module:
        """The converted model, which can be trained."""
        return self._converted[0]

    def forward(
        self,
        data: dict[str, Tensor],
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        compute_displacement: bool = False,
        compute_hessian: bool = False,
        compute_edge_forces: bool = False,
        compute_atomic_stresses: bool = False,
        lammps_mliap: bool = False,
    ) -> dict[str, Tensor | None]:
        """MACE's forward; see ``mace.modules.ScaleShiftMACE``. Results carry no autograd graph.

        Raises:
            NotImplementedError: training, Hessian or LAMMPS; the message says what to use instead.
        """
        for flag, name in (
            (training, "training"),
            (compute_hessian, "compute_hessian"),
            (lammps_mliap, "lammps_mliap"),
        ):
            if flag:
                raise NotImplementedError(
                    f"{name}=True needs more than first derivatives of a frozen model; use mace_fast.convert, "
                    "whose models can do it"
                )
        edges = self.sorted_edges(data)
        want_virials = compute_virials or compute_stress
        want_edges = compute_force or want_virials or compute_edge_forces or compute_atomic_stresses
        with torch.enable_grad() if want_edges else torch.no_grad():
            vectors = edge_vectors(data["positions"], edges, data["shifts"][edges.permutation])
            out, edge_forces = self.evaluate(data, edges, vectors, want_forces=want_edges)
        forces = virials = stress = atomic_virials = atomic_stresses = None
        if edge_forces is not None:
            forces = atomic_forces(edge_forces, edges) if compute_force or want_virials else None
            if want_virials or compute_atomic_stresses:
                per_edge = pair_virials(vectors, edge_forces)
            if want_virials:
                virials, stress = virials_and_stress(per_edge, edges, data, compute_stress)
            if compute_atomic_stresses:
                atomic_virials, atomic_stresses = _atomic_virials(per_edge, edges, data["cell"], data["batch"])
        in_callers_order = None
        if edge_forces is not None and (compute_edge_forces or compute_atomic_stresses):
            in_callers_order = torch.empty_like(edge_forces)
            in_callers_order[edges.permutation] = edge_forces
        graphs = data["ptr"].shape[0] - 1
        return {
            **out,
            "forces": forces,
            "virials": virials,
            "stress": stress,
            "edge_forces": in_callers_order,
            "atomic_virials": atomic_virials,
            "atomic_stresses": atomic_stresses,
            "hessian": None,
            "displacement": vectors.new_zeros((graphs, 3, 3)),
        }

    def sorted_edges(self, data: dict[str, Tensor]) -> SortedEdges:
        """The edges of a batch, sorted; kept while the caller passes the same tensors."""
        sources = (data["edge_index"], data["node_attrs"])
        edges = self._memo.get(sources)
        if edges is None:
            with torch.no_grad():
                sender, receiver = data["edge_index"]
                nodes = data["positions"].shape[0]
                inside = ((data["edge_index"] >= 0) & (data["edge_index"] < nodes)).all() if sender.numel() else None
                if inside is not None and not bool(inside):
                    raise ValueError(f"edge_index holds an index outside [0, {nodes}); rebuild the neighbour list")
                lengths = (data["positions"][receiver] - data["positions"][sender] + data["shifts"]).norm(dim=1)
                species = data["node_attrs"].argmax(dim=1)
                edges = sort_edges(
                    data["edge_index"],
                    lengths,
                    species,
                    data["node_attrs"].shape[1],
                    by_species=depends_on_species(self),
                )
            self._memo.put(sources, edges)
        return edges

    def evaluate(
        self, data: dict[str, Tensor], edges: SortedEdges, vectors: Tensor, *, want_forces: bool
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """Energies, and the derivative of the total energy with respect to each edge vector [E, 3]."""
        prepared = self.prepare(edges.present)
        if want_forces:
            vectors = vectors.detach().requires_grad_()
        radius, harmonics = edge_harmonics(vectors, self._lmax())
        inputs = EdgeInputs(radius, harmonics, edges)
        out, differentiable = self._energies(data, prepared, inputs)
        if not want_forces:
            return out, None
        if not differentiable.requires_grad:  # no edges, or nothing within reach
            return out, torch.zeros_like(vectors)
        (gradient,) = torch.autograd.grad(differentiable, vectors, torch.ones_like(differentiable))
        return {name: t if t is None else t.detach() for name, t in out.items()}, gradient

    def prepare(self, present: tuple[int, ...]) -> Prepared:
        """Tables and prepared weights for these species."""
        fingerprint = self._fingerprint()
        prepared = self._prepared
        if prepared is None or prepared.fingerprint != fingerprint or prepared.present != present:
            with torch.no_grad():
                tables = self._tables(present)
                embedding = self._species_features()
                layers = tuple(
                    freeze_layer(interaction, product, table, embedding if number == 0 else None)
                    for number, (interaction, product, table) in enumerate(
                        zip(self.interactions, self.products, tables, strict=True)
                    )
                )
            self.table_error = max(table.error for table in tables)
            prepared = Prepared(layers, present, fingerprint)
            self._prepared = prepared
        return prepared

    def _fingerprint(self) -> tuple[object, ...]:
        """Changes when a parameter is written, moved, converted or replaced. Asked for at every evaluation."""
        parameters = [p for group in self._parameter_dicts for p in group.values() if p is not None]
        first = parameters[0]
        return (sum(p._version for p in parameters), first.data_ptr(), first.dtype, first.device)

    def _tables(self, present: tuple[int, ...]) -> list[SplineTable]:
        exact = copy.deepcopy(self._converted[0]).to("cpu", torch.float64)
        cutoff = float(self.r_max)
        pairs = [(i, j) for i in present for j in present] if present else [(0, 0)]
        dtype = next(self.parameters()).dtype
        return [
            tabulate(f"interactions.{layer}", [radial_weights(exact, layer, i, j) for i, j in pairs], cutoff, dtype)
            for layer in range(len(self.interactions))
        ]

    def _species_features(self) -> Tensor | None:
        """Features of each species before the first layer, or None where they depend on more than the species."""
        if "joint_embedding" in self._modules:
            return None
        parameter = next(self.parameters())
        one_hot = torch.eye(len(self.atomic_numbers), dtype=parameter.dtype, device=parameter.device)
        features: Tensor = self.node_embedding(one_hot)
        return features

    def _lmax(self) -> int:
        return int(self.spherical_harmonics.irreps_out.lmax)

    def _energies(
        self, data: dict[str, Tensor], prepared: Prepared, inputs: EdgeInputs
    ) -> tuple[dict[str, Tensor | None], Tensor]:
        """The energies of MACE.forward, and the part that depends on positions, summed over everything."""
        batch, graphs = data["batch"], data["ptr"].shape[0] - 1
        heads = data["head"][batch] if "head" in data else torch.zeros_like(batch)
        by_graph = segments(batch, graphs)

        def total(per_node: Tensor) -> Tensor:
            return segment_sum(per_node[:, None], by_graph).squeeze(1)

        def of_head(values: Tensor) -> Tensor:
            return values.gather(1, heads[:, None]).squeeze(1)

        node_e0 = of_head(self.atomic_energies_fn(data["node_attrs"]))
        e0 = total(node_e0).to(inputs.radius.dtype)
        x = self.node_embedding(data["node_attrs"])
        if "joint_embedding" in self._modules:
            x = x + self.joint_embedding(batch, {name: data[name] for name in self.embedding_specs})
            if "embedding_readout" in self._modules:
                readout = torch.atleast_1d(of_head(self.embedding_readout(x, heads)))
                e0 = e0 + total(readout)
        node_pair = self._pair_energy(data, inputs)
        features = []
        for layer in prepared.layers:
            x = layer(x, inputs)
            features.append(x)
        node_readouts = []
        for number, readout_block in enumerate(self.readouts):
            of_layer = features[-1 if len(self.readouts) == 1 else number]
            node_readouts.append(of_head(readout_block(of_layer, heads)))
        node_feats = torch.cat(features, dim=-1)
        if "scale_shift" in self._modules:
            node_inter = torch.stack([node_pair, *node_readouts]).sum(0)
            node_inter = self.scale_shift(node_inter, heads)
            inter = total(node_inter)
            out = {
                "energy": e0 + inter,
                "node_energy": node_e0.double() + node_inter.double(),
                "interaction_energy": inter,
                "node_feats": node_feats,
            }
            return out, inter.sum()
        parts = [e0, total(node_pair), *(total(r) for r in node_readouts)]
        contributions = torch.stack(parts, dim=-1)
        energy = contributions.sum(-1)
        out = {
            "energy": energy,
            "node_energy": torch.stack([node_e0, node_pair, *node_readouts], dim=-1).sum(-1),
            "contributions": contributions,
            "node_feats": node_feats,
        }
        return out, energy.sum()

    def _pair_energy(self, data: dict[str, Tensor], inputs: EdgeInputs) -> Tensor:
        """Repulsion of the nuclei [N]; zeros for a model without it."""
        if "pair_repulsion_fn" not in self._modules:
            return inputs.radius.new_zeros(data["node_attrs"].shape[0])
        edges = inputs.edges
        index = torch.stack([edges.sender, edges.receiver]).long()
        energy: Tensor = self.pair_repulsion_fn(inputs.radius[:, None], data["node_attrs"], index, self.atomic_numbers)
        return energy


def edge_vectors(positions: Tensor, edges: SortedEdges, shifts: Tensor) -> Tensor:
    """Vectors [E, 3] from sender to receiver; ``shifts`` in the sorted order."""
    return positions.detach()[edges.receiver] - positions.detach()[edges.sender] + shifts


def atomic_forces(edge_forces: Tensor, edges: SortedEdges) -> Tensor:
    """Forces [N, 3] from the derivative of the energy with respect to each edge vector."""
    total = segment_sum(edge_forces, edges.senders) - segment_sum(edge_forces, edges.receivers)
    return total[: edges.num_atoms]


def pair_virials(vectors: Tensor, edge_forces: Tensor) -> Tensor:
    """[E, 9], vector (x) derivative."""
    return (vectors[:, :, None] * edge_forces[:, None, :]).view(-1, 9)


def virials_and_stress(
    per_edge: Tensor, edges: SortedEdges, data: dict[str, Tensor], want_stress: bool
) -> tuple[Tensor, Tensor]:
    """Virials and stress [graphs, 3, 3] of each structure, as mace.modules.utils.compute_forces_virials.

    The derivative with respect to a strain is a sum over edges of vector (x) derivative; no autograd through it.
    """
    per_atom = segment_sum(per_edge, edges.receivers)[: edges.num_atoms]
    gradient = segment_sum(per_atom, segments(data["batch"], data["ptr"].shape[0] - 1)).view(-1, 3, 3)
    gradient = (gradient + gradient.transpose(1, 2)) / 2
    stress = torch.zeros_like(gradient)
    if want_stress:
        volume = _volume(data["cell"])
        stress = gradient / volume.view(-1, 1, 1)
        stress = torch.where(stress.abs() < 1e10, stress, torch.zeros_like(stress))
    return -gradient, stress


def _volume(cell: Tensor) -> Tensor:
    """[graphs], from the triple product: a determinant by LU would stop a GPU."""
    a, b, c = cell.view(-1, 3, 3).unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1).abs()


def _atomic_virials(per_edge: Tensor, edges: SortedEdges, cell: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """As mace.modules.utils.get_atomic_virials_stresses: half of each edge to either end."""
    both = segment_sum(per_edge, edges.senders) + segment_sum(per_edge, edges.receivers)
    virial = both[: edges.num_atoms].view(-1, 3, 3) / 2
    virial = (virial + virial.transpose(1, 2)) / 2
    volume = _volume(cell)[batch].view(-1, 1, 1)
    stress = virial / volume
    return -virial, torch.where(stress.abs() < 1e10, stress, torch.zeros_like(stress))


def _require_frozen_form(model: Any) -> None:
    name = type(model).__name__
    if name not in ("MACE", "ScaleShiftMACE"):
        raise UnsupportedModuleError(f"a {name} has no frozen form; MACE and ScaleShiftMACE have")
    for layer, interaction in enumerate(model.interactions):
        if isinstance(interaction, FastRealAgnosticAttResidualInteraction):
            raise UnsupportedModuleError(
                f"interactions.{layer}: its radial weights depend on node features, so they are no function of the "
                "distance; use mace_fast.convert"
            )
        if not isinstance(interaction, FastInteraction):
            raise UnsupportedModuleError(
                f"interactions.{layer} is a {type(interaction).__name__}; convert the model first (mace_fast.convert)"
            )
    for layer, product in enumerate(model.products):
        if not isinstance(product, FastEquivariantProductBasis):
            raise UnsupportedModuleError(
                f"products.{layer} is a {type(product).__name__}; convert the model first (mace_fast.convert)"
            )
