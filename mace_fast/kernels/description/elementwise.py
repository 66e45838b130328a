"""The elementwise ('uuu') tensor product: z[u] = sum over paths of w[u] * (x[u] (x) y[u]), coupled.

A description is data: frozen, hashable, printable, free of torch. It says what is computed, not how.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mace_fast.errors import UnsupportedDescriptionError
from mace_fast.kernels.cg import clebsch_gordan
from mace_fast.kernels.description.channelwise import MAX_DEGREE, Path, Segment
from mace_fast.kernels.description.polynomial import Term, WeightedPolynomial


@dataclass(frozen=True)
class ElementwiseTensorProduct:
    """Operands and paths of an elementwise tensor product, in ``ir_mul`` layout; all blocks have one multiplicity.

    Copy u of x meets copy u of y alone. A path with weights has one for each copy, one path after the other.
    ``Path.coefficient`` multiplies the Clebsch-Gordan block with unit sum of squares, as e3nn's
    ``Instruction.path_weight`` does. Parity does not enter the arithmetic.

    Attributes:
        x, y, z: blocks of the operands and of the result.
        paths: the couplings; several may share an output block, whose contributions add up.

    Raises:
        UnsupportedDescriptionError: multiplicities differ, a path breaks a selection rule or names no block; l > 6.
    """

    x: tuple[Segment, ...]
    y: tuple[Segment, ...]
    z: tuple[Segment, ...]
    paths: tuple[Path, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise UnsupportedDescriptionError("an elementwise tensor product needs at least one path")
        muls = sorted({mul for mul, _ in (*self.x, *self.y, *self.z)})
        if len(muls) != 1 or muls[0] < 1:
            raise UnsupportedDescriptionError(
                f"blocks have multiplicities {muls}; 'uuu' couples copies one to one, so there must be a single one"
            )
        for name, blocks in (("x", self.x), ("y", self.y), ("z", self.z)):
            for mul, degree in blocks:
                if not 0 <= degree <= MAX_DEGREE:
                    raise UnsupportedDescriptionError(
                        f"block {mul} x l={degree} of operand {name}: kernels exist for 0 <= l <= {MAX_DEGREE}"
                    )
        for number, path in enumerate(self.paths):
            for name, index, blocks in (("x", path.x, self.x), ("y", path.y, self.y), ("z", path.z, self.z)):
                if not 0 <= index < len(blocks):
                    raise UnsupportedDescriptionError(
                        f"path {number} names block {index} of {name}, which has {len(blocks)}"
                    )
            l1, l2, l3 = self.x[path.x][1], self.y[path.y][1], self.z[path.z][1]
            if not abs(l1 - l2) <= l3 <= l1 + l2:
                raise UnsupportedDescriptionError(f"path {number}: l = {l1} x {l2} cannot give {l3}")
        # Known from the start: torch.compile cannot trace the lock with which Python up to 3.11 caches a property.
        _ = self.polynomial.key

    @property
    def mul(self) -> int:
        """The multiplicity of every block."""
        return self.x[0][0]

    @property
    def x_dim(self) -> int:
        return self.mul * sum(_dims(self.x))

    @property
    def y_dim(self) -> int:
        return self.mul * sum(_dims(self.y))

    @property
    def z_dim(self) -> int:
        return self.mul * sum(_dims(self.z))

    @property
    def weight_numel(self) -> int:
        return self.mul * sum(path.weighted for path in self.paths)

    @cached_property
    def polynomial(self) -> WeightedPolynomial:
        """The same as a polynomial of each copy in the components of x, those of y, and the weights, in this order.

        Its own single weight stands for one.
        """
        blocks = (*_dims(self.x), *_dims(self.y), *(1 for path in self.paths if path.weighted))
        first_y = sum(_dims(self.x))
        weight = first_y + sum(_dims(self.y))
        coefficients: dict[tuple[int, tuple[int, ...]], float] = {}
        for path in self.paths:
            l1, l2, l3 = self.x[path.x][1], self.y[path.y][1], self.z[path.z][1]
            coupling = clebsch_gordan(l1, l2, l3)
            at_x, at_y, at_z = (
                sum(_dims(operand)[:index]) for operand, index in ((self.x, path.x), (self.y, path.y), (self.z, path.z))
            )
            factor = (weight,) if path.weighted else ()
            weight += path.weighted
            for i, j, k in zip(*coupling.nonzero(), strict=True):
                place = (at_z + int(k), (at_x + int(i), first_y + at_y + int(j), *factor))
                value = path.coefficient * float(coupling[i, j, k])
                coefficients[place] = coefficients.get(place, 0.0) + value
        terms = tuple(Term(output, 0, monomial, value) for (output, monomial), value in sorted(coefficients.items()))
        return WeightedPolynomial(blocks, _dims(self.z), 1, terms)


def _dims(blocks: tuple[Segment, ...]) -> tuple[int, ...]:
    return tuple(2 * degree + 1 for _, degree in blocks)
