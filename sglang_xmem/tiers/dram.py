"""Tier `dram`: host memory on a chosen NUMA node, pinned where there is a GPU, plain where there is none.

Pages are placed by touching them from threads that libnuma has bound to the node: libnuma's Python bindings set a
thread's policy but cannot bind an address range. Touching in parallel also shortens pinning, which otherwise faults
every page in on one thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import psutil

from sglang_xmem import gpus
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.tiers.base import Locality, MemoryTier, Ranks, Region

#: Bytes that one cuMemHostRegister pins; very large registrations fail on some systems.
REGISTER_BYTES = 64 << 30
#: Bytes a thread touches at a time.
TOUCH_BYTES = 256 << 20
_NODES = "/sys/devices/system/node"


class DramSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `dram` in --hicache-xmem-config.

    Attributes:
        numa_node: node for all ranks' memory. Default: the node of each rank's GPU, the kernel's choice where
            there is no GPU or the machine has one node.
        threads: threads that place the memory at start; 0 is half the CPUs, at most 16.
        relays: CUDA ordinals of GPUs that the engine does not compute on, dealt to the ranks in turn. Each moves a
            share of every copy through its own PCIe link and passes it to the rank's GPU over NVLink.
    """

    numa_node: int | None = None
    threads: int = 0
    relays: tuple[int, ...] = ()


class DramSeat(msgspec.Struct, frozen=True):
    """A rank's NUMA node (None leaves placement to the kernel), its relays, and the bytes that it may take of the node:
    ranks that share a node share its room."""

    numa_node: int | None
    relays: tuple[int, ...] = ()
    share_bytes: int | None = None


class DramTier(MemoryTier):
    name = "dram"
    nominal_gbps = 55.0  # measured, PCIe 5 x16
    locality = Locality.HOST
    Settings = DramSettings

    settings: DramSettings
    seat: DramSeat

    @classmethod
    def seats(cls, settings: DramSettings, ranks: Ranks) -> tuple[DramSeat, ...]:
        if not 0 <= settings.threads <= 1024:
            raise ConfigError(
                f"--hicache-xmem-config 'dram.threads' is {settings.threads}; give 1 to 1024, or 0 for auto."
            )
        nodes = _nodes()
        if settings.numa_node is not None:
            if settings.numa_node not in nodes:
                raise ConfigError(
                    f"--hicache-xmem-config 'dram.numa_node' is {settings.numa_node}; this machine has node "
                    f"{', '.join(map(str, nodes)) or 'information for none'}."
                )
            if len(nodes) > 1:
                _libnuma()
        _check_relays(settings.relays, ranks)
        chosen: list[int | None] = []
        for gpu in ranks.gpus:
            node = settings.numa_node
            if node is None and gpu is not None and len(nodes) > 1:
                node = gpus.numa_node(gpu)
                if node is not None:
                    _libnuma()
            chosen.append(node if len(nodes) > 1 else None)
        # All ranks ask for room before any has touched its memory, and a bound thread that finds none is killed.
        shares = {
            node: _node_available_bytes(node) // users for node, users in Counter(chosen).items() if node is not None
        }
        seats = []
        for index, (gpu, node) in enumerate(zip(ranks.gpus, chosen, strict=True)):
            relays = settings.relays[index :: len(ranks.gpus)]
            for relay in relays:
                assert gpu is not None
                if not gpus.can_access_peer(relay, gpu):
                    raise TierUnavailable(
                        f"GPU {relay}, which dram.relays names, has no peer access to GPU {gpu}; name another GPU"
                    )
            seats.append(DramSeat(node, relays, None if node is None else shares[node]))
        return tuple(seats)

    def capacity_bytes(self) -> int:
        if self.seat.numa_node is None:
            return int(psutil.virtual_memory().available)
        available = _node_available_bytes(self.seat.numa_node)
        return available if self.seat.share_bytes is None else min(available, self.seat.share_bytes)

    def allocate(self, nbytes: int, parts: int = 1) -> Region:
        undo = ExitStack()
        with undo:
            try:
                mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError, ValueError) as error:
                raise TierUnavailable(
                    f"mapping {nbytes / 1e9:.2f} GB of host memory failed: {error}; lower --hicache-size"
                ) from None
            with suppress(AttributeError, OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer faults and TLB misses; a hint, so no error if refused
            if self.gpu is not None:
                # The GPU writes to these pages; a forked child's copy-on-write would leave this process with others.
                with suppress(OSError):  # a precaution: nothing here forks
                    mapping.madvise(mmap.MADV_DONTFORK)
            views = [(ctypes.c_uint8 * nbytes).from_buffer(mapping)]
            address = ctypes.addressof(views[0])

            def unmap() -> None:
                views.clear()
                with suppress(BufferError):  # a tensor still views the memory, which goes with the last view
                    mapping.close()

            undo.callback(unmap)
            self._touch(address, nbytes)
            for relay in self.seat.relays:
                gpus.hold_context(relay, undo)  # pinned for all contexts that there are
            if self.gpu is not None:
                self._register(address, nbytes, undo)
            keep = undo.pop_all()
        node = "" if self.seat.numa_node is None else f" of NUMA node {self.seat.numa_node}"
        kind = "pinned host memory" if self.gpu is not None else "host memory"
        if self.seat.relays:
            node += f", relayed by GPU {', '.join(map(str, self.seat.relays))}"
        pinned = tuple(range(address, address + nbytes, REGISTER_BYTES)) if self.gpu is not None else ()
        return Region(address, nbytes, kind + node, keep.close, views[0], relays=self.seat.relays, pinned=pinned)

    def _touch(self, address: int, nbytes: int) -> None:
        if self.gpu is None and self.seat.numa_node is None:
            return  # nothing to place and nothing to pin: the kernel hands pages out as they are used
        count = self.settings.threads or max(1, min(16, (os.cpu_count() or 2) // 2))
        numa = _libnuma() if self.seat.numa_node is not None else None

        refused: list[list[int]] = []

        def bind() -> None:
            if numa is not None:
                numa.memory.set_membind_nodes(self.seat.numa_node)  # of this thread alone
                bound = numa.memory.get_membind_nodes()  # the bindings cannot tell that the kernel refused
                if bound != [self.seat.numa_node]:
                    refused.append(bound)

        def touch(at: int) -> None:
            if not refused:
                ctypes.memset(address + at, 0, min(TOUCH_BYTES, nbytes - at))

        with ThreadPoolExecutor(count, initializer=bind) as threads:
            # ctypes releases the GIL, so the kernel zeroes pages on all threads at once.
            list(threads.map(touch, range(0, nbytes, TOUCH_BYTES)))
        if refused:
            raise TierUnavailable(
                f"the kernel does not let this process bind memory to NUMA node {self.seat.numa_node}; allow "
                "set_mempolicy, or choose --hicache-xmem-config 'dram.numa_node'"
            )

    def _register(self, address: int, nbytes: int, undo: ExitStack) -> None:
        import torch

        torch.cuda.current_stream(self.gpu)  # the rank's primary context, which registration is made in
        d = gpus.driver()
        for at in range(0, nbytes, REGISTER_BYTES):
            size = min(REGISTER_BYTES, nbytes - at)
            flags = d.CU_MEMHOSTREGISTER_PORTABLE | d.CU_MEMHOSTREGISTER_DEVICEMAP
            status = d.cuMemHostRegister(address + at, size, flags)
            try:
                gpus.checked(status, f"pinning {size / 1e9:.2f} GB of host memory")
            except TierUnavailable as error:
                raise TierUnavailable(
                    f"{error}; check the locked-memory limit (ulimit -l) and free memory, or lower --hicache-size"
                ) from None
            undo.callback(d.cuMemHostUnregister, address + at)
        seen = gpus.checked(d.cuMemHostGetDevicePointer(address, 0), "mapping pinned memory for the GPU")
        if int(seen) != address:
            raise TierUnavailable("the GPU sees pinned memory at another address than the CPU, which is not supported")


def _check_relays(relays: tuple[int, ...], ranks: Ranks) -> None:
    """Refuse GPUs that cannot be relays.

    Raises:
        ConfigError: one sentence.
    """
    if not relays:
        return
    option = "--hicache-xmem-config 'dram.relays'"
    if len(set(relays)) != len(relays):
        raise ConfigError(f"{option} is {list(relays)}; name no GPU twice.")
    if not ranks.uses_gpu:
        raise ConfigError(f"{option} is {list(relays)}, and SGLang runs on the CPU; leave it out.")
    gpus.check_named(option, relays, ranks.gpus)


def _nodes() -> list[int]:
    """NUMA nodes that have memory for this process."""
    try:
        names = os.listdir(_NODES)
    except OSError:
        return []
    nodes = sorted(int(name[4:]) for name in names if name.startswith("node") and name[4:].isdigit())
    allowed = _allowed_nodes()
    return [node for node in nodes if _node_field(node, "MemTotal") > 0 and (allowed is None or node in allowed)]


def _allowed_nodes() -> set[int] | None:
    """Nodes that this process's cpuset lets it have memory of; None where the kernel does not say.

    Binding to another one crashes the bindings.
    """
    with suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Mems_allowed_list:"):
                parts = (part.split("-") for part in line.split(":")[1].strip().split(",") if part)
                return {node for part in parts for node in range(int(part[0]), int(part[-1]) + 1)}
    return None


def _node_field(node: int, field: str) -> int:
    """A field of a node's meminfo, in bytes; 0 where the kernel does not give it."""
    with suppress(OSError), open(f"{_NODES}/node{node}/meminfo", encoding="ascii") as file:
        for line in file:
            words = line.split()  # "Node 0 MemFree:   123 kB"
            if words[2] == f"{field}:":
                return int(words[3]) * 1024
    return 0


def _node_available_bytes(node: int) -> int:
    # As MemAvailable, which the kernel does not give a node: free pages and what it drops without writing back.
    return sum(_node_field(node, field) for field in ("MemFree", "Inactive(file)", "SReclaimable"))


def _libnuma() -> Any:
    """py-libnuma, over the system's libnuma.

    Raises:
        TierUnavailable: either is missing, on a machine where placement matters.
    """
    try:
        import numa
        import numa.info
        import numa.memory

        if numa.info.numa_available():
            return numa
    except (ImportError, OSError, AttributeError):
        pass
    raise TierUnavailable(
        "placing memory on a NUMA node needs libnuma and its bindings; "
        "run apt-get install libnuma1 and pip install py-libnuma"
    )
