"""Batches of structures as MACE's data dictionaries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ase
import numpy as np
import torch
from mace.data import AtomicData, Configuration
from mace.tools import AtomicNumberTable, torch_geometric

from mace_fast.errors import StructureError
from mace_fast.verification.structures import elements_and_cutoff, embedding_specs, model_heads

# Names under which mace-torch's calculator looks for an input in atoms.info, and its default.
_INFO_ALIASES: dict[str, tuple[str, float]] = {"total_charge": ("charge", 0.0), "total_spin": ("spin", 1.0)}


_DISPLACEMENT = 1e-3  # A


@dataclass(frozen=True, eq=False)
class Graph:
    """One structure with its neighbour list; equal only to itself."""

    name: str
    formula: str
    pbc: tuple[bool, bool, bool]
    head: str
    num_atoms: int
    num_edges: int
    data: AtomicData


@dataclass(frozen=True)
class Batch:
    """Several graphs as one; float64 on the CPU until ``inputs`` casts it."""

    name: str
    graphs: tuple[Graph, ...]
    tensors: dict[str, torch.Tensor]

    @property
    def num_graphs(self) -> int:
        return len(self.graphs)

    @property
    def num_edges(self) -> int:
        return sum(graph.num_edges for graph in self.graphs)

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """A fresh data dictionary (MACE writes into the one it is given)."""
        return {
            key: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True)
            for key, value in self.tensors.items()
        }

    def displaced(self, generator: torch.Generator) -> Batch:
        """The same edges with every atom moved by some 1e-3 A, to positions that float32 holds exactly."""
        positions = self.tensors["positions"]
        moved = positions + _DISPLACEMENT * torch.randn(positions.shape, dtype=torch.float64, generator=generator)
        return replace(self, tensors={**self.tensors, "positions": moved.float().double()})


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """MACE creates tensors of torch's default dtype on the way; it is put back whatever happens."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_graphs(model: torch.nn.Module, structures: Sequence[ase.Atoms]) -> list[Graph]:
    """Neighbour list, one-hot elements, head and additional inputs, as mace-torch's calculator makes them.

    Positions and cells are rounded to float32 first: every dtype then sees the very same structure, and an
    error in float32 is one of arithmetic, not of the input.

    Raises:
        StructureError: an element, a head or an additional input that the model does not know or the
            structure lacks.
    """
    numbers, r_max = elements_and_cutoff(model)
    heads = model_heads(model)
    with default_dtype(torch.float64):
        return [
            _build_graph(model, atoms, atoms.info.get("head", heads[0]), numbers, r_max, heads) for atoms in structures
        ]


def batch_graphs(name: str, graphs: Sequence[Graph]) -> Batch:
    """Graphs as one batch."""
    with default_dtype(torch.float64):
        collated = torch_geometric.Batch.from_data_list([graph.data for graph in graphs]).to_dict()
    tensors = {key: value for key, value in collated.items() if isinstance(value, torch.Tensor)}
    return Batch(name=name, graphs=tuple(graphs), tensors=tensors)


def _build_graph(
    model: torch.nn.Module, atoms: ase.Atoms, head: str, numbers: Any, r_max: float, heads: list[str]
) -> Graph:
    name = str(atoms.info.get("name", atoms.get_chemical_formula()))
    unknown = sorted(set(atoms.numbers.tolist()) - set(numbers.tolist()))
    if unknown:
        raise StructureError(f"structure {name!r} holds atomic numbers {unknown}, which the model was not trained on")
    if head not in heads:
        raise StructureError(f"structure {name!r} asks for head {head!r}; the model has {heads}")
    if len(atoms) == 0:
        raise StructureError(f"structure {name!r} has no atoms")
    positions = atoms.positions.astype(np.float32).astype(np.float64)
    cell = np.asarray(atoms.cell.array).astype(np.float32).astype(np.float64)
    if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        raise StructureError(f"structure {name!r} has positions or a cell that are not finite")
    pbc = tuple(bool(periodic) for periodic in atoms.pbc)
    config = Configuration(
        atomic_numbers=atoms.numbers,
        positions=positions,
        properties=_embedding_inputs(model, atoms, name),
        property_weights={},
        cell=cell,
        pbc=pbc,
        head=head,
    )
    data = AtomicData.from_config(config, z_table=AtomicNumberTable(numbers.tolist()), cutoff=r_max, heads=heads)
    return Graph(
        name=name,
        formula=str(atoms.get_chemical_formula(empirical=len(atoms) > 12)),
        pbc=pbc,  # type: ignore[arg-type]
        head=head,
        num_atoms=len(atoms),
        num_edges=int(data["edge_index"].shape[1]),
        data=data,
    )


def _embedding_inputs(model: torch.nn.Module, atoms: ase.Atoms, name: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for key, spec in embedding_specs(model).items():
        source = atoms.info if spec["per"] == "graph" else atoms.arrays
        alias, default = _INFO_ALIASES.get(key, (key, None))
        value = source.get(key, source.get(alias, default))
        if value is None:
            where = "info" if spec["per"] == "graph" else "arrays"
            raise StructureError(f"the model takes {key!r}, which structure {name!r} lacks: set atoms.{where}[{key!r}]")
        inputs[key] = value
    return inputs
