"""What the CUDA driver and NVML say of this machine's GPUs, without making a CUDA context.

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

#: A GPU with more bytes in use than this by nobody whom NVML names counts as in use: an idle H200 shows under 10 MB, a
#: bare CUDA context about 500 MB.
IDLE_USED_BYTES = 256 << 20


def checked(result: Any, doing: str) -> Any:
    """The values of a cuda-bindings call, or Unavailable with the driver's words.

    Args:
        result: what the call returned: (status, value, ...).
        doing: what was tried, for the message.
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
    """cuda.bindings.driver, initialized.

    Raises:
        Unavailable: no driver or no GPU.
    """
    try:
        from cuda.bindings import driver as bindings
    except ImportError:
        raise _no_package("cuda-bindings") from None
    try:
        status = bindings.cuInit(0)[0]
    except Exception:  # cuda-bindings raises errors of several packages where libcuda is missing
        raise Unavailable("this machine has no NVIDIA driver") from None
    if status != bindings.CUresult.CUDA_SUCCESS:
        raise Unavailable(f"the NVIDIA driver finds no usable GPU (cuInit: error {int(status)})")
    return bindings


def _device(gpu: int) -> Any:
    return checked(driver().cuDeviceGet(gpu), f"opening GPU {gpu}")


def visible_gpus() -> range:
    """All CUDA ordinals."""
    return range(checked(driver().cuDeviceGetCount(), "counting GPUs"))


def check_named(setting: str, named: Iterable[int], engine: Collection[int | None]) -> None:
    """Refuse GPUs that a setting names for an engine's use and that are not there, or are the engine's own.

    Raises:
        SettingError: one of them is.
    """
    visible = visible_gpus()
    for gpu in named:
        if gpu not in visible:
            raise SettingError(
                setting, f"names GPU {gpu}, and this process sees {_gpu_list(visible)}", "name one of these"
            )
        if gpu in engine:
            raise SettingError(setting, f"names GPU {gpu}, which this engine computes on", "name another GPU")


def _gpu_list(visible: range) -> str:
    return f"GPUs 0 to {len(visible) - 1}" if len(visible) > 1 else f"{len(visible)} GPU"


def can_access_peer(gpu: int, peer: int) -> bool:
    """Whether kernels on `gpu` can be given access to memory of `peer`."""
    d = driver()
    answer = d.cuDeviceCanAccessPeer(_device(gpu), _device(peer))
    return bool(checked(answer, f"asking for peer access from GPU {gpu} to GPU {peer}"))


def attribute(gpu: int, name: str) -> int:
    """A CUdevice_attribute by its name without CU_DEVICE_ATTRIBUTE_."""
    d = driver()
    key = getattr(d.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(checked(d.cuDeviceGetAttribute(key, _device(gpu)), name))


def peer_atomics(gpu: int, peer: int) -> bool:
    """Whether additions by kernels on `gpu` to integers in memory of `peer` are atomic, as they are over NVLink.

    Over PCIe such an addition is a read and a write, and one of two at a time may be lost.
    """
    d = driver()
    # All operations of CUDA, or since CUDA 13 some: an integer addition is the first that any link has.
    for name in ("NATIVE_ATOMIC_SUPPORTED", "ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED"):
        key = getattr(d.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name}", None)
        if key is None:
            continue  # cuda-bindings of before
        status, value = d.cuDeviceGetP2PAttribute(key, _device(gpu), _device(peer))
        if not status.value and value:  # an older driver refuses the question
            return True
    return False


def hold_context(gpu: int, undo: ExitStack) -> Any:
    """Keep a GPU's primary context until `undo`, and return it; it becomes current nowhere.

    Without any context a GPU's clocks are idle, and other GPUs reach its memory at a lower rate (docs/performance.md).

    Raises:
        Unavailable: the GPU gives none.
    """
    d = driver()
    device = _device(gpu)
    context = checked(d.cuDevicePrimaryCtxRetain(device), f"making a context on GPU {gpu}")
    undo.callback(d.cuDevicePrimaryCtxRelease, device)
    return context


@functools.cache
def nvml_library() -> Any:
    """pynvml, initialized.

    Raises:
        Unavailable: there is none.
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
    """NVML's handle of a GPU.

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
    """(free, used) bytes of a GPU's memory, over all processes."""
    nvml = nvml_library()
    info = nvml.nvmlDeviceGetMemoryInfo(nvml_handle(gpu), version=nvml.nvmlMemory_v2)
    return int(info.free), int(info.used)


def sm_clock_mhz(gpu: int) -> int | None:
    """The clock of a GPU's multiprocessors now; None where the driver does not report it."""
    nvml = nvml_library()
    with suppress(nvml.NVMLError):
        return int(nvml.nvmlDeviceGetClockInfo(nvml_handle(gpu), nvml.NVML_CLOCK_SM))
    return None


def total_bytes(gpu: int) -> int:
    """Bytes of a GPU's memory."""
    d = driver()
    return int(checked(d.cuDeviceTotalMem(_device(gpu)), f"sizing GPU {gpu}"))


def name(gpu: int) -> str:
    """A GPU's product name."""
    d = driver()
    raw = checked(d.cuDeviceGetName(128, _device(gpu)), f"naming GPU {gpu}")
    return str(raw.split(b"\0")[0].decode(errors="replace"))


def driver_versions() -> tuple[str, str]:
    """The NVIDIA driver's version, and that of the newest CUDA that it runs, such as ("580.65.06", "13.0")."""
    number = int(checked(driver().cuDriverGetVersion(), "asking for the driver's version"))
    return str(nvml_library().nvmlSystemGetDriverVersion()), f"{number // 1000}.{number % 1000 // 10}"


def processes(gpu: int) -> dict[int, int | None]:
    """Bytes of a GPU's memory by process id, None where the driver does not say.

    Those of other containers may be missing: `memory_bytes` counts their memory all the same.
    """
    nvml = nvml_library()
    handle = nvml_handle(gpu)
    found: dict[int, int | None] = {}
    for query in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):  # not offered in some virtual machines; used memory still shows it
            found.update((process.pid, process.usedGpuMemory) for process in query(handle))
    return found


def foreign_use(gpu: int) -> str | None:
    """A clause that says who else uses a GPU, or None where it is free.

    This process does not count, and for one of an engine's ranks neither do its launcher and the other ranks. A
    launcher has no ranks yet when it asks: children that it has are another engine's, and use their GPUs.
    """
    held = processes(gpu)
    foreign = sorted(held.keys() - _own_pids())
    if foreign:
        return f"GPU {gpu} is in use by process {', '.join(map(str, foreign))}"
    # NVML names processes with a context on the GPU. One of another container, or one that only maps the GPU's memory
    # as tier `peer` does, shows in the GPU's used bytes alone.
    hidden = memory_bytes(gpu)[1] - sum(nbytes or 0 for nbytes in held.values())
    if None not in held.values() and hidden > IDLE_USED_BYTES:
        return f"GPU {gpu} has {hidden / 1e9:.2f} GB in use by processes that cannot be seen from here"
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
    """Say that this process is one of an engine's ranks: its siblings' use of a GPU is not foreign."""
    global _is_rank
    _is_rank = True


def numa_node(gpu: int) -> int | None:
    """The NUMA node that a GPU hangs on, None where the machine does not say."""
    d = driver()
    bus = checked(d.cuDeviceGetPCIBusId(16, _device(gpu)), "reading its bus id")
    name = bus.split(b"\0")[0].decode().lower()
    with suppress(OSError, ValueError), open(f"/sys/bus/pci/devices/{name}/numa_node", encoding="ascii") as file:
        node = int(file.read())
        return node if node >= 0 else None
    return None
