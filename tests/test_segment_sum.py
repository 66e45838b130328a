"""segment_sum, segment_gather and csr against plain float64 sums."""

from __future__ import annotations

import pytest
import torch

from mace_fast.kernels.build import compile_cuda
from mace_fast.kernels.ops.segment import Segments, csr, segment_gather, segment_sum, segments
from mace_fast.kernels.source.segment import FLOATS, IDS, segment_cuda, segment_lists_cuda

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-15}
# rows, segments, columns: nothing, one of each, more segments than rows, one crowded segment, wide and narrow
# rows
SHAPES = [
    (0, 0, 3),
    (0, 4, 3),
    (5, 4, 0),
    (1, 1, 1),
    (3, 50, 2),
    (1000, 7, 65),
    (2000, 2, 600),
    (5000, 1, 1),
    (4000, 31, 9),
    (3000, 100, 128),
]


def reference(values: torch.Tensor, index: torch.Tensor, num_segments: int) -> torch.Tensor:
    out = torch.zeros(num_segments, values.shape[1], dtype=torch.float64)
    return out.index_add(0, index.long(), values.double())


def close(out: torch.Tensor, expected: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> bool:
    """Within rounding of the sum of absolute values, element by element."""
    scale = reference(values.abs(), index, expected.shape[0])
    bound = TOLERANCE[out.dtype] * scale + torch.finfo(torch.float64).tiny
    return bool(((out.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "num_segments", "dim"), SHAPES)
def test_sum_of_rows(seed: int, dtype: torch.dtype, ids: torch.dtype, rows: int, num_segments: int, dim: int) -> None:
    index = torch.randint(max(num_segments, 1), (rows,)).to(ids)
    values = torch.randn(rows, dim, dtype=dtype)
    lists = segments(index, num_segments)
    out = segment_sum(values, lists)
    assert out.dtype == dtype and out.shape == (num_segments, dim)
    assert close(out, reference(values, index, num_segments), values, index)
    assert torch.equal(out, segment_sum(values, lists))
    assert torch.equal(segment_gather(out, lists), out[index.long()])


def test_one_crowded_segment_and_thread_counts(seed: int) -> None:
    index = torch.randint(20, (30000,))
    index[torch.rand(30000) < 0.8] = 7
    values = torch.randn(30000, 6)
    lists = segments(index, 20)
    out = segment_sum(values, lists)
    assert close(out, reference(values, index, 20), values, index)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(out, segment_sum(values, lists))
    finally:
        torch.set_num_threads(threads)


def test_csr_lists_rows_in_order(seed: int) -> None:
    index = torch.randint(9, (400,))
    order, row_ptr = csr(index, 12)
    assert torch.equal(order, torch.sort(index, stable=True).indices)
    assert row_ptr[0] == 0 and torch.equal(row_ptr.diff(), torch.bincount(index, minlength=12))


def test_sorted_rows_need_no_order(seed: int) -> None:
    index = torch.randint(5, (40,)).sort().values
    values = torch.randn(40, 3)
    lists = segments(index, 5)
    assert torch.equal(segment_sum(values, Segments(index, None, lists.row_ptr)), segment_sum(values, lists))
    narrow = Segments(index.int(), lists.order.int() if lists.order is not None else None, lists.row_ptr.int())
    assert torch.equal(segment_sum(values, narrow), segment_sum(values, lists))


def test_strided_values(seed: int) -> None:
    index = torch.randint(5, (40,))
    lists = segments(index, 5)
    wide = torch.randn(6, 80, dtype=torch.float64)
    for values in (wide[:, ::2].T, wide[:1, :40].T.expand(40, 3), wide[:, :40].T[:, 1:3]):
        assert close(segment_sum(values, lists), reference(values, index, 5), values, index)


@pytest.mark.parametrize("function", [segment_sum, segment_gather])
def test_derivatives(seed: int, function: object) -> None:
    lists = segments(torch.tensor([3, 0, 3, 1, 3, 0]), 5)
    rows = 6 if function is segment_sum else 5
    values = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)

    def curved(values: torch.Tensor) -> torch.Tensor:
        return function(values.pow(3), lists).pow(2)  # type: ignore[operator]

    assert torch.autograd.gradcheck(curved, (values,))
    assert torch.autograd.gradgradcheck(curved, (values,))


def test_ops_are_registered_completely(seed: int) -> None:
    index = torch.tensor([3, 0, 3, 1])
    lists = segments(index, 5)
    ops = torch.ops.mace_fast
    torch.library.opcheck(ops.csr.default, (index, 5))
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    sums = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.segment_sum.default, (rows, *lists))
    torch.library.opcheck(ops.segment_gather.default, (sums, *lists))


def test_errors_name_the_argument(seed: int) -> None:
    index = torch.tensor([0, 1, 1, 0])
    lists = segments(index, 2)
    values = torch.randn(4, 3)
    for wrong, kind, word in [
        ((index + 1, 2), ValueError, r"index has values from 1 to 2; they must lie in \[0, 2\)"),
        ((index - 1, 2), ValueError, r"index has values from -1 to 0"),
        ((index.float(), 2), TypeError, "index is torch.float32"),
        ((index[None], 2), ValueError, "index has shape"),
        ((index, -1), ValueError, "num_segments is -1"),
    ]:
        with pytest.raises(kind, match=word):
            csr(*wrong)
    assert lists.order is not None
    for values_, lists_, kind, word in [
        (values.half(), lists, TypeError, "values is torch.float16"),
        (values[:, 0], lists, ValueError, "values has shape"),
        (values[1:], lists, ValueError, "values has shape"),
        (values.to("meta"), lists, ValueError, "index is on cpu"),
        (values, lists._replace(order=lists.order[1:]), ValueError, "order has shape"),
        (values, lists._replace(order=lists.order.int()), TypeError, "order is torch.int32"),
        (values, lists._replace(order=lists.order + 1), ValueError, "order has an entry that is not a row"),
        (values, lists._replace(row_ptr=lists.row_ptr[:0]), ValueError, "row_ptr is empty"),
        (values, lists._replace(row_ptr=lists.row_ptr[:-1]), ValueError, "row_ptr does not begin at 0"),
        (values, lists._replace(row_ptr=torch.tensor([0, 3, 2, 4])), ValueError, "row_ptr decreases"),
    ]:
        with pytest.raises(kind, match=word):
            segment_sum(values_, lists_)
    with pytest.raises(ValueError, match="values has shape"):
        segment_gather(values, lists)
    with pytest.raises(ValueError, match="index has values from 1 to 2"):
        segment_gather(values[:2], lists._replace(ids=index + 1))


@pytest.mark.parametrize(
    ("arch", "ids"),
    [(arch, ids) for arch in ("sm_80", "sm_90", "sm_100") for ids in IDS]
    + [(arch, "int32") for arch in ("sm_86", "sm_89", "sm_120")],
)
def test_cuda_text_compiles_without_spills(arch: str, ids: str) -> None:
    for source in (*(segment_cuda(values, ids) for values in FLOATS), segment_lists_cuda(ids)):
        for entry, resources in compile_cuda(source, arch).resources.items():
            print(arch, source.name, entry, resources)
            assert resources.spill_stores == resources.spill_loads == resources.stack == 0, entry


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "num_segments", "dim"),
    [*SHAPES, (100_000, 1, 1), (100_000, 3, 512), (70_000, 1000, 3), (2000, 300, 5000)],
)
def test_cuda_sum_of_rows(
    seed: int, dtype: torch.dtype, ids: torch.dtype, rows: int, num_segments: int, dim: int
) -> None:
    index = torch.randint(max(num_segments, 1), (rows,)).to(ids)
    index[torch.rand(rows) < 0.5] = 0  # one crowded segment among small ones
    values = torch.randn(rows, dim, dtype=dtype)
    lists = segments(index.cuda(), num_segments)
    order, row_ptr = csr(index, num_segments)
    assert lists.order is not None
    assert torch.equal(lists.order.cpu(), order) and torch.equal(lists.row_ptr.cpu(), row_ptr)
    out = segment_sum(values.cuda(), lists)
    assert close(out.cpu(), reference(values, index, num_segments), values, index)
    assert torch.equal(out, segment_sum(values.cuda(), lists))
    assert torch.equal(segment_gather(out, lists), out[index.cuda().long()])


@pytest.mark.gpu
@pytest.mark.parametrize("num_segments", [3, 5000])
def test_cuda_id_out_of_range_is_nan(seed: int, num_segments: int) -> None:
    index = torch.randint(num_segments, (1000,), device="cuda")
    index[5] = num_segments
    lists = segments(index, num_segments)
    values = torch.randn(1000, 4, device="cuda")
    assert segment_sum(values, lists).isnan().all()
    gathered = segment_gather(torch.randn(num_segments, 4, device="cuda"), lists)
    assert gathered[5].isnan().all() and int(gathered.isnan().sum()) == 4
    index[5] = -1
    assert segment_sum(values, segments(index, num_segments)).isnan().all()


@pytest.mark.gpu
def test_cuda_derivatives_and_graph_capture(seed: int) -> None:
    lists = segments(torch.tensor([3, 0, 3, 1, 3, 0], device="cuda"), 5)
    values = torch.randn(6, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    curved = lambda values: segment_sum(values.pow(3), lists).pow(2)  # noqa: E731
    assert torch.autograd.gradcheck(curved, (values,))
    assert torch.autograd.gradgradcheck(curved, (values,))
    with torch.no_grad():
        expected = segment_sum(values, lists)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = segment_sum(values, segments(lists.ids, 5))
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
