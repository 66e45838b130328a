"""Kernels that a frozen program is made of beside the contractions: geometry, readouts, sums. Against plain torch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mace.modules.radial import ZBLBasis
from oracles import assert_close

import mace_fast._mace  # noqa: F401  (before every other import of mace)
from mace_fast.inference.repulsion import freeze_repulsion
from mace_fast.kernels.build import CudaSource, compile_cuda
from mace_fast.kernels.ops.geometry import edge_geometry, edge_gradient
from mace_fast.kernels.ops.graph import edge_graph
from mace_fast.kernels.ops.harmonics import edge_harmonics
from mace_fast.kernels.ops.normalise import normalise_rows
from mace_fast.kernels.ops.readout import node_energies
from mace_fast.kernels.ops.repulsion import nuclear_repulsion
from mace_fast.kernels.ops.segment import segments
from mace_fast.kernels.ops.totals import atom_forces, structure_energies, structure_stress
from mace_fast.kernels.source.geometry import geometry_cuda, gradient_cuda
from mace_fast.kernels.source.normalise import normalise_cuda
from mace_fast.kernels.source.readout import readout_cuda
from mace_fast.kernels.source.repulsion import repulsion_cuda
from mace_fast.kernels.source.totals import totals_cuda
from mace_fast.verification.graphs import default_dtype

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]
NAN = float("nan")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lmax", [1, 3])
def test_geometry(seed: int, device: str, dtype: torch.dtype, lmax: int) -> None:
    positions = torch.randn(20, 3, dtype=torch.float64, device=device) + 1e5  # float32 would know nothing of them
    sender, receiver = torch.randint(20, (2, 301), dtype=torch.int32, device=device)
    shifts = 3 + torch.randn(301, 3, dtype=torch.float64, device=device)
    vectors, radius, y = edge_geometry(positions, shifts, sender, receiver, lmax, dtype)
    exact = positions[receiver.long()] - positions[sender.long()] + shifts
    assert torch.equal(vectors, exact.to(dtype))
    wanted_radius, wanted_y = edge_harmonics(vectors, lmax)
    assert torch.equal(radius, wanted_radius) and torch.equal(y, wanted_y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_divided_by_their_density(seed: int, device: str, dtype: torch.dtype) -> None:
    for rows, columns, slope, offset in ((37, 300, 1.0, 1.0), (5, 1, 0.3, 20.0), (0, 4, 1.0, 1.0)):
        x, g = (torch.randn(rows, columns, dtype=torch.float64, device=device) for _ in range(2))
        exact = (x.requires_grad_(), torch.rand(rows, 1, dtype=torch.float64, device=device).requires_grad_())
        expected = exact[0] / (slope * exact[1] + offset)
        leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
        got = normalise_rows(leaves[0], leaves[1], slope, offset)
        assert_close(got, expected)
        gradients = torch.autograd.grad(got, leaves, g.to(dtype))
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, g), strict=True):
            assert_close(ours, theirs, terms=columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repulsion_of_nuclei(seed: int, device: str, dtype: torch.dtype) -> None:
    """mace-torch's, with edges inside and outside of its reach; edges that no row lists do not count."""
    numbers = torch.tensor([1, 6, 29, 92], device=device)
    for p, atoms, listed in ((6, 40, 2000), (2, 3, 200), (5, 4, 0)):
        block = ZBLBasis(p=p).double().to(device)
        species = torch.randint(len(numbers), (atoms,), device=device)
        sender, receiver = torch.randint(atoms, (2, listed + 5), device=device)
        receiver = receiver.sort().values
        row = torch.searchsorted(receiver[:listed], torch.arange(atoms + 1, device=device)).to(torch.int32)
        radius = (0.3 + 4 * torch.rand(listed + 5, dtype=torch.float64, device=device)).to(dtype).double()
        exact = radius[:listed].clone().requires_grad_()
        index = torch.stack([sender, receiver])[:, :listed]
        one_hot = torch.nn.functional.one_hot(species, len(numbers)).double()
        with default_dtype(torch.float64):  # in which it multiplies the charges
            expected = block(exact[:, None], one_hot, index, numbers)
        model = SimpleNamespace(_modules={"pair_repulsion_fn": block}, atomic_numbers=numbers)
        model.parameters = partial(iter, [radius.to(dtype)])
        form = freeze_repulsion(model)
        assert form is not None and form.table.dtype == dtype
        radius[listed:] = NAN
        leaf = radius.to(dtype).requires_grad_()
        got = nuclear_repulsion(form, leaf, species, sender.to(torch.int32), row)
        assert_close(got, expected, terms=100)
        g = torch.randn(atoms, dtype=torch.float64, device=device)
        (gradient,) = torch.autograd.grad(got, leaf, g.to(dtype))
        (wanted,) = torch.autograd.grad(expected, exact, g)
        assert_close(gradient[:listed], wanted, terms=100)
        assert (expected > 0).all() == (listed > 0)
    row = torch.tensor([0, 5, 5, 5, 5], dtype=torch.int32, device=device)
    found = nuclear_repulsion(form, torch.full_like(leaf, NAN), species, sender.to(torch.int32), row)
    assert torch.isnan(found).tolist() == [True, False, False, False]


def test_other_repulsions_have_no_form() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    for modules in ({}, {"pair_repulsion_fn": torch.nn.Identity()}):
        assert freeze_repulsion(SimpleNamespace(_modules=modules, parameters=lambda: iter([parameter]))) is None


def test_what_has_no_density_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density has shape \(3,\); .*\(3, 1\)"):
        normalise_rows(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(TypeError, match="density is torch.float64"):
        normalise_rows(torch.ones(3, 2), torch.ones(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("users", [(1, 1), (3, 2), (0, 1), (1, 0)])
def test_gradient_of_several_users(seed: int, device: str, dtype: torch.dtype, users: tuple[int, int]) -> None:
    edges, lmax = 211, 3
    vectors = (torch.randn(edges, 3, dtype=torch.float64) * 2).to(device)
    # As the convolution hands them over: columns of wider rows.
    both = [torch.randn(edges, 17, dtype=torch.float64, device=device) for _ in range(max(users))]
    exact = vectors.clone().requires_grad_()
    radius, y = edge_harmonics(exact, lmax)
    dradius, dy = [b[:, -1] for b in both[: users[0]]], [b[:, :-1] for b in both[: users[1]]]
    total = sum((radius * d).sum() for d in dradius) + sum((y * d).sum() for d in dy)
    (expected,) = torch.autograd.grad(total, exact)
    both = [b.to(dtype) for b in both]
    for b in both:
        b[200:] = NAN
    dradius, dy = [b[:, -1] for b in both[: users[0]]], [b[:, :-1] for b in both[: users[1]]]
    count = torch.tensor([200], dtype=torch.int32, device=device)
    got = edge_gradient(vectors.to(dtype), dradius, dy, lmax, count)
    assert_close(got[:200], expected[:200], terms=1e4)
    assert torch.equal(got[200:], torch.zeros_like(got[200:]))
    assert torch.isnan(edge_gradient(vectors.to(dtype), dradius, dy, lmax)[200:]).all()


def test_geometry_refuses() -> None:
    positions, shifts = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    index = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"positions is torch\.float32"):
        edge_geometry(positions.float(), shifts, index, index, 3, torch.float32)
    with pytest.raises(TypeError, match=r"sender is torch\.int64"):
        edge_geometry(positions, shifts, index.long(), index, 3, torch.float32)
    with pytest.raises(ValueError, match="shifts has shape"):
        edge_geometry(positions, shifts[:3], index, index, 3, torch.float32)
    with pytest.raises(TypeError, match="dtype is"):
        edge_geometry(positions, shifts, index, index, 3, torch.float16)
    with pytest.raises(ValueError, match="lmax is 7"):
        edge_geometry(positions, shifts, index, index, 7, torch.float32)
    with pytest.raises(ValueError, match=r"dy\[0\] has shape"):
        edge_gradient(shifts, [], [torch.zeros(4, 9, dtype=torch.float64)], 3)
    with pytest.raises(TypeError, match="count"):
        edge_gradient(shifts, [], [torch.zeros(4, 16, dtype=torch.float64)], 3, torch.tensor([4]))
    assert edge_geometry(positions, shifts[:0], index[:0], index[:0], 3, torch.float32)[2].shape == (0, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_node_energies(seed: int, device: str, dtype: torch.dtype, gradient: bool) -> None:
    nodes = 33
    exact = {
        "wide": torch.randn(nodes, 70, requires_grad=True, dtype=torch.float64),
        "short": torch.randn(nodes, 40, requires_grad=True, dtype=torch.float64),
        "other": torch.randn(nodes, 3, requires_grad=True, dtype=torch.float64),
    }
    linear, w1, w2, v1, v2 = (torch.randn(*s, dtype=torch.float64) for s in ((2, 45), (16, 40), (16,), (5, 2), (5,)))
    extra, scale, shift, base = torch.randn(4, nodes, dtype=torch.float64)
    head = torch.randint(2, (nodes,))
    silu = torch.nn.functional.silu
    terms = extra + (exact["wide"][:, :45] * linear[head]).sum(1)
    terms = terms + silu(exact["short"] @ w1.T) @ w2 + silu(exact["other"][:, :2] @ v1.T) @ v2
    expected = scale * terms + shift
    gradients = torch.autograd.grad(expected.sum(), (exact["short"], exact["other"]))

    def cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.detach().to(device, dtype) for t in tensors]

    inter, energy, got = node_energies(
        cast(*exact.values()),
        cast(linear, w1, v1),
        [None, *cast(w2, v2)],
        *cast(extra),
        head.to(device),
        *cast(scale, shift),
        base.to(device),
        want_gradient=gradient,
    )
    assert inter.dtype == energy.dtype == torch.float64
    assert_close(inter.to(dtype), expected, terms=200)
    assert_close(energy.to(dtype), expected.detach() + base, terms=200)
    assert len(got) == (2 if gradient else 0)
    for one, other in zip(got, gradients, strict=gradient):
        assert_close(one, other, terms=200)


def test_node_energies_far_out_and_without_readouts() -> None:
    """silu and its gradient where the exponential overflows; a model whose readouts are all computed elsewhere."""
    x = torch.tensor([[-1e4], [1e4], [0.0]])
    one, zero, base = torch.ones(3), torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    head = torch.zeros(3, dtype=torch.int64)
    inter, _, (dx,) = node_energies(
        [x], [torch.ones(1, 1)], [torch.ones(1)], None, head, one, zero, base, want_gradient=True
    )
    assert inter.tolist() == [0.0, 1e4, 0.0] and dx.flatten().tolist() == [0.0, 1.0, 0.5]
    inter, energy, rest = node_energies([], [], [], one, head, 2 * one, one, base + 4, want_gradient=True)
    assert inter.tolist() == [3.0] * 3 and energy.tolist() == [7.0] * 3 and not rest


def test_node_energies_refuse() -> None:
    x, one, head = torch.zeros(2, 4), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    base = torch.zeros(2, dtype=torch.float64)

    def run(first: torch.Tensor, second: torch.Tensor | None, **changes: torch.Tensor) -> None:
        nodewise = {"head": head, "scale": one, "shift": one, "base": base, **changes}
        node_energies([x], [first], [second], None, **nodewise, want_gradient=False)

    run(torch.zeros(1, 4), None)
    with pytest.raises(ValueError, match="width 5"):
        run(torch.zeros(1, 5), None)
    with pytest.raises(ValueError, match="65 hidden"):
        run(torch.zeros(65, 4), torch.zeros(65))
    with pytest.raises(ValueError, match=r"second\[0\]"):
        run(torch.zeros(3, 4), torch.zeros(2))
    with pytest.raises(TypeError, match="head"):
        run(torch.zeros(1, 4), None, head=head.int())
    with pytest.raises(TypeError, match="shift"):
        run(torch.zeros(1, 4), None, shift=one.double())
    with pytest.raises(ValueError, match="base has shape"):
        run(torch.zeros(1, 4), None, base=base[:1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [0, 9])
def test_forces_and_stress(seed: int, device: str, dtype: torch.dtype, padding: int) -> None:
    atoms, edges = 37, 1500
    sender = torch.randint(atoms - 1, (edges,), device=device)  # one atom without edges
    receiver = torch.randint(atoms - 1, (edges,), device=device).sort().values
    graph = edge_graph(sender, receiver, atoms, atoms)
    vectors = torch.randn(edges + padding, 3, dtype=torch.float64, device=device)
    derivatives = torch.randn(edges + padding, 3, dtype=torch.float64, device=device)
    vectors, derivatives = vectors.to(dtype), derivatives.to(dtype)
    derivatives[edges:] = NAN
    tail = torch.arange(edges, edges + padding, dtype=torch.int32, device=device)
    lists = (graph.row, torch.cat([graph.sender_order, tail]), graph.sender_row)
    forces, virials = atom_forces(derivatives, *lists, atoms, vectors)
    g, r = derivatives[:edges].double(), vectors[:edges].double()
    zeros = torch.zeros(atoms, 3, dtype=torch.float64, device=device)
    expected = zeros.index_add(0, sender, g) - zeros.index_add(0, receiver, g)
    assert_close(forces, expected, terms=100)
    assert forces.dtype == torch.float64 and torch.equal(forces[-1], zeros[-1])
    assert torch.equal(atom_forces(derivatives, *lists, atoms)[0], forces), "with and without virials"
    outer = torch.einsum("ea,eb->eab", r, g)
    assert_close(virials, torch.zeros(atoms, 3, 3, dtype=torch.float64, device=device).index_add(0, receiver, outer))

    batch = torch.randint(3, (atoms,), device=device)
    by_structure = segments(batch, 4)  # one structure without atoms
    assert by_structure.order is not None
    cells = torch.randn(4, 3, 3, dtype=torch.float64, device=device)
    cells[2] = 0
    total, stress = structure_stress(virials, by_structure.order, by_structure.row_ptr, cells)
    strain = torch.zeros(4, 3, 3, dtype=torch.float64, device=device).index_add(0, batch, virials)
    strain = (strain + strain.transpose(1, 2)) / 2
    assert_close(total, -strain, terms=100)
    volume = torch.linalg.det(cells).abs()
    assert_close(stress[[0, 1, 3]], (strain / volume[:, None, None])[[0, 1, 3]], terms=100)
    assert torch.equal(stress[2], torch.zeros_like(stress[2])), "no volume"

    values, base = torch.randn(atoms, dtype=torch.float64, device=device), torch.ones(4, dtype=torch.float64).to(device)
    sums, energies = structure_energies(values, by_structure.order, by_structure.row_ptr, base)
    assert_close(sums, torch.zeros_like(base).index_add(0, batch, values))
    assert torch.equal(energies, sums + base)


def test_a_structure_of_many_atoms(seed: int) -> None:
    values = torch.randn(5000, dtype=torch.float64)
    by_structure = segments(torch.zeros(5000, dtype=torch.int64), 1)
    assert by_structure.order is not None
    sums, _ = structure_energies(values, by_structure.order, by_structure.row_ptr, torch.zeros(1, dtype=torch.float64))
    assert_close(sums, values.sum()[None], terms=5000)


def test_totals_refuse() -> None:
    derivatives, row = torch.zeros(4, 3), torch.zeros(3, dtype=torch.int32)
    order = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(TypeError, match="sender_order"):
        atom_forces(derivatives, row, order.long(), row, 2)
    with pytest.raises(ValueError, match="receiver_row has shape"):
        atom_forces(derivatives, row, order, row, 3)
    with pytest.raises(TypeError, match="vectors"):
        atom_forces(derivatives, row, order, row, 2, derivatives.double())
    values, long = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="values"):
        structure_energies(values.float(), long, long[:2], values[:1])
    with pytest.raises(ValueError, match="base has shape"):
        structure_energies(values, long, long[:2], values)
    with pytest.raises(ValueError, match="cells has shape"):
        structure_stress(values[:, None, None].expand(4, 3, 3), long, long[:2], torch.zeros(2, 3, 3).double())


@pytest.mark.parametrize(
    ("arch", "ctype"),
    [(arch, ctype) for arch in ("sm_80", "sm_90", "sm_100") for ctype in ("float", "double")]
    + [(arch, "float") for arch in ("sm_86", "sm_89", "sm_120")],
)
def test_kernels_compile_without_spills(arch: str, ctype: str) -> None:
    sources: list[CudaSource] = [
        geometry_cuda(3, ctype),
        gradient_cuda(3, ctype, 3, 2),
        normalise_cuda(ctype),
        readout_cuda(ctype, (0, 16)),
        repulsion_cuda(ctype),
        totals_cuda(ctype),
    ]
    for source in sources:
        for entry, resources in compile_cuda(source, arch).resources.items():
            assert resources.spill_stores == 0, f"{entry}: {resources}"
