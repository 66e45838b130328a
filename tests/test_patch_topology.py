"""The memo of edges and species: right for every tensor that is not the one it remembers."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.ops.linear import arrange_indexed_weight
from mace_fast.patch.blocks.topology import Species, TopologyMemo, indexed_weight, without_species_gradient


def _edges(rng: np.random.Generator, nodes: int = 6, edges: int = 20) -> torch.Tensor:
    return torch.tensor(rng.integers(nodes, size=(2, edges)))


def _species_of_nodes(species: Species) -> torch.Tensor:
    return species.of_node if species.present is None else species.present[species.of_node]


def test_same_tensor_is_remembered(rng: np.random.Generator) -> None:
    memo, edges = TopologyMemo(), _edges(rng)
    first = memo.topology(edges, 6, fresh=False)
    assert memo.topology(edges, 6, fresh=False) is first
    assert memo.topology(edges, 6, fresh=True) is not first


def test_anything_else_is_not(rng: np.random.Generator) -> None:
    memo, edges = TopologyMemo(), _edges(rng)
    first = memo.topology(edges, 6, fresh=False)
    assert memo.topology(edges.clone(), 6, fresh=False) is not first
    first = memo.topology(edges, 6, fresh=False)
    assert memo.topology(edges, 7, fresh=False) is not first  # another number of nodes
    first = memo.topology(edges, 6, fresh=False)
    edges[0, 0] = 5 - edges[0, 0]  # written in place
    second = memo.topology(edges, 6, fresh=False)
    assert second is not first and int(second.graph.sender[0]) == int(edges[0, 0])
    edges.data = _edges(rng)  # another storage under the same object
    assert memo.topology(edges, 6, fresh=False) is not second


def test_a_dead_tensor_is_forgotten(rng: np.random.Generator) -> None:
    memo, edges = TopologyMemo(), _edges(rng)
    memo.topology(edges, 6, fresh=False)
    source = memo._graph.source  # type: ignore[union-attr]
    del edges
    assert source() is None


def test_writes_that_torch_does_not_count(rng: np.random.Generator) -> None:
    array = rng.integers(6, size=(2, 20))
    memo, edges = TopologyMemo(), torch.from_numpy(array)
    memo.topology(edges, 6, fresh=True)
    array[:] = 5 - array
    assert torch.equal(memo.topology(edges, 6, fresh=True).graph.sender.long(), edges[0])


def test_a_new_forward_forgets_the_species(rng: np.random.Generator) -> None:
    array = np.eye(3)[rng.integers(3, size=6)]
    memo, attributes, edges = TopologyMemo(), torch.from_numpy(array), _edges(rng)
    memo.species(attributes)
    array[:] = np.eye(3)[rng.integers(3, size=6)]
    memo.topology(edges, 6, fresh=True)
    assert torch.equal(_species_of_nodes(memo.species(attributes)), attributes.argmax(dim=1))


def test_tracing_remembers_nothing(rng: np.random.Generator) -> None:
    from torch._subclasses import FakeTensorMode

    memo = TopologyMemo()
    with FakeTensorMode() as mode:
        attributes = mode.from_tensor(torch.eye(4))
        memo.species(attributes)
    assert memo._species is None


def test_what_torchscript_traces_serves_other_species() -> None:
    memo = TopologyMemo()
    traced = torch.jit.trace(lambda attributes: _species_of_nodes(memo.species(attributes)), torch.eye(4)[[0, 2]])
    other = torch.tensor([3, 1])
    assert torch.equal(traced(torch.eye(4)[other]), other)


def test_inference_tensors(rng: np.random.Generator) -> None:
    memo = TopologyMemo()
    with torch.inference_mode():
        edges = _edges(rng).clone()
        first = memo.topology(edges, 6, fresh=False)
        assert memo.topology(edges, 6, fresh=False) is first


def test_copies_are_empty(rng: np.random.Generator) -> None:
    memo = TopologyMemo()
    memo.topology(_edges(rng), 6, fresh=False)
    for twin in (copy.deepcopy(memo), pickle.loads(pickle.dumps(memo))):
        assert twin is not memo and twin._graph is None


@pytest.mark.parametrize("choices", [[0, 1, 2, 3], [1, 3], [2]])
def test_species(choices: list[int], rng: np.random.Generator) -> None:
    memo = TopologyMemo()
    index = torch.tensor(np.concatenate([choices, rng.choice(choices, size=9)]))
    attributes = torch.eye(4)[index]
    species = memo.species(attributes)
    assert torch.equal(_species_of_nodes(species), index)
    assert memo.species(attributes) is species
    present = [0, 1, 2, 3] if species.present is None else species.present.tolist()
    assert present == choices
    assert species.groups.num_segments == len(choices)
    assert torch.equal(species.groups.row_ptr.diff(), torch.bincount(index, minlength=4)[choices])
    assert torch.equal(index[species.groups.order], index.sort().values)
    table = torch.tensor(rng.normal(size=(4, 2)))
    assert torch.equal(species.rows_of(table)[species.of_node], table[index])


def test_species_of_no_nodes() -> None:
    assert TopologyMemo().species(torch.zeros(0, 3)).of_node.shape == (0,)


@pytest.mark.parametrize("choices", [[0, 1, 2, 3], [0, 3], [2]])
def test_weights_of_the_species_that_occur(choices: list[int], rng: np.random.Generator) -> None:
    """Row by row those of the whole table, and so are their gradients."""
    linear = Linear.from_paths([(2, 0), (3, 1)], [(4, 0), (5, 1), (1, 0)], [(1, 1, 1.0), (0, 0, 1.0), (0, 2, 1.0)])
    species = TopologyMemo().species(torch.eye(4)[torch.tensor(choices)])
    weight = torch.tensor(rng.normal(size=4 * linear.weight_numel), requires_grad=True)
    chosen, whole = indexed_weight(weight, linear, 4, species), arrange_indexed_weight(weight, linear, 4)[choices]
    assert torch.equal(chosen, whole)
    cotangent = torch.tensor(rng.normal(size=whole.shape))
    for a, b in zip(*(torch.autograd.grad(t, weight, cotangent) for t in (chosen, whole)), strict=True):
        assert torch.equal(a, b)


def test_no_gradient_by_species(rng: np.random.Generator) -> None:
    """mace-torch asks for it without using it; whoever uses it gets NaN, and everything else is as
    without."""
    x = torch.tensor(rng.normal(size=(5, 3)), requires_grad=True)
    attributes = torch.eye(4, dtype=torch.float64)[torch.tensor(rng.integers(4, size=5))].requires_grad_()
    y = without_species_gradient(x**3, attributes)
    by_x, by_attributes = torch.autograd.grad((y**2).sum(), [x, attributes], create_graph=True)
    assert torch.allclose(by_x, 6 * x**5) and bool(by_attributes.isnan().all())
    (second,) = torch.autograd.grad(by_x.sum(), [x])
    assert torch.allclose(second, 30 * x**4)
    assert without_species_gradient(x, attributes.detach()) is x


@pytest.mark.parametrize("wrong", [0.5, 2.0, 0.0, float("nan")])
def test_species_that_are_not_one_hot(wrong: float, rng: np.random.Generator) -> None:
    attributes = torch.eye(4)[torch.tensor(rng.integers(4, size=9))]
    attributes[3] = torch.where(attributes[3] == 1, wrong, 0.0)
    with pytest.raises(ValueError, match="row 3"):
        TopologyMemo().species(attributes)
    attributes[3] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="row 3"):
        TopologyMemo().species(attributes)
