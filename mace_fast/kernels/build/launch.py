"""CUDA kernels on a device: loading machine code, and launching it on torch's current stream.

A launch goes through cuda.bindings and costs a few microseconds: there are some fifty in each step of
molecular dynamics. It neither synchronises nor allocates on the device, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from mace_fast.errors import BuildError, MissingToolError
from mace_fast.kernels.build.arguments import Signature
from mace_fast.kernels.build.nvrtc import INSTALL, CompiledCuda, compile_cuda, load_nvrtc
from mace_fast.kernels.build.resources import KernelResources
from mace_fast.kernels.build.sources import CudaSource

_PLAIN_SHARED = 48 * 1024  # bytes of shared memory that a block has without asking for more


@functools.cache
def _driver() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingToolError(
            f"launching CUDA kernels needs the package cuda-bindings ({error}); {INSTALL}"
        ) from error
    return driver


def _describe(status: Any) -> str:
    _, text = _driver().cuGetErrorString(status)
    return f"{status.name} ({text.decode() if text else 'no description'})"


def _checked(result: Sequence[Any], what: str) -> Any:
    """The value of a driver call. Raises BuildError with `what` and the driver's own words."""
    status, *values = result
    if status != 0:
        raise BuildError(f"{what}: {_describe(status)}")
    return values[0] if values else None


class _Kernel:
    """One entry point of a loaded module.

    parameters: bytes of each of its parameters; None where the driver cannot tell.
    shared_limit: bytes of dynamic shared memory that a launch may have as things stand.
    """

    def __init__(
        self, name: str, function: Any, resources: KernelResources, parameters: tuple[int, ...] | None
    ) -> None:
        self.name = name
        self.function = function
        self.resources = resources
        self.parameters = parameters
        self.shared_limit = _PLAIN_SHARED - resources.static_shared
        self.signatures: dict[tuple[type, ...], Signature] = {}

    def signature(self, kinds: tuple[type, ...]) -> Signature:
        """How arguments of these types are passed. Raises TypeError if the kernel does not take them."""
        self.signatures[kinds] = signature = Signature(self.name, kinds, self.parameters)
        return signature


class CudaModule:
    """The kernels of one source on one device. Made by load_cuda.

    source: what was compiled. index: the device's number. resources: what each entry point uses.
    """

    def __init__(self, source: CudaSource, index: int, compiled: CompiledCuda) -> None:
        self.source = source
        self.index = index
        self.resources = compiled.resources
        driver = _driver()
        self._launch_kernel = driver.cuLaunchKernel
        self._invalid_context = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
        # torch.cuda.current_stream() makes two Python objects; what torch's own compiler calls makes none.
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._current_device = torch._C._cuda_getDevice
        self._only_device = torch.cuda.device_count() == 1
        torch.cuda.init()
        what = f"loading the kernels of {source.name!r} on cuda:{index}"
        device = _checked(driver.cuDeviceGet(index), what)
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(device), what)
        self._most_shared = most_shared_bytes(index)
        self._kernels = self._load(driver, compiled, what)

    def _load(self, driver: ModuleType, compiled: CompiledCuda, what: str) -> dict[str, _Kernel]:
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _checked(driver.cuCtxPushCurrent(self._context), what)
        # Loading enqueues nothing; yet drivers before 580 may refuse it while a stream is captured.
        mode = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), what)
        try:
            status, module = driver.cuModuleLoadData(compiled.cubin)
            if status != 0:
                version = _checked(driver.cuDriverGetVersion(), what)
                raise BuildError(
                    f"{what}: {_describe(status)}. The driver is for CUDA {version // 1000}, the compiler is "
                    f"{load_nvrtc().identity}. If the driver is the older one, update it, or install the "
                    f'compiler of its generation: pip install "mace-fast[cuda12]"'
                )
            kernels = {}
            for name in self.source.entry_points:
                function = _checked(driver.cuModuleGetFunction(module, name.encode()), f"{what}: {name}")
                _load_now(driver, function, f"{what}: {name}")
                parameters = _parameter_sizes(driver, function)
                kernels[name] = _Kernel(name, function, compiled.resources[name], parameters)
            return kernels
        finally:
            driver.cuThreadExchangeStreamCaptureMode(mode)
            driver.cuCtxPopCurrent()

    def _kernel(self, name: str) -> _Kernel:
        try:
            return self._kernels[name]
        except KeyError:
            known = ", ".join(self._kernels)
            raise ValueError(f"source {self.source.name!r} has no kernel {name!r}, only {known}") from None

    def set_shared(self, entry: str, size: int) -> None:
        """Allow the blocks of `entry` `size` bytes of dynamic shared memory; beyond 48 KB this is opt-in.

        `launch` does it where needed. Raises BuildError if the device has less.
        """
        kernel = self._kernel(entry)
        if size <= kernel.shared_limit:
            return
        total = size + kernel.resources.static_shared
        if total > self._most_shared:
            raise BuildError(
                f"kernel {entry!r} asks for {total} bytes of shared memory per block, and cuda:{self.index} "
                f"has {self._most_shared}"
            )
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(kernel.function, attribute, size), f"kernel {entry!r}, shared memory")
        kernel.shared_limit = size

    def launch(
        self,
        entry: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Sequence[torch.Tensor | int | float | None],
    ) -> None:
        """Launch `entry` on torch's current stream of the module's device, and return at once.

        args: a tensor is passed as its data pointer (null if it is empty, or None), an int as long long, a
        float as double, an Int32 as int, a Float32 as float. A grid without blocks launches nothing.
        Raises TypeError for arguments that the kernel does not take, ValueError for a tensor on another
        device, BuildError if the driver refuses.
        """
        kernel = self._kernels.get(entry) or self._kernel(entry)
        kinds = tuple(map(type, args))
        signature = kernel.signatures.get(kinds) or kernel.signature(kinds)
        index = self.index
        values = signature.values(entry, args, index)
        if 0 in grid:
            return
        if shared_bytes > kernel.shared_limit:
            self.set_shared(entry, shared_bytes)
        slot = signature.slot()
        slot.pack(*values)
        call = (kernel.function, *grid, *block, shared_bytes, self._current_stream(index), slot.address, 0)
        status = self._invalid_context
        if self._only_device or self._current_device() == index:
            (status,) = self._launch_kernel(*call)
        # Another device is current, or the thread has not used CUDA yet: nothing was launched.
        if status == self._invalid_context:
            status = self._launch_in_context(call)
        signature.free.append(slot)
        if status != 0:
            raise BuildError(
                f"launching kernel {entry!r} on cuda:{index} with grid {grid}, block {block} and "
                f"{shared_bytes} bytes of dynamic shared memory ({kernel.resources}): {_describe(status)}"
            )

    def _launch_in_context(self, call: tuple[Any, ...]) -> Any:
        """Launch with the device's context made current for the while; the driver's status."""
        driver = _driver()
        _checked(driver.cuCtxPushCurrent(self._context), f"making cuda:{self.index} current")
        try:
            (status,) = self._launch_kernel(*call)
        finally:
            driver.cuCtxPopCurrent()
        return status


def _load_now(driver: ModuleType, function: Any, what: str) -> None:
    """Have a kernel loaded now: the driver does it at the first launch, which may be inside a capture."""
    try:
        result = driver.cuFuncLoad(function)
    except (AttributeError, RuntimeError):  # bindings, or driver, before CUDA 12.4: warm up before a capture
        return
    _checked(result, what)


def _parameter_sizes(driver: ModuleType, function: Any) -> tuple[int, ...] | None:
    """Bytes of each parameter of a kernel; None where it cannot be told."""
    sizes: list[int] = []
    while True:
        try:
            status, _, size = driver.cuFuncGetParamInfo(function, len(sizes))
        except (AttributeError, RuntimeError):  # bindings, or driver, before CUDA 12.4
            return None
        if status != 0:  # no parameter of this number
            return tuple(sizes)
        sizes.append(size)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether CUDA kernels serve this tensor. Ops ask here, so that tests can have the kernels emulated on a CPU."""
    return tensor.is_cuda


def architecture(device: torch.device) -> str:
    """What kernels for a CUDA device are compiled for, such as ``"sm_90"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def most_shared_bytes(index: int) -> int:
    """Shared memory that a block may ask for on a CUDA device."""
    driver, what = _driver(), f"shared memory of cuda:{index}"
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    found: int = _checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(index), what)), what)
    return found


def load_cuda(source: CudaSource, device: torch.device | str) -> CudaModule:
    """Compile for the architecture of `device` (or find in the cache) and load, once per source and device.

    Raises MissingToolError without a GPU, a driver or NVRTC, BuildError if the source does not compile or
    load, ValueError for a device that is not a CUDA device of this machine.
    """
    return _load(source, cuda_index(device))


def cuda_index(device: torch.device | str) -> int:
    """Which CUDA device of this machine is meant; raises what :func:`load_cuda` raises where there is none."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device {device}: CUDA kernels need a CUDA device")
    if not torch.cuda.is_available():
        raise MissingToolError(
            f"device {device}: there is no CUDA device here (torch.cuda.is_available() is false); use the "
            f"CPU, or install NVIDIA's driver and a torch that is built for CUDA"
        )
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _load(source: CudaSource, index: int) -> CudaModule:
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"device cuda:{index}: this machine has {count} CUDA devices")
    return CudaModule(source, index, compile_cuda(source, architecture(torch.device("cuda", index))))
