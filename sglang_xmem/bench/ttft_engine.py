"""One engine of the TTFT benchmark, in a process of its own: `python -m sglang_xmem.bench.ttft_engine SPEC.json`.

Reads a specification, runs the engine, appends a JSON line for each sample to the file that it names. The engine's
own process is the unit of isolation: backends never share a CUDA context, a cache or an allocator.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    with open(spec["samples"], "a", encoding="utf-8") as file:

        def emit(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        started = time.perf_counter()
        import sglang as sgl

        engine = sgl.Engine(**spec["engine"])
        try:
            emit(kind="ready", seconds=round(time.perf_counter() - started, 2))
            measure(engine, spec, emit)
        finally:
            engine.shutdown()


def measure(engine: Any, spec: dict[str, Any], emit: Any) -> None:
    """Ask every prompt cold, then in rounds from the tier and from HBM.

    A flood between samples pushes the prompt out of the GPU's pool. It asks for prompts that are in the tier
    themselves, which takes a fraction of the time that prefilling new ones would.
    """
    sizes: list[int] = spec["sizes"]
    page: int = spec["engine"]["page_size"]
    vocab: int = spec["vocab"]
    prompts = {size: tokens(spec["seed"] + size, size, vocab) for size in sizes}
    count = -(-spec["engine"]["max_total_tokens"] // spec["filler_tokens"]) + 1
    fillers = [tokens(-1 - index, spec["filler_tokens"], vocab) for index in range(count)]

    def ask(prompt: list[int], new_tokens: int = 1) -> dict[str, Any]:
        start = time.perf_counter()
        answer = engine.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
        )
        elapsed = time.perf_counter() - start
        details = answer["meta_info"].get("cached_tokens_details") or {}
        return {
            "ms": elapsed * 1e3,
            "device": details.get("device") or 0,
            "host": details.get("host") or 0,
            "output": answer["output_ids"],
        }

    for index in range(3):  # kernels of every batch shape that follows, compiled and loaded
        for length in (page * 2, spec["filler_tokens"]):
            ask(tokens(-1000 - index, length, vocab), 4)
            ask(tokens(-1000 - index, length, vocab), 4)

    reference: dict[int, list[int]] = {}
    for size in sizes:
        sample = ask(prompts[size])
        emit(kind="recompute", prompt_tokens=size, **sample)
        reference[size] = ask(prompts[size], spec["output_tokens"])["output"]
    for filler in fillers:
        ask(filler)
    time.sleep(spec["settle_s"])  # write-through to the tier ends in the background

    for round_number in range(spec["rounds"]):
        for size in sizes:
            if spec["tier"]:
                for filler in fillers:
                    ask(filler)
                sample = ask(prompts[size])
                # The last page is always computed again: its last token's logits are what the answer needs.
                proven = sample["host"] >= size - 2 * page and sample["device"] <= page
                check = ask(prompts[size], spec["output_tokens"])
                emit(
                    kind="tier",
                    round=round_number,
                    prompt_tokens=size,
                    proven=proven,
                    outputs_equal=check["output"] == reference[size] and check["output"][:1] == sample["output"],
                    **sample,
                )
            else:
                ask(prompts[size])
            sample = ask(prompts[size])
            emit(
                kind="hbm",
                round=round_number,
                prompt_tokens=size,
                proven=sample["device"] >= size - 2 * page,
                outputs_equal=sample["output"] == reference[size][:1],
                **sample,
            )


def tokens(seed: int, count: int, vocab: int) -> list[int]:
    """A reproducible random prompt."""
    generator = random.Random(seed)
    return [generator.randrange(3, vocab) for _ in range(count)]


if __name__ == "__main__":
    main()
