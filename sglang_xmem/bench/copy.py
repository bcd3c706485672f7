"""`sglang-xmem bench copy`: page copies against a contiguous copy-engine copy of as many bytes, in the same run.

Scattered pages between this GPU and a tier, one direction at a time, bytes verified after each case. A case that
cannot run here says WAIVED and why.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_xmem.bench import environment

PATHS = ("peer_load", "peer_store", "host_load", "host_store")


@dataclass(frozen=True)
class Case:
    """Pages to copy: `planes` planes of `pages` pages of `page_bytes`, rows of `row_bytes`."""

    label: str
    page_bytes: int
    row_bytes: int
    pages: int
    planes: int

    @property
    def nbytes(self) -> int:
        return self.page_bytes * self.pages * self.planes


CASES = (
    Case("bf16 pages of 64 tokens", 65536, 1024, 1000, 96),
    Case("16 pages", 65536, 1024, 16, 48),
    Case("page size 1", 1024, 1024, 1_000_000, 4),
    Case("fp8 pages of 64 tokens", 32768, 512, 1000, 96),
    Case("MLA rows of 1152 B, pages of 64", 73728, 1152, 1000, 61),
    Case("MLA rows of 656 B, pages of 64", 41984, 656, 1000, 61),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--cases", default="", help="comma-separated indices of cases; default: all")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--peer", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tunings", default="[{}]", help="JSON list of changes to the default tuning")
    parser.add_argument("--ctas", default="0", help="comma-separated CTA limits; 0 is the tuning's own")
    parser.add_argument("--output", type=Path, default=Path("copy.jsonl"), help="JSON Lines file to append to")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("WAIVED: no GPU on this machine; bench copy measures copies between a GPU and a tier.")
        return 0
    torch.cuda.set_device(args.gpu)
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.with_name(f"{args.output.stem}.runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"bench": "copy", "run": run_id, **environment.describe()}) + "\n")
    cases = [CASES[int(i)] for i in args.cases.split(",")] if args.cases else list(CASES)
    failed = False
    for row in measure(args, cases):
        row = {"bench": "copy", "run": run_id, **row}
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "waived" in row:
            print(f"{row['path']:>10}  WAIVED: {row['waived']}", flush=True)
            continue
        failed = failed or not row["verified"]
        print(
            f"{row['path']:>10} {row['page_bytes']:>6} B x {row['pages']:>7}  {row['gbps']:7.1f} GB/s of "
            f"{row['contiguous_gbps']:6.1f}  {row['ratio']:6.1%}  bytes {'right' if row['verified'] else 'WRONG'}  "
            f"{row['kernel']}",
            flush=True,
        )
    return 1 if failed else 0


def measure(args: argparse.Namespace, cases: list[Case]) -> Iterator[dict[str, Any]]:
    import torch

    from sglang_xmem.config import parse_options
    from sglang_xmem.copies import make_copier
    from sglang_xmem.copies.cuda import CudaPageCopier
    from sglang_xmem.errors import ConfigError
    from sglang_xmem.plan import Placement, make_plan
    from sglang_xmem.pool import region_bytes
    from sglang_xmem.tiers import Ranks

    def unlimited(nbytes: int) -> int:
        return 1 << 60

    device = torch.device("cuda", args.gpu)
    tunings = json.loads(args.tunings)
    ctas_limits = [int(text) for text in args.ctas.split(",")]
    for tier_name in ("peer", "dram"):
        paths = [p for p in args.paths.split(",") if p.startswith("peer" if tier_name == "peer" else "host")]
        if not paths:
            continue
        config = {"peer": {"gpus": [args.peer]}}
        # Twice a case's pages on each side, so that random pages are scattered; at most what a case needs.
        nbytes = max(2 * case.nbytes for case in cases)
        try:
            plan = make_plan(parse_options(tier_name, config), Ranks(gpus=(args.gpu,)), nbytes, unlimited)
            tier, region = Placement(plan, 0, unlimited).allocate(nbytes)
        except ConfigError as error:
            for path in paths:
                yield {"path": path, "waived": str(error)}
            continue
        tier_bytes = region_bytes(region, device)
        device_bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        device_bytes.view(torch.int64).random_()
        try:
            for case, path in itertools.product(cases, paths):
                load = path.endswith("load")
                rows_per_page = case.page_bytes // case.row_bytes
                tokens = 2 * case.pages * rows_per_page
                shape = (case.planes, tokens, case.row_bytes)
                size = case.planes * tokens * case.row_bytes
                tier_planes = list(tier_bytes[:size].view(shape))
                device_planes = list(device_bytes[:size].view(shape))
                generator = torch.Generator().manual_seed(case.pages)
                tier_rows, device_rows = (
                    (torch.randperm(2 * case.pages, generator=generator)[: case.pages] * rows_per_page).to(device)
                    for _ in range(2)
                )
                contiguous = _contiguous_gbps(tier_bytes, device_bytes, case.nbytes, load, args.repetitions)
                for settings, ctas in itertools.product(tunings, ctas_limits):
                    changes = {**settings, **({"ctas": ctas} if ctas else {})}
                    copier = make_copier(
                        "cuda",
                        tier_planes,
                        device_planes,
                        rows_per_page,
                        tier_locality=tier.locality.value,
                        load=changes,
                        store=changes,
                    )
                    assert isinstance(copier, CudaPageCopier)
                    copy = copier.load if load else copier.store
                    planes = range(case.planes)
                    times = _times_ms(functools.partial(copy, tier_rows, device_rows, planes), args.repetitions)
                    gbps = case.nbytes / statistics.median(times) / 1e6
                    used = copier.load_tuning if load else copier.store_tuning
                    right = _verify(copier, tier_planes, device_planes, tier_rows, device_rows, rows_per_page, load)
                    yield {
                        "path": path,
                        "case": case.label,
                        "page_bytes": case.page_bytes,
                        "row_bytes": case.row_bytes,
                        "pages": case.pages,
                        "planes": case.planes,
                        "ctas": used.ctas,
                        "kernel": str(used),
                        "gbps": round(gbps, 2),
                        "contiguous_gbps": round(contiguous, 2),
                        "ratio": round(gbps / contiguous, 4),
                        "times_ms": [round(t, 4) for t in times],
                        "verified": right,
                    }
        finally:
            torch.cuda.synchronize()
            region.release()


def _times_ms(call: Callable[[], None], repetitions: int) -> list[float]:
    """Milliseconds on the GPU of each of `repetitions` calls, after two warm-ups."""
    import torch

    times = []
    for index in range(repetitions + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end))
    return times


def _contiguous_gbps(tier: Any, device: Any, nbytes: int, load: bool, repetitions: int) -> float:
    """The copy engine on one contiguous range, GB/s (1e9 bytes)."""
    import torch

    from sglang_xmem import gpus

    d = gpus.driver()
    source, target = (tier, device) if load else (device, tier)

    def copy() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        gpus.checked(d.cuMemcpyAsync(target.data_ptr(), source.data_ptr(), nbytes, stream), "a contiguous copy")

    return nbytes / statistics.median(_times_ms(copy, repetitions)) / 1e6


def _verify(copier: Any, tier: Any, device: Any, tier_rows: Any, device_rows: Any, rows: int, load: bool) -> bool:
    """Copy once more, and compare every page of the first and the last plane byte by byte."""
    import torch

    offsets = torch.arange(rows, device=device_rows.device)
    here = (device_rows[:, None] + offsets).flatten()
    there = (tier_rows[:, None] + offsets).flatten()
    for plane in (0, len(device) - 1):
        on_cpu = tier[plane].device.type == "cpu"
        at = there.cpu() if on_cpu else there
        device[plane].random_()  # fresh bytes of a store, a poisoned destination of a load
        (copier.load if load else copier.store)(tier_rows, device_rows, range(plane, plane + 1))
        torch.cuda.synchronize()
        if not torch.equal(device[plane][here], tier[plane][at].to(here.device)):
            return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
