"""Architectures of MACE models as data: the public foundation models, and whatever a test makes from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Hyper-parameters of a model, named as the arguments of ``mace.modules.MACE`` are.

    `model` is the class, "ScaleShiftMACE" or "MACE". `interaction` and `interaction_first` name interaction
    blocks of mace-torch. `correlation` is one order for all layers or one for each. Lengths are in
    angstrom, `hidden_irreps` and the other irreps are in e3nn's notation.
    """

    name: str
    hidden_irreps: str
    interaction_first: str
    interaction: str
    atomic_numbers: tuple[int, ...]
    r_max: float
    num_bessel: int
    model: str = "ScaleShiftMACE"
    num_interactions: int = 2
    max_ell: int = 3
    correlation: int | tuple[int, ...] = 3
    num_polynomial_cutoff: int = 5
    radial_type: str = "bessel"
    radial_MLP: tuple[int, ...] = (64, 64, 64)
    MLP_irreps: str = "16x0e"
    gate: str = "silu"
    edge_irreps: str | None = None
    use_edge_irreps_first: bool = False
    pair_repulsion: bool = False
    distance_transform: str = "None"
    apply_cutoff: bool = True
    use_reduced_cg: bool = False
    use_so3: bool = False
    use_agnostic_product: bool = False
    use_last_readout_only: bool = False
    use_embedding_readout: bool = False
    keep_last_layer_irreps: bool = False
    heads: tuple[str, ...] = ("Default",)
    embedding_specs: Mapping[str, Mapping[str, Any]] | None = None

    def reduced(self, *, elements: Sequence[int] | None = None, channels: int | None = None) -> Architecture:
        """A smaller model of the same kind.

        Args:
            elements: atomic numbers to keep, a subset of the model's own; they are put in ascending order.
            channels: number of scalar channels of the hidden irreps. Every multiplicity of the hidden and
                edge irreps and the width of feature embeddings scale by the same factor (at least 1 stays).

        Raises:
            ValueError: an element that the architecture does not have, none at all, or channels below 1.
        """
        smaller = self
        if elements is not None:
            unknown = sorted(set(elements) - set(self.atomic_numbers))
            if unknown or not elements:
                raise ValueError(
                    f"{self.name}: cannot keep elements {list(elements)}; it has {list(self.atomic_numbers)}"
                )
            smaller = replace(smaller, atomic_numbers=tuple(sorted(set(elements))))
        if channels is not None:
            if channels < 1:
                raise ValueError(f"{self.name}: channels must be at least 1, got {channels}")
            factor = channels / _multiplicity(self.hidden_irreps)
            specs = None
            if self.embedding_specs is not None:
                specs = {
                    feature: {**spec, "emb_dim": max(1, round(spec["emb_dim"] * factor))}
                    for feature, spec in self.embedding_specs.items()
                }
            smaller = replace(
                smaller,
                hidden_irreps=_scale(self.hidden_irreps, factor),
                edge_irreps=None if self.edge_irreps is None else _scale(self.edge_irreps, factor),
                embedding_specs=specs,
            )
        return smaller


def architectures() -> dict[str, Architecture]:
    """The foundation architectures, keyed by short name (mp0-medium, off23-large, mh-1, ...).

    Hyper-parameters were read from published training scripts; the note in the data file tells which are
    approximate.
    """
    return dict(_foundation())


@lru_cache(maxsize=1)
def _foundation() -> dict[str, Architecture]:
    text = files("mace_fast.zoo").joinpath("data/foundation_architectures.json").read_text(encoding="utf-8")
    document = json.loads(text)
    found: dict[str, Architecture] = {}
    for name, own in document["models"].items():
        fields: dict[str, Any] = {**document["common"], **own}
        fields["atomic_numbers"] = document["atomic_numbers"][fields["atomic_numbers"]]
        tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        found[name] = Architecture(name=name, **{**fields, **tuples})
    return found


def _scale(irreps: str, factor: float) -> str:
    blocks = [block.strip().split("x") for block in irreps.split("+")]
    return "+".join(f"{max(1, round(int(multiplicity) * factor))}x{irrep}" for multiplicity, irrep in blocks)


def _multiplicity(irreps: str) -> int:
    return int(irreps.split("x")[0])
