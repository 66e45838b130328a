"""Random-weight models at the exact shapes of an architecture, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mace.modules
import numpy as np
import torch

# mace first: e3nn 0.4 cannot read its constants under torch 2.6 or later unless mace has prepared for it.
from e3nn import o3

from ._defaults import cpu_seed, default_dtype
from .architectures import Architecture, architectures

_NUMBER_DENSITY = 0.0685
"""Atoms per cubic angstrom; gives MACE-MP-0's published average of 62 neighbours at 6 angstrom."""

_RADIAL_GAIN = 30.0
"""Factor on the last radial layer of blocks that divide by the average number of neighbours. With
mace-torch's own initial values their messages are near 0.004, and a wrong third-order term of the product
would hide below float32's rounding; with it they are near 0.1, as they are in the blocks that normalise by
density. Not for the attention block: its radial network sees node features, so two layers of it would explode."""

_DENSITY_NORMALISED = (
    mace.modules.interaction_classes["RealAgnosticDensityInteractionBlock"],
    mace.modules.interaction_classes["RealAgnosticDensityResidualInteractionBlock"],
)
_NEIGHBOUR_NORMALISED = (
    mace.modules.interaction_classes["RealAgnosticInteractionBlock"],
    mace.modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
)


def build(
    architecture: str | Architecture,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    elements: Sequence[int] | None = None,
    channels: int | None = None,
) -> mace.modules.MACE:
    """A model with random weights, as mace-torch builds it.

    Nothing is left at a trivial value: biases, layer norms, density normalisations, scales, shifts and
    atomic energies are random too, so that a conversion that drops one of them changes the result. Torch's
    default dtype and random state are as before afterwards.

    The largest, omol-xl in full (1024 channels, three layers), has 55 million parameters, 0.45 GB in
    float64, and takes some 7 s of one core and 1 GB to build; the others take 2 to 3 s.

    Args:
        architecture: a name of :func:`architectures`, or an architecture of your own.
        dtype: of parameters and buffers, float32 or float64.
        device: where the finished model lies; it is built on the CPU.
        seed: of everything random; equal seeds give equal models on every device.
        elements: atomic numbers to keep (see :meth:`Architecture.reduced`).
        channels: number of scalar channels (see :meth:`Architecture.reduced`).

    Returns:
        A ``mace.modules.ScaleShiftMACE`` (or ``MACE``, where the architecture says so) in eval mode.

    Raises:
        KeyError: no architecture of that name.
        ValueError: elements or channels that the architecture cannot be reduced to, or a dtype that is no
            float.
    """
    if isinstance(architecture, str):
        known = architectures()
        if architecture not in known:
            raise KeyError(f"no architecture {architecture!r} in the zoo; there are {', '.join(sorted(known))}")
        architecture = known[architecture]
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    architecture = architecture.reduced(elements=elements, channels=channels)
    rng = np.random.default_rng(seed)
    # Built in float64 whatever the dtype, so that the float32 model is the rounded float64 model.
    with default_dtype(torch.float64), cpu_seed(seed):
        model: mace.modules.MACE = _MODELS[architecture.model](**_arguments(architecture, rng))
        _randomise(model)
    return model.to(dtype=dtype, device=device).eval()


_MODELS = {"MACE": mace.modules.MACE, "ScaleShiftMACE": mace.modules.ScaleShiftMACE}


def _arguments(architecture: Architecture, rng: np.random.Generator) -> dict[str, Any]:
    """Keyword arguments of the model's constructor."""
    blocks = mace.modules.interaction_classes
    heads = len(architecture.heads)
    species = len(architecture.atomic_numbers)
    correlation = architecture.correlation
    volume = 4.0 / 3.0 * np.pi * architecture.r_max**3
    arguments: dict[str, Any] = {
        "r_max": architecture.r_max,
        "num_bessel": architecture.num_bessel,
        "num_polynomial_cutoff": architecture.num_polynomial_cutoff,
        "max_ell": architecture.max_ell,
        "interaction_cls": blocks[architecture.interaction],
        "interaction_cls_first": blocks[architecture.interaction_first],
        "num_interactions": architecture.num_interactions,
        "num_elements": species,
        "hidden_irreps": o3.Irreps(architecture.hidden_irreps),
        "MLP_irreps": o3.Irreps(architecture.MLP_irreps),
        "atomic_energies": rng.uniform(-8.0, -1.0, size=(heads, species) if heads > 1 else species),
        "avg_num_neighbors": float(_NUMBER_DENSITY * volume),
        "atomic_numbers": list(architecture.atomic_numbers),
        "correlation": correlation if isinstance(correlation, int) else list(correlation),
        "gate": mace.modules.gate_dict[architecture.gate],
        "pair_repulsion": architecture.pair_repulsion,
        "distance_transform": architecture.distance_transform,
        "apply_cutoff": architecture.apply_cutoff,
        "use_reduced_cg": architecture.use_reduced_cg,
        "use_so3": architecture.use_so3,
        "use_agnostic_product": architecture.use_agnostic_product,
        "use_last_readout_only": architecture.use_last_readout_only,
        "use_embedding_readout": architecture.use_embedding_readout,
        "keep_last_layer_irreps": architecture.keep_last_layer_irreps,
        "edge_irreps": None if architecture.edge_irreps is None else o3.Irreps(architecture.edge_irreps),
        "use_edge_irreps_first": architecture.use_edge_irreps_first,
        "radial_MLP": list(architecture.radial_MLP),
        "radial_type": architecture.radial_type,
        "heads": list(architecture.heads),
    }
    if architecture.embedding_specs is not None:
        arguments["embedding_specs"] = {name: dict(spec) for name, spec in architecture.embedding_specs.items()}
    if architecture.model == "ScaleShiftMACE":
        arguments["atomic_inter_scale"] = rng.uniform(0.8, 2.4, size=heads) if heads > 1 else rng.uniform(0.8, 2.4)
        arguments["atomic_inter_shift"] = rng.normal(0.0, 0.3, size=heads) if heads > 1 else rng.normal(0.0, 0.3)
    return arguments


@torch.no_grad()
def _randomise(model: mace.modules.MACE) -> None:
    """A random value for every parameter that mace-torch starts at a constant or next to zero, and messages
    near one."""
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "alpha":  # starts at 20; the denominator density * beta + alpha must stay positive
            parameter.uniform_(8.0, 30.0)
        elif leaf == "beta":  # starts at 0, which hides the density network
            parameter.uniform_(0.5, 1.5)
        elif "source_embedding" in name or "target_embedding" in name:  # start at 0.001: no species dependence
            parameter.normal_()
        elif parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all()):  # layer norms, zero biases
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    radial_width = int(model.radial_embedding.out_dim)
    radial = model.radial_embedding
    # Gaussians, and any functions of a transformed distance, are several times larger than spherical Bessel functions,
    # and the products raise what is too large to the ninth power.
    large = "distance_transform" in radial._modules or isinstance(radial.bessel_fn, mace.modules.radial.GaussianBasis)
    gain = _RADIAL_GAIN / 5 if large else _RADIAL_GAIN
    for block in model.modules():
        if isinstance(block, _NEIGHBOUR_NORMALISED):
            block.conv_tp_weights[-1].weight.mul_(gain)
        if isinstance(block, _DENSITY_NORMALISED):
            # The density is a square of one weighted sum of radial functions. Where signs let it cancel for all
            # neighbours at once, nothing normalises the messages, and the products raise them to the ninth power.
            for weight in block.density_fn.parameters():
                weight.abs_()
        if isinstance(block, mace.modules.radial.RadialMLP):
            # Its input is a few radial functions beside hundreds of species features: make the distance
            # count.
            first = block.net[0].weight
            first[:, :radial_width].mul_((first.shape[1] / radial_width) ** 0.5)
