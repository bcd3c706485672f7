"""Every kernel on odd shapes, small enough for compute-sanitizer: `python sanitize_kernels.py`."""

from __future__ import annotations

import itertools
import sys

import torch

from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.sums_cuda import CudaSummer, CudaSums
from sglang_xmem.copies.tuning import DEFAULT_TUNING, CudaTuning
from sglang_xmem.sums import Chosen, Group, SectionSums

TUNINGS = (
    CudaTuning(ctas=3),
    CudaTuning(ctas=3, unroll=16),
    CudaTuning(ctas=2, variant="bulk"),
    CudaTuning(ctas=2, variant="bulk", rings=2, stages=3, stage_bytes=8192, pending_stores=1),
    DEFAULT_TUNING["load", "nvlink"],
)
PAGES = 37
#: Units of one page, each of its own plane: of a few kinds, and of more planes than a warp has lanes.
UNITS = [[16, 656], [24] * 3, [65536, 1024, 8448, 16], [1024, 48] * 20]


def copies(device: torch.device) -> tuple[int, int]:
    """Cases and wrong ones of the copy kernel's builds."""
    wrong = cases = 0
    for units, divisor, tuning in itertools.product(UNITS, (1, 48), TUNINGS):
        room = 2 * PAGES
        tier = torch.randint(0, 256, (room, sum(units)), dtype=torch.uint8, device=device)
        pools = [torch.zeros((room, nbytes), dtype=torch.uint8, device=device) for nbytes in units]
        copier = CudaPageCopier([Slab(tier.data_ptr(), room, sum(units))], device, load=tuning, store=tuning)
        ends = list(itertools.accumulate(units))
        steps = [
            Step(Plane(pool.data_ptr(), nbytes, room, end - nbytes, nbytes, divisor), 0, part)
            for part, (pool, nbytes, end) in enumerate(zip(pools, units, ends, strict=True))
        ]
        program = copier.compile(steps, len(steps) + 1)
        frames, slots = (torch.randperm(room)[:PAGES].to(device) for _ in range(2))
        pages = [Pages(tier.data_ptr() + frames * sum(units), slots * divisor)]
        counters = copier.make_counters(len(steps) + 1)
        # The store is checked against what the load brought, and the last load against what was stored.
        before = tier[frames].clone()
        for copy in (copier.load, copier.store, copier.load):
            for target in [tier] if copy == copier.store else pools:
                target.fill_(0xA5)
            copy(program, pages)
            torch.cuda.synchronize()
            wrong += not torch.equal(torch.cat([pool[slots] for pool in pools], 1), before)
            wrong += not torch.equal(tier[frames], before)
        if counters is not None:
            for pool in pools:
                pool.fill_(0xA5)
            copier.load(program, pages, counters)
            counters.wait(len(steps))
            torch.cuda.synchronize()
            wrong += not torch.equal(torch.cat([pool[slots] for pool in pools], 1), before)
        cases += 1
    return cases, wrong


def _lists(summer: CudaSummer, prepared: CudaSums, chosen: list[Chosen]) -> list[torch.Tensor]:
    return [torch.from_numpy(each).to("cuda") for each in summer.lists(prepared, chosen)]


def sums(device: torch.device) -> tuple[int, int]:
    """Cases and wrong ones of the kernel of sums: equal pages are equal, a changed one is found."""
    wrong = cases = 0
    summer = CudaSummer(device)
    for units, divisor, every in itertools.product([[5], [16, 656], [24] * 3, [65536, 1023, 8448]], (1, 48), (1, 3)):
        pools = [torch.randint(0, 256, (2 * PAGES, nbytes), dtype=torch.uint8, device=device) for nbytes in units]
        offsets = [0, *itertools.accumulate(units)]
        planes = [
            Plane(pool.data_ptr(), nbytes, 2 * PAGES, offset, nbytes, divisor)
            for pool, nbytes, offset in zip(pools, units, offsets, strict=False)
        ]
        group = Group(SectionSums(planes, 2 * PAGES, every, pinned=True), tuple((plane, 0) for plane in planes))
        numbers, slots = torch.randperm(2 * PAGES)[:PAGES], torch.randperm(2 * PAGES)[:PAGES].to(device)
        pages = [Pages(torch.zeros(PAGES, dtype=torch.int64, device=device), slots * divisor)]
        chosen = [Chosen.of(group.sums, numbers)]
        prepared = summer.prepare([group])
        summer.write(prepared, pages, chosen, _lists(summer, prepared, chosen))
        equal = summer.compare(prepared, pages, chosen, _lists(summer, prepared, chosen))
        torch.cuda.synchronize()
        wrong += equal.wrong()[0] != 0
        if len(chosen[0].rows):
            pools[-1][slots[int(chosen[0].rows[-1])], -1] ^= 1
            changed = summer.compare(prepared, pages, chosen, _lists(summer, prepared, chosen))
            torch.cuda.synchronize()
            wrong += changed.wrong()[0] != 1
        cases += 1
    return cases, wrong


def main() -> int:
    device = torch.device("cuda:0")
    found = [copies(device), sums(device)]
    wrong = sum(each for _, each in found)
    print(f"cases {sum(each for each, _ in found)} wrong {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
