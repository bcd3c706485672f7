"""Facts about this machine from the kernel, NVML and the driver. Nothing here allocates or creates a CUDA context.

Every function returns JSON; an unavailable value is None or empty, with a reason.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

import sglang_xmem
from sglang_xmem import gpus, machine
from sglang_xmem.engines.sglang import versions as sglang_versions
from sglang_xmem.errors import Unavailable, UnsupportedSGLang
from sglang_xmem.tiers.mtier import DEFAULT_LIBRARY, LIBRARY_VARIABLE

Json = dict[str, Any]

PACKAGES = ("sglang", "torch", "triton", "cuda-bindings", "xmem-mtier")
_ENTRY_POINTS = "sglang.srt.plugins"


def versions() -> Json:
    """Return the versions of installed packages; None for missing ones."""
    found: Json = {"python": platform.python_version(), "sglang_xmem": sglang_xmem.__version__}
    for package in PACKAGES:
        found[package] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def plugin_problem(sglang: str | None) -> str | None:
    """Return why `--hicache-use-xmem` would be unknown to the server, or None."""
    if sglang is None:
        return f"SGLang is not installed; run pip install sglang=={sglang_versions.known()[0]}"
    try:
        sglang_versions.load(sglang)
    except UnsupportedSGLang as error:
        return str(error).rstrip(".")
    if "sglang_xmem" not in {point.name for point in importlib.metadata.entry_points(group=_ENTRY_POINTS)}:
        return "sglang_xmem is not installed as a plugin of SGLang; run pip install on it in this environment"
    listed = os.environ.get("SGLANG_PLUGINS", "")
    if listed and "sglang_xmem" not in {name.strip() for name in listed.split(",")}:
        return f"SGLANG_PLUGINS is {listed!r}; add sglang_xmem to it"
    return None


def driver() -> Json:
    """Return the versions of the NVIDIA driver and of CUDA."""
    try:
        version, cuda = gpus.driver_versions()
    except Exception as error:  # NVML has many error classes
        return {"version": None, "cuda": None, "reason": reason_of(error)}
    return {"version": version, "cuda": cuda, "reason": None}


def gpu_list() -> tuple[list[Json], str | None]:
    """List the GPUs; also return the reason if there is none."""
    try:
        visible = gpus.visible_gpus()
    except Unavailable as error:
        return [], str(error)
    return [_gpu(gpu) for gpu in visible], None if visible else "the NVIDIA driver finds no GPU"


def _gpu(gpu: int) -> Json:
    found: Json = {
        "gpu": gpu,
        "name": None,
        "total_bytes": None,
        "free_bytes": None,
        "used_bytes": None,
        "numa_node": None,
        "in_use": None,
        "processes": [],
        "reason": None,
    }
    try:
        found["name"] = gpus.name(gpu)
        found["total_bytes"] = gpus.total_bytes(gpu)
        found["numa_node"] = gpus.numa_node(gpu)
        found["free_bytes"], found["used_bytes"] = gpus.memory_bytes(gpu)
        found["in_use"] = gpus.foreign_use(gpu)
        found["processes"] = [
            {"pid": pid, "name": _process_name(pid), "used_bytes": used} for pid, used in gpus.processes(gpu).items()
        ]
    except Exception as error:  # keep the values found so far; NVML has many error classes
        found["reason"] = reason_of(error)
    return found


def _process_name(pid: int) -> str | None:
    with suppress(psutil.Error):
        return str(psutil.Process(pid).name())
    return None  # in another container, or ended


def peer_access(visible: list[int]) -> list[Json]:
    """List the ordered pairs, and whether kernels on `gpu` can access memory of `peer`."""
    rows = []
    for gpu in visible:
        for peer in visible:
            if peer != gpu:
                row: Json = {"gpu": gpu, "peer": peer, "access": None, "reason": None}
                try:
                    row["access"] = gpus.can_access_peer(gpu, peer)
                except Unavailable as error:
                    row["reason"] = str(error)
                rows.append(row)
    return rows


def host_memory() -> Json:
    """Return the machine's memory and this process's locked-memory limit (None: no limit)."""
    memory = psutil.virtual_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "total_bytes": int(memory.total),
        "available_bytes": int(memory.available),
        "locked_limit_bytes": None if soft == resource.RLIM_INFINITY else soft,
    }


def numa_nodes(root: Path = Path("/")) -> list[Json]:
    """List each NUMA node's memory and reserved hugepages; empty if the kernel does not report nodes.

    Args:
        root: directory that holds `sys`.
    """
    directory = root / "sys/devices/system/node"
    numbers = []
    with suppress(OSError):
        numbers = sorted(int(path.name[4:]) for path in directory.glob("node[0-9]*") if path.name[4:].isdigit())
    cxl = machine.cxl_nodes(root)
    return [{**_numa_node(directory / f"node{number}", number), "cxl": number in cxl} for number in numbers]


def _numa_node(directory: Path, number: int) -> Json:
    fields: dict[str, int] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in (directory / "meminfo").read_text(encoding="ascii").splitlines():
            words = line.split()  # "Node 0 MemFree:   123 kB"
            fields[words[2].rstrip(":")] = int(words[3]) * 1024
    hugepages = []
    with suppress(OSError):
        for path in directory.glob("hugepages/hugepages-*kB"):
            with suppress(OSError, ValueError):
                hugepages.append(
                    {
                        "page_bytes": int(path.name[len("hugepages-") : -len("kB")]) * 1024,
                        "total": _number(path / "nr_hugepages"),
                        "free": _number(path / "free_hugepages"),
                    }
                )
    hugepages.sort(key=lambda size: size["page_bytes"])
    total, free = fields.get("MemTotal"), fields.get("MemFree")
    return {"node": number, "total_bytes": total, "free_bytes": free, "hugepages": hugepages}


def devdax(root: Path = Path("/")) -> list[Json]:
    """List the devices of device-DAX memory (CXL or persistent memory).

    Args:
        root: directory that holds `sys` and `dev`.
    """
    names: set[str] = set()
    for directory in (root / "sys/bus/dax/devices", root / "dev"):
        with suppress(OSError):
            names.update(path.name for path in directory.glob("dax[0-9]*"))
    return [_devdax(root, name) for name in sorted(names)]


def _devdax(root: Path, name: str) -> Json:
    device, node = root / "sys/bus/dax/devices" / name, root / "dev" / name
    found: Json = {"device": f"/dev/{name}", "size_bytes": None, "target_node": None, "reason": None}
    for key, file in (("size_bytes", "size"), ("target_node", "target_node")):
        with suppress(OSError, ValueError):
            found[key] = _number(device / file)
    if not node.exists():
        # Driver kmem has turned it into system memory (a NUMA node), or it has no driver.
        found["reason"] = "no device node in /dev: the kernel uses it as system memory, or it has no driver"
    elif not os.access(node, os.R_OK | os.W_OK):
        found["reason"] = "this user has no read and write access"
    return found


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def xmem() -> Json:
    """Return the path of X-Mem's library as the SDK resolves it; a child process tests whether it works."""
    path = os.environ.get(LIBRARY_VARIABLE, DEFAULT_LIBRARY)
    return {"library": path, "library_exists": os.path.exists(path)}


def reason_of(error: Exception) -> str:
    """Format an error as a clause; includes the error's class unless its message is ours."""
    words = " ".join(str(error).split())
    if isinstance(error, Unavailable):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
