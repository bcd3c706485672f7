"""`sglang-xmem bench roundtrip`: fill a whole pool through a tier and back, and compare every byte.

Random bytes of every plane go from the GPU to random pages of the tier; the GPU's copy is poisoned; the pages come back
in another order of calls, and are compared with the same random bytes, made again.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from pathlib import Path
from typing import Any

from sglang_xmem.bench import environment, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tier", default="peer", help="peer or dram")
    parser.add_argument("--gb", type=runs.at_least(0.001, float), default=4.0, help="bytes of the pool in GB (1e9)")
    parser.add_argument("--gpu", type=runs.at_least(0), default=0)
    parser.add_argument("--peer", type=runs.at_least(0), default=1, help="GPU whose memory the peer tier takes")
    parser.add_argument("--layers", type=runs.at_least(1), default=48)
    parser.add_argument("--row-bytes", type=runs.at_least(1), default=1024, help="bytes of one token's K of one layer")
    parser.add_argument("--page-size", type=runs.at_least(1), default=64)
    parser.add_argument("--calls", type=runs.at_least(1), default=16, help="stores, and loads, that move the pages")
    parser.add_argument("--output", type=Path, default=Path("roundtrip.jsonl"), help="JSON Lines file to append to")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("WAIVED: no GPU on this machine; bench roundtrip copies between a GPU and a tier.")
        return 0
    row = measure(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    return 0 if row["bytes_equal"] and row["control_detected"] else 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from sglang_xmem.config import CopySettings, parse_options
    from sglang_xmem.plan import Placement, make_plan
    from sglang_xmem.pool import TierPool
    from sglang_xmem.tiers import Ranks

    def unlimited(nbytes: int) -> int:
        return 1 << 60

    device = torch.device("cuda", args.gpu)
    torch.cuda.set_device(device)
    pages = int(args.gb * 1e9) // (2 * args.layers * args.row_bytes * args.page_size)
    tokens = pages * args.page_size
    config = {"peer": {"gpus": [args.peer]}}
    plan = make_plan(parse_options(args.tier, config), Ranks(gpus=(args.gpu,)), None, unlimited)
    pool = TierPool(
        Placement(plan, 0, unlimited),
        num_layers=args.layers,
        num_tokens=tokens,
        page_size=args.page_size,
        row_bytes=args.row_bytes,
        device=device,
        copy=CopySettings(),
    )
    buffers = torch.empty(2, args.layers, tokens, args.row_bytes, dtype=torch.uint8, device=device)

    def original(kind: int, layer: int) -> Any:
        generator = torch.Generator(device).manual_seed(1000 * layer + kind)
        shape = (tokens, args.row_bytes // 8)
        return torch.randint(-(2**62), 2**62, shape, generator=generator, device=device).view(torch.uint8)

    def wrong_planes() -> int:
        return sum(
            not torch.equal(buffers[kind, layer], original(kind, layer))
            for kind in range(2)
            for layer in range(args.layers)
        )

    for kind in range(2):
        for layer in range(args.layers):
            buffers[kind, layer] = original(kind, layer)
    pool.attach(list(buffers[0]), list(buffers[1]))
    generator = torch.Generator().manual_seed(7)
    tier_rows, device_rows = (
        (torch.randperm(pages, generator=generator) * args.page_size).to(device) for _ in range(2)
    )
    seconds = {}
    parts = list(zip(tier_rows.chunk(args.calls), device_rows.chunk(args.calls), strict=True))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for tier_part, device_part in parts:
        pool.store(tier_part, device_part)
    torch.cuda.synchronize()
    seconds["store"] = time.perf_counter() - start
    buffers.fill_(0xA5)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for tier_part, device_part in reversed(parts):
        pool.load_layers(tier_part, device_part)
    torch.cuda.synchronize()
    seconds["load"] = time.perf_counter() - start
    wrong = wrong_planes()
    # The comparison has to see a single wrong page: swap two pages' origins and load them again.
    swapped = torch.stack([tier_rows[1], tier_rows[0]])
    pool.load_layer(swapped, device_rows[:2].contiguous(), args.layers // 2)
    torch.cuda.synchronize()
    control = wrong_planes() - wrong
    nbytes = buffers.numel()
    kernel = pool.copier.describe()
    pool.close()
    return {
        "bench": "roundtrip",
        "run": f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}",
        "tier": args.tier,
        "bytes": nbytes,
        "pages": pages,
        "page_bytes": args.page_size * args.row_bytes,
        "planes": 2 * args.layers,
        "bytes_equal": wrong == 0,
        "wrong_planes": wrong,
        "control_detected": control > 0,
        "store_gbps": round(nbytes / seconds["store"] / 1e9, 2),
        "load_gbps": round(nbytes / seconds["load"] / 1e9, 2),
        "kernel": kernel,
        **environment.describe(),
    }
