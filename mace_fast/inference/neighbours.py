"""Neighbour search: pairs of atoms within a cutoff, on the CPU or on the GPU, behind one call.

Which library does it is a choice of :class:`NeighbourSearch`; its attribute ``method`` says which one is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import NamedTuple

import numpy as np
import torch
import vesin
from ase.geometry import complete_cell
from torch import Tensor

from mace_fast.errors import MissingToolError
from mace_fast.inference.arrays import fingerprint
from mace_fast.inference.verlet import Structures
from mace_fast.kernels.source.edge_lists import IMAGE_BITS

logger = logging.getLogger(__name__)

CPU_METHODS = ("vesin",)
CUDA_METHODS = ("vesin-cuda", "nvalchemi", "vesin-upload")


class Neighbours(NamedTuple):
    """Pairs of atoms, each in both directions, on one device.

    Those of one receiver are in an order that does not change from one search to the next; receivers are in none.

    Attributes:
        edge_index: [2, E] int64, row 0 the sender, row 1 the receiver, as MACE's ``edge_index``.
        shifts: [E, 3] int32; the vector of an edge is ``positions[receiver] - positions[sender] + shifts @ cell``.
    """

    edge_index: Tensor
    shifts: Tensor


class Pairs(NamedTuple):
    """Pairs of atoms, each once, on the host; their order does not change from one search to the next.

    Attributes:
        atoms: [P, 2] int64, first and second.
        images: [P, 3] int32; the vector of a pair is ``positions[second] - positions[first] + images @ cell``.
    """

    atoms: np.ndarray
    images: np.ndarray


class NeighbourSearch:
    """Every pair within a cutoff, through the boundaries that are periodic.

    Any cell does: triclinic, left-handed, thinner than the cutoff, atoms outside it. Directions that are not periodic
    are ignored, whatever vector they have.

    Methods:

    - ``"vesin"``: on the CPU, the only one there. It was chosen over matscipy, which mace-torch uses: diamond at 6 A on
      2 cores, 64 / 1000 / 21952 atoms take 1.1 / 21 / 410 ms against 2.6 / 75 / 750 ms.
    - ``"vesin-cuda"``: vesin's CUDA search. Nothing else to install; compiled at first use, in float64. Releases before
      0.6 missed pairs in triclinic and partly periodic cells, so the first list of each kind of cell is compared with
      the CPU's.
    - ``"nvalchemi"``: nvalchemi-toolkit-ops (``pip install nvalchemi-toolkit-ops``), which brings warp-lang, 150 MB.
      The better choice beyond some thousand atoms: diamond at 6 A on an H100, 64 / 1000 / 21952 atoms take
      3.2 / 4.4 / 6.6 ms against vesin's 1.8 / 2.4 / 23 ms.
    - ``"vesin-upload"``: the CPU's list, copied to the GPU.

    A search on a GPU takes at least 1.8 ms, most of which it waits. Small structures are faster on the CPU: a molecule
    of 21 atoms takes 0.02 ms, 64 of them in one search 0.25, 64 atoms of diamond at 6.5 A 0.47, 216 of them 4.6. So
    where no method is asked for, and in batches, structures that :meth:`small` names are searched there.

    Args:
        device: where the pairs are wanted.
        method: one of these; None takes the first of them that works on this device, and logs it.

    Attributes:
        method: the one in use. With None on a GPU it is decided at the first search there.

    Raises:
        ValueError: a method that the device does not have.
        MissingToolError: a package that the method needs is not installed.
    """

    def __init__(self, device: torch.device | str, method: str | None = None) -> None:
        self.device = torch.device(device)
        methods = CPU_METHODS if self.device.type == "cpu" else CUDA_METHODS
        if method is not None and method not in methods:
            raise ValueError(f"method={method!r}: neighbours on {self.device} are found by one of {', '.join(methods)}")
        if method == "nvalchemi" and not _has_nvalchemi():
            raise MissingToolError(
                "nvalchemi-toolkit-ops is not installed: pip install nvalchemi-toolkit-ops, or use method='vesin-cuda'"
            )
        self.method = CPU_METHODS[0] if self.device.type == "cpu" else method
        self._asked_for = method
        self._search: dict[str, tuple[float, vesin.NeighborList]] = {}
        self._crowded: set[int] = set()
        self._judged: tuple[tuple[object, ...], bool] | None = None
        self._compared: set[tuple[object, ...]] = set()
        self._cell_compared: tuple[object, ...] | None = None

    def __reduce__(self) -> tuple[type[NeighbourSearch], tuple[torch.device, str | None]]:
        return NeighbourSearch, (self.device, self._asked_for)

    def __call__(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        """The pairs of one structure.

        Args:
            positions: [N, 3] float64, finite.
            cell: [3, 3] float64, rows are the vectors.
            pbc: [3] bool.
            cutoff: in A.
        """
        if self.method is None:
            return self._first(positions, cell, pbc, cutoff)
        return self._find(self.method, positions, cell, pbc, cutoff)

    def small(self, structures: Structures, cutoff: float) -> bool:
        """Whether :meth:`pairs` takes less time than a search on a GPU, and is not against what was asked for."""
        if self.device.type == "cuda" and self._asked_for is not None and len(structures.cells) == 1:
            return False
        key = (cutoff, *fingerprint(structures.cells, structures.pbc, structures.ptr))
        if self._judged is None or self._judged[0] != key:
            self._judged = key, bool((_candidates(structures, cutoff) <= _FEW).all())
        return self._judged[1]

    def pairs(self, structures: Structures, cutoff: float) -> Pairs:
        """The pairs of small structures, each once, found on the CPU; atoms counted through.

        Structures that are not periodic are searched all at once, a search being mostly what it takes to begin one.
        """
        apart: np.ndarray = np.logical_not(structures.pbc.any(axis=1))
        if len(apart) == 1:
            return self._vesin_pairs(structures.positions, structures.cells[0], structures.pbc[0], cutoff)
        found = []
        if apart.any():
            atoms, positions = _in_a_row(structures, apart, cutoff)
            near = self._vesin_pairs(positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), cutoff)
            found.append(near if apart.all() else near._replace(atoms=atoms[near.atoms]))
        for number in np.flatnonzero(~apart).tolist():
            first, end = structures.ptr[number : number + 2].tolist()
            near = self._vesin_pairs(
                structures.positions[first:end], structures.cells[number], structures.pbc[number], cutoff
            )
            found.append(near._replace(atoms=near.atoms + first))
        return found[0] if len(found) == 1 else Pairs(*(np.concatenate([each[k] for each in found]) for k in (0, 1)))

    def batch(self, structures: Structures, cutoff: float) -> Neighbours:
        """The pairs of several structures, atoms counted through; small ones are searched as by :meth:`pairs`."""
        if len(structures.cells) == 1:
            return self(structures.positions, structures.cells[0], structures.pbc[0], cutoff)
        small = _candidates(structures, cutoff) <= _FEW
        apart = small & ~structures.pbc.any(axis=1)
        found = []
        for number in np.flatnonzero(~apart).tolist():
            first, end = structures.ptr[number : number + 2].tolist()
            one = (structures.positions[first:end], structures.cells[number], structures.pbc[number], cutoff)
            near = self._find_on_host(*one) if small[number] else self(*one)
            found.append(near._replace(edge_index=near.edge_index + first))
        if apart.any():
            atoms, positions = _in_a_row(structures, apart, cutoff)
            near = self._find_on_host(positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), cutoff)
            found.append(near._replace(edge_index=torch.from_numpy(atoms)[near.edge_index]))
        index, shifts = (torch.cat([each[k].to(self.device) for each in found], dim=1 - k) for k in (0, 1))
        return Neighbours(index, shifts)

    def _find_on_host(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        return self._vesin_cpu(positions, _periodic_box(cell, pbc), pbc, cutoff)

    def _first(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        """Decide on a method for this GPU by trying: vesin finds out at the first search whether it can compile."""
        try:
            found = self._find("vesin-cuda", positions, cell, pbc, cutoff)
            self.method = "vesin-cuda"
        except RuntimeError as error:
            self.method = "nvalchemi" if _has_nvalchemi() else "vesin-upload"
            logger.warning(
                "vesin cannot search on %s (%s); neighbour lists are made by %s%s",
                self.device,
                str(error).splitlines()[0][:200],
                self.method,
                "" if self.method == "nvalchemi" else ", on the CPU (or pip install nvalchemi-toolkit-ops)",
            )
            found = self._find(self.method, positions, cell, pbc, cutoff)
        logger.info("neighbours on %s are found by %s", self.device, self.method)
        return found

    def _find(self, method: str, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        if len(positions) == 0:
            return Neighbours(
                torch.zeros((2, 0), dtype=torch.int64, device=self.device),
                torch.zeros((0, 3), dtype=torch.int32, device=self.device),
            )
        box = _periodic_box(cell, pbc)
        if method == "nvalchemi":
            return _in_order(_nvalchemi(positions, box, pbc, cutoff, self.device))
        if method == "vesin-cuda":
            return _in_order(self._vesin_cuda(positions, box, pbc, cutoff))
        return self._uploaded(positions, box, pbc, cutoff)

    def _vesin(self, cutoff: float, where: str, *, full: bool = True) -> vesin.NeighborList:
        """Its object, which keeps its memory, for one cutoff and use."""
        if where not in self._search or self._search[where][0] != cutoff:
            self._search[where] = (cutoff, vesin.NeighborList(cutoff=cutoff, full_list=full, sorted=full))
        return self._search[where][1]

    def _vesin_pairs(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> Pairs:
        # Each pair once and in no order takes half of what a sorted list of both directions does.
        search = self._vesin(cutoff, "pairs", full=False)
        atoms, images = search.compute(
            points=positions, box=_periodic_box(cell, pbc), periodic=pbc, quantities="PS", copy=True
        )
        return Pairs(atoms.view(np.int64), images)

    def _vesin_cpu(self, positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        receiver, sender, shifts = self._vesin(cutoff, "cpu").compute(
            points=positions, box=box, periodic=pbc, quantities="ijS"
        )
        # vesin sorts by its first index, our receiver, and gives r_second - r_first + S @ cell, so S turns round.
        index = torch.from_numpy(np.stack([sender, receiver]).view(np.int64))
        return Neighbours(index, torch.from_numpy(np.negative(shifts)))

    def _uploaded(self, positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        return Neighbours(*(t.to(self.device) for t in self._vesin_cpu(positions, box, pbc, cutoff)))

    def _vesin_cuda(self, positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        if len(positions) in self._crowded:
            return self._uploaded(positions, box, pbc, cutoff)
        with torch.cuda.device(self.device):
            points, on_device, periodic = upload(self.device, positions, box, pbc.astype(np.float64))
            # vesin works on the default stream whatever torch's current one is.
            current, default = torch.cuda.current_stream(self.device), torch.cuda.default_stream(self.device)
            if current != default:
                current.synchronize()
            try:
                pairs, shifts = self._vesin(cutoff, "cuda").compute(
                    points=points, box=on_device, periodic=periodic != 0, quantities="PS", copy=False
                )
            except RuntimeError as error:
                if "maximum capacity" not in str(error):
                    raise
                return self._crowd(positions, box, pbc, cutoff)
            if current != default:
                default.synchronize()
            pairs = pairs.view(torch.int64)
            found = Neighbours(torch.stack([pairs[:, 1], pairs[:, 0]]), -shifts)
        cell = (cutoff, *fingerprint(box, pbc))
        if cell != self._cell_compared:
            self._compare(found, positions, box, pbc, cutoff)
            self._cell_compared = cell
        return found

    def _crowd(self, positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float) -> Neighbours:
        """vesin reserves memory for a number of pairs an atom; cells much thinner than the cutoff have more."""
        logger.warning(
            "%d atoms have more neighbours within %g A than vesin has room for on %s; the lists of structures of this "
            "size are made on the CPU from now on",
            *(len(positions), cutoff, self.device),
        )
        del self._search["cuda"]
        self._crowded.add(len(positions))
        return self._uploaded(positions, box, pbc, cutoff)

    def _compare(
        self, found: Neighbours, positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float
    ) -> None:
        """Compare the first list of each kind of cell with the CPU's."""
        kind = _kind(box, pbc, cutoff)
        if kind not in self._compared:
            expected = self._vesin_cpu(positions, box, pbc, cutoff)
            degrees, right = (_degrees(each, positions, box, cutoff) for each in (found, expected))
            if not np.array_equal(degrees, right):
                raise RuntimeError(
                    "vesin's list on the GPU is not that on the CPU: pip install -U vesin, or have it made by another "
                    "method: neighbours='vesin-upload' or 'nvalchemi'"
                )
            self._compared.add(kind)


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Float64 arrays on a device, by one copy that is not waited for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        # From pinned memory, which torch keeps until the copy is done.
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _in_order(found: Neighbours) -> Neighbours:
    """The pairs by sender and image: those of one receiver are then always in the same order.

    A search on a GPU lists them in the order in which its threads came to them; what is computed from the list is then
    not the same to the last bit, least of all where an atom sees images of one atom at the same distance on both sides.
    """
    image = found.shifts.to(torch.int64) & _IMAGE_MASK
    key = (found.edge_index[0] << 3 * IMAGE_BITS) | (image[:, 0] << 2 * IMAGE_BITS)
    order = torch.argsort(key | (image[:, 1] << IMAGE_BITS) | image[:, 2])
    return Neighbours(found.edge_index[:, order], found.shifts[order])


def _candidates(structures: Structures, cutoff: float) -> np.ndarray:
    """[G] at most how many pairs vesin looks at on the CPU, which takes about 4 ns for each.

    It sorts atoms into cells not thinner than the cutoff, where the box has room for several, and tries those around
    each, through the boundaries that are periodic. Of the others' extent nothing is assumed.
    """
    sizes, pbc = np.diff(structures.ptr), structures.pbc
    if not pbc.any():
        tried: np.ndarray = sizes * sizes
        return tried
    # Heights from the periodic vectors' Gram matrix, in which others stand as perpendicular ones.
    periodic = np.where(pbc[:, :, None], structures.cells, 0.0)
    gram = periodic @ periodic.swapaxes(1, 2) + np.where(pbc, 0.0, 1.0)[:, :, None] * np.identity(3)
    heights = 1 / np.sqrt(np.linalg.inv(gram).diagonal(axis1=1, axis2=2))
    cells = np.maximum(np.floor(heights / cutoff), 1.0)
    around = np.where(pbc, (2 * np.ceil(cutoff * cells / heights) + 1) / cells, 1.0)
    tried = sizes * sizes * around.prod(axis=1)
    return tried


def _in_a_row(structures: Structures, chosen: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and positions of the atoms of the chosen structures, none of them periodic, put in a row: further than
    the cutoff from one another, so that one search finds the pairs of all."""
    atoms = np.flatnonzero(chosen[structures.batch])
    sizes = np.diff(structures.ptr)[chosen]
    positions = structures.positions[atoms]
    begin = np.cumsum(sizes) - sizes
    low, high = (least.reduceat(positions[:, 0], begin) for least in (np.minimum, np.maximum))
    room = high - low + 2 * cutoff
    positions[:, 0] += np.repeat(np.cumsum(room) - room - low, sizes)
    return atoms, positions


def _periodic_box(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Vectors of directions that are not periodic are replaced: they may be anything, zero too."""
    if pbc.all():
        return np.ascontiguousarray(cell)
    if not pbc.any():
        return np.identity(3)
    return np.ascontiguousarray(complete_cell(np.where(np.asarray(pbc)[:, None], cell, 0.0)))


def _kind(box: np.ndarray, pbc: np.ndarray, cutoff: float) -> tuple[object, ...]:
    """Cells that take the same way through a search: periodicity, handedness, shape, number of images."""
    heights = 1 / np.linalg.norm(np.linalg.inv(box), axis=0)
    square = bool(np.allclose(box, np.diag(np.diag(box))))
    return (*np.asarray(pbc).tolist(), bool(np.linalg.det(box) < 0), square, *np.ceil(2 * cutoff / heights).tolist())


def _degrees(found: Neighbours, positions: np.ndarray, box: np.ndarray, cutoff: float) -> np.ndarray:
    """[N] neighbours of each atom, without those that rounding may put on either side of the cutoff."""
    (sender, receiver), shifts = found.edge_index.cpu().numpy(), found.shifts.cpu().numpy()
    vectors = positions[receiver] - positions[sender] + shifts @ box
    near = np.linalg.norm(vectors, axis=1) < cutoff - 1e-6
    return np.bincount(receiver[near], minlength=len(positions))


def _has_nvalchemi() -> bool:
    return importlib.util.find_spec("nvalchemiops") is not None


def _nvalchemi(
    positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, cutoff: float, device: torch.device
) -> Neighbours:
    module = importlib.import_module("nvalchemiops.torch.neighbors")  # optional, and slow to import

    points, cell, periodic = (
        torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in (positions, box[None], pbc[None])
    )
    room = _NVALCHEMI_ROOM
    while True:
        # The matrix form says how many neighbours each atom has, whether or not they fitted. Its list form drops the
        # surplus silently in some releases.
        matrix, counts, shifts, *_ = module.neighbor_list(
            points, cutoff, cell=cell, pbc=periodic, max_neighbors=room, fill_value=len(positions)
        )
        most = int(counts.max())
        if most <= room:
            break
        room = -(-most // _NVALCHEMI_ROOM) * _NVALCHEMI_ROOM
    receiver, slot = (torch.arange(matrix.shape[1], device=device)[None] < counts[:, None]).nonzero(as_tuple=True)
    index = torch.stack([matrix[receiver, slot].to(torch.int64), receiver])
    return Neighbours(index, -shifts[receiver, slot].to(torch.int32))


_FEW = 200_000
"""Candidates up to which the CPU finds a structure's pairs: in about 0.8 ms."""

_IMAGE_MASK = (1 << IMAGE_BITS) - 1
"""The bits in which images of one atom differ; 2^21 atoms have room beside three of them."""

_NVALCHEMI_ROOM = 256
"""Neighbours of an atom that its matrix has room for at first; more of them take a second search."""
