"""The convolution problems that benchmarks/conv.py measures: irreps of node features, edge attributes and target."""

from __future__ import annotations

from dataclasses import dataclass

from e3nn import o3

from mace_fast.kernels import ChannelwiseTensorProduct, FullyConnectedTensorProduct, Path
from mace_fast.kernels.plan.coupling import coupling, of_path


@dataclass(frozen=True)
class Problem:
    """A channelwise convolution: node features (x) spherical harmonics, filtered to the target's irreps."""

    name: str
    node_irreps: str
    lmax: int
    target: str
    graph = "diamond"

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


@dataclass(frozen=True)
class FullyConnectedProblem:
    """A convolution in which every path that irreps allow mixes all copies ('uvw'); each edge has its own weights."""

    name: str
    node_irreps: str
    edges: str
    target: str
    graph = "complexes"

    @property
    def edge_irreps(self) -> o3.Irreps:
        return o3.Irreps(self.edges)

    def instructions(self) -> tuple[o3.Irreps, list[tuple[int, int, int, str, bool]]]:
        """Output irreps and e3nn instructions, as o3.FullyConnectedTensorProduct has them."""
        irreps_out = o3.Irreps(self.target)
        return irreps_out, [
            (i, j, k, "uvw", True)
            for i, (_, a) in enumerate(o3.Irreps(self.node_irreps))
            for j, (_, b) in enumerate(self.edge_irreps)
            for k, (_, c) in enumerate(irreps_out)
            if c in a * b
        ]

    def description(self) -> FullyConnectedTensorProduct:
        irreps_out, instructions = self.instructions()
        operands = o3.Irreps(self.node_irreps), self.edge_irreps, irreps_out
        x, y, z = (tuple((mul, ir.l) for mul, ir in irreps) for irreps in operands)

        def summed(block: int) -> int:
            """Numbers that add up in each element of an output block: e3nn normalises by them."""
            return sum(x[i][0] * y[j][0] for i, j, k, _, _ in instructions if k == block)

        paths = tuple(Path(i, j, k, (irreps_out[k].ir.dim / summed(k)) ** 0.5) for i, j, k, _, _ in instructions)
        return FullyConnectedTensorProduct(x, y, z, paths)


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

_DIFFDOCK = "10x1o+10x1e+48x0e+48x0o"
DIFFDOCK = {
    problem.name: problem
    for problem in (
        FullyConnectedProblem("diffdock-l1", _DIFFDOCK, "1x0e+1x1o", _DIFFDOCK),
        FullyConnectedProblem("diffdock-l2", _DIFFDOCK, "1x0e+1x1o+1x2e", _DIFFDOCK),
    )
}
"""On a graph of their own, 2000 nodes with 20 edges each: 6928 and 7128 weights an edge, 1.1 GB in all in float32."""


def forward_operations(description: ChannelwiseTensorProduct | FullyConnectedTensorProduct) -> int:
    """Floating-point operations of an edge in the product itself: multiply-adds of the couplings and of the weights."""
    if isinstance(description, FullyConnectedTensorProduct):
        return sum(
            path.rows * (3 * len(coupling(path.l1, path.l2, path.l3, path.coefficient).triples))
            + path.rows * path.mul_z * 2 * (2 * path.l3 + 1)
            for path in description.resolved
        )
    return sum(
        path.mul * (2 * len(of_path(path).uses) + (2 * path.l1 + 1 if path.weighted else 0))
        for path in description.flat_paths()
    )
