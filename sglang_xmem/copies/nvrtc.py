"""CUDA sources compiled on the user's machine: NVRTC to a cubin, a cache of cubins on disk, and the loader.

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

#: A cache file is this, the SHA-256 of the rest, and the image: what a crash or a full disk left behind is not loaded.
_MAGIC = b"sglang_xmem image 1\n"


def build(source: str, name: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Image of a CUDA source for GPUs of one compute capability, from the cache or compiled now.

    Args:
        source: CUDA C++ text.
        name: file name that messages show.
        macros: preprocessor definitions.
        capability: (major, minor) of the GPU.

    Returns: a cubin, or PTX text if NVRTC is older than the GPU's generation.

    Raises:
        CopyError: NVRTC is missing, does not know an architecture old enough, or refuses the source.
    """
    nvrtc = _bindings("nvrtc")
    try:
        version = _checked(nvrtc, nvrtc.nvrtcVersion())
        supported = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:  # cuda-bindings' "no such library", of several classes; CopyError is one too
        raise CopyError(f"NVRTC, which compiles the copy kernel, cannot be used: {error}") from error
    options = [f"--gpu-architecture={_architecture(capability, supported)}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in sorted(macros.items())]

    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()[:32]
    try:
        path = cache_dir() / f"{Path(name).stem}-{key}.bin"
    except CacheError as error:
        logger.warning("sglang_xmem: kernels are compiled at each start: %s", error)
        return _compile(nvrtc, source, name, options)
    image = _read(path)
    if image is None:
        image = _compile(nvrtc, source, name, options)
        _write(path, image)
    return image


def upload(content: bytearray, device: torch.device) -> torch.Tensor:
    """Bring a kernel's constant table to a GPU, uint8 (n,); launches on any stream find it there.

    It goes on a stream of its own, so that nobody waits for more than these bytes: the scheduler thread may have a
    forward pass on the current one.
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
    """Make a kernel of a compiled image callable in the primary context of `device`, the one that torch uses.

    Args:
        image: cubin or PTX.
        symbol: the kernel's (extern "C") name.
        shared_bytes: dynamic shared memory of a launch.

    Returns: a CUfunction. Its library stays loaded for the life of the process: unloading one while a launch is in
        flight is an error, and the cache keeps them to one for each kind of kernel and GPU.

    Raises:
        CopyError: the driver refuses the image, or the shared memory.
    """
    import torch

    driver = _bindings("driver")
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # creates the context if nothing has, and makes it current
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
        device: whose context is current, or was when this thread last used CUDA, as a rule.

    Raises:
        CopyError: the driver refuses; nothing is enqueued.
    """
    call = _cu_launch_kernel()
    (status,) = call(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
    if status.value:
        import torch

        # This thread may have no CUDA context yet, or another GPU's. Finding out only now keeps that question out of
        # every other launch. torch.cuda.device alone would not create a context.
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).query()
            (status,) = call(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
    if status.value:
        raise CopyError(f"The driver refuses to launch a kernel of copies or sums: {status.name}.")


@functools.cache
def _cu_launch_kernel() -> Any:
    return _bindings("driver").cuLaunchKernel


def _bindings(name: str) -> Any:
    """Module `cuda.bindings.<name>`."""
    import importlib

    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CopyError(f"the copier 'cuda' needs the package cuda-bindings: {error}") from error


def _checked(module: Any, answer: tuple[Any, ...]) -> Any:
    """Result of a cuda-bindings call, whose answers are (status, result, ...): nothing, one value or a tuple.

    Raises:
        CopyError: any status but success.
    """
    status, *results = answer
    if status.value:
        raise CopyError(f"{type(status).__name__} {status.name} from {module.__name__}.")
    return results[0] if len(results) == 1 else tuple(results)


def _architecture(capability: tuple[int, int], supported: list[int]) -> str:
    """NVRTC's name of the newest target that runs on a GPU.

    A cubin runs on the same major number with an equal or higher minor one; across majors the driver has to compile.
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
    """Image of a cache file; None if there is no whole one that is the user's own."""
    content = read_own(path)
    if content is None:
        return None
    digest, image = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
    if not content.startswith(_MAGIC) or hashlib.sha256(image).digest() != digest:
        logger.warning("sglang_xmem: %s is damaged and will be written anew", path)
        return None
    return image


def _write(path: Path, image: bytes) -> None:
    """Put an image into the cache, in one step as other processes see it; failure costs only the next start's time."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(image).digest() + image)
        os.replace(temporary, path)
    except OSError as error:
        logger.info("sglang_xmem: compiled kernel not kept in %s: %s", path.parent, error)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
