"""Every build of the copy kernel on odd shapes, small enough for compute-sanitizer: `python sanitize_kernels.py`."""

from __future__ import annotations

import itertools
import sys

import torch

from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.tuning import DEFAULT_TUNING, CudaTuning

TUNINGS = (
    CudaTuning(ctas=3),
    CudaTuning(ctas=3, unroll=16),
    CudaTuning(ctas=2, variant="bulk"),
    CudaTuning(ctas=2, variant="bulk", rings=2, stages=3, stage_bytes=8192, pending_stores=1),
    DEFAULT_TUNING["load", "device"],
)
PAGES, PLANES = 37, 4


def main() -> int:
    device = torch.device("cuda:0")
    wrong = cases = 0
    for row_bytes, page_size, tuning in itertools.product((16, 24, 656, 1024), (1, 64), TUNINGS):
        shape = (2 * PAGES * page_size, row_bytes)
        tier = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(PLANES)]
        pool = [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(PLANES)]
        copier = CudaPageCopier(tier, pool, page_size, load=tuning, store=tuning)
        offsets = torch.arange(page_size, device=device)
        tier_rows, pool_rows = (torch.randperm(2 * PAGES)[:PAGES].to(device) * page_size for _ in range(2))
        there, here = ((rows[:, None] + offsets).flatten() for rows in (tier_rows, pool_rows))
        for copy, target in ((copier.load, pool), (copier.store, tier)):
            for plane in target:
                plane.fill_(0xA5)
            copy(tier_rows, pool_rows, range(PLANES))
            torch.cuda.synchronize()
            wrong += not all(torch.equal(a[here], b[there]) for a, b in zip(pool, tier, strict=True))
        signals = copier.make_signals(PLANES // 2)
        if signals is not None:
            for plane in pool:
                plane.fill_(0xA5)
            copier.load_signalling(tier_rows, pool_rows, range(PLANES), signals)
            signals.wait(PLANES // 2 - 1)
            torch.cuda.synchronize()
            wrong += not all(torch.equal(a[here], b[there]) for a, b in zip(pool, tier, strict=True))
        cases += 1
    print(f"cases {cases} wrong {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
