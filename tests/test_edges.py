"""Lists of edges: their order, and padded lists that are written over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mace_fast.inference.candidates import cartesian
from mace_fast.inference.edges import AtomsBySpecies, SortedEdges, group_atoms, sort_edges, sort_pairs
from mace_fast.inference.neighbours import Neighbours, Pairs, _in_order
from mace_fast.inference.packed import Packed
from mace_fast.inference.padded import padded_parts, refill, without_edges

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
    capacity, used = 300, 0
    kept = room(12, capacity, present)
    for count in (120, 250, 40, 0, 300, 299):
        atoms = some_atoms(rng, 12, present)
        edges = sort_edges(*some_edges(rng, atoms, count), atoms)
        before = addresses(kept)
        kept = refill(kept, max(used, count), edges)
        used = count
        assert addresses(kept) == before
        for name, values in edges._asdict().items():
            held = getattr(kept, name)
            if name in ("receiver_row", "sender_row"):
                assert held.tolist() == [*values.tolist(), capacity], (count, name)
            elif name in ("sender", "receiver", "sender_order", "sender_species", "pair") and values is not None:
                rest = range(count, capacity) if name == "sender_order" else [0] * (capacity - count)
                assert held.tolist() == [*values.tolist(), *rest], (count, name)
            elif name != "permutation":
                assert torch.equal(held, values) if isinstance(values, Tensor) else held == values, (count, name)
    too_many = sort_edges(*some_edges(rng, atoms, capacity + 1), atoms)
    with pytest.raises(ValueError, match="301 edges do not fit into 300"):
        refill(kept, used, too_many)


def room(atoms: int, capacity: int, present: tuple[int, ...] | None) -> SortedEdges:
    parts = padded_parts(atoms, capacity, KNOWN, with_pairs=present is not None)
    return without_edges(Packed(parts, torch.device("cpu")).on_device)


@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("graphs", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_lists_from_pairs_are_those_from_edges(
    count: int, graphs: int, present: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """Lattice sites, so that lengths are the same, images on both sides, an atom's own images, atoms without edges."""
    atoms = some_atoms(rng, 14, present)
    positions = rng.choice([0.0, 0.1, 1.7, -2.3], (12, 3))
    cells = rng.choice([-3.1, 2.0, 2.7, 4.0], (graphs, 3, 3))
    graph = np.sort(rng.integers(0, graphs, 12)) if graphs > 1 else None
    first = rng.integers(0, 12, count)
    second = rng.integers(0, 12, count)
    if graph is not None:
        second = np.array([rng.choice(np.flatnonzero(graph == graph[n])) for n in first], dtype=np.int64)
    # Both directions of each must differ from those of all others.
    candidates = np.column_stack([first, second, rng.integers(-3, 4, (count, 3))])
    taken = {}
    for i, j, *image in candidates.tolist():
        if i != j or any(image):
            taken.setdefault(min((i, j, *image), (j, i, *(-n for n in image))), (i, j, *image))
    rows = np.array(list(taken.values()), dtype=np.int64).reshape(-1, 5)
    pairs = Pairs(np.ascontiguousarray(rows[:, :2]), np.ascontiguousarray(rows[:, 2:].astype(np.int32)))

    ends = torch.from_numpy(pairs.atoms)
    index = torch.cat([ends.T.flip(0), ends.T], dim=1)
    images = torch.from_numpy(pairs.images)
    near = _in_order(Neighbours(index, torch.cat([-images, images])))
    sender, receiver = near.edge_index
    # As the list of a batch makes them, where operations are rounded one by one.
    of_edges = torch.zeros_like(receiver) if graph is None else torch.from_numpy(graph)[receiver]
    shifts = cartesian(near.shifts.to(torch.float64), of_edges, torch.from_numpy(cells))
    x, y, z = (torch.from_numpy(positions)[receiver] - torch.from_numpy(positions)[sender] + shifts).unbind(1)
    expected = sort_edges(near.edge_index, (x * x + y * y + z * z).sqrt(), atoms)

    found, found_images, found_shifts = sort_pairs(pairs, positions, cells, graph, atoms)
    for name, values in expected._asdict().items():
        if name != "permutation":
            value = getattr(found, name)
            assert torch.equal(value, values) if isinstance(values, Tensor) else value == values, name
    assert torch.equal(found_images, near.shifts[expected.permutation])
    assert torch.equal(found_shifts, shifts[expected.permutation])
    if count:
        pairs.atoms[0, 1] = 14
        with pytest.raises(ValueError, match=r"outside \[0, 14\)"):
            sort_pairs(pairs, positions, cells, graph, atoms)


def addresses(edges: SortedEdges) -> list[int]:
    return [value.data_ptr() for value in edges if isinstance(value, Tensor)]
