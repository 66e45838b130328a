"""A frozen model with static shapes: buffers for so many atoms, edges and structures, evaluated as they are filled.

Everything has a fixed size, and nothing in an evaluation waits for the device, so that on CUDA it is one graph that is
captured once and replayed. Lists are loaded at a rebuild of the neighbour list, in one copy if they come from the host;
a step brings positions, in one copy, and takes all results back in one copy. On the CPU the same program runs without a
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mace_fast.errors import MissingToolError
from mace_fast.inference.edges import Memo, SortedEdges
from mace_fast.inference.energies import NodeInputs, nodes_can_be_captured
from mace_fast.inference.frozen import FrozenMACE, Geometry, Prepared
from mace_fast.inference.packed import Packed
from mace_fast.inference.padded import padded_parts, refill, without_edges, write
from mace_fast.kernels.ops.geometry import edge_geometry
from mace_fast.kernels.ops.totals import atom_forces, structure_stress

FAR = 1.0e4
"""Length (A) of an edge that pads a list: beyond every cutoff, so that all it contributes is exactly zero."""

_WARMUPS = 3


class Bucket(NamedTuple):
    """Sizes of a program: what it has room for. The atoms that fill it up are a structure of their own."""

    atoms: int
    edges: int
    graphs: int

    def holds(self, atoms: int, edges: int, graphs: int) -> bool:
        """Whether there is room for so many."""
        return atoms <= self.atoms and edges <= self.edges and graphs <= self.graphs


class StaticProgram:
    """One evaluation of a model at fixed sizes.

    Args:
        model: on its device, with its dtype.
        bucket: the sizes.
        forces, stress: what is computed beside the energies.
        capture: replay a CUDA graph; otherwise every operation is launched by itself.
        pool: memory pool shared with other graphs, which never run at the same time.

    Raises:
        MissingToolError: ``capture`` on a device that is not CUDA.
    """

    def __init__(
        self,
        model: FrozenMACE,
        bucket: Bucket,
        *,
        forces: bool,
        stress: bool,
        capture: bool,
        pool: Any = None,
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if capture and self.device.type != "cuda":
            raise MissingToolError(
                f"CUDA graphs need a CUDA device; the model is on {self.device}. Pass cuda_graph=False"
            )
        self.model, self.bucket, self.forces, self.stress = model, bucket, forces or stress, stress
        self.version: tuple[Any, ...] | None = None
        """What is loaded, as the caller counts it."""
        self.shifts_from: Memo[bool] = Memo()
        """The tensors that the shifts were last set from, for callers that get the same ones again."""
        self._capture = capture
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prepared: Prepared | None = None
        self._nodes: NodeInputs | None = None
        self._nodes_stale = False
        self._node_graph: torch.cuda.CUDAGraph | None = None
        self._moved = False
        self._lists: Packed | None = None
        self._lists_to_upload = False
        self._edges: SortedEdges | None = None
        self._host_edges: SortedEdges | None = None
        self._used = self._host_used = 0
        self._data: dict[str, Tensor] = {}
        self._features: Packed | None = None
        self._data_to_upload = False
        self._data_from: Memo[bool] = Memo()
        self._names = {"node_attrs", "batch", "ptr", "head", *feature_specs(model)}
        self._sizes = (0, 0)
        self._layout: list[tuple[str, slice, tuple[int, ...]]] = []
        atoms, _, graphs = bucket
        # Positions, then cells: what changes from step to step, together.
        self._packed_inputs = Packed({"all": ((atoms + 3 * (graphs + 1), 3), torch.float64)}, self.device)
        self._inputs = self._packed_inputs.on_device["all"]
        self._inputs_array = self._packed_inputs.on_host["all"].numpy()
        self._elements = torch.arange(len(model.atomic_numbers), device=self.device)
        self._parts: dict[str, tuple[int, ...]] = {"node_energy": (atoms,), "energy": (graphs + 1,)}
        self._parts |= {"forces": (atoms, 3)} if self.forces else {}
        self._parts |= {"stress": (graphs + 1, 3, 3), "virials": (graphs + 1, 3, 3)} if stress else {}
        size, pinned = sum(math.prod(shape) for shape in self._parts.values()), self.device.type == "cuda"
        self._host_outputs = torch.zeros(size, dtype=torch.float64, pin_memory=pinned)
        self._outputs = torch.zeros_like(self._host_outputs, device=self.device) if pinned else self._host_outputs
        self._outputs_array = self._host_outputs.numpy()

    @property
    def captured(self) -> bool:
        """Whether a graph is held."""
        return self._graph is not None

    @property
    def pool(self) -> Any:
        """The memory pool of the graph, or None before it is captured."""
        return self._pool

    def load(self, edges: SortedEdges, data: Mapping[str, Tensor], version: tuple[Any, ...]) -> None:
        """Fill in a neighbour list and what else does not change from step to step.

        What comes from the host is brought over by the next :meth:`step`; nothing else may be loaded before that.

        Args:
            edges: of at most ``bucket.atoms`` atoms: if fewer, they are filled up here. On the device or on the host;
                in the latter case :meth:`set_shifts` has to follow with shifts from there.
            data: ``batch``, ``ptr``, ``head`` and embedded features, as MACE takes them, and ``node_attrs``, which can
                be made from the species of the edges. On the device or on the host.
            version: kept as :attr:`version` when all is loaded.

        Raises:
            ValueError: more atoms, edges or structures than the bucket has room for.
        """
        self.version = None
        atoms, count, graphs = data["batch"].shape[0], edges.sender.shape[0], data["ptr"].shape[0] - 1
        if not self.bucket.holds(atoms, count, graphs):
            raise ValueError(f"{atoms} atoms, {count} edges, {graphs} structures do not fit into {self.bucket}")
        if edges.num_atoms != self.bucket.atoms:
            raise ValueError(f"edges are sorted for {edges.num_atoms} atoms, and must be for {self.bucket.atoms}")
        if self._lists is None or self._edges is None:
            parts = padded_parts(
                self.bucket.atoms, self.bucket.edges, len(self._elements), with_pairs=edges.pair is not None
            )
            self._lists = Packed({**parts, "shifts": ((self.bucket.edges, 3), torch.float64)}, self.device)
            self._edges = without_edges(self._lists.on_device)
            self._shifts = self._lists.on_device["shifts"].fill_(FAR)
        # If filling breaks off, what it wrote is padding to be written over.
        if _on_host(edges.sender):
            if self._host_edges is None:
                self._host_edges = without_edges(self._lists.on_host)
                self._lists.on_host["shifts"].fill_(FAR)
            self._host_used = max(self._host_used, count)
            self._host_edges = refill(self._host_edges, self._host_used, edges)
            self._lists.on_host["shifts"][count : self._host_used] = FAR
            self._edges = self._edges._replace(present=edges.present)
            self._host_used = count
            self._lists_to_upload = True
        else:
            self._used = max(self._used, count)
            self._edges = refill(self._edges, self._used, edges)
            self._shifts[count : self._used] = FAR
        self._used = count
        self.set_features(data)
        self._sizes = (atoms, graphs)
        self._layout = self._places(atoms, graphs)
        self.version = version

    def set_shifts(self, shifts: Tensor) -> None:
        """[count, 3] float64, A, of the loaded edges in their order: what a cell that changes brings. On the device, or
        on the host where the edges came from there."""
        assert self._lists is not None, "load() comes first"
        if _on_host(shifts):
            write(self._lists.on_host["shifts"][: shifts.shape[0]], shifts)
            self._lists_to_upload = True
        else:
            self._upload_lists()  # which would come over these
            self._shifts[: shifts.shape[0]] = shifts

    def set_features(self, data: Mapping[str, Tensor]) -> None:
        """Other values of the embedded features, or of anything else that is not edges; nothing where they are those
        that were set last."""
        assert self._edges is not None, "load() comes first"
        sources = tuple(data[name] for name in sorted(self._names & data.keys()))
        if self._data_from.get(sources) is not None:
            return
        filled = pad_inputs(data, self.bucket, self.model)
        parts = {name: (tuple(value.shape), value.dtype) for name, value in filled.items()}
        if self._features is None or parts != self._features.parts:
            self._features = Packed(parts, self.device)
            self._data, self._node_graph, self._moved = dict(self._features.on_device), None, True
            if "node_attrs" not in filled:
                shape = (self.bucket.atoms, len(self._elements))
                self._data["node_attrs"] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        from_host = _on_host(filled["batch"])
        target = self._features.on_host if from_host else self._features.on_device
        for name, value in filled.items():
            write(target[name], value)
        self._data_to_upload, self._nodes_stale = from_host, True
        self._data_from.put(sources, True)

    def _upload_lists(self) -> None:
        if self._lists_to_upload:
            assert self._lists is not None
            self._lists.upload()
            self._lists_to_upload = False

    def _made_nodes(self, prepared: Prepared) -> NodeInputs:
        assert self._edges is not None and self._features is not None
        if "node_attrs" not in self._features.on_device:
            torch.eq(self._edges.species[:, None], self._elements, out=self._data["node_attrs"])
        return self.model.node_inputs(self._data, self._edges, prepared)

    def _make_nodes(self, prepared: Prepared) -> None:
        """What does not depend on positions, written where a graph reads it if it has its shapes already."""
        self._nodes_stale = True
        if prepared is not self._prepared:
            # Held, since graphs read its weights where they lie.
            self._prepared, self._node_graph, self._moved = prepared, None, True
        if self._node_graph is None:
            made, old = self._made_nodes(prepared), self._nodes
            if old is None or [t.shape for t in old.tensors] != [t.shape for t in made.tensors]:
                self._nodes, self._moved = made, True
            else:
                self._write_nodes(made)
                if self._capture and nodes_can_be_captured(self.model, prepared.readouts):
                    self._node_graph = self._recorded(lambda: self._write_nodes(self._made_nodes(prepared)))
        else:
            self._node_graph.replay()
        self._nodes_stale = False

    def _write_nodes(self, made: NodeInputs) -> None:
        assert self._nodes is not None
        for target, value in zip(self._nodes.tensors, made.tensors, strict=True):
            target.copy_(value)

    def step(self, positions: np.ndarray, cells: np.ndarray) -> dict[str, np.ndarray]:
        """Results for positions [N, 3] and cells [G, 3, 3] (the volume of the latter divides stresses), float64."""
        assert self._edges is not None, "load() comes first"
        atoms, graphs = self._sizes
        self._inputs_array[:atoms] = positions
        start = self.bucket.atoms
        self._inputs_array[start : start + 3 * graphs] = cells.reshape(-1, 3)
        self._packed_inputs.upload()
        self._upload_lists()
        if self._data_to_upload:
            assert self._features is not None
            self._features.upload()
            self._data_to_upload = False
        self.run()
        if self._outputs is not self._host_outputs:
            self._host_outputs.copy_(self._outputs, non_blocking=True)
            # Now the host may write again what it has uploaded.
            torch.cuda.current_stream(self.device).synchronize()
        return {name: self._outputs_array[part].reshape(shape).copy() for name, part, shape in self._layout}

    def step_on_device(self, positions: Tensor, cells: Tensor) -> dict[str, Tensor]:
        """The same with tensors on the device, from where all that was loaded came too; the results are copies, in
        float64 for nodes, else as the positions."""
        assert self._edges is not None, "load() comes first"
        atoms, graphs = self._sizes
        start = self.bucket.atoms
        self._inputs[:atoms] = positions.detach()
        self._inputs[start : start + 3 * graphs] = cells.detach().reshape(-1, 3)
        self.run()
        # Two small kernels for all results: a launch takes the host longer than the device.
        exact = self._outputs.clone()
        rounded = exact.to(positions.dtype)
        return {
            name: (exact if name == "node_energy" else rounded)[part].view(shape) for name, part, shape in self._layout
        }

    def run(self) -> None:
        """Evaluate what is in the buffers; on CUDA this does not wait for the device."""
        assert self._edges is not None, "load() comes first"
        prepared = self.model.prepare(self._edges.present)
        if prepared is not self._prepared or self._nodes_stale:
            self._make_nodes(prepared)
        if not self._capture:
            self._evaluate()
            return
        if self._graph is None or self._moved:
            self._graph = self._recorded(self._evaluate)
            self._moved = False
        self._graph.replay()

    def _recorded(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture work; kernels are compiled and libraries choose their algorithms in the runs before.

        A graph that is there already stays until the next is, so that its pool of memory lives on and serves it too.
        """
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(_WARMUPS):
                    work()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may work on the GPU meanwhile: other calculators of this process do.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                work()
        self._pool = graph.pool() if self._pool is None else self._pool
        return graph

    def _evaluate(self) -> None:
        edges, nodes, prepared = self._edges, self._nodes, self._prepared
        assert edges is not None and nodes is not None and prepared is not None
        atoms = self.bucket.atoms
        positions, cells = self._inputs[:atoms], self._inputs[atoms:].view(-1, 3, 3)
        geometry = Geometry(
            *edge_geometry(positions, self._shifts, edges.sender, edges.receiver, self.model.lmax, self.dtype)
        )
        out, edge_forces = self.model.evaluate_geometry(
            self._data, edges, geometry, nodes, prepared, want_forces=self.forces
        )
        results = {"node_energy": out["node_energy"], "energy": out["energy"]}
        if edge_forces is not None:
            lists = (edges.receiver_row, edges.sender_order, edges.sender_row)
            vectors = geometry.vectors if self.stress else None
            results["forces"], virials = atom_forces(edge_forces, *lists, atoms, vectors)
            if self.stress:
                results["virials"], results["stress"] = structure_stress(virials, nodes.order, nodes.row, cells)
        flat = []
        for name in self._parts:
            value = results[name]
            assert value is not None
            flat.append(value.flatten())
        torch.cat(flat, out=self._outputs)

    def _places(self, atoms: int, graphs: int) -> list[tuple[str, slice, tuple[int, ...]]]:
        """Where the results of so many atoms and structures lie in the packed outputs, and their shapes."""
        parts, start = [], 0
        for name, shape in self._parts.items():
            row = math.prod(shape[1:])
            rows = atoms if name in _OF_ATOMS else graphs
            parts.append((name, slice(start, start + rows * row), (rows, *shape[1:])))
            start += math.prod(shape)
        return parts


_OF_ATOMS = ("node_energy", "forces")


def pad_inputs(data: Mapping[str, Tensor], bucket: Bucket, model: FrozenMACE) -> dict[str, Tensor]:
    """MACE's inputs filled up to a bucket: further atoms like the first belong to one structure more, which is last.
    ``node_attrs`` and ``head`` where they are there."""
    atoms, graphs = data["batch"].shape[0], data["ptr"].shape[0] - 1

    def filled(values: Tensor, count: int) -> Tensor:
        if values.shape[0] == count:
            return values
        rest = values[:1].expand(count - values.shape[0], *values.shape[1:])
        return torch.cat([values, rest])

    ptr = torch.full((bucket.graphs + 2,), atoms, dtype=data["ptr"].dtype, device=data["ptr"].device)
    ptr[: graphs + 1] = data["ptr"]
    ptr[-1] = bucket.atoms
    batch = torch.full((bucket.atoms,), bucket.graphs, dtype=data["batch"].dtype, device=data["batch"].device)
    batch[:atoms] = data["batch"]
    padded = {"batch": batch, "ptr": ptr}
    if "node_attrs" in data:
        padded["node_attrs"] = filled(data["node_attrs"], bucket.atoms)
    if "head" in data:
        padded["head"] = filled(data["head"], bucket.graphs + 1)
    for name, spec in feature_specs(model).items():
        padded[name] = filled(data[name], bucket.atoms if spec["per"] == "atom" else bucket.graphs + 1)
    return padded


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def feature_specs(model: Any) -> Mapping[str, Mapping[str, Any]]:
    """What a model takes beside atoms; mace-torch sets the attribute only on models that take something."""
    return getattr(model, "embedding_specs", None) or {}
