"""How `sglang-xmem bench copy` measures: clocks, streams and copies on a machine, and the checks of every byte.

A `Machine` has what differs between a GPU and a CPU; the measurements above it are the same for both.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch

from sglang_xmem.bench import stats
from sglang_xmem.bench.copy_jobs import (
    ENQUEUE_PAGES,
    MATMUL_CTAS,
    MATMUL_KERNELS,
    MATMUL_LINK_SHARE,
    Case,
    Job,
    Row,
    RunsOn,
    reached,
)
from sglang_xmem.copies import make_copier, on_peer_or_rank
from sglang_xmem.copies.base import PLANES_PER_LAYER, PageCopier
from sglang_xmem.copies.engine import CopyEngine
from sglang_xmem.copies.signals import LoadSignals
from sglang_xmem.copies.staged import staged

Call = Callable[[], None]

#: Side of the square bf16 matrices whose product runs beside a load, and how many products a round takes.
MATMUL_SIDE, MATMUL_CALLS, MATMUL_ROUNDS = 8192, 15, 3
ENQUEUE_REPETITIONS = 20
#: Calls a stream makes where two run at once.
CALLS_AT_ONCE = 10
#: Copies below this are over so soon that a median needs more of them.
SHORT_BYTES, SHORT_REPETITIONS = 256e6, 20
#: The stream is kept busy for so long while a measured call is enqueued, so that only the GPU's time counts.
HOLD_MS = 0.3


class MeasurementFailed(Exception):
    """A measurement that says nothing; the message is a sentence."""


class Machine(ABC):
    """Clock, streams and contiguous copies of the machine.

    Attributes:
        device: of the KV pool.
        name: for rows.
        is_gpu: whether there are peers, settings and streams.
    """

    device: torch.device
    name: str
    is_gpu: ClassVar[bool]

    @abstractmethod
    def stream(self, priority: int = 0) -> Any:
        """A new stream; lower numbers go first."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in the current stream."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Have the current stream wait for a mark of another one."""

    @abstractmethod
    def ms(self, start: Any, end: Any) -> float:
        """Between two marks that have passed."""

    @abstractmethod
    def events(self, count: int) -> list[Any]:
        """Events without timing, with a method `record(stream)`."""

    @abstractmethod
    def hold(self, ms: float) -> None:
        """Keep the current stream busy for about so long."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything; raises what went wrong on the device."""

    @abstractmethod
    def memcpy(self, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        """The contiguous copy that others are compared with, enqueued on the current stream."""

    @abstractmethod
    def copying_pages(self, targets: list[int], sources: list[int], nbytes: int) -> Call:
        """A call that has the copy engine take pages of `nbytes` from address to address, on the current stream."""

    @abstractmethod
    def room(self) -> int:
        """Bytes that the benchmark may take of this device's memory for the KV pool's side."""


class Gpu(Machine):
    """One CUDA GPU, torch's current one from here on."""

    is_gpu = True

    def __init__(self, index: int) -> None:
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(index)

    def stream(self, priority: int = 0) -> Any:
        return torch.cuda.Stream(self.device, priority=priority)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream().wait_event(mark)

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def events(self, count: int) -> list[Any]:
        return [torch.cuda.Event() for _ in range(count)]

    def hold(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * 2e6))  # cycles, of clocks around 2 GHz

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memcpy(self, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        from sglang_xmem import gpus

        stream = torch.cuda.current_stream().cuda_stream
        status = gpus.driver().cuMemcpyAsync(target.data_ptr(), source.data_ptr(), nbytes, stream)
        gpus.checked(status, "a contiguous copy")

    def copying_pages(self, targets: list[int], sources: list[int], nbytes: int) -> Call:
        engine, count = CopyEngine(), len(targets)
        arrays = [torch.tensor(values) for values in (targets, sources, [nbytes] * count)]

        def call() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            engine.copy(arrays[0].data_ptr(), arrays[1].data_ptr(), arrays[2].data_ptr(), count, stream)

        return call

    def room(self) -> int:
        # Checking bytes takes four planes more, and a matrix product its own.
        return int(torch.cuda.mem_get_info(self.device)[0] * 0.4)


class Cpu(Machine):
    """A machine without a GPU: calls are done when they return, and there are no streams."""

    is_gpu = False
    device = torch.device("cpu")
    name = "cpu"

    def stream(self, priority: int = 0) -> Any:
        return None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> Any:
        return time.perf_counter()

    def wait(self, mark: Any) -> None:
        pass

    def ms(self, start: Any, end: Any) -> float:
        return float(end - start) * 1e3

    def events(self, count: int) -> list[Any]:
        raise MeasurementFailed("a machine without a GPU has no events.")

    def hold(self, ms: float) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def memcpy(self, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        target[:nbytes].copy_(source[:nbytes])

    def copying_pages(self, targets: list[int], sources: list[int], nbytes: int) -> Call:
        def call() -> None:
            for target, source in zip(targets, sources, strict=True):
                ctypes.memmove(target, source, nbytes)

        return call

    def room(self) -> int:
        import psutil

        return int(psutil.virtual_memory().available // 4)


class Scene:
    """Planes on both sides, and two sets of pages in random order that have none in common: to load, and to store.

    Args:
        tier, device: bytes on either side, at least `Scene.nbytes(case)`.
        locality: of the tier, `host` or `device`.
        copying_gpu: the peer that runs the copies where the tier chooses; None: the rank's own GPU.
        in_order: pages follow each other instead, on both sides.
        relays: GPUs that each move a share of every copy.
        run_pages: so many pages follow each other in the tier.
    """

    def __init__(
        self,
        machine: Machine,
        tier: torch.Tensor,
        device: torch.Tensor,
        case: Case,
        locality: str,
        copying_gpu: int | None = None,
        in_order: bool = False,
        relays: tuple[int, ...] = (),
        run_pages: int = 1,
    ) -> None:
        self.machine, self.case, self.locality, self.copying_gpu = machine, case, locality, copying_gpu
        self.relays = relays
        self.tier, self.device = tier, device
        self.rows_per_page = case.page_bytes // case.row_bytes
        tokens = 2 * case.pages * self.rows_per_page
        shape = (case.planes, tokens, case.row_bytes)
        self.tier_planes = list(tier[: self.nbytes(case)].view(shape))
        self.device_planes = list(device[: self.nbytes(case)].view(shape))
        generator = torch.Generator().manual_seed(case.pages)
        count = 2 * case.pages

        def pages(run: int) -> torch.Tensor:
            firsts = torch.randperm(-(-count // run), generator=generator) * run
            found = (firsts[:, None] + torch.arange(run)).flatten()
            return found[found < count].to(machine.device)

        self.tier_pages, self.device_pages = (pages(count if in_order else run) for run in (run_pages, 1))
        self.tier_rows, self.device_rows = self.tier_pages * self.rows_per_page, self.device_pages * self.rows_per_page
        n = case.pages
        self.to_load = (self.tier_rows[:n], self.device_rows[:n])
        self.to_store = (self.tier_rows[n:], self.device_rows[n:])
        self.planes = range(case.planes)

    @staticmethod
    def nbytes(case: Case) -> int:
        """On either side: twice the pages, so that random ones are scattered."""
        return 2 * case.nbytes

    def copier(self, job: Job, changes: dict[str, Any] | None = None) -> tuple[PageCopier, RunsOn | None]:
        """The page copier of a job, or with other changes to the tier's own settings, and which GPU it runs on.

        Raises:
            CopyError: it cannot run there.
        """
        settings = dict(job.changes) if changes is None else changes
        make = partial(
            make_copier,
            job.kernel,  # type: ignore[arg-type]
            self.tier_planes,
            self.device_planes,
            self.rows_per_page,
            tier_locality=self.locality,  # type: ignore[arg-type]
            load=settings,
            store=settings,
            relays=self.relays,
        )
        gpu = None if job.by == "rank" else self.copying_gpu
        copier, refused = on_peer_or_rank(make, gpu, required=job.by == "peer")
        if gpu is not None and refused is None:
            return copier, "peer"
        return copier, "rank" if self.machine.is_gpu else None

    def copy(self, copier: PageCopier, load: bool, planes: range | None = None) -> None:
        """Enqueue one direction."""
        copy, rows = (copier.load, self.to_load) if load else (copier.store, self.to_store)
        copy(*rows, self.planes if planes is None else planes)

    def contiguous(self, load: bool, planes: range | None = None) -> None:
        """Enqueue the contiguous copy of as many bytes; the two directions touch different halves."""
        count = len(self.planes if planes is None else planes)
        nbytes = self.case.page_bytes * self.case.pages * count
        at = 0 if load else self.case.nbytes
        tier, device = self.tier[at:], self.device[at:]
        self.machine.memcpy(*((device, tier) if load else (tier, device)), nbytes)

    def parts(self) -> list[range]:
        """All planes in up to four calls of the same size."""
        size = max(1, len(self.planes) // 4)
        return [range(at, at + size) for at in range(0, len(self.planes) - size + 1, size)]

    # ---- bytes ----

    def right(self, load: Call | None = None, store: Call | None = None) -> bool:
        """Copy once more between fresh random bytes, and compare all of both sides.

        A byte that should have moved and did not, one that moved elsewhere, and a source that changed all show.

        Args:
            load, store: enqueue the copy of `to_load` and `to_store`; both run at once.
        """
        machine = self.machine
        for number in self.planes:
            machine.memcpy(self.tier_planes[number], self._random(2 * number), self.tier_planes[number].numel())
            self.device_planes[number].copy_(self._random(2 * number + 1))
        machine.synchronize()
        for call in (load, store):
            if call is not None:
                with machine.on(machine.stream()):
                    call()
        machine.synchronize()
        n = self.case.pages
        there, here = self.tier_pages, self.device_pages
        for number in self.planes:
            tier, device = self._random(2 * number), self._random(2 * number + 1)
            # Whole words: byte by byte a CPU takes many times as long.
            words = self.case.page_bytes // 8
            tier_paged, device_paged = (plane.view(torch.int64).view(-1, words) for plane in (tier, device))
            loaded, stored = tier_paged[there[:n]], device_paged[here[n:]]
            if load is not None:
                device_paged[here[:n]] = loaded
            if store is not None:
                tier_paged[there[n:]] = stored
            found = torch.empty_like(tier)
            machine.memcpy(found, self.tier_planes[number], found.numel())
            if not (torch.equal(found, tier) and torch.equal(self.device_planes[number], device)):
                return False
        return True

    def _random(self, seed: int) -> torch.Tensor:
        """Bytes of a plane, the same for the same seed."""
        plane = torch.empty_like(self.device_planes[0])
        generator = torch.Generator(self.machine.device).manual_seed(seed)
        plane.view(torch.int64).random_(generator=generator)
        return plane


def measure(job: Job, scene: Scene, repetitions: int) -> list[Row]:
    """The rows of a job.

    Raises:
        MeasurementFailed, CopyError, and what the device says.
    """
    kind = job.path.partition("_")[2]
    if kind == "both":
        rows = _both(job, scene)
    elif kind == "matmul":
        rows = [_matmul(job, scene, repetitions)]
    elif kind == "enqueue":
        rows = [_enqueue(job, scene)]
    else:
        rows = [_one_way(job, scene, repetitions, load=kind == "load")]
    for row in rows:
        row.update(target=job.target)
        row["reached"] = reached(row)
    return rows


def describe(job: Job, machine: Machine) -> Row:
    """What every row of a job begins with."""
    case = job.case
    return {
        "path": job.path,
        "case": case.label,
        "page_bytes": case.page_bytes,
        "row_bytes": case.row_bytes,
        "pages": case.pages,
        "planes": case.planes,
        "memory": job.memory,
        "tuning": job.tuning,
        "device": machine.name,
    }


def _settings(
    job: Job, copier: PageCopier, runs_on: RunsOn | None, load: bool, changes: dict[str, Any] | None = None
) -> Row:
    """What ran and where, which is not what was asked for where the GPU cannot do that."""
    used = getattr(copier, "load_tuning" if load else "store_tuning", None)
    changes = dict(job.changes) if changes is None else changes
    ctas = getattr(used, "ctas", changes.get("ctas"))
    kernel = str(used) if used is not None else f"{job.kernel}{f', {ctas} CTAs' if ctas else ''}"
    settings = dataclasses.asdict(used) if dataclasses.is_dataclass(used) and not isinstance(used, type) else {}
    where = {} if runs_on is None else {"runs_on": runs_on}
    return {**where, "ctas": ctas, "kernel": kernel, "changes": changes, "settings": settings}


def times_ms(
    machine: Machine, calls: Sequence[Call], repetitions: int, warm_up: int = 2, hold_ms: float = HOLD_MS
) -> list[list[float]]:
    """Milliseconds of each of `calls`, `repetitions` times in turn, so that clocks and caches are the same for all.

    Args:
        hold_ms: enqueueing a call is over by then.
    """
    times: list[list[float]] = [[] for _ in calls]
    for index in range(repetitions + warm_up):
        for mine, call in zip(times, calls, strict=True):
            machine.hold(hold_ms)
            start = machine.mark()
            call()
            end = machine.mark()
            machine.synchronize()
            if index >= warm_up:
                mine.append(machine.ms(start, end))
    return times


def _rate(nbytes: float, times: Sequence[float]) -> float:
    return stats.gbps(nbytes, statistics.median(times))


def _by_engine(job: Job, scene: Scene, repetitions: int, *, load: bool) -> Row:
    """The copy engine, told each page of each plane; not on the legacy stream, which it does not take."""
    machine, case = scene.machine, job.case
    sides = (scene.tier_planes, scene.device_planes)
    rows = [side.tolist() for side in (scene.to_load if load else scene.to_store)]
    there, here = (
        [plane.data_ptr() + row * case.row_bytes for plane in planes for row in mine]
        for planes, mine in zip(sides, rows, strict=True)
    )
    targets, sources = (here, there) if load else (there, here)
    copy = machine.copying_pages(targets, sources, case.page_bytes)
    row, enqueue_us = _enqueued(scene, copy, repetitions, load=load)
    return {
        **describe(job, machine),
        "kernel": "copy engine",
        "runs_on": "rank",
        **row,
        "enqueue_us_per_page": round(enqueue_us / len(targets), 3),  # of each plane
        "verified": scene.right(load=copy) if load else scene.right(store=copy),
    }


def _staged(job: Job, scene: Scene, repetitions: int) -> Row:
    """Loads of the tier's copier with its staging ring; they are in runs, and signal layers as in an engine."""
    machine, layers = scene.machine, job.case.planes // PLANES_PER_LAYER
    direct, runs_on = scene.copier(dataclasses.replace(job, kernel="cuda"))
    copier = staged(direct)
    signals = copier.make_signals(layers)
    if signals is None:
        raise MeasurementFailed("this GPU has no signals, and without them nothing is staged.")
    tier_rows, device_rows = scene.to_load
    on_cpu, planes = tier_rows.cpu(), scene.planes[: layers * PLANES_PER_LAYER]
    copy = partial(copier.load_signalling, tier_rows, device_rows, planes, signals, on_cpu)
    row, enqueue_us = _enqueued(scene, copy, repetitions, load=True)
    if not copier.staged_loads:
        raise MeasurementFailed("these loads are too small or their runs too short to be staged.")
    return {
        **describe(job, machine),
        **_settings(job, direct, runs_on, load=True),
        "kernel": f"copy engine, {copier.ring_bytes >> 20} MiB ring",
        **row,
        "run_pages": job.run_pages,
        "enqueue_us_per_layer": round(enqueue_us / layers, 2),
        "verified": scene.right(load=copy),
    }


def _enqueued(scene: Scene, copy: Call, repetitions: int, *, load: bool) -> tuple[Row, float]:
    """A copy that takes a while to enqueue, against a contiguous one; and the microseconds of enqueueing it."""
    machine = scene.machine
    enqueue_s: list[float] = []

    def timed() -> None:
        start = time.perf_counter()
        copy()
        enqueue_s.append(time.perf_counter() - start)

    with machine.on(machine.stream()):
        timed()
        machine.synchronize()
        hold_ms = HOLD_MS + 1.5e3 * enqueue_s[0]
        contiguous, pages = times_ms(machine, (partial(scene.contiguous, load), timed), repetitions, hold_ms=hold_ms)
    row = _compared(scene.case.nbytes, pages, contiguous)
    return {**row, "times_ms": [round(ms, 4) for ms in pages]}, 1e6 * statistics.median(enqueue_s)


def _one_way(job: Job, scene: Scene, repetitions: int, *, load: bool) -> Row:
    if job.kernel == "engine":
        return _by_engine(job, scene, repetitions, load=load)
    if job.kernel == "staged":
        return _staged(job, scene, repetitions)
    copier, runs_on = scene.copier(job)
    if job.case.nbytes < SHORT_BYTES and repetitions > 2:
        repetitions = max(repetitions, SHORT_REPETITIONS)
    copy = partial(scene.copy, copier, load)
    calls = (partial(scene.contiguous, load), copy)
    contiguous, pages = times_ms(scene.machine, calls, repetitions)
    row = {
        **describe(job, scene.machine),
        **_settings(job, copier, runs_on, load),
        **({"relays": list(scene.relays)} if scene.relays else {}),
        **_compared(job.case.nbytes, pages, contiguous),
        "times_ms": [round(ms, 4) for ms in pages],
    }
    if job.tuning != "candidate":  # of those only the best is checked
        row["verified"] = scene.right(load=copy) if load else scene.right(store=copy)
    return row


def _compared(nbytes: float, pages: Sequence[float], contiguous: Sequence[float]) -> Row:
    rate, link = _rate(nbytes, pages), _rate(nbytes, contiguous)
    return {"gbps": round(rate, 2), "contiguous_gbps": round(link, 2), "ratio": round(rate / link, 4)}


def _gate(machine: Machine) -> Any:
    """A mark that the machine passes a moment after all that is enqueued meanwhile."""
    gate = machine.stream()
    machine.synchronize()
    with machine.on(gate):
        machine.hold(2.0)
        return machine.mark()


def at_once(machine: Machine, sides: Sequence[Sequence[Call]]) -> list[list[float]]:
    """Milliseconds of calls of each side, a stream a side, where all sides were at work.

    Calls that began before every side had, or ended after one was done, do not count.

    Raises:
        MeasurementFailed: the sides hardly ran at the same time.
    """
    streams, start = [machine.stream() for _ in sides], _gate(machine)
    marks: list[list[Any]] = []
    for stream, calls in zip(streams, sides, strict=True):
        with machine.on(stream):
            machine.wait(start)
            mine = [machine.mark()]
            for call in calls:
                call()
                mine.append(machine.mark())
            marks.append(mine)
    machine.synchronize()
    at = [[machine.ms(start, mark) for mark in mine] for mine in marks]
    begin, end = max(mine[0] for mine in at), min(mine[-1] for mine in at)
    # The first call of each counts although it may begin a moment before the other side's.
    slack = 0.05 * (end - begin)
    times = [[b - a for a, b in pairwise(mine) if a >= begin - slack and b <= end + 1e-3] for mine in at]
    if end <= begin or any(len(mine) < 2 for mine in times):
        ends = "; ".join(", ".join(f"{ms:.1f}" for ms in mine) for mine in at)
        raise MeasurementFailed(f"the two directions did not run at the same time: their calls ended at {ends} ms.")
    return times


def span_ms(machine: Machine, sides: Sequence[Sequence[Call]]) -> float:
    """Milliseconds from the first call's begin to the last one's end, a stream a side."""
    streams, start = [machine.stream() for _ in sides], _gate(machine)
    ends = []
    for stream, calls in zip(streams, sides, strict=True):
        with machine.on(stream):
            machine.wait(start)
            for call in calls:
                call()
            ends.append(machine.mark())
    machine.synchronize()
    return max(machine.ms(start, end) for end in ends)


def _both(job: Job, scene: Scene) -> list[Row]:
    machine, parts = scene.machine, scene.parts()
    copier, runs_on = scene.copier(job)
    rounds = [parts[index % len(parts)] for index in range(CALLS_AT_ONCE)]
    pages, contiguous = (
        [[partial(copy, load, part) for part in rounds] for load in (True, False)]
        for copy in (partial(scene.copy, copier), scene.contiguous)
    )
    at_once(machine, pages)  # warm
    times = at_once(machine, pages)
    # The driver may run the two contiguous copies one after the other: what counts is when both are done. Each alone
    # is in the row too.
    span_ms(machine, contiguous)
    each_ms = span_ms(machine, contiguous) / len(rounds)
    alone = [span_ms(machine, [side]) / len(rounds) for side in contiguous]
    verified = scene.right(load=partial(scene.copy, copier, True), store=partial(scene.copy, copier, False))
    nbytes = job.case.page_bytes * job.case.pages * len(parts[0])
    return [
        {
            **describe(job, machine),
            "path": f"{job.path}_{name}",
            **_settings(job, copier, runs_on, load),
            **_compared(nbytes, times[side], [each_ms]),
            "alone_gbps": round(_rate(nbytes, [alone[side]]), 2),
            "times_ms": [round(ms, 4) for ms in times[side]],
            "verified": verified,
        }
        for side, (name, load) in enumerate((("load", True), ("store", False)))
    ]


def _matmul(job: Job, scene: Scene, repetitions: int) -> Row:
    """A load beside products; a kernel of MATMUL_KERNELS with as few blocks as load at 90 % of the link alone."""
    machine, part = scene.machine, scene.parts()[0]
    nbytes = job.case.page_bytes * job.case.pages * len(part)
    attempts = [dict(job.changes)]
    if job.tuning in MATMUL_KERNELS:
        attempts = [{**job.changes, "ctas": ctas} for ctas in MATMUL_CTAS]
    for changes in attempts:
        copier, runs_on = scene.copier(job, changes)
        load = partial(scene.copy, copier, True, part)
        contiguous, pages = times_ms(machine, (partial(scene.contiguous, True, part), load), repetitions)
        compared = _compared(nbytes, pages, contiguous)
        if compared["ratio"] >= MATMUL_LINK_SHARE:
            break
    side = torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=machine.device).to(torch.bfloat16)
    other, product = side.t().contiguous(), torch.empty_like(side)
    alone, beside, loads = _beside(
        machine,
        partial(torch.matmul, side, other, out=product),
        load,
        statistics.median(pages),
    )
    before, after = statistics.median(alone), statistics.median(beside)
    return {
        **describe(job, machine),
        **_settings(job, copier, runs_on, True, changes),
        **compared,
        "gbps_beside": round(_rate(nbytes, loads), 2),
        "matmul_side": MATMUL_SIDE,
        "matmul_ms": round(before, 4),
        "matmul_beside_ms": round(after, 4),
        "matmul_tflops": round(2 * MATMUL_SIDE**3 / before / 1e9, 1),
        "slowdown": round(after / before - 1, 4),
        "times_ms": [round(ms, 4) for ms in pages],
        "verified": scene.right(load=partial(scene.copy, copier, True)),
    }


def _beside(
    machine: Machine, compute: Callable[[], Any], load: Call, load_ms: float
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of `compute` alone, of `compute` while loads follow each other, and of those loads.

    Raises:
        MeasurementFailed: the loads ended first, however many there were.
    """
    loading = machine.stream(priority=-1)  # as the adapter's
    computing = machine.stream()

    def products() -> list[Any]:
        marks = [machine.mark()]
        for _ in range(MATMUL_CALLS):
            compute()
            marks.append(machine.mark())
        return marks

    def between(marks: Sequence[Any]) -> list[float]:
        return [machine.ms(a, b) for a, b in pairwise(marks)]

    alone: list[float] = []
    beside: list[float] = []
    loads: list[float] = []
    count, rounds = 0, 0
    while rounds <= MATMUL_ROUNDS:
        with machine.on(computing):
            machine.hold(1.0)
            marks = products()
        machine.synchronize()
        mine = between(marks)
        # The first round is the warm-up. From it comes how many loads take half as long again as the products.
        count = count or int(1.5 * MATMUL_CALLS * statistics.median(mine) / load_ms) + 4
        with machine.on(loading):
            machine.hold(2.0)
            load_marks = [machine.mark()]
            for _ in range(count):
                load()
                load_marks.append(machine.mark())
        with machine.on(computing):
            machine.wait(load_marks[1])
            marks = products()
        machine.synchronize()
        at = [machine.ms(load_marks[0], mark) for mark in load_marks]
        start, end = (machine.ms(load_marks[0], mark) for mark in (marks[0], marks[-1]))
        if at[-1] < end:
            count *= 2
            if count > 4096:
                raise MeasurementFailed("the loads were over before the matrix products.")
            continue
        if rounds > 0:
            alone += mine
            beside += between(marks)
            loads += [b - a for a, b in pairwise(at) if a >= start and b <= end]
        rounds += 1
    if not loads:
        raise MeasurementFailed("no whole load ran beside the matrix products; a smaller case has shorter ones.")
    return alone, beside, loads


def enqueue_load(
    copier: PageCopier,
    rows: tuple[torch.Tensor, torch.Tensor],
    parts: Sequence[range],
    signals: LoadSignals | None,
    events: Sequence[Any],
    stream: Any,
) -> None:
    """What the scheduler thread does for a load of a layer a part: the call that is timed.

    One launch that signals its parts, and an event behind it; without signals a launch and an event a part.
    """
    if signals is not None:
        copier.load_signalling(*rows, range(parts[0].start, parts[-1].stop), signals)
        events[-1].record(stream)
        return
    for planes, event in zip(parts, events, strict=True):
        copier.load(*rows, planes)
        event.record(stream)


def _enqueue(job: Job, scene: Scene) -> Row:
    machine = scene.machine
    copier, runs_on = scene.copier(job)
    stream = machine.stream(priority=-1)
    first = range(0, len(scene.planes) // PLANES_PER_LAYER * PLANES_PER_LAYER, PLANES_PER_LAYER)
    parts = [range(plane, plane + PLANES_PER_LAYER) for plane in first]
    events = machine.events(len(parts))
    signals = copier.make_signals(len(parts))
    available = scene.tier_rows.numel()
    times: dict[int, dict[str, float]] = {}
    for pages in sorted({min(pages, available) for pages in ENQUEUE_PAGES}):
        rows = (scene.tier_rows[:pages], scene.device_rows[:pages])
        times[pages] = {}
        for state in ("idle", "blocked"):
            mine = []
            gc.collect()
            for index in range(ENQUEUE_REPETITIONS + 3):
                machine.synchronize()
                with machine.on(stream):
                    if state == "blocked":
                        machine.hold(5.0)
                    start = time.perf_counter()
                    enqueue_load(copier, rows, parts, signals, events, stream)
                    elapsed = time.perf_counter() - start
                if index >= 3:
                    mine.append(elapsed * 1e6)
            machine.synchronize()
            times[pages][state] = round(statistics.median(mine), 1)
    most = max(times)
    return {
        **describe(job, machine),
        "pages": most,
        "layers": len(parts),
        **_settings(job, copier, runs_on, True),
        "us": max(times[most].values()),
        **{f"us_{state}_{pages}_pages": us for pages, states in times.items() for state, us in states.items()},
        "verified": scene.right(load=partial(enqueue_load, copier, scene.to_load, parts, signals, events, stream)),
    }
