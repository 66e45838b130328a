"""Models whose product basis spans the same space with other vectors, as mace-torch's reduced basis does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracles import assert_close
from step_cases import as_structures, build, crystal, frozen, reference

from mace_fast import convert, zoo
from mace_fast.inference import Stepper


def in_another_basis(model: torch.nn.Module, rng: np.random.Generator) -> torch.nn.Module:
    """The same function with every U matrix as U Q and its weights as Q^T w, for random orthogonal Q."""
    turned = copy.deepcopy(model)
    changed = 0
    with torch.no_grad():
        for product in turned.products:
            for part in product.symmetric_contractions.contractions:
                for nu in range(part.correlation, 0, -1):
                    weights = part.weights_max if nu == part.correlation else part.weights[part.correlation - 1 - nu]
                    paths = weights.shape[1]
                    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(paths, paths)))[0])
                    part.get_buffer(f"U_matrix_{nu}").copy_(part.U_tensors(nu) @ turn)
                    weights.copy_(torch.einsum("kp,zkc->zpc", turn, weights))
                    changed += paths > 1
    assert changed, "every basis is of one vector"
    return turned


@pytest.mark.parametrize("variant", ["L1_lmax3", "agnostic_product"])
def test_any_basis_of_the_product_is_taken(variant: str, rng: np.random.Generator) -> None:
    """Tables are read from the live model: a basis that is known by heart would give another model."""
    model = build(variant)
    turned, atoms = in_another_basis(model, rng), crystal(rng)
    expected = reference([atoms], turned)
    same = reference([atoms], model)
    out = convert(turned, verify=False)(zoo.graph(atoms, turned), compute_stress=True)
    (found,) = Stepper([frozen(turned)])(as_structures([atoms], turned), stress=True)
    for name in ("energy", "forces", "stress"):
        right = torch.from_numpy(expected[name])
        # mace-torch itself agrees with itself in the other basis to some roundings of sums over a thousand products.
        assert_close(torch.from_numpy(same[name]), right, terms=1e5)
        assert_close(out[name], right, terms=1e5)
        assert_close(torch.from_numpy(found[name]), right, terms=1e6)
