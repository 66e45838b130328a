"""Graphs for kernel benchmarks: a dense crystal, small molecules, a liquid, a star."""

from __future__ import annotations

import numpy as np
import torch
from ase.build import bulk
from matscipy.neighbours import neighbour_list


def diamond(natoms: int = 1000, cutoff: float = 6.0) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(nodes, sender, receiver) of rattled diamond: about 158 edges an atom, sorted by receiver."""
    cells = round((natoms / 8) ** (1 / 3))
    atoms = bulk("C", "diamond", a=3.567, cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=1)
    receiver, sender = neighbour_list("ij", atoms, cutoff)
    return len(atoms), torch.from_numpy(sender.astype(np.int64)), torch.from_numpy(receiver.astype(np.int64))


def random_degree(nodes: int, edges: int, seed: int = 0) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Random senders, the same number of edges at every receiver, senders within 100 nodes as in a molecule batch."""
    generator = torch.Generator().manual_seed(seed)
    receiver = torch.arange(nodes).repeat_interleave(edges // nodes)
    sender = (receiver + torch.randint(-50, 51, receiver.shape, generator=generator)) % nodes
    return nodes, sender, receiver


def star(leaves: int = 100_000) -> tuple[int, torch.Tensor, torch.Tensor]:
    """One node that receives from, and sends to, every other node."""
    others = torch.arange(1, leaves + 1)
    hub = torch.zeros_like(others)
    return leaves + 1, torch.cat([others, hub]), torch.cat([hub, others])


GRAPHS = {
    "diamond": lambda: diamond(1000),
    "diamond-64": lambda: diamond(64),
    "molecules": lambda: random_degree(20_000, 200_000),
    "water": lambda: random_degree(3_000, 180_000),
    "star": star,
    "complexes": lambda: random_degree(2_000, 40_000),
    "complexes-small": lambda: random_degree(40, 800),
}
