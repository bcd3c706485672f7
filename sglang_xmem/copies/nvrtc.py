"""Compile CUDA sources on the user's machine: NVRTC to a cubin, a disk cache of cubins, and the loader.

NVRTC comes with torch's CUDA wheels, so neither nvcc nor a toolkit is needed. `torch` and `cuda.bindings` are
imported on use: importing this module costs nothing on a machine without a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_xmem.cache import CacheError, cache_dir, read_own
from sglang_xmem.errors import CopyError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: A cache file is this magic, the SHA-256 of the rest, and the image, so that a truncated file is not loaded.
_MAGIC = b"sglang_xmem image 1\n"


def build(source: str, name: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Return the image of a CUDA source for a compute capability, from the cache or compiled now.

    Args:
        source: CUDA C++ text.
        name: file name for messages.
        macros: preprocessor definitions.
        capability: (major, minor) of the GPU.

    Returns: a cubin, or PTX text if NVRTC is older than the GPU's generation.

    Raises:
        CopyError: NVRTC is missing, does not support the architecture, or refuses the source.
    """
    nvrtc = _bindings("nvrtc")
    try:
        version = _checked(nvrtc, nvrtc.nvrtcVersion())
        supported = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:  # cuda-bindings' "no such library", of several classes; CopyError is one too
        raise CopyError(f"NVRTC, which compiles the copy kernel, is unavailable: {error}") from error
    options = [f"--gpu-architecture={_architecture(capability, supported)}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in sorted(macros.items())]

    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()[:32]
    try:
        path = cache_dir() / f"{Path(name).stem}-{key}.bin"
    except CacheError as error:
        logger.warning("sglang_xmem: kernels are recompiled at each start: %s", error)
        return _compile(nvrtc, source, name, options)
    image = _read(path)
    if image is None:
        image = _compile(nvrtc, source, name, options)
        _write(path, image)
    return image


def upload(content: bytearray, device: torch.device) -> torch.Tensor:
    """Copy a kernel's constant table to a GPU, uint8 (n,), and wait, so that launches on any stream can use it.

    Uses a separate stream, so that the wait is only for these bytes: the current stream may have a forward pass.
    """
    import torch

    stream = _uploads(device)
    with torch.cuda.stream(stream):
        table = torch.frombuffer(content, dtype=torch.uint8).to(device)
    stream.synchronize()
    return table


@functools.cache
def _uploads(device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device)


@functools.cache
def load(image: bytes, symbol: str, device: torch.device, shared_bytes: int = 0) -> Any:
    """Load a kernel of a compiled image into the primary context of `device`, which torch uses.

    Args:
        image: cubin or PTX.
        symbol: the kernel's (extern "C") name.
        shared_bytes: dynamic shared memory of a launch.

    Returns: a CUfunction. Its library stays loaded for the life of the process: unloading during a launch is an error,
        and the cache limits them to one per kind of kernel and GPU.

    Raises:
        CopyError: the driver refuses the image, or the shared memory.
    """
    import torch

    driver = _bindings("driver")
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # creates the context if necessary, and makes it current
        library = _checked(driver, driver.cuLibraryLoadData(image, [], [], 0, [], [], 0))
        kernel = _checked(driver, driver.cuLibraryGetKernel(library, symbol.encode()))
        function = _checked(driver, driver.cuKernelGetFunction(kernel))
        if shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver, driver.cuFuncSetAttribute(function, attribute, shared_bytes))
            # An idle multiprocessor divides its memory into L1 and shared memory when a block arrives, and keeps that
            # division until it is idle again. By default it would provide only the shared memory that this kernel's
            # block needs, and attention blocks could not run concurrently. A kernel without shared memory needs the L1,
            # where its loads in flight arrive.
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver, driver.cuFuncSetAttribute(function, attribute, 100))  # percent
    return function


def launch(
    function: Any, grid: int, threads: int, shared_bytes: int, stream: int, parameters: int, device: torch.device
) -> None:
    """Enqueue a kernel.

    Args:
        function: from `load`, for `device`.
        grid, threads: thread blocks, and threads of each.
        shared_bytes: dynamic shared memory of a block.
        stream: of `device`, as an address.
        parameters: address of the array of the parameters' addresses; read during the call.
        device: its context usually is, or last was, this thread's current one.

    Raises:
        CopyError: the driver refuses; nothing is enqueued.
    """
    call = _cu_launch_kernel()
    (status,) = call(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
    if status.value:
        import torch

        # This thread may have no CUDA context yet, or another GPU's. Checking only after a failure saves the check in
        # every other launch. torch.cuda.device alone would not create a context.
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).query()
            (status,) = call(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
    if status.value:
        raise CopyError(f"The driver refuses to launch a copy or checksum kernel: {status.name}.")


@functools.cache
def _cu_launch_kernel() -> Any:
    return _bindings("driver").cuLaunchKernel


def _bindings(name: str) -> Any:
    """Import module `cuda.bindings.<name>`."""
    import importlib

    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CopyError(f"the copier 'cuda' needs the package cuda-bindings: {error}") from error


def _checked(module: Any, answer: tuple[Any, ...]) -> Any:
    """Return the results of a cuda-bindings call, (status, result, ...): None, one value or a tuple.

    Raises:
        CopyError: any status but success.
    """
    status, *results = answer
    if status.value:
        raise CopyError(f"{type(status).__name__} {status.name} from {module.__name__}.")
    return results[0] if len(results) == 1 else tuple(results)


def _architecture(capability: tuple[int, int], supported: list[int]) -> str:
    """Return NVRTC's name of the newest target for a GPU.

    A cubin runs on the same major version with an equal or higher minor one; for another major the driver must compile.
    """
    major, minor = capability
    best = max((arch for arch in supported if arch <= 10 * major + minor), default=None)
    if best is None:
        raise CopyError(f"NVRTC has no target for a GPU of compute capability {major}.{minor}.")
    return f"{'sm' if best // 10 == major else 'compute'}_{best}"


def _compile(nvrtc: Any, source: str, name: str, options: list[str]) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, None, None))
    try:
        encoded = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
        if status.value:
            log = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").strip("\0 \n")
            errors = re.findall(r"^.*\berror\b.*$", text, flags=re.MULTILINE) or [text]
            raise CopyError(f"NVRTC refuses {name} with {' '.join(options)}: {errors[0]}")
        if "=sm_" in options[0]:
            size, get = nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN
        else:
            size, get = nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX
        image = b" " * _checked(nvrtc, size(program))
        _checked(nvrtc, get(program, image))
        return image
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(path: Path) -> bytes | None:
    """Read the image of a cache file; None if it is missing, incomplete, or others can write to it."""
    content = read_own(path)
    if content is None:
        return None
    digest, image = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if not content.startswith(_MAGIC) or hashlib.sha256(image).digest() != digest:
        logger.warning("sglang_xmem: %s is damaged and will be rewritten", path)
        return None
    return image


def _write(path: Path, image: bytes) -> None:
    """Write an image to the cache atomically; after a failure the next start recompiles."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError as error:
        logger.info("sglang_xmem: compiled kernel not cached in %s: %s", path.parent, error)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
