"""CapturedMACE and the static program beneath it, run without a graph: on any device the same text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_cases import WALKS, assert_agree, build, frozen, reference

from mace_fast import zoo
from mace_fast.inference import CapturedMACE


@pytest.mark.parametrize("variant", ["base", "nonlinear_foundation", "pair_repulsion"])
def test_without_a_graph_it_is_the_frozen_model(variant: str, rng: np.random.Generator) -> None:
    model = build(variant)
    captured = CapturedMACE(frozen(model), keep=2, capture=False)
    for walk in ("moves", "numbers"):
        for atoms in WALKS[walk](rng):
            data = zoo.graph(atoms, model)
            out = captured(data, compute_stress=True)
            found = {name: out[name].numpy() for name in ("energy", "node_energy", "forces", "stress", "virials")}
            assert_agree(found, reference([atoms], model), 1e-9, str(atoms))
    assert len(captured._programs) == 2


def test_tensors_written_in_place_are_read_again(rng: np.random.Generator) -> None:
    model = build()
    captured = CapturedMACE(frozen(model), capture=False)
    (atoms, *_) = WALKS["moves"](rng)
    data = zoo.graph(atoms, model)
    captured(data)
    atoms.positions += 0.02 * rng.normal(size=atoms.positions.shape)
    with torch.no_grad():
        data["positions"] += torch.from_numpy(atoms.positions) - data["positions"]
    out = captured(data)
    expected = frozen(model)(dict(data))
    assert torch.allclose(out["forces"], expected["forces"], rtol=0, atol=1e-12)


def test_only_what_is_asked_for_in_the_callers_dtype(rng: np.random.Generator) -> None:
    model = build(dtype=torch.float32)
    captured = CapturedMACE(frozen(model), capture=False)
    (atoms, *_) = WALKS["moves"](rng)
    data = zoo.graph(atoms, model, dtype=torch.float32)
    assert set(captured(data, compute_force=False)) == {"energy", "node_energy"}
    out = captured(data)
    assert set(out) == {"energy", "node_energy", "forces"} and out["forces"].dtype == torch.float32
    kept = out["forces"].clone()
    captured({**data, "positions": data["positions"] + 0.01 * torch.randn_like(data["positions"])})
    assert torch.equal(out["forces"], kept), "results stay valid after the next call"


def test_shifts_of_a_cell_that_changes(rng: np.random.Generator) -> None:
    """The list stays and its shifts do not: another tensor, then the same one written in place."""
    model = build()
    fast = frozen(model)
    captured = CapturedMACE(fast, capture=False)
    (atoms, *_) = WALKS["moves"](rng)
    data = zoo.graph(atoms, model)
    captured(data)
    strain = torch.eye(3, dtype=torch.float64) * 1.01
    data["shifts"], data["cell"] = data["shifts"] @ strain, data["cell"] @ strain
    assert torch.allclose(captured(data)["forces"], fast(dict(data))["forces"], rtol=0, atol=1e-12)
    data["shifts"] *= 1.01
    data["cell"] *= 1.01
    assert torch.allclose(captured(data)["forces"], fast(dict(data))["forces"], rtol=0, atol=1e-12)
