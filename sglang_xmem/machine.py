"""Facts about this machine's memory: NUMA nodes, hugepages, container limits, memory devices. Imports no torch.

Every call reads the kernel's files. `root` is the directory that holds `sys` and `proc`, for tests.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

ROOT = Path("/")

#: Bytes of the machine's memory to leave free, as SGLang's HICACHE_HOST_MEMORY_RESERVE_BYTES; a NUMA node leaves its
#: share.
HOST_RESERVE_BYTES = 10 << 30

_NODES = "sys/devices/system/node"
#: Number of the system call mbind by machine; the C library has no function for it.
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_BIND = 2


# ---- NUMA nodes ----


def memory_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Return the NUMA nodes with memory for this process, ascending; empty if the kernel does not report them."""
    allowed = allowed_nodes(root)
    return tuple(
        node
        for node in _numbered(root / _NODES, "node")
        if node_field(node, "MemTotal", root) > 0 and (allowed is None or node in allowed)
    )


def cxl_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Return the NUMA nodes with memory and no CPU, such as CXL memory in system-ram mode, without GPU memory.

    Memory is placed on such a node only if the user names it.
    """
    of_gpus = _gpu_memory_nodes(root)
    return tuple(node for node in memory_nodes(root) if not node_cpus(node, root) and node not in of_gpus)


def cpu_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Return the NUMA nodes with memory and CPUs."""
    return tuple(node for node in memory_nodes(root) if node_cpus(node, root))


def _gpu_memory_nodes(root: Path) -> set[int]:
    """Return the nodes that are memory of NVIDIA GPUs (such as Grace Hopper)."""
    found = set()
    with suppress(OSError):
        for path in (root / "proc/driver/nvidia/gpus").glob("*/numa_status"):
            with suppress(OSError):
                match = re.search(r"^Node:\s+(\d+)", path.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
                if match:
                    found.add(int(match[1]))
    return found


def node_cpus(node: int, root: Path = ROOT) -> set[int]:
    """Return the CPUs of a node; empty if it has none or the kernel does not report them."""
    with suppress(OSError, ValueError):
        return _ranges((root / _NODES / f"node{node}" / "cpulist").read_text(encoding="ascii"))
    return set()


def allowed_nodes(root: Path = ROOT) -> set[int] | None:
    """Return the nodes that this process's cpuset allows for memory; None if the kernel does not report them."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Mems_allowed_list:"):
                return _ranges(line.split(":", 1)[1])
    return None


def node_field(node: int, field: str, root: Path = ROOT) -> int:
    """Return a field of a node's meminfo, in bytes; 0 if the kernel does not report it."""
    with suppress(OSError, ValueError):
        for line in (root / _NODES / f"node{node}" / "meminfo").read_text(encoding="ascii").splitlines():
            words = line.split()  # "Node 0 MemFree:   123 kB"
            if len(words) > 3 and words[2] == f"{field}:":
                return int(words[3]) * 1024
    return 0


def node_available_bytes(node: int, root: Path = ROOT) -> int:
    """Return the bytes of a node that are available without swapping, like the machine's MemAvailable.

    Free pages above the low watermark, plus page cache and reclaimable slabs less the part that the kernel keeps.
    """
    low = _low_watermark_bytes(node, root)
    cache = node_field(node, "Active(file)", root) + node_field(node, "Inactive(file)", root)
    slabs = node_field(node, "SReclaimable", root)
    available = node_field(node, "MemFree", root) - low
    available += cache - min(cache // 2, low) + slabs - min(slabs // 2, low)
    return max(0, available)


def _low_watermark_bytes(node: int, root: Path) -> int:
    """Return the sum of the low watermarks of a node's zones, in bytes; 0 if the kernel does not report them."""
    pages, here = 0, False
    with suppress(OSError, ValueError):
        for line in (root / "proc/zoneinfo").read_text(encoding="ascii", errors="replace").splitlines():
            words = line.split()
            if line.startswith("Node "):
                here = words[1].rstrip(",") == str(node)
            elif here and len(words) == 2 and words[0] == "low":
                pages += int(words[1])
    return pages * mmap.PAGESIZE


def node_reserve_bytes(node: int, root: Path = ROOT) -> int:
    """Return the bytes of a node to leave free: its share of HOST_RESERVE_BYTES, at most 1/8 of the node."""
    nodes = max(1, len(cpu_nodes(root)))
    return min(HOST_RESERVE_BYTES // nodes, node_field(node, "MemTotal", root) // 8)


def bind(address: int, nbytes: int, nodes: Sequence[int]) -> str | None:
    """Bind an untouched range of addresses to NUMA nodes.

    Returns:
        None, or the reason of the kernel's refusal, as in containers without CAP_SYS_NICE.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"no mbind for {platform.machine()}"
    words = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        words[node // 64] |= 1 << (node % 64)
    libc = ctypes.CDLL(None, use_errno=True)
    call = (
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_ulong(_MPOL_BIND),
        words,
        ctypes.c_ulong(len(words) * 64 + 1),  # the kernel uses one bit less
        ctypes.c_ulong(0),
    )
    if libc.syscall(*call) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def bind_refusal(nodes: Sequence[int]) -> str | None:
    """Return why the kernel refuses to bind this process's memory to `nodes`, or None; tries it with one page."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        view = ctypes.c_uint8.from_buffer(page)
        try:
            return bind(ctypes.addressof(view), mmap.PAGESIZE, nodes)
        finally:
            del view


# ---- hugepages ----


def free_hugepage_bytes(page_bytes: int, nodes: Iterable[int] = (), root: Path = ROOT) -> int:
    """Return the bytes of unused, unreserved hugepages of a size.

    Args:
        nodes: count only these NUMA nodes; empty: the whole machine.
    """
    name = f"hugepages-{page_bytes // 1024}kB"
    whole = root / "sys/kernel/mm/hugepages" / name
    free = _number(whole / "free_hugepages") - _number(whole / "resv_hugepages")
    nodes = tuple(nodes)
    if nodes:
        there = sum(_number(root / _NODES / f"node{node}/hugepages" / name / "free_hugepages") for node in nodes)
        free = min(free, there)
    return max(0, free) * page_bytes


# ---- limits of containers ----


def host_available_bytes(root: Path = ROOT) -> int:
    """Return the bytes of RAM available to this process: MemAvailable, within the limits of its cgroups."""
    available = int(psutil.virtual_memory().available)
    headroom = cgroup_headroom_bytes(root)
    return available if headroom is None else min(available, headroom)


def cgroup_headroom_bytes(root: Path = ROOT) -> int | None:
    """Return the bytes left under this process's cgroup limits (v1 and v2, all levels); None without a limit.

    Page cache counts as free, since the kernel drops it before it kills a process.
    """
    least: int | None = None
    for directory, version in _memory_cgroups(root):
        for limit in _LIMITS[version]:
            most = _limit(directory / limit)
            if most is None:
                continue
            usage = _number(directory / _USAGE[version]) - _page_cache_bytes(directory, version)
            left = max(0, most - max(0, usage))
            least = left if least is None else min(least, left)
    return least


_LIMITS = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}
_USAGE = {2: "memory.current", 1: "memory.usage_in_bytes"}
#: v1 represents "no limit" as the largest page multiple in a signed integer.
_NO_LIMIT = 1 << 60


def _memory_cgroups(root: Path) -> list[tuple[Path, int]]:
    """List the directories of this process's memory cgroups and their parents, with the version of each."""
    belongs: dict[int, PurePosixPath] = {}
    mounts: list[tuple[int, PurePosixPath, Path]] = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                belongs[2] = PurePosixPath(path)
            elif "memory" in controllers.split(","):
                belongs[1] = PurePosixPath(path)
        for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, after = line.split(" - ", 1)
            filesystem, _, options = after.split(" ")[:3]
            fields = before.split(" ")
            if filesystem == "cgroup2" or (filesystem == "cgroup" and "memory" in options.split(",")):
                version = 2 if filesystem == "cgroup2" else 1
                mounts.append((version, PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4]))))
    found: list[tuple[Path, int]] = []
    for version, top, mount in mounts:
        own = belongs.get(version)
        if own is None:
            continue
        # In a cgroup namespace the path may be relative to the namespace's root while the mount names the host's.
        relative = own.relative_to(top) if own.is_relative_to(top) else own.relative_to("/")
        if ".." in relative.parts:
            continue
        directory = mount / relative
        if root != ROOT:
            directory = root / directory.relative_to("/")
        for _ in range(len(relative.parts) + 1):
            found.append((directory, version))
            directory = directory.parent
    return found


def _limit(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        value = int(path.read_text(encoding="ascii"))  # "max" is not an integer
        return value if value < _NO_LIMIT else None
    return None


def _page_cache_bytes(directory: Path, version: int) -> int:
    prefix = "" if version == 2 else "total_"
    wanted, total = {f"{prefix}active_file", f"{prefix}inactive_file"}, 0
    with suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines():
            name, value = line.split()
            total += int(value) if name in wanted else 0
    return total


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


# ---- memory devices ----


class DaxDevice(NamedTuple):
    """A device-DAX memory device, as described by sysfs.

    Attributes:
        size_bytes: of the device.
        align_bytes: alignment of offsets and lengths of mappings.
        target_node: its NUMA node in system-ram mode; None if the kernel does not report it.
    """

    size_bytes: int
    align_bytes: int
    target_node: int | None


def dax_device(device_number: int, root: Path = ROOT) -> DaxDevice | None:
    """Return the facts of a character device; None if it is not device-DAX memory.

    Args:
        device_number: st_rdev of the device's node.
    """
    directory = root / "sys/dev/char" / f"{os.major(device_number)}:{os.minor(device_number)}"
    try:
        if os.path.basename(os.readlink(directory / "subsystem")) != "dax":
            return None
        size = int((directory / "size").read_text(encoding="ascii"), 0)
        align = _number(directory / "align") or _number(directory / "dax_region/align")
    except (OSError, ValueError):
        return None
    if size <= 0 or align <= 0:
        return None
    node: int | None = None
    with suppress(OSError, ValueError):
        node = int((directory / "target_node").read_text(encoding="ascii"))
    return DaxDevice(size, align, node if node is not None and node >= 0 else None)


def dax_as_system_ram(name: str, root: Path = ROOT) -> int | None:
    """Return the NUMA node of a dax device (such as "dax9.0") in system-ram mode; None in another mode."""
    directory = root / "sys/bus/dax/devices" / name
    with suppress(OSError, ValueError):
        if os.path.basename(os.readlink(directory / "driver")) == "kmem":
            return int((directory / "target_node").read_text(encoding="ascii"))
    return None


# ---- files ----


def _numbered(directory: Path, prefix: str) -> list[int]:
    with suppress(OSError):
        names = (path.name[len(prefix) :] for path in directory.iterdir() if path.name.startswith(prefix))
        return sorted(int(number) for number in names if number.isdigit())
    return []


def _number(path: Path) -> int:
    """Read a number from a file; 0 if that fails."""
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"), 0)
    return 0


def _ranges(text: str) -> set[int]:
    """Return the numbers of a list such as "0-3,8"."""
    parts = (part.split("-") for part in text.strip().split(",") if part)
    return {number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)}
