"""A frozen model replayed as a CUDA graph: one launch for a whole evaluation, forward and backward.

Shapes are fixed by padding the edge list to a bucket. A graph is captured for the first structure of a kind and
replayed while the number of atoms and structures stays and the edges fit; otherwise another is captured.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mace_fast.errors import MissingToolError
from mace_fast.inference.edges import SortedEdges, pad
from mace_fast.inference.frozen import (
    FrozenMACE,
    atomic_forces,
    edge_vectors,
    pair_virials,
    virials_and_stress,
)

_BUCKET = 4096
"""Edge lists are padded to a multiple of this, with an eighth of room for lists that grow."""

_FAR = 1.0e4
"""Length (A) of an edge that pads a list: beyond every cutoff, so that all it contributes is exactly zero."""

_WARMUPS = 3


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    data: dict[str, Tensor]
    edges: SortedEdges
    shifts: Tensor
    sources: tuple[Any, ...]
    outputs: dict[str, Tensor]
    prepared: object


class CapturedMACE:
    """Callable like a :class:`FrozenMACE` on CUDA, with results equal to its, replayed from a graph.

    Results are copies: they stay valid after the next call.

    Args:
        model: the frozen model, on a CUDA device.
        keep: how many graphs are kept; the one that was not used for longest is dropped.

    Raises:
        MissingToolError: the model is not on a CUDA device.
    """

    def __init__(self, model: FrozenMACE, *, keep: int = 4) -> None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise MissingToolError(
                f"CUDA graphs need a CUDA device; the model is on {device}. Call the frozen model itself"
            )
        self.model = model
        self.device = device
        self._keep = keep
        self._captures: OrderedDict[tuple[object, ...], _Capture] = OrderedDict()
        self._pool: Any = None

    def __call__(
        self, data: dict[str, Tensor], *, compute_force: bool = True, compute_stress: bool = False
    ) -> dict[str, Tensor]:
        """Energy, node_energy, node_feats, and forces, virials, stress where asked for; as MACE.forward."""
        edges = self.model.sorted_edges(data)
        prepared = self.model.prepare(edges.present)
        count = edges.sender.shape[0]
        capacity = -(-(count + count // 8) // _BUCKET) * _BUCKET
        constants = tuple(data[name] for name in ("node_attrs", "batch", "ptr", "head") if name in data)
        extra = tuple(name for name in getattr(self.model, "embedding_specs", {}))
        kind = (
            data["positions"].shape[0],
            data["ptr"].shape[0],
            compute_force,
            compute_stress,
            len(constants),
        )
        capture = self._captures.get(kind)
        if capture is None or capture.prepared is not prepared or count > capture.edges.sender.shape[0]:
            self._captures.pop(kind, None)
            capture = self._capture(data, pad(edges, capacity), prepared, compute_force, compute_stress)
            self._captures[kind] = capture
            while len(self._captures) > self._keep:
                self._captures.popitem(last=False)
        self._captures.move_to_end(kind)
        sources = (edges, *constants)
        if len(capture.sources) != len(sources) or any(
            a is not b for a, b in zip(capture.sources, sources, strict=True)
        ):
            self._load_edges(capture, pad(edges, capture.edges.sender.shape[0]))
            for name in ("node_attrs", "batch", "ptr", "head"):
                if name in data:
                    capture.data[name].copy_(data[name])
            capture.sources = sources
        for name in ("positions", "cell", *extra):
            capture.data[name].copy_(data[name].detach())
        capture.shifts[:count] = data["shifts"][edges.permutation]
        capture.shifts[count:] = _FAR
        capture.graph.replay()
        return {name: value.clone() for name, value in capture.outputs.items()}

    def _capture(
        self,
        data: dict[str, Tensor],
        edges: SortedEdges,
        prepared: object,
        compute_force: bool,
        compute_stress: bool,
    ) -> _Capture:
        static = {name: value.detach().clone() for name, value in data.items() if isinstance(value, Tensor)}
        tensors: dict[str, Any] = {n: v.clone() for n, v in edges._asdict().items() if isinstance(v, Tensor)}
        fixed = edges._replace(**tensors)
        shifts = torch.full((edges.sender.shape[0], 3), _FAR, dtype=static["positions"].dtype, device=self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self._run(static, fixed, shifts, compute_force, compute_stress)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            outputs = self._run(static, fixed, shifts, compute_force, compute_stress)
        self._pool = graph.pool() if self._pool is None else self._pool
        return _Capture(graph, static, fixed, shifts, (), outputs, prepared)

    def _run(
        self,
        data: dict[str, Tensor],
        edges: SortedEdges,
        shifts: Tensor,
        compute_force: bool,
        compute_stress: bool,
    ) -> dict[str, Tensor]:
        with torch.enable_grad():
            vectors = edge_vectors(data["positions"], edges, shifts)
            want = compute_force or compute_stress
            out, edge_forces = self.model.evaluate(data, edges, vectors, want_forces=want)
        results = {name: value for name, value in out.items() if value is not None}
        if edge_forces is not None:
            results["forces"] = atomic_forces(edge_forces, edges)
            if compute_stress:
                per_edge = pair_virials(vectors, edge_forces)
                results["virials"], results["stress"] = virials_and_stress(per_edge, edges, data, True)
        return results

    @staticmethod
    def _load_edges(capture: _Capture, edges: SortedEdges) -> None:
        for name, target in capture.edges._asdict().items():
            if isinstance(target, Tensor):
                target.copy_(getattr(edges, name))
