"""A frozen model replayed as a CUDA graph, called like the model itself: MACE's input, results on the device.

For graphs that somebody else builds. :class:`mace_fast.inference.Stepper` goes from positions, and keeps the lists.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from mace_fast.inference.frozen import FrozenMACE
from mace_fast.inference.program import Bucket, StaticProgram, feature_specs

_INPUTS = ("node_attrs", "batch", "ptr", "head")
_ROOM = 4096
"""Edge lists are padded to a multiple of this, with an eighth of room for lists that grow."""


class CapturedMACE:
    """Callable like a :class:`FrozenMACE` on CUDA, with results equal to its, replayed from a graph.

    A graph is captured for the first structure of a kind and replayed while the number of atoms and structures stays
    and the edges fit; otherwise another is captured. Results are copies: they stay valid after the next call.

    Args:
        model: the frozen model, on a CUDA device.
        keep: how many graphs are kept; the one that was not used for longest is dropped.
        capture: False runs the same program without a graph, on any device.

    Raises:
        MissingToolError: the model is not on a CUDA device.
    """

    def __init__(self, model: FrozenMACE, *, keep: int = 4, capture: bool = True) -> None:
        self.model = model
        self._keep = keep
        self._capture = capture
        self._programs: OrderedDict[tuple[object, ...], StaticProgram] = OrderedDict()
        if capture:
            # Refused now where it cannot work.
            StaticProgram(model, Bucket(1, 1, 1), forces=False, stress=False, capture=True)

    def __call__(
        self, data: dict[str, Tensor], *, compute_force: bool = True, compute_stress: bool = False
    ) -> dict[str, Tensor]:
        """Energy, node_energy, and forces, virials, stress where asked for; as MACE.forward."""
        edges = self.model.sorted_edges(data)
        atoms, count, graphs = data["positions"].shape[0], edges.sender.shape[0], data["ptr"].shape[0] - 1
        kind = (atoms, graphs, compute_force, compute_stress)
        program = self._programs.get(kind)
        if program is None or not program.bucket.holds(atoms, count, graphs):
            self._programs.pop(kind, None)
            bucket = Bucket(atoms, -(-(count + count // 8) // _ROOM) * _ROOM, graphs)
            program = StaticProgram(
                self.model, bucket, forces=compute_force, stress=compute_stress, capture=self._capture, pool=self._pool
            )
            self._programs[kind] = program
            while len(self._programs) > self._keep:
                self._programs.popitem(last=False)
        self._programs.move_to_end(kind)
        version = (edges, *(data[name] for name in _INPUTS if name in data))
        if program.version is None or not _same(program.version, version):
            program.load(edges, data, version)
        elif feature_specs(self.model):
            program.set_features(data)
        shifts = (data["shifts"], edges.permutation)
        if program.shifts_from.get(shifts) is None:
            program.set_shifts(data["shifts"][edges.permutation])
            program.shifts_from.put(shifts, True)
        return program.step_on_device(data["positions"], data["cell"])

    @property
    def _pool(self) -> object:
        """One pool of memory serves all graphs: they never run at the same time."""
        return next((program.pool for program in self._programs.values() if program.captured), None)


def _same(old: tuple[object, ...], new: tuple[object, ...]) -> bool:
    """The very same objects."""
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))
