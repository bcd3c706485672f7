"""sglang.bench_serving with requests of ours: python -m sglang_xmem.bench.serving SCHEDULE.json URL OUTPUT.jsonl

Its client, its clock and its cache report, for prompts of exact lengths given as token ids. The schedule is that of
`bench trace`. bench_serving knows times of requests for its dataset `mooncake` alone, by the generator that is
replaced here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sglang_xmem.bench.workloads import Drawn, Materializer, Prompt


def main() -> None:
    """Run bench_serving; its result is in the output file then."""
    if importlib.util.find_spec("datasets") is None:
        # Of SGLang's dependencies, and used for datasets of pictures alone.
        sys.modules["datasets"] = types.ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    from sglang.benchmark import serving
    from sglang.benchmark.datasets import DatasetRow

    schedule_path, url, output = sys.argv[1:]
    schedule = json.loads(Path(schedule_path).read_text())
    tokens = Materializer(schedule["vocab"])
    rows = []
    for request in schedule["requests"]:
        ids = tokens(Prompt(tuple(Drawn(seed, count) for seed, count in request["parts"])))
        rows.append((request["at_s"], DatasetRow(prompt=ids, prompt_len=len(ids), output_len=request["output"])))

    async def over_time(*_: Any) -> AsyncIterator[Any]:
        began = time.perf_counter()
        for at_s, row in rows:
            if at_s is not None:
                await asyncio.sleep(max(0.0, at_s - (time.perf_counter() - began)))
            yield row

    serving.get_mooncake_request_over_time = over_time
    command = ["--backend", "sglang", "--base-url", url, "--dataset-name", "mooncake", "--output-file", output]
    # The dataset's own lines are not used, but counted. No warm-up: it would be the first prompt's.
    lines = Path(output).with_suffix(".lines")
    lines.write_text('{"timestamp": 0, "hash_ids": []}\n' * len(rows))
    command += ["--dataset-path", str(lines), "--num-prompts", str(len(rows)), "--warmup-requests", "0"]
    command += ["--cache-report", "--output-details", "--disable-tqdm"]
    if schedule["concurrency"]:
        command += ["--max-concurrency", str(schedule["concurrency"])]
    sys.argv = ["bench_serving", *command]
    serving.cli_main()


if __name__ == "__main__":
    main()
