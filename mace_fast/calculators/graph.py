"""From ASE atoms to the dictionary of tensors that a MACE model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from mace_fast.errors import StructureError
from mace_fast.inference.arrays import all_finite, fingerprint
from mace_fast.inference.geometry import volume_cell
from mace_fast.inference.neighbours import NeighbourSearch
from mace_fast.inference.verlet import Structures

# Values that mace-torch gives to graph-level features that a structure does not state (mace.data.AtomicData).
FEATURE_DEFAULTS = {"total_charge": 0.0, "total_spin": 1.0, "elec_temp": 0.0}

# Where atoms.info has the features whose names mace-torch's calculator does not read (MACECalculator's info_keys).
INFO_KEYS = {"total_spin": "spin", "total_charge": "charge", "external_field": "external_field"}


@dataclass(frozen=True)
class Edges:
    """Pairs of atoms closer than a cutoff, each in both directions, grouped by receiver.

    Attributes:
        index: [2, E] int64, row 0 the sender, row 1 the receiver, as MACE's ``edge_index``.
        shifts: [E, 3] int32; the edge's vector is ``positions[receiver] - positions[sender] + shifts @
            cell``.
    """

    index: np.ndarray
    shifts: np.ndarray


def find_edges(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Edges:
    """Every pair within ``cutoff`` (A), through the boundaries that ``pbc`` says are periodic, found on the CPU.

    Any cell does; vectors of directions that are not periodic are ignored. The order of the edges depends on the
    structure alone, so results repeat bit for bit.

    Args:
        positions: [N, 3] float64, finite.
        cell: [3, 3] float64, rows are the vectors.
        pbc: [3] bool.
        cutoff: in A.
    """
    found = NeighbourSearch("cpu")(positions, cell, pbc, cutoff)
    return Edges(index=found.edge_index.numpy(), shifts=found.shifts.numpy())


@dataclass
class GraphBuilder:
    """Builds model inputs for one model on one device; keeps the tensors that depend on the species alone.

    Attributes:
        atomic_numbers: the elements that the model knows, in its own order.
        cutoff: the model's r_max in A.
        device, dtype: of the tensors that it makes.
        head: index of the model's head that is evaluated.
        feature_specs: ``embedding_specs`` of a model that takes more than atoms (charge, spin); else empty.
        info_keys, arrays_keys: feature -> name in ``atoms.info`` or ``atoms.arrays``.
    """

    atomic_numbers: Sequence[int]
    cutoff: float
    device: torch.device
    dtype: torch.dtype
    head: int
    feature_specs: Mapping[str, Mapping[str, Any]]
    info_keys: Mapping[str, str]
    arrays_keys: Mapping[str, str]
    _numbers: tuple[object, ...] | None = field(default=None, init=False, repr=False)
    _index: np.ndarray | None = field(default=None, init=False, repr=False)
    _cell: tuple[object, ...] | None = field(default=None, init=False, repr=False)

    def read(self, atoms: Atoms) -> Structures:
        """One structure as arrays, checked; they are views of the atoms where that costs least.

        Raises:
            StructureError: no atoms, an unknown element, positions or a cell that are not finite, a
                periodic direction without extent; a feature that the model takes and the structure lacks, gives under
                another name, or gives a value that :func:`check_feature` refuses.
        """
        # ASE's getters copy; a position array may be of another dtype where a user put it there.
        positions = np.asarray(atoms.positions, dtype=np.float64)
        cell, pbc = np.asarray(atoms.cell.array, dtype=np.float64), np.asarray(atoms.pbc)
        self._check_geometry(positions, cell, pbc)
        return Structures(
            positions=positions,
            cells=cell[None],
            pbc=pbc[None],
            species=self.species(atoms.numbers),
            ptr=np.array([0, len(positions)]),
            features=self._features(atoms),
            head=self.head,
        )

    def read_all(self, structures: Sequence[Atoms]) -> Structures:
        """Several structures, at least one, as one batch; checking them together takes a fraction of the time.

        Raises:
            StructureError: as :meth:`read`, with the number of the structure, from 0.
        """
        with naming("structure", len(structures), lambda number: self.read(structures[number])):
            return self._read_together(structures)

    def _read_together(self, structures: Sequence[Atoms]) -> Structures:
        ptr = np.concatenate([[0], np.cumsum([len(atoms) for atoms in structures])])
        positions = np.concatenate([atoms.positions for atoms in structures], dtype=np.float64)
        cells = np.array([atoms.cell.array for atoms in structures], dtype=np.float64)
        pbc = np.array([atoms.pbc for atoms in structures])
        check_structures(positions, cells, pbc, ptr)
        features = [self._features(atoms) for atoms in structures] if self.feature_specs else [{}]
        return Structures(
            positions=positions,
            cells=cells,
            pbc=pbc,
            species=self.species_index(np.concatenate([atoms.numbers for atoms in structures])),
            ptr=ptr,
            features={name: np.concatenate([each[name] for each in features]) for name in features[0]},
            head=self.head,
        )

    def __call__(self, atoms: Atoms) -> dict[str, torch.Tensor]:
        """The input of ``model.forward`` for one structure; see :meth:`read` for what is refused."""
        structure = self.read(atoms)
        positions, cell, pbc = structure.positions, structure.cells[0], structure.pbc[0]
        edges = find_edges(positions, cell, pbc, self.cutoff)
        model_cell = volume_cell(positions, cell, pbc, self.cutoff)

        shifts = torch.from_numpy(edges.shifts).to(self.device).to(torch.float64)
        # Only differences of positions enter, so the origin is free: near zero, float32 keeps the most
        # digits.
        centred = torch.from_numpy(positions - positions.mean(axis=0))
        cell64 = torch.from_numpy(model_cell).to(self.device)
        species = torch.from_numpy(structure.species).to(self.device)
        return {
            "node_attrs": torch.nn.functional.one_hot(species, len(self.atomic_numbers)).to(self.dtype),
            "batch": torch.zeros(len(positions), dtype=torch.int64, device=self.device),
            "ptr": torch.tensor([0, len(positions)], device=self.device),
            "head": torch.tensor([self.head], device=self.device),
            "positions": centred.to(self.device, self.dtype),
            "cell": cell64.to(self.dtype),
            "edge_index": torch.from_numpy(edges.index).to(self.device),
            "unit_shifts": shifts.to(self.dtype),
            "shifts": (shifts @ cell64).to(self.dtype),
            **{name: torch.from_numpy(value).to(self.device, self.dtype) for name, value in structure.features.items()},
        }

    def species_index(self, numbers: np.ndarray) -> np.ndarray:
        """[N] position of each atom's element in :attr:`atomic_numbers`.

        Raises:
            StructureError: names the elements that the model does not know, and those that it does.
        """
        lookup = np.full(max(*self.atomic_numbers, int(numbers.max(initial=0))) + 1, -1)
        lookup[list(self.atomic_numbers)] = np.arange(len(self.atomic_numbers))
        index = lookup[numbers]
        if (index < 0).any():
            unknown = ", ".join(chemical_symbols[z] for z in sorted(set(numbers[index < 0].tolist())))
            known = " ".join(chemical_symbols[z] for z in self.atomic_numbers)
            raise StructureError(f"the model does not know {unknown}; it was trained on {known}")
        return index

    def species(self, numbers: np.ndarray) -> np.ndarray:
        """:meth:`species_index`, remembered for the last numbers."""
        key = fingerprint(numbers)
        if self._index is None or self._numbers != key:
            self._index, self._numbers = self.species_index(numbers), key
        return self._index

    def _features(self, atoms: Atoms) -> dict[str, np.ndarray]:
        """float64; mace-torch's shapes: one number a graph is [1], one a node is [N, 1]."""
        features = {}
        for name, spec in self.feature_specs.items():
            per_atom = spec["per"] == "atom"
            keys, values = (self.arrays_keys, atoms.arrays) if per_atom else (self.info_keys, atoms.info)
            key = keys.get(name, name)
            place = "atoms.arrays" if per_atom else "atoms.info"
            value = values.get(key, FEATURE_DEFAULTS.get(name))
            # mace-torch's calculator overlooks what the feature's own name says, and so takes another charge.
            if key != name and name in values and not np.array_equal(values[name], value):
                found = f"is {values[key]!r}" if key in values else "is not set"
                setting = "arrays_keys" if per_atom else "info_keys"
                raise StructureError(
                    f"{place}[{name!r}] is {values[name]!r}, but {name} is read from {place}[{key!r}], which {found}: "
                    f"rename it, or make the calculator with {setting}={{{name!r}: {name!r}}}"
                )
            if value is None:
                raise StructureError(f"the model takes {name!r}, which the structure lacks; set {place}[{key!r}]")
            where = f"{place}[{key!r}]" if key in values else f"the default, as {place}[{key!r}] is not set"
            features[name] = check_feature(name, spec, value, len(atoms) if per_atom else 1, where)
        return features

    def _check_geometry(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> None:
        check_positions(positions)
        key = fingerprint(cell, pbc)
        if self._cell != key:
            check_cells(cell[None], pbc[None])
            self._cell = key


def take(structures: Structures, chosen: np.ndarray) -> Structures:
    """Some structures of a batch, by their numbers, in this order."""
    begin, sizes = structures.ptr[chosen], np.diff(structures.ptr)[chosen]
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    atoms = np.repeat(begin - ptr[:-1], sizes) + np.arange(ptr[-1])
    # Features of atoms have as many rows as there are atoms; where structures are as many, each is an atom.
    rows = {len(structures.cells): chosen, len(structures.species): atoms}
    return Structures(
        positions=structures.positions[atoms],
        cells=structures.cells[chosen],
        pbc=structures.pbc[chosen],
        species=structures.species[atoms],
        ptr=ptr,
        features={name: values[rows[len(values)]] for name, values in structures.features.items()},
        head=structures.head,
    )


@contextmanager
def naming(kind: str, count: int, check: Callable[[int], object]) -> Iterator[None]:
    """Around a check of several structures at once: its error is raised with the number of the first that fails
    ``check`` by itself."""
    try:
        yield
    except StructureError:
        for number in range(count):
            try:
                check(number)
            except StructureError as exc:
                raise StructureError(f"{kind} {number}: {exc}") from exc
        raise


def check_feature(name: str, spec: Mapping[str, Any], value: Any, count: int, where: str) -> np.ndarray:
    """A further input of the model as float64, in mace-torch's shapes: [G] for graphs, [N, columns] for atoms.

    Args:
        name: of the feature.
        spec: its entry in the model's ``embedding_specs``. Of a categorical feature the model knows the integers from
            ``-offset`` to ``num_classes - 1 - offset`` (mace.modules.embeddings, which rounds others towards zero after
            the offset is added, and reads past the end of its table).
        value: numbers, one for a graph, one or more for an atom.
        count: of graphs or atoms.
        where: the value was found, for the message.

    Raises:
        StructureError: no numbers or not as many, not finite, not an integer or out of range where it is categorical.
    """
    per_atom = spec["per"] == "atom"
    try:
        array = np.asarray(value, dtype=np.float64)
        array = array.reshape(count, -1) if per_atom else array.reshape(count)
    except (TypeError, ValueError) as exc:
        wanted = "numbers for each atom" if per_atom else "one number"
        raise StructureError(f"{name} ({where}) is {value!r}; the model takes {wanted}") from exc
    bad = ~np.isfinite(array)
    takes = "finite numbers"
    if spec.get("type") == "categorical":
        offset = spec.get("offset", 0)
        smallest, largest = -offset, spec["num_classes"] - 1 - offset
        takes = f"integers from {smallest} to {largest}"
        with np.errstate(invalid="ignore"):
            bad |= (array != np.rint(array)) | (array < smallest) | (array > largest)
    if bad.any():
        row = int(np.argwhere(bad)[0, 0])
        of_which = f" of atom {row}" if per_atom else ""
        raise StructureError(f"{name}{of_which} ({where}) is {array[bad][0]:g}; the model takes {takes}")
    return array


def check_structures(positions: np.ndarray, cells: np.ndarray, pbc: np.ndarray, ptr: np.ndarray) -> None:
    """Refuse a batch with a structure that :func:`check_positions` or :func:`check_cells` refuses."""
    if not np.diff(ptr).all():
        raise StructureError("a structure has no atoms")
    check_positions(positions)
    check_cells(cells, pbc)


def check_positions(positions: np.ndarray) -> None:
    """Refuse a structure without atoms, or with positions that are not finite."""
    if len(positions) == 0:
        raise StructureError("the structure has no atoms")
    if not all_finite(positions):
        atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
        raise StructureError(f"the position of atom {atom} is not a finite number: {positions[atom]}")


def check_cells(cells: np.ndarray, pbc: np.ndarray) -> None:
    """Refuse cells [G, 3, 3] that are not finite, or without extent along their periodic directions [G, 3]."""
    finite = np.isfinite(cells).all(axis=(1, 2))
    if not finite.all():
        raise StructureError(f"the cell is not finite: {cells[np.argmin(finite)].tolist()}")
    # The extent that the periodic vectors span: length, area or volume against that of a right-angled cell. In their
    # Gram matrix the other vectors stand as perpendicular ones of length 1.
    periodic = np.where(pbc[:, :, None], cells, 0.0)
    gram = periodic @ periodic.swapaxes(1, 2) + np.where(pbc, 0.0, 1.0)[:, :, None] * np.identity(3)
    lengths = np.where(pbc, np.linalg.norm(periodic, axis=2), 1.0)
    extent = np.sqrt(np.maximum(np.linalg.det(gram), 0.0))
    flat = (lengths.min(axis=1) == 0) | (extent < 1e-6 * np.prod(lengths, axis=1))
    if flat.any():
        number = int(np.argmax(flat))
        raise StructureError(
            f"pbc={pbc[number].tolist()} with the cell {cells[number].tolist()}: the periodic vectors span nothing; "
            "set a cell or pbc=False"
        )
