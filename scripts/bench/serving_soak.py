#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Serves mixed load from a tier, and compares all answers with an engine without a cache: serving_soak.py --minutes 3.

Clients ask in random order for prompts that share prefixes, hang up in the middle of answers, and flood the device
pool, while a server per write policy serves from the tier. One wrong answer, one request that fails or hangs, or no
hit in the tier fails the run. One row per policy goes to --output.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.sglang_server import CPU_OPTIONS, HOST, Server, launch_server_command
from sglang_xmem import errors
from sglang_xmem.bench.runs import Results
from sglang_xmem.bench.setup import has_gpu

POLICIES = ("write_through", "write_through_selective", "write_back")
PAGE_SIZE = 16
#: Of the device pool: some four prompts, so that most hits are in the tier.
DEVICE_TOKENS = 1536
OUTPUT_TOKENS = 8
#: Prompts: as many families with a common prefix, members of each, and tokens of the prefix and of a whole prompt.
FAMILIES, MEMBERS, PREFIX_TOKENS, PROMPT_TOKENS = 8, 4, 160, 328
#: What a client does next, with weights.
DEEDS = {"ask": 12, "abort": 3, "flood": 1}
ANSWER_TIMEOUT_S = 120
START_TIMEOUT_S = 300


def prompts(seed: int) -> list[list[int]]:
    """All prompts; the tokens of each differ from the others' behind the family's prefix."""
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, 1000) for _ in range(count)]

    families = [tokens(PREFIX_TOKENS) for _ in range(FAMILIES)]
    return [prefix + tokens(PROMPT_TOKENS - PREFIX_TOKENS) for prefix in families for _ in range(MEMBERS)]


def engine_options(model: Path, gpu: bool) -> dict[str, Any]:
    """Of the server with a tier and of the one without a cache."""
    return {
        **({"attention_backend": "flashinfer"} if gpu else CPU_OPTIONS),
        "model_path": str(model),
        "skip_tokenizer_init": True,
        # In bf16 two tokens may be equally likely, and which one wins depends on what else is in the batch.
        "dtype": "bfloat16" if gpu else "float32",
        "page_size": PAGE_SIZE,
        "max_total_tokens": DEVICE_TOKENS,
        "max_running_requests": 4,
        "context_length": 1024,
        "chunked_prefill_size": 512,
        "random_seed": 0,
    }


class Load:
    """Clients of one server.

    Args:
        expected: the right answer to each prompt.

    Attributes:
        stopped: clients begin nothing more once it is set.
    """

    def __init__(self, server: Server, asked: Sequence[list[int]], expected: Sequence[list[int]], seed: int) -> None:
        self.server = server
        self.prompts = asked
        self.expected = expected
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self, clients: int, seconds: float) -> None:
        """Have clients do things until time is up."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self._client, number, end) for number in range(clients)]:
                done.result()

    def _client(self, number: int, end: float) -> None:
        generator = random.Random(f"{self.seed} {number}")
        while time.monotonic() < end and not self.stopped.is_set():
            (deed,) = generator.choices(list(DEEDS), list(DEEDS.values()))
            if deed == "ask":
                self._ask(generator.randrange(len(self.prompts)), OUTPUT_TOKENS)
            elif deed == "abort":
                self._abort(generator.randrange(len(self.prompts)), generator.random())
            else:
                for index in generator.sample(range(len(self.prompts)), len(self.prompts) // 4):
                    self._ask(index, 1)
            self._add(**{deed: 1})

    def _ask(self, index: int, count: int) -> None:
        try:
            answer = self.server.generate(self.prompts[index], count)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            self._problem(failed=1, words=f"prompt {index}: {error!r}"[:300])
            return
        self._add(answers=1, **{f"from_{place}": tokens for place, tokens in answer.cached.items()})
        if answer.output_ids != self.expected[index][:count]:
            self._problem(
                wrong=1, words=f"prompt {index}: {answer.output_ids}, right is {self.expected[index][:count]}"
            )

    def _abort(self, index: int, share: float) -> None:
        """Ask, and hang up at some time."""
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=ANSWER_TIMEOUT_S)
        sampling = {"temperature": 0, "max_new_tokens": 8 * OUTPUT_TOKENS, "ignore_eos": True}
        body = json.dumps({"input_ids": self.prompts[index], "sampling_params": sampling, "stream": True})
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            if share < 0.5:
                time.sleep(share)
            else:
                connection.getresponse().readline()

    def _add(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def _problem(self, words: str, **counts: int) -> None:
        self._add(**counts)
        with self._lock:
            self.problems.append(words)


def right_answers(options: dict[str, Any], asked: Sequence[list[int]], log: Path) -> list[list[int]]:
    """What an engine without any cache says, one request at a time."""
    with Server(launch_server_command(), {**options, "disable_radix_cache": True}, log) as server:
        server.wait_ready(START_TIMEOUT_S)
        answers = [server.generate(tokens, OUTPUT_TOKENS) for tokens in asked]
        assert not any(sum(answer.cached.values()) for answer in answers)
        return [answer.output_ids for answer in answers]


def counted(server: Server) -> tuple[Counter[str], bool]:
    """What the rank counted, and whether its tier is healthy."""
    status, body = server.request("GET", "/server_info")
    assert status == 200, body
    state = json.loads(body)["internal_states"][0]["sglang_xmem"]
    return Counter(state["counts"]), state["healthy"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of load, shared by the policies (default 3)")
    parser.add_argument("--clients", type=int, default=8, help="at the same time (default 8)")
    parser.add_argument("--tier", default="dram", help="value of --hicache-xmem-tier (default dram)")
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"default {','.join(POLICIES)}")
    parser.add_argument("--model", type=Path, help="a model's folder; default: a small random one is made")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and deeds (default 0)")
    parser.add_argument("--output", type=Path, default=Path("soak.jsonl"), help="default ./soak.jsonl")
    args = parser.parse_args()
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_soak_") as scratch:
        model = args.model or Path(scratch) / "model"
        if args.model is None:
            maker = Path(__file__).resolve().parents[1] / "make_tiny_model.py"
            subprocess.run([sys.executable, str(maker), str(model)], check=True)
        options = engine_options(model, has_gpu())
        asked = prompts(args.seed)
        expected = right_answers(options, asked, Path(scratch) / "right.log")
        results = Results("soak", args, program="scripts/bench/serving_soak.py", load="serving")
        policies = args.policies.split(",")
        for policy in policies:
            tier = {
                "enable_hierarchical_cache": True,
                "hicache_ratio": 4.0,
                "hicache_write_policy": policy,
                "hicache_use_xmem": True,
                "hicache_xmem_tier": args.tier,
                "hicache_xmem_config": {"integrity": "full"},
            }
            with Server(launch_server_command(), {**options, **tier}, Path(scratch) / f"{policy}.log") as server:
                server.wait_ready(START_TIMEOUT_S)
                load = Load(server, asked, expected, args.seed)
                begun = time.monotonic()
                load.run(args.clients, 60 * args.minutes / len(policies))
                seconds = time.monotonic() - begun
                counts, healthy = counted(server)
            found = load.counts
            row = {
                "tier": args.tier,
                "gpu": results.head["machine"],
                "policy": policy,
                "integrity": "full",
                "page_copies": counts["pages:load"] + counts["pages:store"],
                "pages_compared": counts["integrity:checked"],
                "wrong": found["wrong"],
                "failed": found["failed"],
                "answers": found["answers"],
                "aborts": found["abort"],
                "floods": found["flood"],
                "tier_tokens": found["from_host"],
                "clients": args.clients,
                "healthy": healthy,
                "seconds": round(seconds, 1),
            }
            print(json.dumps(results.write([row])[0]), flush=True)
            problems += [f"{policy}: {words}" for words in load.problems]
            if not found["from_host"]:
                problems.append(f"{policy}: no hit came from the tier")
            if not healthy:
                problems.append(f"{policy}: the tier is not healthy")
    for words in problems[:20]:
        print(words, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except errors.ConfigError as error:
        sys.exit(f"serving_soak: {error}")
