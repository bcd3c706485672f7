"""Two SGLang servers that share a bank of mtierd, one of which is killed while the other serves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts.sglang_server import Answer, Server, launch_server_command, tier_in
from tests.e2e.harness import BASE_OPTIONS, EVICT_AND_ASK_AGAIN, GPU_OPTIONS, PROMPT_TOKENS, ServerClient, run_steps
from tests.mtier.service import Daemon, wait_until

__all__ = ["GPU_OPTIONS", "share"]

#: Tokens of the prompt that can be cached: whole pages, and at least one token is computed.
CACHEABLE = (PROMPT_TOKENS - 1) // BASE_OPTIONS["page_size"] * BASE_OPTIONS["page_size"]
ASK_AGAIN = (("flood",), ("ask", "tier_hit", "A"))
TIER = {"hicache_use_xmem": True, "hicache_xmem_tier": "mtier"}


def share(
    daemon: Daemon,
    model: str,
    options: tuple[Mapping[str, Any], Mapping[str, Any]],
    environment: Mapping[str, str],
    folder: Path,
    memory_used: Callable[[], int],
    start_timeout_s: float,
) -> dict[str, Any]:
    """Take two servers through hits of the tier, kill the first one's process group, and see the second serve on.

    Args:
        daemon: a service with one bank.
        options: of each server, over harness.BASE_OPTIONS; None removes one.
        environment: for the servers: how to find the service.
        folder: for the servers' logs.
        memory_used: bytes in use where the bank is, over all processes.

    Returns:
        A JSON object of what was seen.

    Raises:
        AssertionError: a hit did not come from the tier, outputs differ, or memory did not come back.
    """
    total = daemon.available()
    used_at_start = memory_used()
    servers: list[Server] = []
    held: list[int] = []
    answers: list[dict[str, Answer]] = []
    with ExitStack() as stack:
        for name, more in zip("ab", options, strict=True):
            all_options = {**BASE_OPTIONS, **TIER, **more, "model_path": model}
            before = daemon.available()
            server = Server(launch_server_command(), all_options, folder / f"{name}.log", environment)
            servers.append(stack.enter_context(server))
            server.wait_ready(start_timeout_s)
            assert tier_in(server.log()) == "mtier", server.log()[-4000:]
            held.append(before - daemon.available())
            answers.append(run_steps(ServerClient(server), EVICT_AND_ASK_AGAIN))
            check(answers[-1])
        assert all(held), "both pools are in the bank"
        assert answers[0]["tier_hit"].output_ids == answers[1]["tier_hit"].output_ids
        used_by_both = memory_used()

        first, second = servers
        rounds: list[Answer] = []
        failures: list[BaseException] = []
        killed = threading.Event()

        def serve() -> None:
            try:
                # Until three rounds have begun after the kill.
                after = 0
                while after < 3:
                    after += killed.is_set()
                    rounds.append(run_steps(ServerClient(second), ASK_AGAIN)["tier_hit"])
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            wait_until(lambda: bool(rounds or failures), 120)
            # The server leads its process group, which holds its schedulers and nothing else.
            os.killpg(first.process.pid, signal.SIGKILL)
            start = time.monotonic()
            wait_until(lambda: daemon.available() == total - held[1], 1)
            account_s = time.monotonic() - start
            memory_s = wait_until(lambda: memory_used() <= used_by_both - held[0], 30)
        finally:
            killed.set()
            thread.join(300)
        assert not failures, failures
        for answer in rounds:
            assert answer.cached == {"device": 0, "host": CACHEABLE}
            assert answer.output_ids == answers[1]["device_hit"].output_ids
        second.process.send_signal(signal.SIGTERM)
        second.process.wait(60)
    wait_until(lambda: daemon.available() == total, 1)
    wait_until(lambda: memory_used() - used_at_start < 64 << 20, 30)
    return {
        "bank_bytes": total,
        "pool_bytes": held,
        "cached": [each["tier_hit"].cached for each in answers],
        "outputs_equal": True,
        "hits_of_the_second_around_the_kill": len(rounds),
        "bank_available_after_kill_s": round(account_s, 3),
        "memory_free_after_kill_s": round(account_s + memory_s, 3),
    }


def check(answers: Mapping[str, Answer]) -> None:
    """The third kind of request came from the tier alone, and gave what the hit in the device pool gave."""
    assert sum(answers["cold"].cached.values()) == 0
    assert answers["device_hit"].cached == {"device": CACHEABLE, "host": 0}
    assert answers["tier_hit"].cached == {"device": 0, "host": CACHEABLE}
    assert answers["tier_hit"].output_ids == answers["device_hit"].output_ids
    # Otherwise equal outputs would say nothing about what was loaded.
    assert answers["changed"].output_ids != answers["cold"].output_ids
