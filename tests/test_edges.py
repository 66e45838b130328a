"""Lists of edges: their order, and padded lists that are written over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mace_fast.inference.edges import AtomsBySpecies, SortedEdges, group_atoms, pad, refill, sort_edges

KNOWN = 7
PRESENT = (0, 2, 3, 6)


def some_atoms(rng: np.random.Generator, count: int, present: tuple[int, ...] | None) -> AtomsBySpecies:
    return group_atoms(torch.from_numpy(rng.choice(PRESENT, count)), KNOWN, present)


def some_edges(rng: np.random.Generator, atoms: AtomsBySpecies, count: int) -> tuple[Tensor, Tensor]:
    """Few lengths, so that many are the same, some that differ by less than float32 tells apart, and some that are no
    numbers, of either sign."""
    index = torch.from_numpy(rng.integers(0, atoms.species.shape[0], (2, count)))
    choices = [0.0, 1.5, 1.5 + 1e-12, 3.25, np.inf, np.nan, np.copysign(np.nan, -1.0)]
    return index, torch.from_numpy(rng.choice(choices, count))


@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_order(count: int, present: tuple[int, ...] | None, rng: np.random.Generator) -> None:
    atoms = some_atoms(rng, 9, present)
    index, lengths = some_edges(rng, atoms, count)
    sender, receiver = index.numpy()
    order = np.lexsort((np.arange(count), lengths.to(torch.float32).numpy(), receiver))
    edges = sort_edges(index, lengths, atoms)
    sender, receiver = sender[order], receiver[order]
    by_sender = np.argsort(sender, kind="stable")
    species = atoms.species.numpy()
    expected = {
        "permutation": order,
        "sender": sender,
        "receiver": receiver,
        "receiver_row": np.searchsorted(receiver, np.arange(10)),
        "sender_order": by_sender,
        "sender_row": np.searchsorted(sender[by_sender], np.arange(10)),
        "species": species,
        "sender_species": species[sender],
    }
    for name, values in expected.items():
        assert np.array_equal(getattr(edges, name), values), name
    assert np.array_equal(species[edges.species_order], np.sort(species))
    assert edges.species_row.tolist() == np.searchsorted(np.sort(species), np.arange(KNOWN + 1)).tolist()
    if present is None:
        assert edges.pair is None and edges.present == ()
    else:
        places = np.searchsorted(present, species)
        assert edges.pair is not None and edges.present == present
        assert np.array_equal(edges.pair, places[sender] * len(present) + places[receiver])


@pytest.mark.parametrize("present", [None, PRESENT])
def test_lists_that_are_written_over_are_those_that_would_be_made(
    present: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    capacity, used, kept = 300, 0, None
    for count in (120, 250, 40, 0, 300, 299):
        atoms = some_atoms(rng, 12, present)
        edges = sort_edges(*some_edges(rng, atoms, count), atoms)
        fresh = pad(edges, capacity)
        if kept is None:
            kept = pad(edges, capacity)
        before = addresses(kept)
        kept = refill(kept, used, edges)
        used = count
        assert addresses(kept) == before
        for name, value in fresh._asdict().items():
            held = getattr(kept, name)
            assert torch.equal(held, value) if isinstance(value, Tensor) else held == value, (count, name)
    too_many = sort_edges(*some_edges(rng, atoms, capacity + 1), atoms)
    for attempt in (lambda: pad(too_many, capacity), lambda: refill(kept, used, too_many)):
        with pytest.raises(ValueError, match="301 edges do not fit into 300"):
            attempt()


def addresses(edges: SortedEdges) -> list[int]:
    return [value.data_ptr() for value in edges if isinstance(value, Tensor)]
