"""A MACE model frozen for inference: same signature and results, parameters constant, radial networks tabulated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mace_fast.copying import copy_module
from mace_fast.errors import UnsupportedModuleError
from mace_fast.inference.edges import Memo, SortedEdges, group_atoms, sort_edges
from mace_fast.inference.energies import (
    NodeInputs,
    Readout,
    contributions,
    energies,
    freeze_readouts,
    node_inputs,
)
from mace_fast.inference.layers import EdgeInputs, FrozenLayer, freeze_layer
from mace_fast.inference.radial import depends_on_species, radial_weights, shared_functions
from mace_fast.inference.repulsion import freeze_repulsion
from mace_fast.inference.tables import SplineTable, tabulate
from mace_fast.kernels.ops.geometry import edge_gradient
from mace_fast.kernels.ops.harmonics import edge_harmonics
from mace_fast.kernels.ops.prepare import compile_sources, spline_sources, target
from mace_fast.kernels.ops.repulsion import Repulsion, nuclear_repulsion
from mace_fast.kernels.ops.segment import segment_sum, segments
from mace_fast.kernels.ops.totals import atom_forces
from mace_fast.patch.blocks.interaction import FastRealAgnosticAttResidualInteraction
from mace_fast.patch.match import MACE_BLOCKS
from mace_fast.patch.understand import call_listener, class_name, replaced_forward

_MODELS = ("mace.modules.models.MACE", "mace.modules.models.ScaleShiftMACE")
_REPLACED = {
    "node_embedding": "mace.modules.blocks.LinearNodeEmbeddingBlock",
    "radial_embedding": "mace.modules.blocks.RadialEmbeddingBlock",
    "spherical_harmonics": "e3nn.o3._spherical_harmonics.SphericalHarmonics",
    "scale_shift": "mace.modules.blocks.ScaleShiftBlock",
}
"""Modules that are not called at an evaluation, or of which is known what their results depend on, by class."""


@dataclass(frozen=True)
class Prepared:
    """What is computed once from the parameters: the layers, for a set of species where tables depend on them.

    Attributes:
        model: a copy of the converted model as it was then. All else was made from it, and modules that are still
            called are this copy's: an evaluation never sees parameters of two times.
        table_of_pair: [pairs of these species] int32, where pairs share tables.
        made_from: the tensors of the model that was copied.
    """

    model: Any
    layers: tuple[FrozenLayer, ...]
    table_of_pair: Tensor | None
    readouts: tuple[Readout, ...]
    repulsion: Repulsion | None
    present: tuple[int, ...]
    made_from: Watched


class Watched:
    """The parameters of a model, and the buffers outside of its layers, watched for writing.

    A tensor counts as written when its version has changed, as an operation in place, an optimiser and
    ``load_state_dict`` change it; when it lies elsewhere, as after ``.to()``; and when another object is in its place.
    A write to memory through ``.data`` changes none of these. To find it, values would have to be read, for which the
    host would wait for a GPU at each evaluation.

    Args:
        model: its modules are those of now; one that is exchanged later is not watched.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # A module without any gets none later; TorchScript takes long to say each time that there are none.
        groups: list[dict[str, Any]] = [module._parameters for module in model.modules() if len(module._parameters)]
        groups += [
            module._buffers
            for name, module in model.named_modules()
            if name.partition(".")[0] not in ("interactions", "products")
            and not isinstance(module, torch.jit.ScriptModule)
            and module._buffers
        ]
        self._groups = groups
        self._key = self._now()
        # Both are held, so that no other object and no other memory can take the place that the key names.
        self._held = [(t, t.detach()) for group in groups for t in group.values() if t is not None]

    def unchanged(self) -> bool:
        """Whether no tensor was written, moved or replaced since. Asked at every evaluation: about 10 us."""
        return self._key == self._now()

    def _now(self) -> list[tuple[int, int, int]]:
        return [(id(t), t._version, t.data_ptr()) for group in self._groups for t in group.values() if t is not None]


class Geometry(NamedTuple):
    """Vectors [E, 3], lengths [E] and spherical harmonics [E, (lmax + 1)^2] of edges."""

    vectors: Tensor
    radius: Tensor
    harmonics: Tensor


class FrozenMACE(torch.nn.Module):
    """A converted MACE or ScaleShiftMACE, frozen.

    It shares all state with the converted model that it is made from: same parameters and state dict, same attributes.
    Tables and prepared weights are made at the first evaluation, from a copy of the model, and again at the first
    evaluation after one of these changes:

    - the set of species, where tables depend on it;
    - a parameter, or a buffer outside of the layers (atomic energies, scale, shift ...), that is written in place, by
      an optimiser or by ``load_state_dict``, moved or cast by ``to``, or replaced by another tensor.

    Other changes are not noticed, and results stay those of the model as it was, in every part: values written through
    ``.data`` (as ``torch_ema`` does) or through another view of the same memory that autograd knows nothing of, plain
    attributes such as ``avg_num_neighbors``, an exchanged submodule. Call :meth:`refresh` after such a change.
    Captured graphs, steppers and calculators that run this object follow it.

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
        self._memo: Memo[SortedEdges] = Memo()
        self._prepared: Prepared | None = None
        self._nodes: Memo[tuple[Prepared, NodeInputs]] = Memo()
        self.table_error: float | None = None

    def __reduce__(self) -> tuple[type[FrozenMACE], tuple[torch.nn.Module]]:
        return FrozenMACE, (self._converted[0],)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenMACE:
        return FrozenMACE(copy.deepcopy(self._converted[0], memo))

    @property
    def converted(self) -> torch.nn.Module:
        """The converted model, which can be trained."""
        return self._converted[0]

    def refresh(self) -> None:
        """Take over the model as it is now: everything prepared is dropped, and made again at the next evaluation.

        Needed after changes that are not noticed; the class says which.

        Raises:
            UnsupportedModuleError: the model was changed into one that has no frozen form.
        """
        _require_frozen_form(self._converted[0])
        self._prepared = None

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
        vectors = edge_vectors(data["positions"], edges, data["shifts"][edges.permutation])
        out, edge_forces = self.evaluate(data, edges, vectors, want_forces=want_edges, everything=True)
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
                present = tuple(sorted(set(species.tolist()))) if depends_on_species(self) else None
                atoms = group_atoms(species, data["node_attrs"].shape[1], present)
                edges = sort_edges(data["edge_index"], lengths, atoms)
            self._memo.put(sources, edges)
        return edges

    def evaluate(
        self,
        data: dict[str, Tensor],
        edges: SortedEdges,
        vectors: Tensor,
        *,
        want_forces: bool,
        everything: bool = False,
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """Energies, and the derivative of the total energy with respect to each edge vector [E, 3].

        ``energy`` and ``node_energy``, float64; with ``everything`` all that MACE returns, in its dtypes.
        """
        prepared = self.prepare(edges.present)
        vectors = vectors.detach()
        radius, harmonics = edge_harmonics(vectors, self.lmax)
        geometry = Geometry(vectors, radius, harmonics)
        nodes = self._known_nodes(data, edges, prepared)
        return self.evaluate_geometry(
            data, edges, geometry, nodes, prepared, want_forces=want_forces, everything=everything
        )

    def evaluate_geometry(
        self,
        data: dict[str, Tensor],
        edges: SortedEdges,
        geometry: Geometry,
        nodes: NodeInputs,
        prepared: Prepared,
        *,
        want_forces: bool,
        everything: bool = False,
    ) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The same where lengths and harmonics, and what the nodes bring, are there already."""
        if prepared.table_of_pair is not None and edges.pair is not None:
            edges = edges._replace(pair=prepared.table_of_pair.index_select(0, edges.pair))
        # Each user of the edges has leaves of its own: their gradients are summed in the kernel that needs the sum.
        users: list[EdgeInputs] = []

        def of_edges() -> EdgeInputs:
            radius, harmonics = (t.detach().requires_grad_(want_forces) for t in geometry[1:])
            users.append(EdgeInputs(radius, harmonics, edges))
            return users[-1]

        with torch.set_grad_enabled(want_forces):
            pair = None
            if "pair_repulsion_fn" in self._modules:
                pair = _pair_energy(prepared, data, of_edges())
            x, features = nodes.features, []
            for number, layer in enumerate(prepared.layers):
                x = layer(x, of_edges(), nodes.skip if number == 0 else None)
                features.append(x)
            found = energies(prepared.model, prepared.readouts, nodes, features, pair, want_gradient=want_forces)
        out: dict[str, Tensor | None] = {"energy": found.total, "node_energy": found.of_nodes}
        if everything:
            dtype = geometry.radius.dtype
            out["energy"] = found.total.to(dtype)
            out["node_feats"] = torch.cat(features, dim=-1).detach()
            if "scale_shift" in self._modules:
                out["interaction_energy"] = found.interaction.to(dtype)
            else:
                out["node_energy"] = found.of_nodes.to(dtype)
                parts = contributions(prepared.model, prepared.readouts, nodes, features, pair, data["batch"])
                out["contributions"] = parts.to(dtype)
        if not want_forces:
            return out, None
        return out, _edge_derivatives(found.roots, users, geometry, self.lmax, edges)

    def _known_nodes(self, data: dict[str, Tensor], edges: SortedEdges, prepared: Prepared) -> NodeInputs:
        """What the nodes bring; kept while the caller passes the same tensors."""
        names = ("node_attrs", "batch", "ptr", "head", *(getattr(self, "embedding_specs", None) or ()))
        sources = (*(data[name] for name in names if name in data), edges.species)
        known = self._nodes.get(sources)
        if known is None or known[0] is not prepared:
            known = prepared, self.node_inputs(data, edges, prepared)
            self._nodes.put(sources, known)
        return known[1]

    def node_inputs(self, data: dict[str, Tensor], edges: SortedEdges, prepared: Prepared) -> NodeInputs:
        """What the nodes of a list bring to every evaluation; made from MACE's input without positions."""
        return node_inputs(prepared.model, prepared.layers, prepared.readouts, data, edges)

    def prepare(self, present: tuple[int, ...]) -> Prepared:
        """Tables and prepared weights for these species."""
        prepared = self._prepared
        if prepared is None or prepared.present != present or not prepared.made_from.unchanged():
            # They outlast the call, so they must not be tensors of an inference mode that it was made in.
            _require_frozen_form(self._converted[0])
            with torch.inference_mode(False), torch.no_grad():
                made_from = Watched(self._converted[0])
                model: Any = copy_module(self._converted[0]).requires_grad_(False)
                tables, table_of_pair = _tables(model, present)
                embedding = _species_features(model)
                layers = tuple(
                    freeze_layer(interaction, product, table, embedding if number == 0 else None)
                    for number, (interaction, product, table) in enumerate(
                        zip(model.interactions, model.products, tables, strict=True)
                    )
                )
                readouts, repulsion = freeze_readouts(model), freeze_repulsion(model)
            _compile(layers)
            self.table_error = max(table.error for table in tables)
            prepared = Prepared(model, layers, table_of_pair, readouts, repulsion, present, made_from)
            self._prepared = prepared
        return prepared

    @property
    def lmax(self) -> int:
        """Of the spherical harmonics."""
        return int(self.spherical_harmonics.irreps_out.lmax)


def _tables(model: Any, present: tuple[int, ...]) -> tuple[list[SplineTable], Tensor | None]:
    """The splines of each layer, and which of them the pairs of species have if not each has its own."""
    exact = copy_module(model).to("cpu", torch.float64)
    cutoff, parameter = float(model.r_max), next(model.parameters())
    pairs = [(i, j) for i in present for j in present] if present else [(0, 0)]
    layers = range(len(model.interactions))
    functions = [[radial_weights(exact, layer, i, j) for layer in layers] for i, j in pairs]
    firsts, places = shared_functions(functions, cutoff) if present else ([0], [0])
    tables = [
        tabulate(f"interactions.{layer}", [functions[pair][layer] for pair in firsts], cutoff, parameter.dtype)
        for layer in layers
    ]
    if len(firsts) == len(pairs):
        return tables, None
    return tables, torch.tensor(places, dtype=torch.int32, device=parameter.device)


def _species_features(model: Any) -> Tensor | None:
    """Features of each species before the first layer, or None where they depend on more than the species."""
    if "joint_embedding" in model._modules:
        return None
    parameter = next(model.parameters())
    one_hot = torch.eye(len(model.atomic_numbers), dtype=parameter.dtype, device=parameter.device)
    features: Tensor = model.node_embedding(one_hot)
    return features


def _pair_energy(prepared: Prepared, data: dict[str, Tensor], inputs: EdgeInputs) -> Tensor:
    """Repulsion of the nuclei [N]; by the model's own module where there is no kernel for its form."""
    edges, form, model = inputs.edges, prepared.repulsion, prepared.model
    if form is not None:
        return nuclear_repulsion(form, inputs.radius, edges.species, edges.sender, edges.row)
    index = torch.stack([edges.sender, edges.receiver]).long()
    energy: Tensor = model.pair_repulsion_fn(inputs.radius[:, None], data["node_attrs"], index, model.atomic_numbers)
    return energy


def _edge_derivatives(
    roots: tuple[tuple[Tensor, Tensor], ...],
    users: list[EdgeInputs],
    geometry: Geometry,
    lmax: int,
    edges: SortedEdges,
) -> Tensor:
    """[E, 3], the derivative of the total energy with respect to each edge vector; exactly zero for padding."""
    reached = [(tensor, seed) for tensor, seed in roots if tensor.requires_grad]
    leaves = [leaf for user in users for leaf in (user.radius, user.harmonics)]
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if reached:
        tensors, seeds = zip(*reached, strict=True)
        gradients = torch.autograd.grad(tensors, leaves, seeds, allow_unused=True)
    parts = [part for user in users for several in user.parts for part in several.unbind()]
    dradius = [part[:, -1] for part in parts] + [g for g in gradients[::2] if g is not None]
    dy = [part[:, :-1] for part in parts] + [g for g in gradients[1::2] if g is not None]
    return edge_gradient(geometry.vectors, dradius, dy, lmax, edges.row[-1:])


def edge_vectors(positions: Tensor, edges: SortedEdges, shifts: Tensor) -> Tensor:
    """Vectors [E, 3] from sender to receiver; ``shifts`` in the sorted order."""
    return positions.detach()[edges.receiver] - positions.detach()[edges.sender] + shifts


def atomic_forces(edge_forces: Tensor, edges: SortedEdges) -> Tensor:
    """Forces [N, 3] from the derivative of the energy with respect to each edge vector."""
    forces, _ = atom_forces(edge_forces, edges.receiver_row, edges.sender_order, edges.sender_row, edges.num_atoms)
    return forces.to(edge_forces.dtype)


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


def _compile(layers: tuple[FrozenLayer, ...]) -> None:
    """The convolutions' kernels, side by side, before the first call asks for one after the other."""
    rows = [layer.weights.rows for layer in layers]
    arch = target(rows[0].device)
    makers = [
        maker
        for layer, table in zip(layers, rows, strict=True)
        for maker in spline_sources(layer.conv, table.dtype, arch, table.shape[1], want_x=layer.first is None)
    ]
    compile_sources(makers, arch)


def _require_frozen_form(model: Any) -> None:
    """All that the program computes by code of its own is exactly what that code computes.

    Modules that are called with what MACE calls them with (atomic energies, joint embedding, repulsion, readouts of
    other forms, the parts of the radial embedding) may be of any class.

    Raises:
        UnsupportedModuleError: it is not; the message names the module.
    """
    found = class_name(model)
    if found not in _MODELS:
        raise UnsupportedModuleError(
            f"a {found} has no frozen form, MACE and ScaleShiftMACE of mace-torch have; use mace_fast.convert"
        )
    for layer, interaction in enumerate(model.interactions):
        if isinstance(interaction, FastRealAgnosticAttResidualInteraction):
            raise UnsupportedModuleError(
                f"interactions.{layer}: its radial weights depend on node features, so they are no function of the "
                "distance; use mace_fast.convert"
            )
    for kind in ("interactions", "products"):
        for layer, block in enumerate(model.get_submodule(kind)):
            if type(block) not in MACE_BLOCKS.values():
                raise UnsupportedModuleError(
                    f"{kind}.{layer} is a {class_name(block)}; convert the model first (mace_fast.convert)"
                )
    for name, expected in _REPLACED.items():
        module = model._modules.get(name)
        if module is not None and class_name(module) != expected:
            raise UnsupportedModuleError(
                f"{name} is a {class_name(module)}, and the frozen form computes what a {expected} does; use "
                "mace_fast.convert, whose models call it"
            )
    _require_known_harmonics(model.spherical_harmonics)
    for name, module in model.named_modules():
        what = call_listener(module)
        if what is None and replaced_forward(module):
            what = "a forward that was replaced on the object"
        if what is not None:
            raise UnsupportedModuleError(
                f"{name or 'the model'} ({class_name(module)}) has {what}, and the frozen form does not call it at "
                "every evaluation; remove it, or use mace_fast.convert"
            )


def _require_known_harmonics(module: Any) -> None:
    lmax = module._lmax
    expected = [(1, (degree, (-1) ** degree)) for degree in range(lmax + 1)]
    found = [(mul, (ir.l, ir.p)) for mul, ir in module.irreps_out]
    if not module.normalize or module.normalization != "component" or found != expected:
        raise UnsupportedModuleError(
            f"spherical_harmonics ({class_name(module)}) gives {module.irreps_out} with "
            f"normalize={module.normalize}, normalization={module.normalization!r}; the frozen form computes all "
            "degrees from 0 on, normalize=True, normalization='component'; use mace_fast.convert"
        )
