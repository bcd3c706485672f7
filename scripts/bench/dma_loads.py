"""Measure verified loads from host memory by copy engines and by the copy kernel: one JSON line per measurement.

    python scripts/bench/dma_loads.py --out dma_loads.jsonl

One GPU, 40 GB of its memory, 16 GiB of pinned host memory, some minutes. `copies` measures only copies of a layer's
rows from page-first frames. `load` moves 1280 pages of a model's shape to their slots, by the kernel (`staging_mib` 0)
and by copy engines, with `run` adjacent frames: alone, and concurrently with a kernel that uses all multiprocessors
layer by layer and waits for each layer, like the forward pass. `plain` lets that kernel's blocks start as slots become
free; `cooperative` only when all of them fit.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.copy_moves import pattern
from sglang_xmem.copies import make_copier, nvrtc
from sglang_xmem.copies.base import Pages, Program, Step
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.copies.dma import Gpu
from sglang_xmem.copies.geometry import Plane, Slab

MIB = 1 << 20
PAGES = 1280
SPARE = 16
POISON = 0x5A5A5A5A5A5A5A5A
UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED

_STAND_IN = """
extern "C" __global__ void stand_in(unsigned long long nanoseconds) {
    extern __shared__ char all_of_it[];
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
    if (now == begin) all_of_it[0] = 1;
}
"""


class Shape(NamedTuple):
    """A model's pools.

    Attributes:
        unit_bytes: of a page in a layer, for each component; a component's layers are adjacent in a frame.
        layer_ms: of the forward pass of a prompt that hits in HBM, a layer.
    """

    layers: int
    unit_bytes: tuple[int, ...]
    layer_ms: float

    @property
    def frame_bytes(self) -> int:
        return self.layers * sum(self.unit_bytes)


SHAPES = {
    "qwen3-8b": Shape(36, (131072, 131072), 28.8 / 36),
    "deepseek-v2-lite": Shape(27, (73728,), 27 / 27),
}


def descriptors(sources: Any, targets: Any, width: int, heights: Any, pitch: int, target_pitch: int) -> Any:
    """CUDA_MEMCPY2D for each run of rows: uint64, shape (n, 16)."""
    table = np.zeros((len(sources), 16), dtype=np.uint64)
    table[:, 2], table[:, 9] = UNIFIED, UNIFIED
    table[:, 4], table[:, 6] = sources, pitch
    table[:, 11], table[:, 13] = targets, target_pitch
    table[:, 14], table[:, 15] = width, heights
    return table


def timed(do: Callable[[], object], stream: torch.cuda.Stream, repeat: int) -> tuple[float, float]:
    """Median milliseconds on a stream, and on this thread; the first of repeat + 1 is not counted."""
    on_gpu, here = [], []
    with torch.cuda.stream(stream):
        for _ in range(repeat + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            before = time.perf_counter()
            do()
            here.append((time.perf_counter() - before) * 1e3)
            end.record()
            torch.cuda.synchronize()
            on_gpu.append(start.elapsed_time(end))
    return statistics.median(on_gpu[1:]), statistics.median(here[1:])


def measure_copies(pool: torch.Tensor, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Copies of rows without anything behind them."""
    from cuda.bindings import driver as bindings

    stream = torch.cuda.Stream()
    nbytes = 1 << 30
    here = torch.empty(nbytes // 8, dtype=torch.int64, device="cuda")
    ms, _ = timed(lambda: here.copy_(pool.view(-1)[: nbytes // 8], non_blocking=True), stream, 5)
    yield {"what": "contiguous", "gbps": round(nbytes / ms / 1e6, 2)}
    for name, width in (
        ("deepseek-v2-lite", 73728),
        ("qwen3-8b", 131072),
        ("qwen3-8b", 262144),
        ("deepseek-v2-lite", 4 * 73728),
        ("qwen3-8b", 4 * 131072),
        ("deepseek-v2-lite", 8448),
    ):
        pitch = SHAPES[name].frame_bytes
        rows = min(PAGES, nbytes // width)
        for run in (1, 4, 16, rows):
            # Runs of frames are shuffled, as in a pool that has been in use.
            order = np.random.default_rng(1).permutation(np.arange(rows - rows % run).reshape(-1, run))
            count = order.size
            sources = pool.data_ptr() + order[:, 0] * pitch
            targets = here.data_ptr() + np.arange(len(order)) * run * width
            table = descriptors(sources, targets, width, run, pitch, width)

            def each(table: Any = table) -> None:
                address = table.ctypes.data
                with gpu.ordered():
                    for number in range(len(table)):
                        gpu.copy(address + 128 * number, 0)

            ms, enqueue = timed(each, stream, 3)
            row = {
                "what": "copies",
                "width": width,
                "pitch": pitch,
                "run": int(run),
                "calls": len(order),
                "gbps": round(count * width / ms / 1e6, 2),
                "us_per_call": round(enqueue * 1e3 / len(order), 2),
            }
            if width == 131072 and run in (1, 16):
                made = []
                for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                    copy = bindings.CUDA_MEMCPY2D()
                    copy.srcMemoryType = copy.dstMemoryType = bindings.CUmemorytype.CU_MEMORYTYPE_UNIFIED
                    copy.srcDevice, copy.dstDevice = source, target
                    copy.srcPitch, copy.dstPitch, copy.WidthInBytes, copy.Height = pitch, width, width, int(run)
                    made.append(copy)

                def by_bindings(made: Any = made) -> None:
                    for copy in made:
                        bindings.cuMemcpy2DAsync(copy, stream.cuda_stream)

                _, enqueue = timed(by_bindings, stream, 3)
                row["us_per_call_of_bindings"] = round(enqueue * 1e3 / len(order), 2)
            yield row


class Load:
    """A shape's memory and 1280 pages to load, `run` frames at a time side by side.

    Args:
        pool: int64 pinned memory that frames are put in.
        run: frames of a run; the runs' order, and all slots, are random.
    """

    def __init__(self, name: str, pool: torch.Tensor, run: int) -> None:
        self.name, self.shape, self.run = name, SHAPES[name], run
        shape = self.shape
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.nbytes = PAGES * shape.frame_bytes
        self.tier = pool.view(-1)[: (PAGES + SPARE) * shape.frame_bytes // 8].view(PAGES + SPARE, -1)
        self.slab = Slab(self.tier.data_ptr(), PAGES + SPARE, shape.frame_bytes)
        order = np.random.default_rng(2).permutation(np.arange(PAGES).reshape(-1, run)).reshape(-1)
        self.rows = order
        self.addresses = self.slab.address + order * shape.frame_bytes
        self.units = torch.randperm(PAGES + SPARE, device=self.device)[:PAGES]
        self.pages = [Pages(torch.from_numpy(self.addresses).to(self.device), self.units * 64)]
        self.planes: list[list[Plane]] = [[] for _ in range(shape.layers)]
        self.pools: list[tuple[int, torch.Tensor]] = []  # first word in the frame, units
        offset = 0
        for nbytes in shape.unit_bytes:
            for layer in range(shape.layers):
                array = torch.full((PAGES + SPARE, nbytes // 8), POISON, dtype=torch.int64, device=self.device)
                self.pools.append((offset // 8, array))
                self.planes[layer].append(Plane(array.data_ptr(), nbytes, PAGES + SPARE, offset, nbytes, 64))
                offset += nbytes
        self.steps = [Step(plane, 0, layer) for layer, planes in enumerate(self.planes) for plane in planes]
        for begin in range(0, PAGES + SPARE, 32):
            some = torch.arange(begin, min(begin + 32, PAGES + SPARE), device=self.device)
            self.tier[begin : begin + len(some)].copy_(pattern(some, 0, self.tier.shape[1], 0))
        torch.cuda.synchronize()

    def poison(self) -> None:
        for _, array in self.pools:
            array.fill_(POISON)
        torch.cuda.synchronize()

    def right(self) -> bool:
        """All named units hold their frames' words, and the others what they had."""
        torch.cuda.synchronize()
        others = torch.ones(PAGES + SPARE, dtype=torch.bool, device=self.device)
        others[self.units] = False
        rows, right = torch.from_numpy(self.rows).to(self.device), True
        for first, array in self.pools:
            right &= torch.equal(array[self.units], pattern(rows, first, array.shape[1], 0))
            right &= bool((array[others] == POISON).all())
        return right


class Way:
    """A copier that loads.

    Args:
        staging_mib: of copy engines; 0: the kernel loads.
    """

    def __init__(self, load: Load, staging_mib: int) -> None:
        self.load = load
        self.copier, _ = make_copier("cuda", [load.slab], load.device, link="pcie", staging_bytes=staging_mib * MIB)
        self.program: Program = self.copier.compile(load.steps, load.shape.layers)
        counters = self.copier.make_counters(load.shape.layers)
        assert counters is not None
        self.counters: LayerCounters = counters
        self.about = {"staging_mib": staging_mib, "run": load.run}

    def run(self) -> None:
        self.copier.load(self.program, self.load.pages, self.counters, [self.load.addresses])


class Forward:
    """The stand-in for the forward pass."""

    def __init__(self, shape: Shape) -> None:
        from cuda.bindings import driver

        properties: Any = torch.cuda.get_device_properties(0)
        device = torch.device("cuda", torch.cuda.current_device())
        image = nvrtc.build(_STAND_IN, "stand_in.cu", {}, (properties.major, properties.minor))
        self.shared = properties.shared_memory_per_block_optin
        self.function = nvrtc.load(image, "stand_in", device, self.shared)
        self.grid, self.shape, self.driver = properties.multi_processor_count, shape, driver
        self.stream = torch.cuda.Stream()

    def run(self, counters: LayerCounters | None, *, cooperative: bool) -> None:
        """Enqueue all layers, each behind its part of the load."""
        values = ((int(self.shape.layer_ms * 1e6),), (ctypes.c_uint64,))
        with torch.cuda.stream(self.stream):
            for layer in range(self.shape.layers):
                if counters is not None:
                    counters.wait(layer)
                where = (self.grid, 1, 1, 256, 1, 1, self.shared, self.stream.cuda_stream, values)
                if cooperative:
                    (status,) = self.driver.cuLaunchCooperativeKernel(self.function, *where)
                else:
                    (status,) = self.driver.cuLaunchKernel(self.function, *where, 0)
                if status.value:
                    raise RuntimeError(status.name)


def measure_load(how: Way, load: Load, repeat: int) -> dict[str, Any]:
    """A way to load: alone, and under the stand-in."""
    row: dict[str, Any] = {"what": "load", "shape": load.name, **how.about, "copier": how.copier.describe()}
    loading = torch.cuda.Stream(priority=-1)
    load.poison()
    ms, enqueue = timed(how.run, loading, repeat)
    row |= {"ms": round(ms, 2), "gbps": round(load.nbytes / ms / 1e6, 2), "enqueue_ms": round(enqueue, 3)}
    row["right"] = load.right()
    forward = Forward(load.shape)
    for cooperative in (False, True):
        times = []
        for _ in range(repeat + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(loading)
            forward.stream.wait_event(start)
            with torch.cuda.stream(loading):
                how.run()
            forward.run(how.counters, cooperative=cooperative)
            end.record(forward.stream)
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        row[f"ms_under_{'cooperative' if cooperative else 'plain'}"] = round(statistics.median(times[1:]), 2)
    row["right"] &= load.right()
    row["loads"] = getattr(how.copier, "loads", {})
    return row


def measure_forward(shape: Shape, name: str) -> dict[str, Any]:
    """The stand-in without a load."""
    forward = Forward(shape)
    row: dict[str, Any] = {"what": "forward", "shape": name}
    for cooperative in (False, True):
        ms, _ = timed(lambda c=cooperative: forward.run(None, cooperative=c), forward.stream, 2)  # type: ignore[misc]
        row[f"ms_{'cooperative' if cooperative else 'plain'}"] = round(ms, 2)
    return row


def measure(arguments: argparse.Namespace) -> Iterator[Callable[[], Any]]:
    """Everything, in order of importance."""
    most = max((PAGES + SPARE) * shape.frame_bytes for shape in SHAPES.values())
    pool = torch.empty(most // 8, dtype=torch.int64, pin_memory=True)
    gpu = Gpu(torch.device("cuda", torch.cuda.current_device()))
    yield lambda: list(measure_copies(pool, gpu))
    for name in arguments.shapes:
        yield lambda name=name: [measure_forward(SHAPES[name], name)]  # type: ignore[misc]
        for run, sizes in ((PAGES, (0, 256, 512)), (64, (256, 512)), (16, (256, 512)), (4, (512,))):
            load = Load(name, pool, run)
            for mib in sizes:
                yield lambda mib=mib, load=load: [measure_load(Way(load, mib), load, arguments.repeat)]  # type: ignore[misc]
            del load
            gc.collect()
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file that lines are appended to")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeat", type=int, default=2, help="loads measured each, after one that warms up")
    parser.add_argument("--seconds", type=float, default=200, help="nothing new begins after so long")
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    begun, failures = time.perf_counter(), 0
    with arguments.out.open("a", encoding="utf-8") as out:
        for number, do in enumerate(measure(arguments)):
            if time.perf_counter() - begun > arguments.seconds:
                print("out of time", flush=True)
                break
            try:
                rows = do()
            except Exception as error:
                rows = [{"number": number, "error": f"{type(error).__name__}: {error}"}]
                traceback.print_exc()
            for row in rows:
                row |= {"gpu": torch.cuda.get_device_name(0), "seconds": round(time.perf_counter() - begun, 1)}
                failures += "error" in row or not row.get("right", True)
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(json.dumps(row), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
