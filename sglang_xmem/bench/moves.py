"""Page copies through a tier without an engine, for `bench copy` and `bench soak`: the arena that engines use, pools of
a shape on the device, and every byte compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_xmem import gpus
from sglang_xmem.arena import Arena, SpaceSpec, aligned, bytes_at
from sglang_xmem.bench import setup, sizing
from sglang_xmem.bench.engine import Row
from sglang_xmem.bench.runs import Results
from sglang_xmem.config import parse_options
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.errors import ConfigError, CopyError, Unavailable
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.tiers import Ranks, tier_classes

KIB, MIB = 1 << 10, 1 << 20


class Case(NamedTuple):
    """Pages of a kind: layers, bytes of a layer's units, and slots of a page."""

    layers: int
    units: tuple[int, ...]
    divisor: int

    @property
    def page_bytes(self) -> int:
        return self.layers * sum(self.units)


#: Pages of 64 tokens of Qwen3-30B-A3B in bf16, of DeepSeek V3's latents, single tokens, states of linear attention, and
#: pages so small that a billion of them are copied in minutes.
CASES = {
    "kv": Case(48, (64 * KIB, 64 * KIB), 64),
    "mla": Case(61, (72 * KIB,), 64),
    "token": Case(48, (KIB, KIB), 1),
    "state": Case(36, (2 * MIB, 48 * KIB), 1),
    "small": Case(2, (512, 512), 1),
}


class Scene:
    """One tier's frames and pools on the device for twice as many pages as the largest move has.

    Args:
        gpu: CUDA ordinal of the rank, None for the CPU.
        pages: of the largest move.

    Raises:
        ConfigError: the tier is unavailable, or has no such settings.
    """

    def __init__(self, tier: str, config: str | None, gpu: int | None, case: Case, pages: int, seed: int) -> None:
        self.case, self.pages = case, pages
        self.device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        self.random = torch.Generator().manual_seed(seed)
        self._device_random = torch.Generator(self.device).manual_seed(seed)
        #: Pages that `check` found wrong: int64 (), on the device.
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        options, count, frame = parse_options(tier, config), 2 * pages, aligned(case.page_bytes)
        free = sizing.available_host_bytes()
        plan = make_plan(options, Ranks(gpus=(gpu,)), count * frame, lambda _: free)
        space = SpaceSpec("pages", count, frame)
        self.arena = Arena(Placement(plan, 0, lambda _: free), [space], device=self.device, copy=options.copy)
        self.pools: list[torch.Tensor] = []
        steps, offset = [], 0
        for layer in range(case.layers):
            for nbytes in case.units:
                pool = torch.empty(count, nbytes // 8, dtype=torch.int64, device=self.device)
                steps.append(Step(Plane(pool.data_ptr(), nbytes, count, offset, nbytes, case.divisor), 0, layer))
                self.pools.append(pool)
                offset += nbytes
        self.arena.begin([step._replace(part=0) for step in steps])
        self.program = self.arena.compile(steps, case.layers)
        self.counters = self.arena.make_counters(case.layers)
        assert self.arena.copier is not None
        self.copier = self.arena.copier.describe()

    def some(self, pages: int) -> tuple[Pages, torch.Tensor]:
        """Random pages for a move, and the units on the device that they are in."""
        chosen = torch.randperm(2 * self.pages, generator=self.random)[:pages]
        units = self._units(pages)
        return Pages(self.arena.frames([("pages", chosen)])[0], units * self.case.divisor), units

    def _units(self, pages: int) -> torch.Tensor:
        """Random units of each pool, chosen on the device."""
        return torch.randperm(2 * self.pages, generator=self._device_random, device=self.device)[:pages]

    def store(self, pages: Pages) -> None:
        self.arena.store(self.program, [pages])

    def load(self, pages: Pages) -> None:
        self.arena.load(self.program, [pages], self.counters)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wrong_pages(self, pages: int) -> int:
        """`check`, and how many pages that made wrong; waits for the device."""
        before = int(self.wrong)
        self.check(pages)
        return int(self.wrong) - before

    def check(self, pages: int) -> None:
        """Enqueue: move pages to the tier and to other places on the device, and add to `wrong` how many came back
        with another byte.

        A page that no move named counts too, if it has changed.
        """
        there, before = self.some(pages)
        after = self._units(pages)
        seed = int(torch.randint(1 << 40, (1,), generator=self.random))
        for number, pool in enumerate(self.pools):
            self._fill(pool, seed + number)
        self.store(there)
        for pool in self.pools:
            pool.fill_(seed)
        self.load(Pages(there.frames, after * self.case.divisor))
        wrong = torch.zeros(2 * self.pages, dtype=torch.bool, device=self.device)
        for number, pool in enumerate(self.pools):
            expected = torch.empty_like(pool)
            self._fill(expected, seed + number)
            moved = torch.full_like(pool, seed)
            moved[after] = expected[before]
            wrong |= (pool != moved).any(dim=1)
        self.wrong += wrong.sum()

    @staticmethod
    def _fill(pool: torch.Tensor, seed: int) -> None:
        """Words that are different everywhere."""
        count, words = pool.shape
        numbers = torch.arange(count * words, device=pool.device).view(count, words)
        torch.mul(numbers + seed, 0x9E3779B97F4A7C1, out=pool)
        pool ^= numbers << 7

    def contiguous(self, nbytes: int, *, load: bool) -> Callable[[], None]:
        """A copy of as many bytes in one piece, by torch; of as many as the tier has in one piece."""
        slab = self.arena.spaces["pages"].slabs[0]
        nbytes = min(nbytes, slab.frames * slab.frame_bytes)
        there = bytes_at(slab.address, nbytes, torch.device("cpu") if self.arena.cpu_addressable else self.device)
        here = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        target, source = (here, there) if load else (there, here)

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        return copy

    def close(self) -> None:
        self.pools = []
        self.arena.close()


def add_arguments(parser: argparse.ArgumentParser, bench: str) -> None:
    """Options of both benchmarks."""
    about = "comma-separated; default: all that this machine has"
    parser.add_argument("--tiers", type=setup.several(str), default=[], help=about)
    parser.add_argument("--gpu", type=setup.number(0), default=0, help="CUDA ordinal of the rank; default 0")
    parser.add_argument("--xmem-config", help="value of --hicache-xmem-config; default: none")
    parser.add_argument("--quick", action="store_true", help="the least that still shows something")
    setup.add_output_argument(parser, bench)


def over_tiers(
    bench: str, args: argparse.Namespace, cases: list[str], nbytes: int, measure: Callable[[Scene], list[Row]]
) -> int:
    """Measure each case in each tier; returns the exit status.

    Args:
        nbytes: of the largest move; at most a fifth of the memory that is free on either side.

    A tier that this machine does not have is a row with `skipped`, unless it was named: then, or where no tier was
    measured at all, the status is 1, as after an error, a wrong byte, or fewer copies than were asked for.
    """
    gpu = args.gpu if setup.has_gpu() else None
    if gpu is not None:
        if gpu not in (known := gpus.visible_gpus()):
            raise ConfigError(f"--gpu {gpu} is not a GPU of this machine. Give one of 0 to {len(known) - 1}.")
        torch.cuda.set_device(gpu)
    results, failed, measured = Results(bench, args), False, 0
    for tier in args.tiers or tier_classes():
        for name in cases:
            free = sizing.available_host_bytes() if gpu is None else torch.cuda.mem_get_info(gpu)[0]
            pages = max(1, min(nbytes, free // 5) // CASES[name].page_bytes)
            scene = None
            try:
                scene = Scene(tier, args.xmem_config, gpu, CASES[name], pages, seed=0)
                rows = measure(scene)
                measured += 1
            except (ConfigError, Unavailable) as error:
                rows = [{"skipped": str(error)}]
                failed = failed or bool(args.tiers)
            except (CopyError, RuntimeError) as error:
                rows, failed = [{"error": " ".join(str(error).split())[:300]}], True
            finally:
                if scene is not None:
                    scene.close()
            results.write([{"tier": tier, "case": name, **row} for row in rows])
            failed = failed or any(row.get("wrong") or row.get("too_few") for row in rows)
            if "skipped" in rows[0]:
                break
    results.finish()
    return int(failed or not measured)
