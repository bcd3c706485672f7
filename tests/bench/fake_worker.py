"""A worker of `sglang_xmem.bench.engine` without SGLang: the real one over an engine that only keeps books.

Prompts are cached by pages in a device pool and a host pool, least recently used out first. FAKE_ENGINE in the
environment, a JSON object, makes it misbehave: {"crash_after": asks, "no_host": true, "wrong_output": true, ...}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import types
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from sglang_xmem.bench import engine as bench_engine

#: Runs `sglang-xmem bench ...`: exit status and all rows of its output file.
Bench = Callable[..., tuple[int, list[dict[str, Any]]]]
#: Of shape tiny: K and V, 4 layers, 2 heads of 64, 2 bytes.
BYTES_PER_TOKEN = 2048
FAKE_WORKER = Path(__file__)
HOW = json.loads(os.environ.get("FAKE_ENGINE", "{}"))


class FakeEngine:
    """What the worker uses of sgl.Engine."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.page = options["page_size"]
        self.asks = 0
        self.name = options.get("hicache_xmem_tier", "stock")
        self.device: OrderedDict[int, None] = OrderedDict()
        self.host: OrderedDict[int, None] = OrderedDict()
        self.radix = not options.get("disable_radix_cache", False)
        self.pooled = options.get("enable_hierarchical_cache", False)
        self.loaded_bytes = 0
        self.device_pages = options.get("max_total_tokens", 1 << 20) // self.page
        print("what SGLang prints to stdout", flush=True)
        if HOW.get("refuse"):
            raise ValueError("the fake engine does not start")

    def shutdown(self) -> None:
        self.loop.close()
        if "at_shutdown" in HOW:  # the parent writes its rows in the meantime
            path = Path(HOW["at_shutdown"])
            while not path.read_text().endswith("\n"):
                time.sleep(0.05)
            rows = path.read_text().count("\n")
            with path.open("a") as file:
                file.write(json.dumps({"seen_at_shutdown": rows}) + "\n")

    def generate(self, input_ids: list[int], sampling_params: dict[str, Any]) -> dict[str, Any]:
        self.asks += 1
        if self.asks > HOW.get("crash_after", 1 << 60) and self.name in HOW.get("crash_in", [self.name]):
            print("sglang_xmem: the fake engine gives up", file=sys.stderr, flush=True)
            os._exit(9)
        if self.asks > HOW.get("fail_after", 1 << 60):
            raise ValueError("the fake engine refuses")
        if "asks" in HOW:
            with open(HOW["asks"], "a", encoding="utf-8") as file:
                file.write(f"{self.name}\n")
        time.sleep(HOW.get("seconds", 0.0))
        whole = (len(input_ids) - 1) // self.page
        keys = [hash(tuple(input_ids[: (i + 1) * self.page])) for i in range(len(input_ids) // self.page)]
        device = host = 0
        for key in keys[:whole] if self.radix else []:
            if key in self.device and host == 0:
                device += 1
            elif key in self.host and self.pooled and not HOW.get("no_host"):
                host += 1
            else:
                break
        self.loaded_bytes += host * self.page * BYTES_PER_TOKEN
        for key in keys:
            for pool, limit in ((self.device, self.device_pages), (self.host, 1 << 60)):
                pool[key] = None
                pool.move_to_end(key)
                while len(pool) > limit:
                    pool.popitem(last=False)
        seed = sum(input_ids) + (host if HOW.get("wrong_output") else 0)
        output = [(seed + i) % 1000 for i in range(sampling_params["max_new_tokens"])]
        details = {"device": device * self.page, "host": host * self.page} if device + host else None
        times = {"forward_entry_time": 100.0, "prefill_finished_time": 100.00001}
        return {"output_ids": output, "meta_info": {"cached_tokens_details": details, **times}}

    def get_server_info(self) -> dict[str, Any]:
        counts = {"bytes:load": self.loaded_bytes, "enqueue_ns:load": self.asks * 1000}
        tier = {"sglang_xmem": {"counts": counts}} if self.name != "stock" else {}
        return {"internal_states": [tier]}

    async def async_generate(
        self, input_ids: list[int], sampling_params: dict[str, Any], stream: bool
    ) -> AsyncIterator[dict[str, Any]]:
        assert stream
        reply = self.generate(input_ids, sampling_params)

        async def pieces() -> AsyncIterator[dict[str, Any]]:
            for count in range(1, len(reply["output_ids"]) + 1):
                await asyncio.sleep(0)
                yield {**reply, "output_ids": reply["output_ids"][:count]}

        return pieces()


class FakeServer:
    """A server of `bench trace`, next to a bench_serving that answers all requests but the last."""

    def __init__(self, url: str, **_: Any) -> None:
        self.url = url
        serving = types.ModuleType("sglang.benchmark.serving")
        datasets = types.ModuleType("sglang.benchmark.datasets")
        sys.modules |= {module.__name__: module for module in (serving, datasets)}
        sys.modules["sglang"], sys.modules["sglang.benchmark"] = types.ModuleType("sglang"), types.ModuleType("b")
        sys.modules["sglang.benchmark"].serving = serving  # type: ignore[attr-defined]
        datasets.DatasetRow = lambda *given, timestamp: (*given, timestamp)  # type: ignore[attr-defined]
        serving.get_request = lambda *_, **how: how  # type: ignore[attr-defined]
        serving.cli_main = lambda: self.serve(serving)  # type: ignore[attr-defined]

    def serve(self, serving: Any) -> None:
        rows, n = serving.get_dataset(), len(serving.get_dataset())
        asked = [(row[1:], row[0][:2] == rows[0][0][:2]) for row in rows]
        print(f"{sys.argv[-8:]}\n{serving.get_request()}\n{asked}", flush=True)
        if HOW.get("crash_after"):
            sys.exit("no server")
        found = {"errors": [""] * (n - 1) + ["gone"], "input_lens": [100] * n, "output_lens": [5] * n, "duration": 2.0}
        found |= {"ttfts": [0.5] * n, "itls": [[0.01] * 4] * n, "total_throughput": 52.5}
        found["cached_tokens_details"] = [None] + [{"device": 20, "host": 30}] * (n - 1)
        Path(sys.argv[sys.argv.index("--output-file") + 1]).write_text(json.dumps(found))

    def shutdown(self) -> None: ...


if __name__ == "__main__":
    sys.exit(bench_engine.main(lambda **options: (FakeServer if "url" in options else FakeEngine)(**options)))
