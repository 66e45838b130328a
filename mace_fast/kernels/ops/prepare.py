"""Compiling the kernels of ops before they are called: side by side, instead of one after the other at first calls.

Machine code goes to the cache on disk, from where first calls load it. Small kernels that many models share are left to
first calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from mace_fast.kernels.build import CpuSource, CudaSource, architecture, compile_cpu, compile_cuda, cuda_index
from mace_fast.kernels.build.together import Done, side_by_side
from mace_fast.kernels.description.channelwise import ChannelwiseTensorProduct
from mace_fast.kernels.description.linear import Linear
from mace_fast.kernels.description.polynomial import SymmetricContraction
from mace_fast.kernels.source.channelwise import PASSES, Variant, cpu_source, gpu_passes
from mace_fast.kernels.source.fitted import fitted_source
from mace_fast.kernels.source.linear import TILINGS, aligned_multiplicities, forward_cuda
from mace_fast.kernels.source.symmetric import symmetric_cpu, symmetric_cuda

Description = ChannelwiseTensorProduct | SymmetricContraction | Linear

Source = Callable[[], CpuSource | CudaSource]
"""Makes a source; fitting one to a target may compile others."""

_IDS = "int64"  # of species and of lists of nodes by species, as models give them
_KINDS = ("evaluate", "gradient", "weights")


def prepare(
    descriptions: Iterable[Description],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    order: int = 2,
    done: Done | None = None,
) -> None:
    """Compile what contractions will need, side by side on all processors.

    Args:
        descriptions: of the contractions.
        dtype: float32 or float64.
        device: a CPU or a CUDA device.
        order: of the highest derivative that will be asked for: 0, 1 or 2.
        done: called with the number of kernels that are compiled, and of all.

    Raises:
        ValueError: the order is another.
        BuildError, MissingToolError, CacheError: as for the first call of a kernel.
    """
    arch = target(device)
    compile_sources([s for d in descriptions for s in sources(d, dtype, arch, order)], arch, done)


def target(device: torch.device | str) -> str | None:
    """What is compiled for: ``"sm_90"``, say, or None for the CPU. Raises as ``load_cuda`` without such a GPU."""
    device = torch.device(device)
    return None if device.type == "cpu" else architecture(torch.device("cuda", cuda_index(device)))


def compile_sources(makers: Sequence[Source], arch: str | None, done: Done | None = None) -> None:
    """Compile into the cache; see ``prepare``."""

    def build(make: Source) -> None:
        source = make()
        if isinstance(source, CpuSource):
            compile_cpu(source)
        else:
            assert arch is not None
            compile_cuda(source, arch)

    side_by_side([partial(build, make) for make in makers], done)


def sources(description: Description, dtype: torch.dtype, arch: str | None, order: int = 2) -> list[Source]:
    """The kernels of a contraction and of its derivatives up to an order."""
    if order not in (0, 1, 2):
        raise ValueError(f"order is {order}; kernels are prepared for derivatives of order 0, 1 and 2")
    if isinstance(description, ChannelwiseTensorProduct):
        passes = PASSES if arch is None else gpu_passes(description, dtype.itemsize)
        return _channelwise(description, dtype, arch, passes[: (1, 2, None)[order]])
    if isinstance(description, SymmetricContraction):
        return _symmetric(description, dtype, arch, order)
    return [] if arch is None else _linear(description, dtype, order)  # on the CPU a linear is BLAS


def spline_sources(
    description: ChannelwiseTensorProduct, dtype: torch.dtype, arch: str | None, coefficients: int, want_x: bool
) -> list[Source]:
    """The kernels of a convolution whose weights are splines, and of its gradient; ``want_x``: of x as well."""
    passes = (Variant(False, False, order=coefficients), Variant(False, True, want_x, True, False, coefficients))
    return _channelwise(description, dtype, arch, passes)


def _channelwise(
    description: ChannelwiseTensorProduct, dtype: torch.dtype, arch: str | None, passes: Sequence[Variant]
) -> list[Source]:
    if arch is None:
        return [partial(cpu_source, description, dtype.itemsize, variant) for variant in passes]

    def fitted(variant: Variant, arch: str) -> CudaSource:
        return fitted_source(description, dtype.itemsize, variant, arch)[0]

    # The longest to compile comes last among the passes: begun first, it has company until all is done.
    return [partial(fitted, variant, arch) for variant in reversed(passes)]


def _symmetric(description: SymmetricContraction, dtype: torch.dtype, arch: str | None, order: int) -> list[Source]:
    source = symmetric_cpu if arch is None else symmetric_cuda
    kinds = [(kind, False) for kind in _KINDS[: (1, 3, 3)[order]]] + [(kind, True) for kind in _KINDS if order == 2]
    return [partial(source, description.polynomial, kind, tangent, _name(dtype), _IDS) for kind, tangent in kinds]


def _linear(description: Linear, dtype: torch.dtype, order: int) -> list[Source]:
    """With the tiles of small systems, which the proof of a conversion runs on."""
    name = _name(dtype)
    maps = (description, description.transposed) if order else (description,)
    return [partial(forward_cuda, d, name, _IDS, TILINGS[name][-1]) for d in maps if aligned_multiplicities(d, name)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
