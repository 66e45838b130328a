"""Slow, plain float64 definitions that kernels are compared with, and random problems for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mace_fast.kernels import ChannelwiseTensorProduct, Path
from mace_fast.kernels.cg import clebsch_gordan

EPSILON = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def tolerance(dtype: torch.dtype, terms: float) -> float:
    """Allowed error relative to the scale of the result: rounding of a sum of ``terms`` products, with margin 8."""
    return 8 * EPSILON[dtype] * max(terms, 1.0) ** 0.5 * 4


def assert_close(actual: Tensor, oracle: Tensor, *, terms: float = 16.0) -> None:
    """Largest error over the largest value of the float64 oracle, against the tolerance of the actual dtype."""
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "not finite"
    scale = oracle.detach().abs().max().clamp_min(1e-30)
    error = float((actual.detach().double() - oracle.detach().double().to(actual.device)).abs().max() / scale)
    limit = tolerance(actual.dtype, terms)
    assert error <= limit, f"relative error {error:.2e} exceeds {limit:.2e}"


def channelwise_conv(
    d: ChannelwiseTensorProduct, x: Tensor, y: Tensor, w: Tensor, sender: Tensor, receiver: Tensor, nodes: int
) -> Tensor:
    """Gather, couple by einsum with dense Clebsch-Gordan blocks, add at receivers; differentiable by torch."""
    edges = sender.shape[0]
    weights = w if w.dim() == 2 else w.expand(edges, -1)
    z = x.new_zeros(nodes, d.z_dim)
    for p in d.flat_paths():
        c = torch.tensor(clebsch_gordan(p.l1, p.l2, p.l3).copy(), dtype=x.dtype, device=x.device) * p.coefficient
        d1, d2, d3 = c.shape
        xs = x[sender][:, p.x_offset : p.x_offset + d1 * p.mul].reshape(edges, d1, p.mul)
        ys = torch.stack([y[:, p.y_offset + j * p.y_stride] for j in range(d2)], 1)
        out = torch.einsum("ijk,eiu,ej->eku", c, xs, ys)
        if p.weighted:
            columns = p.w_offset + p.w_stride * torch.arange(p.mul, device=w.device)
            out = out * weights[:, columns][:, None, :]
        block = x.new_zeros(nodes, d3 * p.mul).index_add(0, receiver, out.reshape(edges, d3 * p.mul))
        z = z + torch.nn.functional.pad(block, (p.z_offset, d.z_dim - p.z_offset - d3 * p.mul))
    return z


def mace_product(lmax_x: int, mul: int, lmax_y: int = 3) -> ChannelwiseTensorProduct:
    """The channelwise product of a MACE layer with hidden irreps up to ``lmax_x`` (parity (-1)^l everywhere)."""
    x = tuple((mul, degree) for degree in range(lmax_x + 1))
    y = tuple((1, degree) for degree in range(lmax_y + 1))
    z, paths = [], []
    for l1 in range(lmax_x + 1):
        for l2 in range(lmax_y + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_y) + 1):
                if (l1 + l2 + l3) % 2 == 0:
                    paths.append(Path(l1, l2, len(z), (2 * l3 + 1) ** 0.5))
                    z.append((mul, l3))
    return ChannelwiseTensorProduct(x, y, tuple(z), tuple(paths))


def both_parities_product(lmax: int, mul: int) -> ChannelwiseTensorProduct:
    """As NequIP has them: every degree up to ``lmax`` with either parity, outputs sorted by degree and parity."""
    kinds = [(degree, parity) for degree in range(lmax + 1) for parity in (1, -1)]
    slots = [
        (l3, (-1) ** l2 * parity, i, l2)
        for i, (l1, parity) in enumerate(kinds)
        for l2 in range(lmax + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, lmax) + 1)
    ]
    slots.sort(key=lambda slot: slot[:2])
    x, y = tuple((mul, degree) for degree, _ in kinds), tuple((1, degree) for degree in range(lmax + 1))
    paths = tuple(Path(i, l2, k, (2 * l3 + 1) ** 0.5) for k, (l3, _, i, l2) in enumerate(slots))
    return ChannelwiseTensorProduct(x, y, tuple((mul, slot[0]) for slot in slots), paths)


def random_product(rng: np.random.Generator) -> ChannelwiseTensorProduct:
    """Random blocks: multiplicities 1 to 33, degrees to 3, copies of y, shared output blocks, unweighted paths."""
    muls = [1, 2, 5, 13, 32, 33]
    x = tuple((int(rng.choice(muls)), int(rng.integers(0, 4))) for _ in range(rng.integers(1, 4)))
    y = tuple((int(rng.integers(1, 3)), int(rng.integers(0, 4))) for _ in range(rng.integers(1, 4)))
    z: list[tuple[int, int]] = []
    paths = []
    for i, (mul, l1) in enumerate(x):
        for j, (_, l2) in enumerate(y):
            for l3 in range(abs(l1 - l2), min(l1 + l2, 4) + 1):
                if rng.random() < 0.4 and paths:
                    continue
                same = [k for k, block in enumerate(z) if block == (mul, l3)]
                if same and rng.random() < 0.3:
                    slot = same[0]
                else:
                    slot = len(z)
                    z.append((mul, l3))
                paths.append(Path(i, j, slot, float(rng.uniform(-2, 2)), bool(rng.random() < 0.8)))
    return ChannelwiseTensorProduct(x, y, tuple(z), tuple(paths))


def operands(
    d: ChannelwiseTensorProduct,
    nodes: int,
    edges: int,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    shared: bool = False,
) -> list[Tensor]:
    """Signed random x, y, w that require gradients."""
    shapes = [(nodes, d.x_dim), (edges, d.y_dim), (d.weight_numel,) if shared else (edges, d.weight_numel)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]
