#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Kills processes at random while they use a tier's memory, and looks what they leave behind: kills.py --rounds 1000

A process takes memory of tier dram, mtier or bank as a rank does, moves pages and compares every byte, until SIGKILL
comes at a random moment: while it starts, or while it copies. In one round of ten mtierd is killed before it, and
started again. Afterwards nothing may be left: no process, no file in /dev/shm, no memory in mtierd's account, no frame
of the bank that is neither free nor a whole page; and the next process finds correct bytes. Needs no GPU and no SGLang.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from sglang_xmem.arena import SpaceSpec
from sglang_xmem.bank_space import TRAILER_BYTES, BankSpace
from sglang_xmem.bench.moves import CASES, Scene
from sglang_xmem.mtier.build import built
from sglang_xmem.tiers.bank import BankRankPlan, BankSettings, BankTier
from tests.mtier.service import MIB, Daemon, client_environment

TIERS = ("dram", "mtier", "bank")
STATES = ("starting", "copying", "service killed")
#: Pages of a move at most, in dram and mtier.
PAGES = 64
#: The bank's pages: how many frames one process may have, their bytes with the trailer, and how many keys there are.
FRAMES, FRAME_BYTES, KEYS = 64, 4096, 400
BANK_BYTES = 16 * MIB
#: Seconds within which what a killed process had is back, and within which a process begins to copy.
PATIENCE_S = 60.0
#: What a process says: a page was wrong, and all of a move's were right.
WRONG, RIGHT = b"w", b"r"


class Row(NamedTuple):
    """What kills in one tier and state did.

    Attributes:
        wrong: pages with other bytes than were stored.
        hung: processes that did not begin to copy, and rounds after which the service did not have all back.
        left: processes and files that were left behind.
    """

    fault: str
    state: str
    rounds: int
    wrong: int
    hung: int
    lost_requests: int
    left: int


# ---- in the process that is killed ----


def work(tier: str, seed: int, report: int) -> NoReturn:
    """Use the tier until this process is ended; write a byte per move to `report`."""
    torch.set_num_threads(1)
    generator = random.Random(seed)
    check = _bank_work(generator) if tier == "bank" else _arena_work(tier, generator)
    while True:
        os.write(report, WRONG if check() else RIGHT)


def _arena_work(tier: str, generator: random.Random) -> Callable[[], int]:
    scene = Scene(tier, None, None, CASES["small"], PAGES, generator.randrange(1 << 30))
    return lambda: scene.wrong_pages(generator.randint(1, PAGES))


def _bank_work(generator: random.Random) -> Callable[[], int]:
    tier = BankTier(BankSettings(), BankRankPlan(BANK_BYTES), None)
    tier.share_as([b"k" * 32], "kills")
    space = BankSpace(SpaceSpec("KV", FRAMES, FRAME_BYTES), tier.allocate(FRAMES * FRAME_BYTES, FRAME_BYTES))
    memory, words = np.frombuffer(space.bank.slab.owner, np.uint64), (FRAME_BYTES - TRAILER_BYTES) // 8

    def check() -> int:
        number, page = generator.randrange(KEYS), torch.tensor([generator.randrange(FRAMES)])
        key, right = bytes(30) + number.to_bytes(2, "big"), np.arange(words, dtype=np.uint64) ^ number << 32
        found = space.adopt([key], page)
        if not found:
            space.look_up(page, claim=True)
        begin = (int(space.table[page]) - space.bank.slab.address) // 8
        frame = memory[begin : begin + words]
        if found:
            return int(not np.array_equal(frame, right))
        frame[:] = right
        space.publish([key], page)
        return 0

    return check


# ---- in the process that kills ----


class Killer:
    """Runs rounds in one tier.

    Args:
        daemon: a running service, for tiers that have one.
        start_daemon: starts it again.
    """

    def __init__(self, tier: str, seed: int, start_daemon: Callable[[], Daemon] | None) -> None:
        self.tier = tier
        self.counts: dict[str, Counter[str]] = {state: Counter() for state in STATES}
        self._random = random.Random(f"{tier} {seed}")
        self._start_daemon = start_daemon
        self._daemon = start_daemon() if start_daemon is not None else None

    def round(self) -> None:
        """Start a process, kill it, and look what it left."""
        state = self._random.choices(STATES, (3, 6, 1 if self._daemon is not None else 0))[0]
        counts = self.counts[state]
        counts["rounds"] += 1
        files = _shared_files()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _become(self.tier, self._random.randrange(1 << 30), write)
        os.close(write)
        try:
            first = b"" if state == "starting" else _first_byte(read)
            counts["hung"] += not first and state != "starting"
            counts["wrong"] += first == WRONG
            time.sleep(self._random.uniform(0, 0.05))
            if state == "service killed":
                self._restart()
                time.sleep(self._random.uniform(0, 0.02))
        finally:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        # A process that ended by itself has seen an error, and said what on stderr.
        counts["wrong"] += os.waitstatus_to_exitcode(status) != -signal.SIGKILL
        with os.fdopen(read, "rb") as said:
            counts["wrong"] += said.read().count(WRONG)
        # A compiler that it has asked for its version ends by itself, a moment later.
        _soon(lambda: not _group_lives(pid) and not _shared_files() - files)
        counts["left"] += _group_lives(pid) + len(_shared_files() - files)
        counts["hung"] += not self._whole_again()

    def _restart(self) -> None:
        assert self._daemon is not None
        assert self._start_daemon is not None
        self._daemon.stop(signal.SIGKILL)
        self._daemon = self._start_daemon()

    def _whole_again(self) -> bool:
        """Whether the service soon has back all that the process had."""
        if self._daemon is None:
            return True
        daemon = self._daemon
        if self.tier == "mtier":
            return _soon(lambda: daemon.available() == BANK_BYTES)
        return _soon(lambda: all(_is_whole(space) for space in daemon.status()["spaces"]))

    def rows(self) -> list[Row]:
        """A row for each state that there was."""
        return [
            Row(
                "kill -9",
                f"{self.tier}, {state}",
                counts["rounds"],
                counts["wrong"],
                counts["hung"],
                0,
                counts["left"],
            )
            for state, counts in self.counts.items()
            if counts["rounds"]
        ]

    def close(self) -> None:
        """End the service."""
        if self._daemon is not None:
            self._daemon.stop()


def _soon(holds: Callable[[], bool]) -> bool:
    """Whether a condition holds within PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def _is_whole(space: dict[str, Any]) -> bool:
    """Whether each frame of a bank's space is free, or an unpinned page that others can find."""
    frames = space["free"] + space["cached"]
    return not space["sessions"] and not space["shared"] and frames == space["frames"] and space["pages"] <= frames


def _become(tier: str, seed: int, report: int) -> NoReturn:
    os.setsid()
    try:
        work(tier, seed, report)
    except BaseException as error:
        sys.stderr.write(f"kills: tier {tier}: {error!r}\n")
    finally:
        os._exit(1)


def _first_byte(descriptor: int) -> bytes:
    """Wait until the process has moved something; nothing where it ended or did not within PATIENCE_S."""
    ready, _, _ = select.select([descriptor], [], [], PATIENCE_S)
    return os.read(descriptor, 1) if ready else b""


def _group_lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(pid, 0)
        return True
    return False


def _shared_files() -> set[str]:
    """Files in shared memory, but for those of other engines on this machine."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sglang", "torch", "psm_", "sem."))}


def run(tier: str, rounds: int, seed: int, scratch: Path) -> list[Row]:
    """Kill `rounds` processes that use a tier."""
    start: Callable[[], Daemon] | None = None
    if tier != "dram":
        binaries, socket = built(), scratch / f"{tier}.sock"
        os.environ.update(client_environment(binaries, socket))

        def start() -> Daemon:
            return Daemon(binaries, socket, ["--bank", f"host:{BANK_BYTES}"])

    killer = Killer(tier, seed, start)
    try:
        for _ in range(rounds):
            killer.round()
    finally:
        killer.close()
    return killer.rows()


def main() -> int:
    """Append a row per tier and state; 1 where anything was wrong, hung or left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="kills, shared by the tiers; default 100")
    parser.add_argument("--tiers", default=",".join(TIERS), help=f"default {','.join(TIERS)}")
    parser.add_argument("--seed", type=int, default=0, help="of moments, pages and bytes; default 0")
    parser.add_argument("--output", type=Path, default=Path("faults.jsonl"), help="JSON Lines file to append to")
    arguments = parser.parse_args()
    tiers = arguments.tiers.split(",")
    command = f"python scripts/bench/kills.py --rounds {arguments.rounds} --seed {arguments.seed}"
    bad = False
    with tempfile.TemporaryDirectory(prefix="kills_") as scratch:
        for number, tier in enumerate(tiers):
            rounds = arguments.rounds // len(tiers) + (number < arguments.rounds % len(tiers))
            for row in run(tier, rounds, arguments.seed, Path(scratch)):
                text = json.dumps({"bench": "faults", **row._asdict(), "device": "cpu", "command": command})
                print(text, flush=True)
                with arguments.output.open("a") as file:
                    file.write(text + "\n")
                bad = bad or bool(row.wrong or row.hung or row.left)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
