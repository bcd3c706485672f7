#!/usr/bin/env python3
"""Measure a load's and a store's cost for the enqueueing thread, one JSON line each: enqueue.py --output FILE

The hooks as engines call them (`submit_host_to_device` and `submit_device_to_host`, SGLang's own `L2TransferEngine`
around them) move 80K tokens of a KV, a SWA and a MAMBA pool in tier `dram`, with sums as they are by default. `cold`
puts 64 MiB of other memory through the caches before each call: an engine's scheduler has other work between loads.
Without a GPU nothing is copied and no page has a sum: what is left is the path up to the launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sglang_xmem import session
from sglang_xmem.arena import Arena, SpaceSpec
from sglang_xmem.config import Level, parse_options
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.engines.sglang import transfer
from sglang_xmem.engines.sglang.geometry import KV, MAMBA, SWA, Description, Unit, lay_out
from sglang_xmem.engines.sglang.pools import AdoptedPool
from sglang_xmem.plan import Placement, make_plan
from sglang_xmem.session import Session
from sglang_xmem.tiers import Ranks

#: Bytes of a token and plane: what a launch costs does not depend on it.
ROW_BYTES = 16
LAYERS = 48


class Uncopied(TorchPageCopier):
    """Takes moves as the CUDA kernel does, and leaves the copying out: torch would copy on the calling thread."""

    def _copy(self, *args: Any, **kwargs: Any) -> None:
        return


class Scene:
    """Pools of a model with attention over everything, over a window, and with states.

    Args:
        tokens: of a hit. A window has 1,024 of them; there is one state.
        page_size: tokens of a page.
    """

    def __init__(self, tokens: int, page_size: int, device: torch.device) -> None:
        gpu = device.index if device.type == "cuda" else None
        integrity: Level = "off" if gpu is None else "sample"
        plan = make_plan(parse_options("dram"), Ranks(gpus=(gpu,)), None, lambda _: 1 << 40)
        placement = Placement(plan, 0, lambda _: 1 << 40)
        session.start(Session(plan, placement, deadline_s=0))
        pages = {KV: -(-tokens // page_size), SWA: max(1, 1024 // page_size), MAMBA: 1}
        slots = {KV: page_size, SWA: page_size, MAMBA: 1}
        self.memory: list[torch.Tensor] = []
        described = {}
        for space, count in pages.items():
            units = []
            for layer in range(LAYERS):
                array = torch.zeros(2 * count + 1, slots[space] * ROW_BYTES, dtype=torch.uint8, device=device)
                self.memory.append(array)
                units.append((layer, Unit(array.data_ptr(), array.stride(0), len(array), array.shape[1], slots[space])))
            described[space] = Description((tuple(units),), slots[space], lambda layer, draft: layer, device)
        placed, frames = lay_out((space, space, each.section_bytes) for space, each in described.items())
        specs = [SpaceSpec(space, 2 * pages[space] + 1, frames[space]) for space in pages]
        self.arena = Arena(placement, specs, device=device, copy=plan.options.copy, integrity=integrity)
        session.current().arenas.append(self.arena)
        self.moves = []
        for number, space in enumerate(pages):
            pool: Any = SimpleNamespace(layer_num=LAYERS, dcp_size=1)
            pool.prepare_transfer_indices = lambda host, there, backend: (host, there)
            view = AdoptedPool(pool, number, self.arena, described[space], placed[space])
            setattr(pool, transfer.ADOPTED, view)
            session.current().pools.append(view)
            starts = torch.randperm(2 * pages[space])[: pages[space]] * slots[space]
            host = (starts[:, None] + torch.arange(slots[space])).flatten()
            self.moves.append((pool, SimpleNamespace(), host, (host + slots[space]).to(device)))
        if gpu is None:
            slabs = [slab for space in self.arena.spaces.values() for slab in space.slabs]
            self.arena.copier = Uncopied(slabs, device)
        else:
            views = session.current().pools
            planes = [plane for view in views for planes in view.layers.values() for plane in planes]
            self.arena.begin([transfer.Step(plane, 0, 0) for plane in planes])

    def close(self) -> None:
        self.arena.close()
        session.start(None)


def measure(scene: Scene, device: torch.device, rounds: int, *, cold: bool) -> dict[str, Any]:
    """Microseconds of a load and of a store, as a session's counts have them: median, lowest and highest."""
    from sglang.srt.managers.cache_controller import LayerLoadingEvent
    from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine

    engine = L2TransferEngine("kernel")
    moves = [L2Transfer(*move) for move in scene.moves]
    event = LayerLoadingEvent(LAYERS)
    other = torch.zeros(64 << 20, dtype=torch.uint8)
    counts = session.current().counts
    found: dict[str, list[float]] = {"load": [], "store": []}
    for _ in range(rounds + 2):
        for way, times in found.items():
            if cold:
                other.add_(1)
            before = counts[f"enqueue_ns:{way}"]
            if way == "store":
                transfer.submit_device_to_host(None, engine, moves)
            else:
                transfer.submit_host_to_device(
                    None, engine, moves, transfer_layer_id_max=LAYERS, on_layer_done=event.complete
                )
            times.append((counts[f"enqueue_ns:{way}"] - before) / 1e3)
            if device.type == "cuda":
                torch.cuda.synchronize()
    row: dict[str, Any] = {}
    for way, times in found.items():
        times = sorted(times[2:])  # the first ones compile
        row[f"{way}_us"] = round(statistics.median(times), 1)
        row[f"{way}_us_range"] = [round(times[0], 1), round(times[-1], 1)]
    return row


def main() -> None:
    """Append a row for each page size, warm and cold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("enqueue.jsonl"), help="JSON Lines file to append to")
    parser.add_argument("--tokens", type=int, default=81920, help="of a hit; default 81920")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[1, 16, 64], help="default 1 16 64")
    parser.add_argument("--rounds", type=int, default=50, help="calls measured each; default 50")
    parser.add_argument("--label", default="", help="kept in each line")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with arguments.output.open("a") as file:
        for page_size in arguments.page_sizes:
            scene = Scene(arguments.tokens, page_size, device)
            for cold in (False, True):
                row = {
                    "bench": "enqueue",
                    "label": arguments.label,
                    "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                    "tokens": arguments.tokens,
                    "page_size": page_size,
                    "cold": cold,
                    **measure(scene, device, arguments.rounds, cold=cold),
                    "command": " ".join(["python", "scripts/bench/enqueue.py", *sys.argv[1:]]),
                }
                file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
            scene.close()


if __name__ == "__main__":
    main()
