"""What benchmarks/conv.py measures beside mace_fast: each peer's convolution in its fastest mode."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from e3nn import o3
from torch import Tensor

from benchmarks.problems import FullyConnectedProblem, Problem

Conv = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS = ("e3nn", "cueq", "oeq", "oeq-det")
_PACKAGES = {"e3nn": "e3nn", "cueq": "cuequivariance_torch", "oeq": "openequivariance", "oeq-det": "openequivariance"}


class Peer(NamedTuple):
    """A convolution (x, y, w) -> z of nodes, and how it wants the weights that e3nn has in the order of its paths.

    Operands and result are ir_mul for cuEquivariance, e3nn's mul_ir for the others.
    """

    conv: Conv
    weights: Callable[[Tensor], Tensor]


def peer(
    backend: str,
    problem: Problem | FullyConnectedProblem,
    nodes: int,
    sender: Tensor,
    receiver: Tensor,
    dtype: torch.dtype,
) -> Peer:
    """One of ``BACKENDS`` on a graph.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it does not serve the problem.
    """
    package = _PACKAGES[backend]
    try:
        import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not available: {error}") from error
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if backend.startswith("oeq"):
            return _openequivariance(problem, sender, receiver, dtype, deterministic=backend == "oeq-det")
        if isinstance(problem, FullyConnectedProblem):
            return _fully_connected(backend, problem, nodes, sender, receiver, dtype)
        return Peer(_channelwise(backend, problem, nodes, sender, receiver, dtype), _same)
    finally:
        torch.set_default_dtype(default)


def _same(weights: Tensor) -> Tensor:
    return weights


def _channelwise(
    backend: str, problem: Problem, nodes: int, sender: Tensor, receiver: Tensor, dtype: torch.dtype
) -> Conv:
    """Behind mace-torch's own wrapper."""
    from mace.modules.wrapper_ops import CuEquivarianceConfig, TensorProduct
    from mace.tools.scatter import scatter_sum

    irreps_out, instructions = problem.instructions()
    options: dict[str, Any] = {}
    if backend == "cueq":
        options["cueq_config"] = CuEquivarianceConfig(
            enabled=True, layout="ir_mul", group="O3_e3nn", optimize_all=True, conv_fusion=True
        )
    product = TensorProduct(
        o3.Irreps(problem.node_irreps),
        problem.edge_irreps,
        irreps_out,
        instructions=instructions,
        shared_weights=False,
        internal_weights=False,
        **options,
    ).to(sender.device, dtype)
    edge_index = torch.stack([sender, receiver])
    if backend == "e3nn":
        return lambda x, y, w: scatter_sum(product(x[sender], y, w), receiver, dim=0, dim_size=nodes)
    return lambda x, y, w: product(x, y, w, edge_index)


def _fully_connected(
    backend: str, problem: FullyConnectedProblem, nodes: int, sender: Tensor, receiver: Tensor, dtype: torch.dtype
) -> Peer:
    """Straight from the peers, which gather, multiply and sum apart; mace-torch's wrapper has no such product."""
    from mace.tools.scatter import scatter_sum

    irreps = o3.Irreps(problem.node_irreps), problem.edge_irreps, o3.Irreps(problem.target)
    product: Any
    if backend == "cueq":
        import cuequivariance as cue
        import cuequivariance_torch as cuet
        from mace.tools.cg import O3_e3nn

        if sender.device.type != "cuda":
            raise NotImplementedError("cuequivariance_torch: the method fused_tp runs on a GPU alone")
        product = cuet.FullyConnectedTensorProduct(
            *(cue.Irreps(O3_e3nn, str(irrep)) for irrep in irreps),
            layout=cue.ir_mul,
            shared_weights=False,
            internal_weights=False,
            device=sender.device,
            dtype=dtype,
            math_dtype=dtype,
            method="fused_tp",
        )
    else:
        product = o3.FullyConnectedTensorProduct(*irreps, shared_weights=False, internal_weights=False)
        product = product.to(sender.device, dtype)
    return Peer(lambda x, y, w: scatter_sum(product(x[sender], y, w), receiver, dim=0, dim_size=nodes), _same)


def _openequivariance(
    problem: Problem | FullyConnectedProblem,
    sender: Tensor,
    receiver: Tensor,
    dtype: torch.dtype,
    *,
    deterministic: bool,
) -> Peer:
    """Straight from it: mace-torch 0.3.16 knows nothing of the deterministic variant."""
    import openequivariance as oeq

    number = oeq.torch_to_oeq_dtype(dtype)
    irreps_out, instructions = problem.instructions()
    described = oeq.TPProblem(
        o3.Irreps(problem.node_irreps),
        problem.edge_irreps,
        irreps_out,
        instructions,
        shared_weights=False,
        internal_weights=False,
        irrep_dtype=number,
        weight_dtype=number,
    )
    product = oeq.TensorProductConv(described, deterministic=deterministic)
    rest = (receiver, sender)
    if deterministic:
        rest = (*rest, torch.argsort(sender, stable=True))
    signs = _signs(problem).to(sender.device, dtype)
    # Weights of a path lie in pieces there.
    return Peer(lambda x, y, w: product(x, y, w, *rest), lambda w: product.reorder_weights_from_e3nn(w * signs, True))


def _signs(problem: Problem | FullyConnectedProblem) -> Tensor:
    """-1 for the weights of paths whose coupling has another sign in OpenEquivariance (that of e3nn 0.5 and later) than
    in the e3nn that is installed: some with odd l1 + l2 + l3."""
    from openequivariance.core.e3nn_lite import wigner_3j

    nodes, edges = o3.Irreps(problem.node_irreps), problem.edge_irreps
    irreps_out, instructions = problem.instructions()
    signs = []
    for i, j, k, mode, _ in instructions:
        degrees = nodes[i].ir.l, edges[j].ir.l, irreps_out[k].ir.l
        product = (o3.wigner_3j(*degrees).double() * torch.as_tensor(wigner_3j(*degrees))).sum()
        count = nodes[i].mul * edges[j].mul * (irreps_out[k].mul if mode == "uvw" else 1)
        signs.append(torch.full((count,), float(torch.sign(product))))
    return torch.cat(signs)
