"""Check each tier for an engine with the planning code of SGLang's launcher (sglang_xmem.plan).

Each tier is planned as if the user had named it; `auto` uses the first that can serve, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang_xmem import gpus, machine
from sglang_xmem.config import parse_options
from sglang_xmem.doctor.child import run_task
from sglang_xmem.engines.sglang import versions
from sglang_xmem.engines.sglang.host_budget import launcher_host_budget
from sglang_xmem.errors import ConfigError, Unavailable, UnsupportedSGLang
from sglang_xmem.plan import Candidate, HostBudget, candidate_free_bytes, tried_tiers
from sglang_xmem.plan import examine as examine_tiers
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.mtier import MTierTier, bank_rooms

#: Seconds until a tier counts as stuck: an SDK's import is slow (it imports torch), and its library may wait for its
#: service forever.
LIMIT_S = 30.0
#: The step that lists X-Mem's banks. It is first: a tier that hangs hides no earlier results.
BANKS = "banks"

Json = dict[str, Any]


def engine_gpus(tp_size: int, base_gpu_id: int) -> list[int | None]:
    """Return each rank's GPU as SGLang assigns it; None on a machine without GPUs.

    Raises:
        ConfigError: the options name GPUs that do not exist.
    """
    if tp_size < 1:
        raise ConfigError(f"--tp-size is {tp_size}. Give 1 or more.")
    try:
        visible = gpus.visible_gpus()
    except Unavailable:
        return [None] * tp_size
    if not visible:
        return [None] * tp_size
    wanted = range(base_gpu_id, base_gpu_id + tp_size)
    if base_gpu_id < 0 or wanted[-1] not in visible:
        raise ConfigError(
            f"--base-gpu-id {base_gpu_id} with --tp-size {tp_size} needs GPUs {wanted[0]} to {wanted[-1]}, but this "
            f"process sees GPUs 0 to {len(visible) - 1}."
        )
    return list(wanted)


def sglang_is_known() -> bool:
    """Whether this package supports the installed SGLang."""
    try:
        versions.current()
    except UnsupportedSGLang:
        return False
    return True


def examine(steps: list[str], config: str | None, engine: list[int | None], pool_bytes: int | None) -> Iterator[Json]:
    """Yield one line per step, which is a tier's name or BANKS. Runs in a child process.

    Raises:
        ConfigError: options that the server would refuse.
    """
    ranks = Ranks(gpus=tuple(engine))
    for step in steps:
        if step == BANKS:
            yield _banks()
            continue
        options = parse_options(step, config)
        budget = _host_budget(len(engine))
        (found,) = examine_tiers(options, ranks, pool_bytes, budget)
        if isinstance(found, Candidate):
            try:
                yield _line(step, room_bytes=candidate_free_bytes(found, options, ranks, pool_bytes or 0, budget))
            except Unavailable as error:  # a rank would skip it too
                yield _line(step, error.reason)
        else:
            yield _line(step, found.words())


def _banks() -> Json:
    try:
        return {"banks": [{"total_bytes": total, "available_bytes": free} for total, free in bank_rooms()]}
    except Unavailable as error:
        return {"banks": None, "reason": str(error)}


def _line(tier: str, reason: str | None = None, room_bytes: int | None = None) -> Json:
    return {"tier": tier, "room_bytes": room_bytes, "reason": reason}


def _host_budget(n_ranks: int) -> HostBudget:
    return launcher_host_budget(n_ranks) if sglang_is_known() else fallback_host_budget(n_ranks)


def fallback_host_budget(n_ranks: int) -> HostBudget:
    """Return each rank's limit of host RAM by SGLang's rule, for machines without SGLang."""
    return lambda nbytes: (machine.host_available_bytes() - machine.HOST_RESERVE_BYTES) // n_ranks


def verdict(
    tier: str, config: str | None, engine: list[int | None], pool_bytes: int | None, *, banks: bool = True
) -> tuple[Json, Json]:
    """Return the chosen tier with the reasons against the others, and X-Mem's banks if `banks`.

    Raises:
        ConfigError: options that the server would refuse.
    """
    names = tried_tiers(parse_options(tier, config))
    bank_line: Json = {}
    found: dict[str, Json] = {}
    stuck: list[str] = []
    steps = [BANKS, *names] if banks else names.copy()
    while steps:
        arguments = {"steps": steps, "config": config, "engine": engine, "pool_bytes": pool_bytes}
        outcome = run_task("tiers", arguments, LIMIT_S)
        for step, line in zip(steps, outcome.lines, strict=False):
            if step == BANKS:
                bank_line = line
            else:
                found[step] = line
        steps = steps[len(outcome.lines) :]
        if not steps:
            break
        # A child that neither finished nor failed is stuck in its first open step; the other steps get a new child.
        problem = outcome.problem or "it did not respond"
        failed = steps.pop(0)
        if failed == BANKS:
            bank_line = {"banks": None, "reason": problem}
            if MTierTier.name not in steps:
                continue
            steps.remove(failed := MTierTier.name)  # would wait for the same service again
        found[failed] = _line(failed, problem)
        stuck.append(failed)
    tiers = [found[name] for name in names]
    return {
        "asked": tier,
        "gpus": engine,
        "pool_bytes": pool_bytes,
        "host_budget": "sglang" if sglang_is_known() else "fallback",
        "takes": next((line["tier"] for line in tiers if line["reason"] is None), None),
        "found": tiers,
        "stuck": stuck,
    }, bank_line
