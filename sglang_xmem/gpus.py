"""Queries about this machine's GPUs to the CUDA driver and NVML, without creating a CUDA context.

GPUs are CUDA ordinals as this process sees them (CUDA_VISIBLE_DEVICES applies), as in SGLang's --base-gpu-id.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import psutil

from sglang_xmem.errors import Remedy, SettingError, Unavailable

#: Bytes in use without a visible process above which a GPU counts as in use: an idle H200 shows less than 10 MB, a bare
#: CUDA context about 500 MB.
IDLE_USED_BYTES = 256 << 20


def checked(result: Any, doing: str) -> Any:
    """Return the values of a cuda-bindings call, or raise Unavailable with the driver's message.

    Args:
        result: the call's result: (status, value, ...).
        doing: the action, for the message.
    """
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        reason = text.decode() if text else str(status)
        raise Unavailable(f"{doing} failed with CUDA error {int(status)}: {reason}")
    return values[0] if len(values) == 1 else tuple(values)


def _no_package(name: str) -> Unavailable:
    return Unavailable(f"the Python package {name} is missing", Remedy("install", value=f"pip install {name}"))


@functools.cache
def driver() -> Any:
    """Return cuda.bindings.driver, initialized.

    Raises:
        Unavailable: there is no driver or no GPU.
    """
    try:
        from cuda.bindings import driver as bindings
    except ImportError:
        raise _no_package("cuda-bindings") from None
    try:
        status = bindings.cuInit(0)[0]
    except Exception:  # without libcuda, cuda-bindings raises errors of several packages
        raise Unavailable("this machine has no NVIDIA driver") from None
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise Unavailable(f"the NVIDIA driver finds no usable GPU (cuInit: error {int(status)})")
    return bindings


def _device(gpu: int) -> Any:
    return checked(driver().cuDeviceGet(gpu), f"opening GPU {gpu}")


def visible_gpus() -> range:
    """Return all CUDA ordinals."""
    return range(checked(driver().cuDeviceGetCount(), "counting GPUs"))


def count() -> int:
    """Count the GPUs that this process sees; 0 without a driver."""
    try:
        return len(visible_gpus())
    except Unavailable:
        return 0


def check_named(setting: str, named: Iterable[int], engine: Collection[int | None]) -> None:
    """Refuse named GPUs that do not exist, or that the engine computes on.

    Raises:
        SettingError: a GPU is refused.
    """
    visible = visible_gpus()
    for gpu in named:
        if gpu not in visible:
            raise SettingError(
                setting, f"names GPU {gpu}, but this process sees {_gpu_list(visible)}", "name one of these"
            )
        if gpu in engine:
            raise SettingError(setting, f"names GPU {gpu}, which this engine computes on", "name another GPU")


def _gpu_list(visible: range) -> str:
    return f"GPUs 0 to {len(visible) - 1}" if len(visible) > 1 else f"{len(visible)} GPU"


def can_access_peer(gpu: int, peer: int) -> bool:
    """Whether kernels on `gpu` can access memory of `peer`."""
    d = driver()
    answer = d.cuDeviceCanAccessPeer(_device(gpu), _device(peer))
    return bool(checked(answer, f"querying peer access from GPU {gpu} to GPU {peer}"))


def attribute(gpu: int, name: str) -> int:
    """Return a CUdevice_attribute by its name without CU_DEVICE_ATTRIBUTE_."""
    d = driver()
    key = getattr(d.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(checked(d.cuDeviceGetAttribute(key, _device(gpu)), name))


def peer_atomics(gpu: int, peer: int) -> bool:
    """Whether integer additions by kernels on `gpu` in memory of `peer` are atomic, as over NVLink.

    Over PCIe such an addition is a read and a write, so one of two concurrent additions may be lost.
    """
    d = driver()
    # The first attribute means all CUDA atomics, the second (since CUDA 13) some; every such link has integer addition.
    for name in ("NATIVE_ATOMIC_SUPPORTED", "ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED"):
        key = getattr(d.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name}", None)
        if key is None:
            continue  # older cuda-bindings
        status, value = d.cuDeviceGetP2PAttribute(key, _device(gpu), _device(peer))
        if not status.value and value:  # an older driver refuses the question
            return True
    return False


def hold_context(gpu: int, undo: ExitStack) -> Any:
    """Retain a GPU's primary context until `undo`, and return it without making it current.

    Without any context a GPU runs at idle clocks, and other GPUs access its memory more slowly (docs/performance.md).

    Raises:
        Unavailable: the driver refuses a context.
    """
    d = driver()
    device = _device(gpu)
    context = checked(d.cuDevicePrimaryCtxRetain(device), f"creating a context on GPU {gpu}")
    undo.callback(d.cuDevicePrimaryCtxRelease, device)
    return context


@functools.cache
def nvml_library() -> Any:
    """Return pynvml, initialized.

    Raises:
        Unavailable: it is missing or does not start.
    """
    try:
        import pynvml
    except ImportError:
        raise _no_package("nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unavailable(f"NVML does not start: {error}") from None
    return pynvml


def nvml_handle(gpu: int) -> Any:
    """Return NVML's handle of a GPU.

    Raises:
        Unavailable: NVML does not know it.
    """
    d = driver()
    uuid = checked(d.cuDeviceGetUuid(_device(gpu)), f"naming GPU {gpu}")
    raw = bytes(uuid.bytes).hex()
    name = f"GPU-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}"
    nvml = nvml_library()
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except nvml.NVMLError as error:
        raise Unavailable(f"NVML does not know GPU {gpu} ({name}): {error}") from None


def memory_bytes(gpu: int) -> tuple[int, int]:
    """Return (free, used) bytes of a GPU's memory, over all processes."""
    nvml = nvml_library()
    info = nvml.nvmlDeviceGetMemoryInfo(nvml_handle(gpu), version=nvml.nvmlMemory_v2)
    return int(info.free), int(info.used)


def total_bytes(gpu: int) -> int:
    """Return the total bytes of a GPU's memory."""
    d = driver()
    return int(checked(d.cuDeviceTotalMem(_device(gpu)), f"sizing GPU {gpu}"))


def name(gpu: int) -> str:
    """Return a GPU's product name."""
    d = driver()
    raw = checked(d.cuDeviceGetName(128, _device(gpu)), f"naming GPU {gpu}")
    return str(raw.split(b"\0")[0].decode(errors="replace"))


def driver_versions() -> tuple[str, str]:
    """Return the NVIDIA driver's version and the newest CUDA that it supports, such as ("580.65.06", "13.0")."""
    number = int(checked(driver().cuDriverGetVersion(), "querying the driver's version"))
    return str(nvml_library().nvmlSystemGetDriverVersion()), f"{number // 1000}.{number % 1000 // 10}"


def processes(gpu: int) -> dict[int, int | None]:
    """Return the bytes of a GPU's memory by process id; None if the driver does not report them.

    Processes of other containers may be missing; `memory_bytes` includes their memory.
    """
    nvml = nvml_library()
    handle = nvml_handle(gpu)
    found: dict[int, int | None] = {}
    for query in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):  # not available in some virtual machines; used memory still shows the use
            found.update((process.pid, process.usedGpuMemory) for process in query(handle))
    return found


def foreign_use(gpu: int) -> str | None:
    """Return a clause about other processes on a GPU, or None if there are none.

    This process does not count. For a rank, its launcher and the other ranks do not count either. A launcher has no
    ranks yet when it asks: its children belong to another engine, which uses their GPUs.
    """
    held = processes(gpu)
    foreign = sorted(held.keys() - _own_pids())
    if foreign:
        return f"GPU {gpu} is in use by process {', '.join(map(str, foreign))}"
    # NVML lists processes with a context on the GPU. A process of another container, or one that only maps the GPU's
    # memory as tier `peer` does, shows only in the GPU's used bytes.
    hidden = memory_bytes(gpu)[1] - sum(nbytes or 0 for nbytes in held.values())
    if None not in held.values() and hidden > IDLE_USED_BYTES:
        return f"GPU {gpu} has {hidden / 1e9:.2f} GB in use by processes that are not visible from here"
    return None


def _own_pids() -> set[int]:
    own = {os.getpid()}
    with suppress(psutil.Error):
        launcher = psutil.Process().parent() if _is_rank else None
        if launcher is not None:
            own.update((launcher.pid, *(child.pid for child in launcher.children(recursive=True))))
    return own


_is_rank = False


def mark_as_rank() -> None:
    """Mark this process as a rank of an engine, whose other ranks' use of a GPU does not count."""
    global _is_rank
    _is_rank = True


def numa_node(gpu: int) -> int | None:
    """Return the NUMA node of a GPU; None if the machine does not report it."""
    d = driver()
    bus = checked(d.cuDeviceGetPCIBusId(16, _device(gpu)), "reading the GPU's bus id")
    name = bus.split(b"\0")[0].decode().lower()
    with suppress(OSError, ValueError), open(f"/sys/bus/pci/devices/{name}/numa_node", encoding="ascii") as file:
        node = int(file.read())
        return node if node >= 0 else None
    return None
