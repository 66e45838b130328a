"""The least time that each operation of a program could take: its bytes at the speed of a copy, its arithmetic at the
peak of the units. Every operand is read once and every result written once; what an implementation writes in between
does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.description.linear import parse_linear
from mace_fast.kernels.description.polynomial import WeightedPolynomial
from mace_fast.kernels.plan.coupling import of_path
from mace_fast.kernels.plan.symmetric import plan_symmetric


@dataclass(frozen=True)
class Operation:
    """One operation: its name, the shape of its first result, the bytes that must move, the operations it needs."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    arithmetic: int

    def floor_s(self, bandwidth: float, peak: float | None) -> float:
        """Seconds; ``bandwidth`` in bytes/s, ``peak`` in operations/s or None where it is not known."""
        return max(self.bytes / bandwidth, self.arithmetic / peak if peak else 0.0)


class Recorder(TorchDispatchMode):
    """Lists the operations of what runs inside, each run under ``around(number, name)``."""

    def __init__(self, around: Callable[[int, str], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._around = around

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and record one."""
        with self._around(len(self.operations), str(func)):
            result = func(*args, **(kwargs or {}))
        self.operations.append(_operation(str(func), args, result))
        return result


def _operation(name: str, args: Sequence[Any], result: Any) -> Operation:
    operands = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in _tensors(args)}
    results = list(_tensors(result))
    moved = sum(operands.values()) + sum(t.numel() * t.element_size() for t in results)
    short = name.removesuffix(".default")
    if "spline_conv" in name:
        rows = args[11] if "backward" in name or "parts" in name else args[10]
        edges = args[2].shape[0] * rows.shape[1] * rows.shape[2]
        moved -= max(0, rows.numel() - edges) * rows.element_size()
    return Operation(short, tuple(results[0].shape) if results else (), moved, _arithmetic(short, args))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _arithmetic(name: str, args: Sequence[Any]) -> int:
    """Additions and multiplications that the operation needs; 0 where they do not matter."""
    key = next((each for each in args if isinstance(each, str)), "")
    if name in ("mace_fast.spline_conv", "mace_fast.spline_conv_edge_parts", "mace_fast.spline_conv_backward"):
        backward = name != "mace_fast.spline_conv"
        order = args[11 if backward else 10].shape[1]
        return args[2].shape[0] * conv_operations(ChannelwiseTensorProduct.parse(key), order, backward, args[-1])
    if name in ("mace_fast.linear", "mace_fast.linear_add", "mace_fast.indexed_linear", "mace_fast.indexed_linear_add"):
        d = parse_linear(key)
        pairs = sum(d.x[p.x][0] * d.z[p.z][0] * (2 * d.x[p.x][1] + 1) for p in d.paths)
        return 2 * args[0].shape[0] * pairs
    if name in ("mace_fast.symmetric_value", "mace_fast.symmetric_gradient"):
        plan = plan_symmetric(WeightedPolynomial.from_key(key))
        count = plan.evaluate_operations if name == "mace_fast.symmetric_value" else plan.gradient_operations
        return 2 * args[0].shape[0] * args[0].shape[2] * count
    return 0


def conv_operations(d: ChannelwiseTensorProduct, order: int, backward: bool, want_x: object) -> int:
    """Of one edge: weights from their polynomials, then the couplings of every path and channel.

    Backward: the couplings once transposed (for the gradients of x and of the weights), and once as the products of x
    and the cotangent that the gradient of y is a sum of.
    """
    total = 0
    for path in d.flat_paths():
        dx, dz, uses = 2 * path.l1 + 1, 2 * path.l3 + 1, len(of_path(path).uses)
        if backward:
            fused = 2 * order + uses + dx * dz + 2 * dx + (dx if want_x is True else 0)
        else:
            fused = order + dx + uses
        total += 2 * fused * path.mul
    return total
