#!/usr/bin/env python3
"""Start an SGLang server with HiCache in a tier of sglang_xmem, and show the sources of its hits.

Each round sends a new prompt (recompute), sends it again (hit in device memory), and again after other prompts have
evicted it from the device pool (hit in the tier). The last line on stdout is one JSON object. Exit status 1: a hit did
not come from the tier, or outputs differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.sglang_server import CPU_OPTIONS, Answer, Server, ServerFailed, launch_server_command, tier_in

#: Rows of the table in order, and keys of `ttft_ms` in the JSON line.
KINDS = {"recompute": "not cached, recomputed", "hbm_hit": "hit in the device pool", "tier_hit": "hit in the tier"}
OUTPUT_TOKENS = 8
#: A second hit in the device pool, which shows whether this engine's outputs are reproducible.
AGAIN = "hbm_hit_again"


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens; `device_pool` is small, so that few prompts evict one."""

    prompt: int
    page: int
    device_pool: int
    rounds: int

    @property
    def flood_prompts(self) -> int:
        """Return the prompts that fill the device pool once, so that the oldest entry is evicted."""
        return math.ceil(self.device_pool / self.prompt) + 1


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, with defaults for the machine."""
    on_gpu = os.environ.get("SGLANG_USE_CPU_ENGINE") != "1"
    parser = argparse.ArgumentParser(
        prog="quickstart.sh",
        description="Show HiCache hits in a tier of sglang_xmem. Options after -- go to the server.",
    )
    parser.add_argument("model", nargs="?", help="model directory or name (default: a small random model is made)")
    parser.add_argument("--tier", default="auto", help="value of --hicache-xmem-tier (default: auto)")
    parser.add_argument("--prompt-tokens", type=int, default=8192 if on_gpu else 400)
    parser.add_argument("--page-size", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up round")
    parser.add_argument("--start-timeout", type=float, default=900 if on_gpu else 180, help="seconds")
    own, server = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, server = own[:cut], own[cut + 1 :]
    arguments = parser.parse_args(own)
    if arguments.prompt_tokens <= arguments.page_size or arguments.rounds < 1:
        parser.error("--prompt-tokens must exceed --page-size, and --rounds must be at least 1")
    arguments.on_gpu, arguments.server = on_gpu, server
    return arguments


def make_model(directory: Path, on_gpu: bool) -> None:
    """Make a random model; on a GPU a larger one, so that recomputing a prompt is slow enough to save."""
    size = ["--layers", "16", "--hidden-size", "1024", "--heads", "16", "--kv-heads", "8", "--head-dim", "128"]
    size += ["--sharpness", "2"]
    script = Path(__file__).with_name("make_tiny_model.py")
    command = [sys.executable, str(script), str(directory), *(size if on_gpu else [])]
    subprocess.run(command, check=True, stdout=sys.stderr)


def server_options(arguments: argparse.Namespace, model: str, workload: Workload) -> dict[str, Any]:
    """Return the keywords of sgl.Engine for the demonstration."""
    options: dict[str, Any] = {
        "model_path": model,
        "skip_tokenizer_init": True,
        "page_size": workload.page,
        "max_total_tokens": workload.device_pool,
        "max_running_requests": 4,
        "random_seed": 0,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 4.0,
        "hicache_write_policy": "write_through",
        "hicache_use_xmem": True,
        "hicache_xmem_tier": arguments.tier,
    }
    return options if arguments.on_gpu else {**options, **CPU_OPTIONS}


def measure(server: Server, workload: Workload) -> list[dict[str, Answer]]:
    """Run the rounds; return one dict of answers by kind per round, without the warm-up."""
    generator = random.Random(0)

    def new_prompt() -> list[int]:
        # Every model's vocabulary has these ids; the lowest ones are often special tokens.
        return [generator.randrange(100, 1000) for _ in range(workload.prompt)]

    rounds = []
    for number in range(workload.rounds + 1):
        prompt = new_prompt()
        answers = {kind: server.generate(prompt, OUTPUT_TOKENS) for kind in ("recompute", "hbm_hit", AGAIN)}
        for _ in range(workload.flood_prompts):
            server.generate(new_prompt(), 1)
        answers["tier_hit"] = server.generate(prompt, OUTPUT_TOKENS)
        if number > 0:
            rounds.append(answers)
        print(f"round {number} of {workload.rounds}" + (" (warm-up)" if number == 0 else ""), file=sys.stderr)
    return rounds


def problems_in(rounds: list[dict[str, Answer]], tier: str | None) -> list[str]:
    """List contradictions to the claim that the tier served the third request of each round."""
    problems = []
    if tier is None:
        problems.append("the server's log does not name a tier: sglang_xmem is not active")
    for number, answers in enumerate(rounds, 1):
        if answers["recompute"].cached.get("device") or answers["recompute"].cached.get("host"):
            problems.append(f"round {number}: the new prompt was cached already: {answers['recompute'].cached}")
        if not answers["hbm_hit"].cached.get("device"):
            problems.append(f"round {number}: the second request missed the device pool: {answers['hbm_hit'].cached}")
        if not answers["tier_hit"].cached.get("host"):
            problems.append(f"round {number}: the third request missed the tier: {answers['tier_hit'].cached}")
        if answers[AGAIN].output_ids != answers["hbm_hit"].output_ids:
            problems.append(f"round {number}: the outputs of two hits in the device pool differ")
        if answers["tier_hit"].output_ids != answers["hbm_hit"].output_ids:
            problems.append(f"round {number}: the outputs of the hits in device pool and tier differ")
    return problems


def print_table(rounds: list[dict[str, Answer]], tier: str | None, workload: Workload) -> None:
    """Format the result for stdout, before the JSON line."""
    print(f"\nTTFT of a prompt of {workload.prompt} tokens, tier {tier}, median of {len(rounds)} rounds\n")
    print(f"{'request':24} {'TTFT ms':>9} {'min':>9} {'max':>9}  {'from device':>11}  {'from tier':>9}")
    for kind, label in KINDS.items():
        times = [answers[kind].ttft_ms for answers in rounds]
        cached = rounds[-1][kind].cached
        print(
            f"{label:24} {statistics.median(times):9.2f} {min(times):9.2f} {max(times):9.2f}"
            f"  {cached.get('device', 0):11d}  {cached.get('host', 0):9d}"
        )
    same = sum(answers["recompute"].output_ids == answers["tier_hit"].output_ids for answers in rounds)
    # A hit computes its last tokens in another batch shape than a full prefill, so rounding may differ on a GPU.
    print(f"\nA tier hit gave the tokens of the recomputed prompt in {same} of {len(rounds)} rounds.\n")


def summary(rounds: list[dict[str, Answer]], tier: str | None) -> dict[str, Any]:
    """Make the JSON line. `hits` is of the round with the fewest tokens from the tier."""
    worst = min((answers["tier_hit"].cached for answers in rounds), key=lambda cached: cached.get("host", 0))
    return {
        "tier": tier,
        "hits": {"device": worst.get("device", 0), "host": worst.get("host", 0)},
        "outputs_equal": all(answers["tier_hit"].output_ids == answers["hbm_hit"].output_ids for answers in rounds),
        "ttft_ms": {kind: round(statistics.median(answers[kind].ttft_ms for answers in rounds), 3) for kind in KINDS},
    }


def _terminated(number: int, frame: object) -> NoReturn:
    # An exception, so that the server is stopped during cleanup.
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demonstration; return the exit status."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, _terminated)
    pages_of_prompt = math.ceil(arguments.prompt_tokens / arguments.page_size)
    workload = Workload(
        prompt=arguments.prompt_tokens,
        page=arguments.page_size,
        # 2.5 prompts with their outputs.
        device_pool=math.ceil(2.5 * (pages_of_prompt + 1)) * arguments.page_size,
        rounds=arguments.rounds,
    )
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_quickstart_") as scratch:
        model = arguments.model
        if model is None:
            model = str(Path(scratch) / "model")
            print("Making a small random model ...", file=sys.stderr)
            make_model(Path(model), arguments.on_gpu)
        options = server_options(arguments, model, workload)
        print("Starting the server ...", file=sys.stderr)
        try:
            log_path = Path(scratch) / "server.log"
            with Server(launch_server_command(), options, log_path, arguments=arguments.server) as server:
                server.wait_ready(arguments.start_timeout)
                tier = tier_in(server.log())
                rounds = measure(server, workload)
        except ServerFailed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    problems = problems_in(rounds, tier)
    print_table(rounds, tier, workload)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(json.dumps(summary(rounds, tier)), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
