"""The kill matrix: each fault of tests/fakes/faults.py in an engine that serves, every answer compared."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e import harness
from tests.e2e.harness import FAULT, XMEM_DRAM, Spec, Step, run

#: Faults that a rank survives, in the order in which an engine meets them.
SURVIVED = ("refuse store", "refuse load", "delay", "flip", "stale", "flip load")
#: How an answer is asked for: nothing is cached, or it comes from the tier.
STATES = ("cold", "tier hit", "again")
#: Seconds after which a tier that was set aside has been tried again.
REST_S = 4.0

OPTIONS: dict[str, Any] = {**XMEM_DRAM, "hicache_xmem_config": {"integrity": "full"}}
#: An engine without any cache.
REFERENCE: dict[str, Any] = {"enable_hierarchical_cache": None, "disable_radix_cache": True, "hicache_ratio": None}


class Row(NamedTuple):
    """What a fault did to requests of one state.

    Attributes:
        met: copies that had the fault, in all states.
    """

    fault: str
    state: str
    rounds: int
    wrong: int
    hung: int
    lost_requests: int
    met: int


def steps(rounds: int, faults: Sequence[str] = SURVIVED) -> list[Step]:
    """Ask for a new prompt, push it out of the device pool, ask for it again, with a fault at each copy."""
    plan: list[Step] = []
    for fault in faults:
        for number in range(rounds):
            name = f"{fault} {number}"
            plan += [("fault", fault), ("try", f"{name} cold", name)]
            plan += [("fault", ""), ("flood",), ("fault", fault), ("try", f"{name} tier hit", name), ("fault", "")]
            plan += [("try", f"{name} again", name)]
        plan += [("rest", REST_S)]
    return plan


def reference(model: str, rounds: int) -> dict[str, list[int]]:
    """The right answer to each prompt."""
    names = [f"{fault} {number}" for fault in SURVIVED for number in range(rounds)]
    result = run(Spec("engine", model, REFERENCE, [("ask", name, name) for name in names], forked=True), timeout_s=600)
    return {name: result.answers[name].output_ids for name in names}


def survived(model: str, rounds: int, scratch: Path) -> tuple[list[Row], harness.Result]:
    """Run all faults that a rank survives in one engine."""
    right = reference(model, rounds)
    environment = {FAULT: str(scratch / "fault")}
    result = run(Spec("engine", model, OPTIONS, steps(rounds), environment, forked=True), timeout_s=900)
    rows = []
    for fault in SURVIVED:
        for state in STATES:
            names = [f"{fault} {number}" for number in range(rounds)]
            found = {name: result.answers.get(f"{name} {state}") for name in names}
            wrong = sum(answer is not None and answer.output_ids != right[name] for name, answer in found.items())
            lost = sum(answer is None for answer in found.values())
            rows.append(Row(fault, state, rounds, wrong, 0, lost, faults_in(result.log)[fault]))
    return rows, result


def hang(model: str, deadline_s: float, scratch: Path) -> tuple[Row, str, float]:
    """A load that never ends: the row, the log, and the seconds from the start of the load to the engine's end."""
    plan: list[Step] = [("ask", "cold", "A"), ("flood",), ("fault", "hang"), ("try", "tier hit", "A")]
    environment = {FAULT: str(scratch / "fault"), "SGLANG_XMEM_DEADLINE_S": str(deadline_s)}
    begun = time.monotonic()
    log = ""
    try:
        log = run(Spec("engine", model, OPTIONS, plan, environment, forked=True), timeout_s=240).log
    except AssertionError as error:  # the engine is gone, as it has to be
        log = str(error)
    hung, met = int("did not end within" not in log), faults_in(log)["hang"]
    return Row("hang", "tier hit", 1, 0, hung, 1, met), log, time.monotonic() - begun


def faults_in(log: str) -> Counter[str]:
    """How many copies had each fault."""
    return Counter(re.findall(r"xmem_e2e: fault: (.*)", log))
