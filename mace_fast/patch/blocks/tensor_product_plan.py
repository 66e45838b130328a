"""Reading a tensor product of e3nn: its paths sorted by what serves them, and where each finds operands and weights.

A kernel has paths of one kind. What e3nn lets stand side by side in one product is served as a sum:

    uvu   channelwise_tp
    uvv   channelwise_tp with x and y exchanged: C[l1, l2, l3][i, j, k] = (-1)^(l1 + l2 + l3) C[l2, l1, l3][j, i, k]
    uuu   elementwise_tp, once for each multiplicity
    uvw   fully_connected_tp
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mace_fast.errors import UnsupportedModuleError
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct, Path, Segment
from mace_fast.kernels.description.elementwise import ElementwiseTensorProduct
from mace_fast.kernels.description.fully_connected import FullyConnectedTensorProduct
from mace_fast.patch.understand import (
    TENSOR_PRODUCTS,
    described,
    kept_blocks,
    require_known_couplings,
    require_name,
)

Description = ChannelwiseTensorProduct | FullyConnectedTensorProduct | ElementwiseTensorProduct

_KINDS: dict[str, Callable[..., Description]] = {
    "uvu": ChannelwiseTensorProduct,
    "uvv": ChannelwiseTensorProduct,
    "uuu": ElementwiseTensorProduct,
    "uvw": FullyConnectedTensorProduct,
}
_PAIRS = {
    "uvuv": "gives a copy for each pair of copies",
    "uvu<v": "works on pairs of copies of one operand",
    "u<vw": "works on pairs of copies of one operand",
    "uuw": "mixes what equal copies give",
}
"""Why other modes have no kernel."""


@dataclass(frozen=True)
class WeightSlice:
    """Numbers [rows, columns] of e3nn's flat weights, from ``first`` on, which the kernel takes as [columns, rows]."""

    first: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def last(self) -> int:
        return self.first + self.size

    @property
    def in_order(self) -> bool:
        """Whether the kernel takes them as they lie."""
        return 1 in (self.rows, self.columns)


@dataclass(frozen=True)
class Part:
    """The paths of one kernel.

    Attributes:
        description: of its operands and result, which have only the blocks that its paths name.
        exchanged: its first operand is the module's second.
        x, y, z: which of the module's blocks the description's are; x and y as the module has them.
        weights: where the weights of its paths are, in the order of the paths.
    """

    description: Description
    exchanged: bool
    x: tuple[int, ...]
    y: tuple[int, ...]
    z: tuple[int, ...]
    weights: tuple[WeightSlice, ...]


@dataclass(frozen=True)
class TensorProductPlan:
    """Blocks of the module's operands and result, and the parts whose results add up to the product."""

    x: tuple[Segment, ...]
    y: tuple[Segment, ...]
    z: tuple[Segment, ...]
    parts: tuple[Part, ...]
    weight_numel: int

    def __post_init__(self) -> None:
        # Known from the start: torch.compile cannot trace the lock with which Python up to 3.11 caches a property.
        _ = self.x_dim, self.y_dim, self.z_dim

    @cached_property
    def x_dim(self) -> int:
        return _dim(self.x)

    @cached_property
    def y_dim(self) -> int:
        return _dim(self.y)

    @cached_property
    def z_dim(self) -> int:
        return _dim(self.z)


def _dim(blocks: tuple[Segment, ...]) -> int:
    return sum(mul * (2 * degree + 1) for mul, degree in blocks)


def read_tensor_product(name: str, module: Any) -> TensorProductPlan:
    """What an ``o3.TensorProduct``, or a subclass that only chooses its paths, computes with weights from anywhere.

    Raises:
        UnsupportedModuleError: another class; a path that no kernel serves; coupling constants in another convention
            than e3nn 0.4's; a fully connected product with one set of weights, which e3nn does faster.
    """
    require_name(name, module, *TENSOR_PRODUCTS)
    modes = sorted({ins.connection_mode for ins in module.instructions} - set(_KINDS))
    if modes:
        why = "; ".join(f"{mode} {_PAIRS[mode]}" for mode in modes)
        raise UnsupportedModuleError(f"its {name} has paths of mode {', '.join(modes)} ({why}), which have no kernel")
    if module.shared_weights and {ins.connection_mode for ins in module.instructions} == {"uvw"}:
        raise UnsupportedModuleError(
            f"its {name} is fully connected with one set of weights for all samples: e3nn's matrix products are faster"
        )
    require_known_couplings(name, module)
    blocks, places = zip(*map(kept_blocks, (module.irreps_in1, module.irreps_in2, module.irreps_out)), strict=True)
    groups: dict[tuple[str, int], tuple[list[Path], list[WeightSlice]]] = {}
    first = 0
    for number, ins in enumerate(module.instructions):
        if 0 in ins.path_shape:
            continue
        operands = (ins.i_in1, ins.i_in2, ins.i_out)
        if any(index not in found for index, found in zip(operands, places, strict=True)):
            raise UnsupportedModuleError(
                f"path {number} of its {name} has copies of its operands but none of its result, for which e3nn 0.4 "
                "adds the results of later paths to other blocks"
            )
        x, y, z = (found[index] for index, found in zip(operands, places, strict=True))
        group = (ins.connection_mode, blocks[0][x][0] if ins.connection_mode == "uuu" else 0)
        paths, weights = groups.setdefault(group, ([], []))
        paths.append(Path(x, y, z, float(ins.path_weight), bool(ins.has_weight)))
        if ins.has_weight:
            rows, columns = ins.path_shape if ins.connection_mode == "uvv" else (1, math.prod(ins.path_shape))
            weights.append(WeightSlice(first, rows, columns))
            first += rows * columns
    if not groups:
        raise UnsupportedModuleError(f"its {name} has no path, so there is nothing to compute")
    if first != module.weight_numel:
        raise UnsupportedModuleError(
            f"its {name} has {module.weight_numel} weights, but its instructions imply {first}"
        )
    parts = tuple(_part(name, mode, paths, weights, blocks) for (mode, _), (paths, weights) in groups.items())
    return TensorProductPlan(blocks[0], blocks[1], blocks[2], parts, first)


def _part(
    name: str,
    mode: str,
    paths: list[Path],
    weights: list[WeightSlice],
    blocks: tuple[tuple[Segment, ...], ...],
) -> Part:
    x, y, z = (tuple(sorted({getattr(path, operand) for path in paths})) for operand in "xyz")
    renamed = [replace(path, x=x.index(path.x), y=y.index(path.y), z=z.index(path.z)) for path in paths]
    operands = [tuple(segments[index] for index in used) for segments, used in zip(blocks, (x, y, z), strict=True)]
    exchanged = mode == "uvv"
    if exchanged:
        renamed = [
            replace(path, x=path.y, y=path.x, coefficient=path.coefficient * _sign_of_exchange(path, operands))
            for path in renamed
        ]
        operands[:2] = operands[1], operands[0]
    description = described(name, _KINDS[mode], *operands, tuple(renamed))
    return Part(description, exchanged, x, y, z, _joined(weights))


def _sign_of_exchange(path: Path, operands: Sequence[tuple[Segment, ...]]) -> int:
    degrees = operands[0][path.x][1] + operands[1][path.y][1] + operands[2][path.z][1]
    return -1 if degrees % 2 else 1


def _joined(weights: list[WeightSlice]) -> tuple[WeightSlice, ...]:
    """The same with neighbours in one slice where they lie as the kernel takes them."""
    joined: list[WeightSlice] = []
    for piece in weights:
        if joined and joined[-1].last == piece.first and joined[-1].in_order and piece.in_order:
            joined[-1] = WeightSlice(joined[-1].first, 1, joined[-1].size + piece.size)
        else:
            joined.append(piece)
    return tuple(joined)
