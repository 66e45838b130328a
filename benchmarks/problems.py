"""The convolution problems that benchmarks/conv.py measures: irreps of node features, edge attributes and target."""

from __future__ import annotations

from dataclasses import dataclass

from e3nn import o3

from mace_fast.kernels import ChannelwiseTensorProduct, Path
from mace_fast.kernels.plan.coupling import of_path


@dataclass(frozen=True)
class Problem:
    """A channelwise convolution: node features (x) spherical harmonics, filtered to the target's irreps."""

    name: str
    node_irreps: str
    lmax: int
    target: str

    @property
    def edge_irreps(self) -> o3.Irreps:
        return o3.Irreps.spherical_harmonics(self.lmax)

    def instructions(self) -> tuple[o3.Irreps, list[tuple[int, int, int, str, bool]]]:
        """Output irreps, sorted by irrep, and e3nn instructions, one output slot a path."""
        allowed = {ir for _, ir in o3.Irreps(self.target)}
        slots, pairs = [], []
        for i, (mul, ir_in) in enumerate(o3.Irreps(self.node_irreps)):
            for j, (_, ir_edge) in enumerate(self.edge_irreps):
                for ir_out in ir_in * ir_edge:
                    if ir_out in allowed:
                        pairs.append((i, j, len(slots)))
                        slots.append((mul, ir_out))
        irreps, permutation, _ = o3.Irreps(slots).sort()
        instructions = [(i, j, permutation[k], "uvu", True) for i, j, k in pairs]
        return irreps, sorted(instructions, key=lambda entry: entry[2])

    def description(self) -> ChannelwiseTensorProduct:
        irreps, instructions = self.instructions()
        blocks = [
            tuple((mul, ir.l) for mul, ir in irs) for irs in (o3.Irreps(self.node_irreps), self.edge_irreps, irreps)
        ]
        paths = tuple(Path(i, j, k, float(irreps[k].ir.dim) ** 0.5) for i, j, k, _, _ in instructions)
        return ChannelwiseTensorProduct(blocks[0], blocks[1], blocks[2], paths)


def _both_parities(mul: int, lmax: int) -> str:
    return "+".join(f"{mul}x{degree}{parity}" for degree in range(lmax + 1) for parity in "eo")


MACE_TARGET = "0e+1o+2e+3o"


def _nequip(mul: int, lmax: int) -> Problem:
    return Problem(f"nequip-l{lmax}-{mul}", _both_parities(mul, lmax), lmax, _both_parities(1, lmax))


TABLE = {
    problem.name: problem
    for problem in (
        Problem("medium-L1", "128x0e", 3, MACE_TARGET),
        Problem("medium-L2", "128x0e+128x1o", 3, MACE_TARGET),
        Problem("large-L2", "128x0e+128x1o+128x2e", 3, MACE_TARGET),
        Problem("nequip-s", "64x0e+64x1o+64x2e", 2, "0e+1o+2e"),
        Problem("nequip-l", _both_parities(64, 3), 3, _both_parities(1, 3)),
    )
}
"""What is measured unless asked otherwise."""

FAMILIES = {
    problem.name: problem
    for problem in (
        *(_nequip(mul, lmax) for lmax in (1, 2, 3) for mul in (32, 64) if (lmax, mul) != (3, 64)),
        Problem("mixed", "128x0e+64x1o+32x2e+32x3o", 3, MACE_TARGET),  # as SevenNet and Nequix have them
    )
}
PROBLEMS = {**TABLE, **FAMILIES}


def forward_operations(description: ChannelwiseTensorProduct) -> int:
    """Floating-point operations of an edge in the product itself: weighting x, and a multiply-add for each term."""
    return sum(
        path.mul * (2 * len(of_path(path).uses) + (2 * path.l1 + 1 if path.weighted else 0))
        for path in description.flat_paths()
    )
