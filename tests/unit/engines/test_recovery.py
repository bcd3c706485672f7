"""What a scheduler does about pages that came back wrong, on SGLang's own classes where they carry state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_xmem import session
from sglang_xmem.engines.sglang import recovery, versions
from sglang_xmem.engines.sglang.transfer import CHECK
from tests.pools.seam import placed


class Check:
    """A comparison that found `wrong`."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def settle(self) -> str:
        return self.wrong


class Request:
    def __init__(self, finished: bool = False) -> None:
        self.to_finish: Any = None
        self.discard_output_reason: Any = None
        self.skip_radix_cache_insert = False
        self._finished = finished

    def finished(self) -> bool:
        return self._finished


class Scheduler:
    """As much of SGLang's as recovery uses."""

    def __init__(self) -> None:
        self.events = [SimpleNamespace(), SimpleNamespace(), SimpleNamespace()]
        counter = SimpleNamespace(events=self.events)
        self.tree_cache = SimpleNamespace(cache_controller=SimpleNamespace(layer_done_counter=counter))
        self.running, self.aborted, self.flushes = [Request()], 0, 0
        self.result_queue: list[Any] = []
        self._engine_paused = self.idle = False
        self.page_size = 16

    def collect_inflight_reqs(self) -> set[Request]:
        return set(self.running)

    def abort_request(self, request: Any) -> None:
        assert request.abort_all
        self.aborted += 1

    def is_fully_idle(self, ignore_waiting: bool = False) -> bool:
        return self.idle and ignore_waiting

    def flush_cache(self, empty_cache: bool = True) -> bool:
        assert self._engine_paused
        self.flushes += 1
        return True


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found: Any = SimpleNamespace(
        counts=Counter(), checks=[], trouble="", healthy=True, arenas=[], tier_names=lambda: ["dram"]
    )
    found.set_aside = lambda why: setattr(found, "trouble", why)
    monkeypatch.setattr(session, "_session", found)
    monkeypatch.setattr(recovery, "alone", lambda: True)
    monkeypatch.setattr(recovery, "_doubted_since", None)
    return found


def batch(index: int, *requests: Request) -> Any:
    return SimpleNamespace(hicache_consumer_index=index, reqs=list(requests))


def settled(scheduler: Scheduler, one: Any) -> Any:
    return recovery.settle(lambda self, batch, result: "processed", scheduler, one, SimpleNamespace())


def test_right_pages_change_nothing(active: Any) -> None:
    scheduler = Scheduler()
    setattr(scheduler.events[1], CHECK, Check(""))
    assert settled(scheduler, batch(1, Request())) == "processed"
    assert settled(scheduler, batch(-1, Request())) == "processed"
    assert (scheduler.aborted, active.trouble) == (0, "")


def test_wrong_pages_end_all_that_may_have_read_them(active: Any) -> None:
    """The batch's requests, those that run, and those of a batch that was launched since; not one that is done."""
    scheduler = Scheduler()
    setattr(scheduler.events[1], CHECK, Check("1 page is wrong"))
    mine, launched, done = Request(), Request(), Request(finished=True)
    scheduler.result_queue = [(batch(2, launched), None)]
    settled(scheduler, batch(1, mine, done))
    assert scheduler.aborted == 1
    for request in (mine, launched, *scheduler.running):
        assert request.skip_radix_cache_insert
        assert request.to_finish is request.discard_output_reason
        assert request.to_finish.to_json()["type"] == "abort"
    assert done.to_finish is None
    assert active.trouble == "1 page is wrong"
    # Each result is read once.
    settled(scheduler, batch(1))
    assert scheduler.aborted == 1


def test_wrong_pages_end_sharing_of_what_lies_in_a_bank(active: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[bytes] = []
    monkeypatch.setattr(recovery.sharing, "bank_spaces", lambda: [SimpleNamespace(weights_changed=names.append)])
    scheduler = Scheduler()
    setattr(scheduler.events[1], CHECK, Check("1 page is wrong"))
    settled(scheduler, batch(1, Request()))
    assert len(names) == 1
    assert names[0] != b"", "the keys of before would be found again"


def test_another_batchs_load_is_not_waited_for(active: Any) -> None:
    scheduler = Scheduler()
    setattr(scheduler.events[2], CHECK, Check("wrong"))
    settled(scheduler, batch(1, Request()))
    assert scheduler.aborted == 0


def test_a_load_of_no_batch_is_settled_by_the_next(active: Any) -> None:
    scheduler = Scheduler()
    active.checks.append(Check("wrong"))
    settled(scheduler, batch(-1, Request()))
    assert (scheduler.aborted, active.checks) == (1, [])


def test_nothing_is_admitted_or_stored_before_the_caches_are_empty(active: Any) -> None:
    scheduler = Scheduler()

    planned = SimpleNamespace(batch_to_run=None)

    def plan(self: Any, running_batch: Any) -> Any:
        return planned

    def back_up(self: Any, node_id: int) -> str:
        return "stored"

    setattr(scheduler.events[0], CHECK, Check("wrong"))
    settled(scheduler, batch(0, Request()))
    assert recovery.plan_prefill(plan, scheduler, None).batch_to_run is None
    assert recovery.back_up(back_up, scheduler, 1) is None
    scheduler.idle = True
    assert recovery.plan_prefill(plan, scheduler, None) is planned
    assert recovery.back_up(back_up, scheduler, 1) == "stored"
    assert (scheduler.flushes, scheduler._engine_paused) == (1, False)


def test_ranks_that_decide_together_end(active: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def end(message: str) -> None:
        raise Ended(message)

    monkeypatch.setattr(recovery, "alone", lambda: False)
    monkeypatch.setattr(recovery, "end_rank", end)
    scheduler = Scheduler()
    setattr(scheduler.events[0], CHECK, Check("1 page is wrong"))
    with pytest.raises(Ended, match=r"^1 page is wrong, so this rank ends"):
        settled(scheduler, batch(0, Request()))
    active.healthy = False
    indices = torch.arange(4)
    entry = SimpleNamespace(name="kv", host_pool=SimpleNamespace())
    group = SimpleNamespace(anchor_entry=entry, entry_map={"kv": entry})
    controller = SimpleNamespace(mem_pool_host=group)
    assert recovery.load(lambda self, host: "loaded", controller, indices) == "loaded"
    monkeypatch.setattr(recovery, "alone", lambda: True)
    assert recovery.load(lambda self, host: "loaded", controller, indices) is None
    assert recovery.write(lambda self, device: "stored", controller, indices) is None


def test_a_batchs_copy_knows_its_load() -> None:
    """SGLang's own copy, which is what results are matched with where passes overlap."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    hooks = [hook for hook in versions.current().scheduler_hooks if hook.target.endswith("ScheduleBatch.copy")]
    assert len(hooks) == 1
    one = ScheduleBatch(reqs=[], hicache_consumer_index=2)
    assert one.copy().hicache_consumer_index == -1, "SGLang copies it by itself now; the hook can go"
    with placed(hooks):
        assert one.copy().hicache_consumer_index == 2


def prompt(tokens: int, device: int = 0, host: int = 0, storage: int = 0) -> Any:
    return SimpleNamespace(
        origin_input_ids=[1] * tokens,
        cached_tokens_device=device,
        cached_tokens_host=host,
        cached_tokens_storage=storage,
    )


def test_pages_are_looked_up_once(active: Any) -> None:
    """A long prompt has several parts, and decoding requests may be in the batch too: each is counted at its start."""
    scheduler = Scheduler()
    first, second = prompt(100, device=16, host=48), prompt(40, storage=16)

    def plan_with(*requests: Any) -> None:
        planned = SimpleNamespace(batch_to_run=SimpleNamespace(reqs=list(requests)))
        recovery.plan_prefill(lambda self, running_batch: planned, scheduler, None)

    plan_with(first)
    first.cached_tokens_device = 96
    plan_with(first, second)
    found = {name.removeprefix("lookups:"): count for name, count in active.counts.items()}
    assert found == {"device": 1, "tier": 3, "storage": 1, "miss": 2 + 1}
