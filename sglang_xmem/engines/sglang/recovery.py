"""A scheduler's reaction to a failing tier: no wrong page is served, and no server ends because of one.

A page that is found damaged before its load is planned is a miss (`load`). A page that is found damaged later has been
read by a forward pass, possibly also by the next one, and is in the tree. So before that pass's results are used
(`settle`), all requests end with an error, and as soon as nothing runs both caches are flushed (`plan_prefill`). The
server continues. While the tier is set aside, nothing is stored in it or loaded from it.

With tensor and pipeline parallelism all schedulers must make the same decisions without communication. So a rank that
finds damage cannot decide alone: it ends, and its supervisor restarts the engine.
"""

from __future__ import annotations

import logging
import os
import time
from http import HTTPStatus
from typing import Any

from sglang_xmem import session
from sglang_xmem.engines.sglang import checks, lookups, sharing
from sglang_xmem.engines.sglang.transfer import ADOPTED, CHECK
from sglang_xmem.sums import FAILURES
from sglang_xmem.watch import end_rank

logger = logging.getLogger(__name__)

#: Error message of the ended requests.
_DAMAGED = "KV cache pages from tier {tiers} are damaged. Send the request again."
#: Seconds until an engine must be idle after all its requests were ended.
_IDLE_WITHIN_S = 60.0

#: When (time.monotonic()) the caches started to wait for a flush; None while they are valid.
_doubted_since: float | None = None


def alone() -> bool:
    """Whether this scheduler alone decides on the contents of its caches."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(parallel.tp_size) == 1 and int(parallel.pp_size) == 1


def copy_batch(result: Any, self: Any) -> Any:
    """Keep the number of a batch's load in the copy that waits for results (hook); SGLang drops it."""
    result.hicache_consumer_index = self.hicache_consumer_index
    return result


def settle(original: Any, self: Any, batch: Any, result: Any) -> Any:
    """Read the comparisons of a batch's load before the batch's results are used (hook)."""
    active = session.current()
    due, active.checks = active.checks, []
    index = getattr(batch, "hicache_consumer_index", -1)
    if index >= 0:
        event = self.tree_cache.cache_controller.layer_done_counter.events[index]
        check = getattr(event, CHECK, None)
        if check is not None:
            setattr(event, CHECK, None)
            due.append(check)
    if due:
        # SGLang waits for this too, a moment later; the pass has waited for the load, so it is done by then.
        if getattr(result, "copy_done", None) is not None:
            result.copy_done.synchronize()
        wrong = "; ".join(filter(None, (check.settle() for check in due)))
        if wrong:
            _end_requests(self, batch, wrong)
    return original(self, batch, result)


def _end_requests(scheduler: Any, batch: Any, wrong: str) -> None:
    """End all requests that may have read wrong pages: all running ones, and all that share a batch with them."""
    global _doubted_since
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    active = session.current()
    if not alone():
        sharing.finish_reports()
        end_rank(f"{wrong}, so this rank ends and its supervisor can start it again. Test the memory of the tier.")
    logger.error("sglang_xmem: %s; all requests end with an error and the caches are flushed", wrong)
    active.set_aside(wrong)
    _share_nothing_old()
    message = _DAMAGED.format(tiers=", ".join(active.tier_names()))
    reason = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE)
    # Waiting requests end too, since the flush invalidates the pages that they fetched from storage.
    scheduler.abort_request(AbortReq(rid="", abort_all=True, abort_message=message, finished_reason=reason.to_json()))
    # SGLang tracks batches launched before this one; the next one may be running.
    batches = [batch, *(one for one, _ in getattr(scheduler, "result_queue", ()))]
    for req in {*scheduler.collect_inflight_reqs(), *(req for one in batches for req in one.reqs)}:
        if not req.finished():
            req.to_finish = reason
            req.discard_output_reason = reason
            req.skip_radix_cache_insert = True
    _doubted_since = time.monotonic()


def _share_nothing_old() -> None:
    """Forget all pages that a page bank has now: a page that was found wrong may be among them."""
    for space in sharing.bank_spaces():
        space.weights_changed(os.urandom(32))


def plan_prefill(original: Any, self: Any, running_batch: Any) -> Any:
    """Admit no request to invalid caches, and flush them once nothing runs; count look-ups (hook)."""
    global _doubted_since
    if _doubted_since is not None:
        paused, self._engine_paused = self._engine_paused, True  # as for a flush with waiting requests
        try:
            if self.is_fully_idle(ignore_waiting=True) and self.flush_cache(empty_cache=False):
                _doubted_since = None
        finally:
            self._engine_paused = paused
    if _doubted_since is None:
        plan = original(self, running_batch)
        lookups.count(plan.batch_to_run, self.page_size)
        return plan
    if time.monotonic() - _doubted_since > _IDLE_WITHIN_S:
        end_rank(
            f"The engine is not idle {_IDLE_WITHIN_S:g} s after damaged pages were found, so this rank ends and its "
            "supervisor can start it again."
        )
    from sglang.srt.managers.schedule_batch import NextBatchPlan

    return NextBatchPlan(batch_to_run=None, running_batch=running_batch)


def back_up(original: Any, self: Any, node_id: Any) -> Any:
    """Keep pages of invalid caches out of storage (hook)."""
    return original(self, node_id) if _doubted_since is None else None


def load(original: Any, self: Any, host_indices: Any, *args: Any, **kwargs: Any) -> Any:
    """Load nothing from a tier that is set aside, and no page that is known to be damaged (hook): both are misses."""
    active = session.current()
    if not active.healthy and alone():
        active.counts["set_aside:load"] += 1
        return None
    extra_pools = kwargs.get("extra_pools") or (args[2] if len(args) > 2 else None)
    wrong = _damaged(self.mem_pool_host, host_indices, extra_pools)
    if wrong:
        active.counts[FAILURES] += wrong
        if not alone():
            sharing.finish_reports()
            end_rank(f"{wrong} pages in the tier are damaged, so this rank ends. Test the memory of the tier.")
        logger.error("sglang_xmem: %d pages in the tier are damaged; their request computes them", wrong)
        return None
    return original(self, host_indices, *args, **kwargs)


def _damaged(group: Any, host_indices: Any, extra_pools: Any) -> int:
    """Count a load's pages that the CPU finds damaged in the tier."""
    indices = {group.anchor_entry.name: host_indices}
    for transfer in extra_pools or ():
        source = transfer.indices_from_pool
        own = transfer.host_indices if source is None else indices.get(source)
        if own is not None:
            indices[transfer.name] = own
    found = 0
    for name, own in indices.items():
        view = getattr(group.entry_map[name].host_pool, ADOPTED, None)
        if view is not None and own.numel():
            found += len(checks.damaged(view, own))
    return found


def write(original: Any, self: Any, device_indices: Any, *args: Any, **kwargs: Any) -> Any:
    """Store nothing in a tier that is set aside (hook), as if host memory were full."""
    active = session.current()
    if not active.healthy and alone():
        active.counts["set_aside:store"] += 1
        return None
    return original(self, device_indices, *args, **kwargs)
