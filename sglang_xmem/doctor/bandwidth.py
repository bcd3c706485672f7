"""Measure the links between GPUs, and between each GPU and host memory, in a child process with a deadline.

Measures the tiers' upper bound: copy-engine copies of contiguous memory, peer memory mapped as by tier `peer`, and a
CUDA context on every GPU, so that none runs at idle clocks. GPUs in use by others are not measured.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.doctor.child import run_task
from sglang_xmem.errors import Unavailable
from sglang_xmem.tiers.peer import PeerRankPlan, PeerSettings, PeerTier

#: Bytes of a copy: enough for 99 % of a link's rate, small compared with any GPU's memory.
COPY_BYTES = 256 << 20
REPETITIONS = 5
#: Seconds for all measurements including the child's start, and seconds until it is killed.
BUDGET_S = 8.0
LIMIT_S = 9.5
NO_TIME = "the time limit of the measurement was reached"
#: Bytes compared at the start, in the middle and at the end of each copy.
_SAMPLE_BYTES = 4096

Json = dict[str, Any]


def run() -> tuple[list[Json], str | None]:
    """Return the rows of `measure`, and the reason if some are missing."""
    outcome = run_task("bandwidth", {"deadline": time.monotonic() + BUDGET_S}, LIMIT_S, total=True)
    return outcome.lines, outcome.problem


def measure(deadline: float) -> Iterator[Json]:
    """Yield a row per GPU for its host link, and one per ordered pair with peer access. Runs in a child process.

    Args:
        deadline: time.monotonic() after which nothing new starts; all processes of the machine share that clock.
    """
    visible = list(gpus.visible_gpus())
    busy = {gpu: gpus.foreign_use(gpu) for gpu in visible}
    peers = {gpu: [peer for peer in visible if peer != gpu and gpus.can_access_peer(gpu, peer)] for gpu in visible}
    left = sum(1 + len(peers[gpu]) for gpu in visible)
    with ExitStack() as contexts:
        for gpu in visible:  # once, since creating a context takes longer than measuring a link
            with suppress(Unavailable):  # reported where the context is needed
                if busy[gpu] is None and time.monotonic() < deadline:
                    gpus.hold_context(gpu, contexts)
        yield from _rows(visible, peers, busy, left, deadline)


def _rows(
    visible: list[int], peers: dict[int, list[int]], busy: dict[int, str | None], left: int, deadline: float
) -> Iterator[Json]:
    for gpu in visible:
        rows: list[Json] = [{"gpu": gpu, "peer": peer} for peer in [None, *peers[gpu]]]
        with ExitStack() as stack:
            bench: _Bench | None = None
            reason = busy[gpu]
            if reason is None and time.monotonic() < deadline:
                try:
                    bench = stack.enter_context(_bench(gpu))
                except Unavailable as error:
                    reason = str(error)
            for row in rows:
                now = time.monotonic()
                peer = row["peer"]
                why = reason or (None if peer is None else busy[peer])
                if why is None and (bench is None or now >= deadline):
                    why = NO_TIME
                if why is not None or bench is None:
                    yield {**row, "not_measured": why}
                else:
                    share = (deadline - now) / left
                    try:
                        yield {**row, **(bench.host(share) if peer is None else bench.peer(peer, share))}
                    except Unavailable as error:
                        yield {**row, "not_measured": str(error)}
                left -= 1


@contextmanager
def _bench(gpu: int) -> Iterator[_Bench]:
    """Provide a context on a GPU with a buffer; both are released afterwards."""
    d = gpus.driver()
    with ExitStack() as undo:
        context = gpus.hold_context(gpu, undo)
        gpus.checked(d.cuCtxSetCurrent(context), f"entering GPU {gpu}'s context")
        undo.callback(d.cuCtxSetCurrent, d.CUcontext(0))
        stream = gpus.checked(d.cuStreamCreate(1), "creating a stream")  # CU_STREAM_NON_BLOCKING
        undo.callback(d.cuStreamDestroy, stream)
        events = []
        for _ in range(2):
            events.append(gpus.checked(d.cuEventCreate(0), "creating an event"))
            undo.callback(d.cuEventDestroy, events[-1])
        what = f"allocating {COPY_BYTES / 1e9:.2f} GB on GPU {gpu}"
        buffer = int(gpus.checked(d.cuMemAlloc(COPY_BYTES), what))
        undo.callback(d.cuMemFree, buffer)
        yield _Bench(d, gpu, stream, events, buffer)


class _Bench:
    """Copies to and from a buffer on a GPU with the current context."""

    def __init__(self, driver: Any, gpu: int, stream: Any, events: list[Any], buffer: int) -> None:
        self._driver = driver
        self._gpu = gpu
        self._stream = stream
        self._start, self._end = events
        self._buffer = buffer

    def host(self, share_s: float) -> Json:
        """Measure both directions between pinned memory and the GPU."""
        d = self._driver
        with _cpus_near(self._gpu):  # the driver allocates pages on the calling CPU's node
            status = d.cuMemHostAlloc(COPY_BYTES, d.CU_MEMHOSTALLOC_PORTABLE)
        pinned = int(gpus.checked(status, f"pinning {COPY_BYTES / 1e9:.2f} GB of host memory"))
        try:
            read = self._gbps(self._buffer, pinned, share_s / 2, host_source=True)
            write = self._gbps(pinned, self._buffer, share_s / 2, host_target=True)
            return {"read_gbps": read, "write_gbps": write}
        finally:
            d.cuMemFreeHost(pinned)

    def peer(self, peer: int, share_s: float) -> Json:
        """Measure both directions between a peer's memory and the GPU."""
        plan = PeerRankPlan(gpus=(peer,), named=True)
        tier = PeerTier(PeerSettings(gpus=(peer,), copy_on="rank"), plan, self._gpu)
        region = tier.allocate(COPY_BYTES)
        try:
            there = region.extents[0].address
            read = self._gbps(self._buffer, there, share_s / 2)
            return {"read_gbps": read, "write_gbps": self._gbps(there, self._buffer, share_s / 2)}
        finally:
            region.release()

    def _gbps(
        self, target: int, source: int, share_s: float, *, host_source: bool = False, host_target: bool = False
    ) -> float:
        """Return the median rate of a few copies, in GB/s (1e9 bytes).

        Raises:
            Unavailable: a call failed, or a copy changed bytes.
        """
        d = self._driver
        samples = {at: os.urandom(_SAMPLE_BYTES) for at in (0, COPY_BYTES // 2, COPY_BYTES - _SAMPLE_BYTES)}
        for at, sample in samples.items():
            self._write(source + at, sample, host_source)
        gpus.checked(d.cuCtxSynchronize(), "writing samples")  # small writes return before they complete
        times: list[float] = []
        began = time.monotonic()
        for number in range(REPETITIONS + 1):
            gpus.checked(d.cuEventRecord(self._start, self._stream), "recording an event")
            gpus.checked(d.cuMemcpyAsync(target, source, COPY_BYTES, self._stream), "copying")
            gpus.checked(d.cuEventRecord(self._end, self._stream), "recording an event")
            gpus.checked(d.cuEventSynchronize(self._end), "copying")
            if number > 0:  # the first is a warm-up
                times.append(float(gpus.checked(d.cuEventElapsedTime(self._start, self._end), "timing")))
                if time.monotonic() - began > share_s:
                    break
        for at, sample in samples.items():
            if self._read(target + at, host_target) != sample:
                raise Unavailable("a copy changed bytes; check the IOMMU and ACS settings")
        return round(COPY_BYTES / statistics.median(times) / 1e6, 2)

    def _write(self, address: int, data: bytes, on_host: bool) -> None:
        if on_host:
            ctypes.memmove(address, data, len(data))
        else:
            staged = ctypes.create_string_buffer(data, len(data))
            status = self._driver.cuMemcpyHtoD(address, ctypes.addressof(staged), len(data))
            gpus.checked(status, "writing a sample")

    def _read(self, address: int, on_host: bool) -> bytes:
        if on_host:
            return ctypes.string_at(address, _SAMPLE_BYTES)
        staged = ctypes.create_string_buffer(_SAMPLE_BYTES)
        status = self._driver.cuMemcpyDtoH(ctypes.addressof(staged), address, _SAMPLE_BYTES)
        gpus.checked(status, "reading a sample")
        return staged.raw


@contextmanager
def _cpus_near(gpu: int) -> Iterator[None]:
    """Run this thread on CPUs of the GPU's NUMA node, if the node is known and the CPUs are allowed."""
    before = os.sched_getaffinity(0)
    with suppress(OSError, ValueError):
        node = gpus.numa_node(gpu)
        if node is not None:
            with open(f"/sys/devices/system/node/node{node}/cpulist", encoding="ascii") as file:
                parts = [part.split("-") for part in file.read().strip().split(",") if part]
            near = before & {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}
            if near:
                os.sched_setaffinity(0, near)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
