#!/usr/bin/env python3
"""What comparing pages costs: time to first token of a hit in the tier for each level of `integrity`, against `off`.

    python scripts/bench/integrity.py --sizes 80K --backends dram,peer --output docs/results/integrity.jsonl

Each level is a run of `sglang-xmem bench ttft`; levels alternate, every other pass in reverse order. Arguments that are
not this script's are those of `bench ttft`. A run that would not end within `--time-limit` is not begun.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

LEVELS = ("off", "sample", "full")
#: Backends that have no tier.
WITHOUT_TIER = ("hbm", "stock", "recompute")


def hits(level: str, arguments: list[str], scratch: Path, timeout_s: float | None) -> list[dict[str, Any]]:
    """Rows of hits in a tier, of one run with a level.

    Raises:
        SystemExit: the run failed, or took longer than `timeout_s`.
    """
    output = scratch / "ttft.jsonl"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang_xmem.cli", "bench", "ttft", *arguments]
    command += ["--xmem-config", json.dumps({"integrity": level}), "--output", str(output)]
    try:
        status = subprocess.run(command, check=False, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
        raise SystemExit(f"bench ttft with integrity {level} did not end in time. Raise --time-limit.") from None
    if status:
        raise SystemExit(f"bench ttft failed with integrity {level}. Read its messages above.")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [row for row in rows if row["backend"] not in WITHOUT_TIER]


def main() -> None:
    """Append a row per level, tier and prompt length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=2, help="runs of each level; default 2")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds for all runs; default 3600")
    parser.add_argument("--output", type=Path, default=Path("integrity.jsonl"), help="JSON Lines file to append to")
    arguments, others = parser.parse_known_args()
    samples: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    about: dict[str, Any] = {}
    begun, longest = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.passes):
            for level in LEVELS if number % 2 == 0 else reversed(LEVELS):
                start = time.monotonic()
                left = arguments.time_limit - (start - begun)
                if left < longest:
                    continue
                for row in hits(level, others, Path(scratch), left):
                    samples[row["backend"], row["prompt_tokens"], level] += row["all_ms"]
                    about = {key: row[key] for key in ("shape", "page_size", "tp_size", "gpu") if key in row}
                longest = max(longest, time.monotonic() - start)
    missing = [level for level in LEVELS if not any(level == measured for _, _, measured in samples)]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} was not measured within {arguments.time_limit:g} s. Raise --time-limit."
        )
    with arguments.output.open("a") as file:
        for (backend, tokens, level), times in samples.items():
            median = statistics.median(times)
            row = {
                "bench": "integrity",
                "level": level,
                "backend": backend,
                "prompt_tokens": tokens,
                "ttft_ratio": round(median / statistics.median(samples[backend, tokens, LEVELS[0]]), 4),
                "ttft_ms": round(median, 3),
                "samples": len(times),
                **about,
                "command": " ".join(["python", "scripts/bench/integrity.py", *sys.argv[1:]]),
            }
            print(json.dumps(row))
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
