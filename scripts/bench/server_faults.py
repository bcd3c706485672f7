#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A server under load whose rank is killed, or whose tier's GPU another process fills: server_faults.py --tier peer

    kill    SIGKILL of a rank during loads. The server must end by itself, leave no process and no
            memory, and start again.
    crowd   Another process takes all memory that is left on the GPU of the tier (host memory without one) and keeps its
            multiprocessors busy, while the server continues.

All answers are compared with those of an engine without a cache. One row per fault goes to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.serving_soak import START_TIMEOUT_S, Load, counted, engine_options, prompts, right_answers
from scripts.sglang_server import Server, launch_server_command
from sglang_xmem import errors, gpus
from sglang_xmem.bench.setup import has_gpu

FAULTS = ("kill", "crowd")
#: Seconds within which a server whose rank was killed ends, and its memory is back.
END_S = 90.0
#: Bytes of a GPU that may differ from before.
SLACK_BYTES = 256 << 20
CROWD = Path(__file__).with_name("crowd.py")


class Faults:
    """Rounds of faults over one model.

    Args:
        options: of the server, the tier's included.
        expected: right answers to the soak's prompts.
        crowd_gpu: which GPU to fill; None: host memory.
    """

    def __init__(self, options: dict[str, Any], expected: list[list[int]], scratch: Path, args: Any) -> None:
        self.options, self.expected, self.scratch, self.args = options, expected, scratch, args
        self.random = random.Random(args.seed)
        self.problems: list[str] = []

    def kill(self) -> Counter[str]:
        """One round; counts as rows have them."""
        before = memory_used()
        with self._server("kill") as server:
            load, thread = self._begin(server)
            self._wait_for_loads(server, thread)
            time.sleep(self.random.uniform(0, 1))
            rank = self.random.choice(ranks(server))
            os.kill(rank, signal.SIGKILL)
            load.stopped.set()
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(END_S)
            ended = server.process.poll() is not None
            thread.join(END_S)
            left = 0 if self._soon(lambda: not group(server)) else len(group(server))
            found = load.counts
        back = self._soon(
            lambda: all(now <= then + SLACK_BYTES for now, then in zip(memory_used(), before, strict=True))
        )
        self.problems += [] if back else ["memory of a GPU is not back"]
        return Counter(
            rounds=1,
            wrong=found["wrong"],
            hung=int(not ended or thread.is_alive()),
            lost_requests=found["failed"],
            left=left + (not back),
            tier_tokens=found["from_host"],
        )

    def crowd(self) -> Counter[str]:
        """One round of --seconds."""
        with self._server("crowd") as server:
            load, thread = self._begin(server)
            self._wait_for_loads(server, thread)
            gpu = "" if not has_gpu() else str(self.args.crowd_gpu)
            with subprocess.Popen([sys.executable, str(CROWD), gpu], stdout=subprocess.PIPE, text=True) as other:
                try:
                    assert other.stdout is not None
                    print(f"server_faults: {other.stdout.readline().strip()}", file=sys.stderr)
                    before = load.counts["from_host"]
                    time.sleep(self.args.seconds)
                    hits = load.counts["from_host"] - before
                finally:
                    other.kill()
            load.stopped.set()
            thread.join(END_S)
            _, healthy = counted(server)
            found = load.counts
        self.problems += [] if hits else ["no hit came from the tier while it was crowded"]
        self.problems += [] if healthy else ["the tier is not healthy"]
        return Counter(
            rounds=1,
            wrong=found["wrong"],
            hung=int(thread.is_alive()),
            lost_requests=found["failed"],
            left=0,
            tier_tokens=hits,
        )

    def _server(self, fault: str) -> Server:
        return Server(launch_server_command(), self.options, self.scratch / f"{fault}.log")

    def _begin(self, server: Server) -> tuple[Load, threading.Thread]:
        server.wait_ready(START_TIMEOUT_S)
        load = Load(server, prompts(self.args.seed), self.expected, self.args.seed)
        thread = threading.Thread(target=load.run, args=(self.args.clients, 3600.0), daemon=True)
        thread.start()
        return load, thread

    def _wait_for_loads(self, server: Server, thread: threading.Thread) -> None:
        """Wait until loads have begun: a killed rank has loads in flight, or had them a moment ago."""
        while counted(server)[0]["pages:load"] < 50:
            if not thread.is_alive():
                raise RuntimeError(f"the load ended before there was a hit; see {server.log_path}")
            time.sleep(0.2)

    @staticmethod
    def _soon(holds: Any) -> bool:
        end = time.monotonic() + END_S
        while not (held := bool(holds())) and time.monotonic() < end:
            time.sleep(0.2)
        return held


def ranks(server: Server) -> list[int]:
    """Process ids of a server's schedulers, which name themselves."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [child.pid for child in children if any("sglang::scheduler" in part for part in child.cmdline())]
    if not found:
        raise RuntimeError("the server has no process that is called sglang::scheduler")
    return found


def group(server: Server) -> list[int]:
    """Process ids of what lives in a server's process group, itself left out."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.pid != server.process.pid and os.getpgid(process.pid) == server.process.pid:
                found.append(process.pid)
    return found


def memory_used() -> list[int]:
    """Bytes in use of each GPU."""
    return [gpus.memory_bytes(gpu)[1] for gpu in gpus.visible_gpus()] if has_gpu() else []


def main() -> int:
    """Append a row per fault; 1 where an answer was wrong, or anything hung or was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"default {','.join(FAULTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of each fault; default 3")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a tier is crowded; default 20")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds after which no round begins")
    parser.add_argument("--tier", default="dram", help="value of --hicache-xmem-tier (default dram)")
    parser.add_argument("--crowd-gpu", type=int, default=1, help="CUDA ordinal of the GPU to fill; default 1")
    parser.add_argument("--clients", type=int, default=8, help="at the same time; default 8")
    parser.add_argument("--model", type=Path, help="a model's folder; default: a small random one is made")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, deeds and moments; default 0")
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), help="JSON Lines file to append to")
    args = parser.parse_args()
    begun, bad = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_faults_") as scratch:
        model = args.model or Path(scratch) / "model"
        if args.model is None:
            maker = Path(__file__).resolve().parents[1] / "make_tiny_model.py"
            subprocess.run([sys.executable, str(maker), str(model)], check=True)
        plain = engine_options(model, has_gpu())
        expected = right_answers(plain, prompts(args.seed), Path(scratch) / "right.log")
        tier = {
            "enable_hierarchical_cache": True,
            "hicache_ratio": 4.0,
            "hicache_write_policy": "write_through",
            "hicache_use_xmem": True,
            "hicache_xmem_tier": args.tier,
            "hicache_xmem_config": {"integrity": "full"},
        }
        faults = Faults({**plain, **tier}, expected, Path(scratch), args)
        for fault in args.faults.split(","):
            total: Counter[str] = Counter()
            for _ in range(args.rounds):
                if time.monotonic() - begun < args.time_limit:
                    total.update(getattr(faults, fault)())
            row = {
                "bench": "faults",
                "fault": {"kill": "kill -9 of a rank", "crowd": "the tier's memory is filled by others"}[fault],
                "state": f"{args.tier}, loads in flight",
                **{key: total[key] for key in ("rounds", "wrong", "hung", "lost_requests", "left", "tier_tokens")},
                "device": "gpu" if has_gpu() else "cpu",
                "command": " ".join(["python", "scripts/bench/server_faults.py", *sys.argv[1:]]),
            }
            print(json.dumps(row), flush=True)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bad = bad or bool(row["wrong"] or row["hung"] or row["left"] or not row["rounds"])
    for words in faults.problems:
        print(f"server_faults: {words}", file=sys.stderr)
    return int(bad or bool(faults.problems))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except errors.ConfigError as error:
        sys.exit(f"server_faults: {error}")
