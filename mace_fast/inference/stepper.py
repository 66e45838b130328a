"""From positions to energies, forces and stress, step after step: candidates, static programs, and what lives how long.

A step takes positions. Candidate pairs within cutoff + skin are found when atoms have moved so far that a pair could be
missing. On a GPU they fill a program of static shapes, which is replayed as a CUDA graph; on the CPU they are narrowed
to the edges within the cutoff. The skin changes no result beyond rounding: an edge beyond the cutoff contributes
exactly nothing.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mace_fast.errors import DeviceError
from mace_fast.inference.arrays import fingerprint
from mace_fast.inference.candidates import Candidates
from mace_fast.inference.device_errors import explain_device_error, is_device_error
from mace_fast.inference.edges import AtomsBySpecies, SortedEdges, group_atoms
from mace_fast.inference.exact import ExactList
from mace_fast.inference.frozen import FrozenMACE, atomic_forces, pair_virials, virials_and_stress
from mace_fast.inference.geometry import volume_cell
from mace_fast.inference.neighbours import NeighbourSearch
from mace_fast.inference.packed import bring
from mace_fast.inference.program import Bucket, StaticProgram, feature_specs
from mace_fast.inference.radial import depends_on_species
from mace_fast.inference.verlet import Structures

logger = logging.getLogger(__name__)

DEFAULT_SKIN = 0.5
"""A. Lists serve until an atom has moved half of it: some dozens of steps of a solid at room temperature."""

WIDE_SKIN = 1.0
"""A, where a static program has so few candidates that more of them take no longer: 64 atoms of diamond 0.52 ms a step
on an H200 with either skin, 1000 atoms 2.08 with 0.5 and 2.26 with this. Lists, 3 ms more for 64 atoms, last twice as
long."""

_MANY_SPECIES = 6
"""Where each pair of species has tables, those of up to so many species stay when others come; more take too long."""

_EDGE_STEP = 1024
Results = dict[str, np.ndarray]


class Stepper:
    """Evaluates structures that are mostly the last ones, moved a little.

    Anything may change from call to call: positions, cells, species, numbers of atoms and structures, what is asked
    for. What has to be made anew is made before anything is computed with it.

    Args:
        models: one frozen model, or a committee that agrees on cutoff, elements, dtype and device.
        skin: A, by which candidates reach beyond the cutoff; 0 makes a list at each step. None takes ``WIDE_SKIN`` for
            small structures in static programs and ``DEFAULT_SKIN`` for others.
        cuda_graph: replay a CUDA graph; None does on CUDA. False launches every operation by itself.
        static: fill programs of static shapes, as on CUDA; None does on CUDA. On the CPU it is for tests.
        neighbours: method of the search, see :class:`NeighbourSearch`.
        keep: programs kept for each model; the one not used for longest is dropped, with its graph and memory.
        varied: sizes differ from call to call, as in screening: programs are made for the next of a few sizes.

    Attributes:
        search: who finds neighbours; ``search.method`` says how.
        rebuilds: how many candidate lists were made.
        captures: how many programs were made.

    Raises:
        MissingToolError: ``cuda_graph=True`` on a device that is not CUDA.
        ValueError: a negative skin.
    """

    def __init__(
        self,
        models: Sequence[FrozenMACE],
        *,
        skin: float | None = None,
        cuda_graph: bool | None = None,
        static: bool | None = None,
        neighbours: str | None = None,
        keep: int = 4,
        varied: bool = False,
    ) -> None:
        if skin is not None and not skin >= 0:
            raise ValueError(f"skin={skin!r}: a distance in A, 0 for a new list at each step")
        self.models = list(models)
        parameter = next(self.models[0].parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        on_gpu = self.device.type == "cuda"
        self._capture = on_gpu if cuda_graph is None else cuda_graph
        self._static = on_gpu or bool(static) or self._capture
        if self._capture:
            StaticProgram(self.models[0], Bucket(1, 1, 1), forces=False, stress=False, capture=True)
        self._options = {
            "skin": skin,
            "cuda_graph": cuda_graph,
            "static": static,
            "neighbours": neighbours,
            "keep": keep,
            "varied": varied,
        }
        self.skin, self._keep, self._varied = skin, keep, varied
        self.search = NeighbourSearch(self.device, neighbours)
        self._cutoff = float(self.models[0].r_max)
        self._num_species = len(self.models[0].atomic_numbers)
        self._by_species = any(depends_on_species(model) for model in self.models)
        self._specs = feature_specs(self.models[0])
        self.rebuilds = self.captures = self._inputs_made = 0
        self._present: tuple[int, ...] = ()
        self._programs: OrderedDict[tuple[Any, ...], StaticProgram] = OrderedDict()
        self.reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.models, self._options)

    def like(self, **changes: Any) -> Stepper:
        """Another one for the same models, with some arguments changed."""
        return _make(self.models, {**self._options, **changes})

    def reset(self) -> None:
        """Forget lists, programs and graphs, as happens after an error: the next call makes what it needs."""
        self.forget_lists()
        self._programs.clear()
        self._inputs: dict[str, Tensor] = {}
        self._species = torch.empty(0, dtype=torch.int64)
        self._grouped: dict[tuple[int, torch.device], AtomsBySpecies] = {}
        self._inputs_of: tuple[object, ...] | None = None
        self._chosen: dict[tuple[int, bool, bool], tuple[int, int, tuple[Any, ...]]] = {}
        self._again: list[Callable[[], object]] = []

    def forget_lists(self) -> None:
        """Find neighbours anew at the next call. Its results then depend on nothing that came before, to the last bit:
        on a GPU the order in which edges are summed is that of their lengths when the list was made.
        """
        self._exact: ExactList | None = None
        self._list: Candidates | None = None

    def repeat(self) -> None:
        """The last evaluation once more, without input, lists and output: what no step can be faster than. On CUDA it
        does not wait. For benchmarks.
        """
        for evaluate in self._again:
            evaluate()

    def __call__(self, structures: Structures, *, forces: bool = True, stress: bool = False) -> list[Results]:
        """Results of each model, float64, in the model's units.

        ``node_energy`` [N], ``energy`` [G], ``forces`` [N, 3] where asked for; with ``stress``, that and ``virials``
        [G, 3, 3]. Stress is the virial over the volume that mace-torch takes (see ``volume_cell``).

        Raises:
            DeviceError: the GPU reported an error; the message says whether this process can go on.
            torch.OutOfMemoryError: lists and graphs are dropped, and the next call begins anew.
        """
        try:
            cells = structures.cells
            if stress:
                cells = _volume_cells(structures, self._cutoff)
            step = self._step_static if self._static else self._step_exact
            # Forces are derivatives, whatever mode the caller is in.
            with torch.inference_mode(False):
                return step(structures, cells, forces, stress)
        except Exception as error:
            self.reset()
            if self.device.type == "cuda" and is_device_error(error):
                raise DeviceError(explain_device_error(error, self.device)) from error
            raise

    def _species_with_tables(self, structures: Structures) -> tuple[int, ...] | None:
        """For which species tables are to exist; None where one table serves all pairs."""
        if not self._by_species:
            return None
        needed = set(np.unique(structures.species).tolist())
        if not needed <= set(self._present):
            together = needed | set(self._present)
            self._present = tuple(sorted(together if len(together) <= _MANY_SPECIES else needed))
        return self._present

    def _model_inputs(self, structures: Structures) -> dict[str, Tensor]:
        """MACE's input without positions, cells and edges, on the host; made again when it changes. Programs make
        ``node_attrs`` themselves."""
        key = _inputs_key(structures)
        if self._inputs_of == key:
            return self._inputs
        graphs = len(structures.cells)
        self._species, self._grouped = torch.from_numpy(structures.species), {}
        inputs = {
            "batch": torch.from_numpy(structures.batch),
            "ptr": torch.from_numpy(structures.ptr),
            "head": torch.full((graphs,), structures.head),
        }
        for name in self._specs:
            inputs[name] = torch.from_numpy(np.asarray(structures.features[name])).to(self._dtype)
        if not self._static:
            one_hot = torch.nn.functional.one_hot(self._species, self._num_species)
            inputs["node_attrs"] = one_hot.to(self._dtype)
        self._inputs = inputs
        self._inputs_of = key
        self._inputs_made += 1
        return self._inputs

    def _skin_for(self, structures: Structures) -> float:
        if self.skin is not None:
            return self.skin
        wide = self._static and self.search.small(structures, self._cutoff + WIDE_SKIN)
        return WIDE_SKIN if wide else DEFAULT_SKIN

    # --- on the host, exact lists

    def _step_exact(self, structures: Structures, cells: np.ndarray, forces: bool, stress: bool) -> list[Results]:
        if self._exact is None or not self._exact.verlet.holds(structures):
            present = self._species_with_tables(structures)
            self._exact = ExactList(
                structures, self.search, self._cutoff, self._skin_for(structures), self._num_species, present
            )
            self.rebuilds += 1
        edges, exact_vectors = self._exact.within(structures)
        data = self._model_inputs(structures)
        dtype = data["node_attrs"].dtype
        vectors = exact_vectors.to(dtype)
        results = []
        self._again = []
        for model in self.models:
            evaluate = partial(_evaluate_exact, model, data, edges, vectors, forces or stress)
            self._again.append(evaluate)
            out, edge_forces = evaluate()
            found = {"node_energy": out["node_energy"], "energy": out["energy"]}
            if edge_forces is not None:
                found["forces"] = atomic_forces(edge_forces, edges)
                if stress:
                    per_edge = pair_virials(vectors, edge_forces)
                    with_cell = {**data, "cell": torch.from_numpy(cells).to(dtype)}
                    found["virials"], found["stress"] = virials_and_stress(per_edge, edges, with_cell, True)
            results.append({n: v.detach().numpy().astype(np.float64) for n, v in found.items() if v is not None})
        return results

    # --- static shapes

    def _step_static(self, structures: Structures, cells: np.ndarray, forces: bool, stress: bool) -> list[Results]:
        data = self._model_inputs(structures)
        if self._list is None or not self._list.verlet.holds(structures):
            self._list = Candidates.find(
                structures,
                self.search,
                self._cutoff,
                self._skin_for(structures),
                self._species_with_tables(structures),
            )
            self.rebuilds += 1
        candidates = self._list
        results: list[Results] = []
        again: list[Callable[[], object]] = []
        for number, model in enumerate(self.models):
            program = self._program(number, model, candidates, structures, forces or stress, stress)
            loaded = program.version
            # Numbers, not objects: a program that waits must not keep a list alive.
            if loaded is None or loaded[0] != self.rebuilds:
                edges = candidates.sorted_for(self._atoms(program.bucket.atoms, candidates))
                program.load(edges, data, (self.rebuilds,))
                loaded = (self.rebuilds, 0, self._inputs_made)
            candidates.set_cells(structures.cells)
            if loaded[1] != candidates.cells_set:
                program.set_shifts(candidates.shifts)
            if loaded[2] != self._inputs_made:
                program.set_features(data)
            program.version = (self.rebuilds, candidates.cells_set, self._inputs_made)
            results.append(program.step(structures.positions, cells))
            again.append(program.run)
        self._again = again
        return results

    def _atoms(self, count: int, candidates: Candidates) -> AtomsBySpecies:
        """Atoms in groups, kept while their species, and with them the tables, are the same; those beyond the
        structures' are like the first."""
        key = count, candidates.where
        grouped = self._grouped.get(key)
        if grouped is None:
            rest = self._species[:1].expand(count - self._species.shape[0])
            species = bring(torch.cat([self._species, rest]), candidates.where)
            grouped = self._grouped[key] = group_atoms(species, self._num_species, candidates.present)
        return grouped

    def _program(
        self,
        number: int,
        model: FrozenMACE,
        candidates: Candidates,
        structures: Structures,
        forces: bool,
        stress: bool,
    ) -> StaticProgram:
        """A program with room enough: the smallest that there is, or a new one."""
        # While list and programs are the same, so is the choice.
        chosen = self._chosen.get((number, forces, stress))
        if chosen is not None and chosen[:2] == (self.rebuilds, self.captures):
            self._programs.move_to_end(chosen[2])
            return self._programs[chosen[2]]
        sizes = (len(structures.species), candidates.count, len(structures.cells))
        mine = [key for key in self._programs if key[0] == number and key[2:] == (forces, stress)]
        fitting = [key for key in mine if key[1].holds(*sizes) and not _wasteful(key[1], *sizes)]
        if fitting:
            key = min(fitting, key=lambda key: (key[1].edges, key[1].atoms))
        else:
            known = [key[1] for key in self._programs if key[0] == number]
            bucket = _coarse_bucket(*sizes) if self._varied else _bucket(*sizes, known)
            key = (number, bucket, forces, stress)
            while len(self._programs) >= self._keep * len(self.models):
                self._programs.popitem(last=False)
            pool = next((p.pool for p in self._programs.values() if p.captured), None)
            self._programs[key] = StaticProgram(
                model, bucket, forces=forces, stress=stress, capture=self._capture, pool=pool
            )
            self.captures += 1
            logger.info("program for %d atoms, %d candidate edges: %s", sizes[0], sizes[1], bucket)
        self._programs.move_to_end(key)
        self._chosen[number, forces, stress] = (self.rebuilds, self.captures, key)
        return self._programs[key]


def _make(models: Sequence[FrozenMACE], options: dict[str, Any]) -> Stepper:
    return Stepper(models, **options)


def _evaluate_exact(
    model: FrozenMACE, data: dict[str, Tensor], edges: SortedEdges, vectors: Tensor, want_forces: bool
) -> tuple[dict[str, Tensor | None], Tensor | None]:
    with torch.set_grad_enabled(want_forces):
        return model.evaluate(data, edges, vectors, want_forces=want_forces)


def _bucket(atoms: int, edges: int, graphs: int, known: list[Bucket]) -> Bucket:
    """Sizes for a new program: no room for more atoms until their number has changed, as in dynamics it does not."""
    grows = any(b.graphs == graphs and 0.8 * atoms <= b.atoms < atoms for b in known)
    room = -(-max(8, atoms // 8) // 8) * 8 if grows else 0
    overflowed = any(b.atoms >= atoms and 0.8 * edges <= b.edges < edges for b in known)
    with_room = edges + edges // (6 if overflowed or grows else 16)
    return Bucket(atoms + room, max(1, -(-with_room // _EDGE_STEP)) * _EDGE_STEP, graphs)


def _coarse_bucket(atoms: int, edges: int, graphs: int) -> Bucket:
    """One of few sizes, four in a doubling: batches of about one size find the program of another."""

    def above(size: int, step: int) -> int:
        exponent = math.ceil(4 * math.log2(max(1.0, size / step)) - 1e-9)
        return max(size, math.ceil(step * 2 ** (exponent / 4)))

    return Bucket(above(atoms, 16), above(edges, _EDGE_STEP), above(graphs, 1))


def _wasteful(bucket: Bucket, atoms: int, edges: int, graphs: int) -> bool:
    """Whether most of a bucket would be padding."""
    return bucket.atoms > 2 * atoms + 16 or bucket.edges > 2 * edges + 8 * _EDGE_STEP or bucket.graphs > 2 * graphs + 4


def _volume_cells(structures: Structures, cutoff: float) -> np.ndarray:
    if structures.pbc.all():
        return structures.cells
    parts = np.split(structures.positions, structures.ptr[1:-1])
    return np.stack([volume_cell(*each, cutoff) for each in zip(parts, structures.cells, structures.pbc, strict=True)])


def _inputs_key(structures: Structures) -> tuple[object, ...]:
    """What model inputs depend on, by value."""
    features = structures.features
    return (
        structures.head,
        fingerprint(structures.species, structures.ptr),
        (*features, fingerprint(*features.values())) if features else None,
    )
