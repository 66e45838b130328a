"""From kernel text to something that runs: NVRTC and the host compiler, a cache on disk, loading, launching.

Importing this needs no CUDA package, no GPU and no compiler; what is missing is named when it is needed.
"""

from __future__ import annotations

from mace_fast.kernels.build.arguments import Float32, Int32
from mace_fast.kernels.build.cache import default_cache_dir
from mace_fast.kernels.build.host import CompiledCpu, compile_cpu, cpu_available, cpu_threads, load_cpu
from mace_fast.kernels.build.launch import CudaModule, architecture, cuda_index, load_cuda, most_shared_bytes, on_gpu
from mace_fast.kernels.build.nvrtc import CompiledCuda, compile_cuda
from mace_fast.kernels.build.resources import KernelResources
from mace_fast.kernels.build.sources import CpuSource, CudaSource
from mace_fast.kernels.build.together import side_by_side

__all__ = [
    "CompiledCpu",
    "CompiledCuda",
    "CpuSource",
    "CudaModule",
    "CudaSource",
    "Float32",
    "Int32",
    "KernelResources",
    "architecture",
    "compile_cpu",
    "compile_cuda",
    "cpu_available",
    "cpu_threads",
    "cuda_index",
    "default_cache_dir",
    "load_cpu",
    "load_cuda",
    "most_shared_bytes",
    "on_gpu",
    "side_by_side",
]
