"""Evaluating a model in each mode of MACE's signature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mace_fast.verification.graphs import Batch, default_dtype

Model = Callable[..., Mapping[str, torch.Tensor | None]]
Outputs = dict[str, torch.Tensor]

PARAMETER_GRADIENT = "parameter gradients"


@dataclass(frozen=True)
class Mode:
    """One way of calling a MACE model.

    Attributes:
        name: as it stands in the report.
        arguments: keyword arguments of the call.
        batch: name of the batch of structures it is run on: "all", "few" (a small selection), "lone" (no
            edges at all), "one".
        ignored: outputs that mace-torch returns in this mode without having computed them.
        what: shown in the progress messages.
    """

    name: str
    arguments: Mapping[str, bool]
    batch: str
    what: str
    ignored: frozenset[str] = frozenset()


MODES: tuple[Mode, ...] = (
    Mode("stress", {"compute_stress": True}, "all", "energy, forces and stress"),
    Mode("energy", {"compute_force": False}, "few", "energy alone"),
    Mode("forces", {}, "few", "energy and forces"),
    # mace-torch fills the stress with zeros when only virials are asked for.
    Mode("virials", {"compute_virials": True}, "few", "virials", frozenset({"stress"})),
    Mode(
        "displacement",
        {"compute_stress": True, "compute_virials": True, "compute_displacement": True},
        "few",
        "stress and virials by the displacement",
    ),
    Mode("no edges", {"compute_stress": True}, "lone", "isolated atoms by themselves"),
    Mode("hessian", {"compute_hessian": True}, "one", "Hessian"),
    Mode(
        "training",
        {"training": True, "compute_stress": True, "compute_virials": True},
        "few",
        "parameter gradients",
    ),
)

NO_STRUCTURE_FOR = {
    "lone": "no structure is without edges",
    "one": "no structure with edges is small enough",
}

_NEAR = 10.0  # A; beyond this distance from the origin virials get less weight in the loss

# The strain with respect to which stress is taken; an input in disguise, not a result.
_NOT_RESULTS = frozenset({"displacement"})


@dataclass(frozen=True)
class Cotangents:
    """Random weights of the training loss, one for each number that the loss holds (float64, CPU).

    The loss is linear, L = sum a E + sum b F + sum c W + sum d V sigma with energies E, forces F, virials W,
    volume times stress V sigma: its gradient reaches first and second derivatives of every path, and no
    residual can hide one.
    """

    energy: torch.Tensor
    forces: torch.Tensor
    virials: torch.Tensor
    stress: torch.Tensor

    @classmethod
    def random(cls, batch: Batch, generator: torch.Generator) -> Cotangents:
        atoms = int(batch.tensors["positions"].shape[0])
        volume = torch.linalg.det(batch.tensors["cell"].view(-1, 3, 3)).abs().view(-1, 1, 1)
        # Virials are sums of x F: unweighted, the structure far from the origin would drown the others in
        # rounding.
        distance = torch.zeros(batch.num_graphs, dtype=torch.float64)
        norms = batch.tensors["positions"].norm(dim=-1)
        distance.scatter_reduce_(0, batch.tensors["batch"], norms, "amax")
        near = (_NEAR / distance.clamp(min=_NEAR)).view(-1, 1, 1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        return cls(
            energy=normal(batch.num_graphs),
            forces=normal(atoms, 3),
            virials=normal(batch.num_graphs, 3, 3) * near,
            stress=normal(batch.num_graphs, 3, 3) * near * volume,
        )

    def loss(self, outputs: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """The loss, a scalar in the dtype of the outputs."""
        total: torch.Tensor | None = None
        for name in ("energy", "forces", "virials", "stress"):
            value = outputs.get(name)
            if value is None:
                raise ValueError(f"the model returned no {name} when called with training=True and compute_stress=True")
            term = (getattr(self, name).to(value) * value).sum()
            total = term if total is None else total + term
        assert total is not None
        return total


@contextlib.contextmanager
def evaluation_context(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, torch's default dtype set, whatever the caller's state; all put back after.

    TorchScript interprets its graphs as they are: optimising those of every copy of a model, for a few calls
    each, would take most of the time.
    """
    with (
        torch.jit.optimized_execution(False),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type=device.type, enabled=False),
        default_dtype(dtype),
    ):
        yield


def evaluate(
    model: Model,
    batch: Batch,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device,
    cotangents: Cotangents | None = None,
) -> Outputs:
    """Results of one call in float64 on the CPU, detached; with ``cotangents`` also parameter gradients.

    A gradient is under the key "parameter gradients:<name>", zeros where the loss does not depend on it.
    """
    with evaluation_context(dtype, device):
        outputs = model(batch.inputs(dtype, device), **mode.arguments)
        results = _results(outputs, mode.ignored)
        if cotangents is not None and isinstance(model, torch.nn.Module):
            parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(cotangents.loss(outputs), list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                value = torch.zeros_like(parameter) if gradient is None else gradient
                results[f"{PARAMETER_GRADIENT}:{name}"] = value.detach().to(device="cpu", dtype=torch.float64)
    return results


def evaluate_edge_forces(
    model: Model, batch: Batch, dtype: torch.dtype, device: torch.device
) -> tuple[Outputs, torch.Tensor]:
    """Results without forces, and dE/dr of each edge [E, 3], the terms that forces and virials are sums of.

    Edge vectors are r = x_receiver - x_sender + shift: the derivative with respect to the shift is wanted.
    """
    inputs = batch.inputs(dtype, device)
    with evaluation_context(dtype, device):
        shifts = inputs["shifts"].requires_grad_(True)
        outputs = model(inputs, compute_force=False)
        energy = outputs["energy"]
        assert energy is not None
        (gradient,) = torch.autograd.grad(energy.sum(), [shifts], allow_unused=True)
    forces = torch.zeros_like(shifts) if gradient is None else gradient
    return _results(outputs), forces.detach().to(device="cpu", dtype=torch.float64)


def _results(outputs: Mapping[str, torch.Tensor | None], ignored: frozenset[str] = frozenset()) -> Outputs:
    return {
        key: value.detach().to(device="cpu", dtype=torch.float64)
        for key, value in outputs.items()
        if isinstance(value, torch.Tensor) and key not in _NOT_RESULTS | ignored
    }
