"""Engines with their pools on a devdax, with a file on tmpfs in its place: each with a range, or all in one bank."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.mtier.build import built
from tests.e2e import harness
from tests.e2e.bank_rig import Engine, places, ready, until
from tests.e2e.harness import BASE_OPTIONS, PROMPT_TOKENS, ForkedServer, loads_in
from tests.e2e.test_bank import find_in_bank
from tests.e2e.test_engines import cacheable, check_refusal
from tests.mtier.service import Daemon
from tests.unit.tiers.fake_dax import FakeDax

pytestmark = pytest.mark.cpu_engine

MIB = 1 << 20
GIB = 1 << 30
HIT = cacheable(16)


@pytest.fixture
def device(tmpfs: Path) -> FakeDax:
    return FakeDax(tmpfs)


class Starter:
    """Starts engines of one model on the device."""

    def __init__(self, model: Path, folder: Path, device: FakeDax) -> None:
        self.model, self.folder, self.device = model, folder, device
        self._starts = 0

    def start(self, tier: str, settings: dict[str, Any], **variables: str) -> AbstractContextManager[Engine]:
        """Begin to start an engine; it is ready in the context."""
        self._starts += 1
        options = {"hicache_use_xmem": True, "hicache_xmem_tier": tier, "hicache_xmem_config": {tier: settings}}
        log = self.folder / f"{self._starts}.log"
        # Threads of two engines on the same CPUs wait for each other.
        cpus = sorted(os.sched_getaffinity(0))
        environment = {
            "SGLANG_CPU_OMP_THREADS_BIND": str(cpus[self._starts % len(cpus)]),
            harness.LEAVE_OUT: f"{log}.leave_out",
            harness.DAX_ROOT: str(self.device.root),
            **variables,
        }
        everything = {**BASE_OPTIONS, "model_path": str(self.model), **options}
        return ready(ForkedServer(everything, log, environment), tier)


@pytest.fixture
def starter(tiny_model: Path, tmp_path: Path, device: FakeDax) -> Starter:
    return Starter(tiny_model, tmp_path, device)


def flood(engine: Engine) -> None:
    """Push all prompts out of the device pool, and into the tier."""
    for number in range(harness.DEVICE_POOL_TOKENS // PROMPT_TOKENS + 1):
        engine.client.generate(harness.prompt(f"flood {number}"), 1)


def in_use(device: FakeDax) -> set[int]:
    """Which MiB of the device have other bytes than zeros."""
    content = device.path.read_bytes()
    return {at // MIB for at in range(0, len(content), MIB) if any(content[at : at + MIB])}


# ---- a range for each engine ----


SIZE = 16  # MiB of each


def range_from(device: FakeDax, offset: int) -> dict[str, Any]:
    """Settings of the tier; `offset` in MiB."""
    return {"device": str(device.path), "offset_gib": offset * MIB / GIB, "size_gib": SIZE * MIB / GIB}


def check_hit(engine: Engine, name: str, expected: harness.Answer) -> None:
    """A prompt that has left the device pool comes from the tier, byte for byte, and gives what it gave."""
    before = len(loads_in(engine.server.log()))
    hit = engine.ask(name)
    assert places(hit) == {"host": HIT}
    assert (hit.output_ids, hit.logprobs) == (expected.output_ids, expected.logprobs)
    loads = loads_in(engine.server.log())[before:]
    assert sum(load.moved["kv"] for load in loads) == HIT
    assert all(load.wrong == {"kv": 0} for load in loads)


def test_engines_side_by_side_in_one_device(starter: Starter, device: FakeDax) -> None:
    with contextlib.ExitStack() as engines:
        starting = [starter.start("dax", range_from(device, offset)) for offset in (0, SIZE)]
        first, second = map(engines.enter_context, starting)
        expected = {}
        for engine, name in ((first, "A"), (second, "B")):
            cold = engine.ask(name)
            assert places(cold) == {}
            expected[name] = engine.ask(name)
            assert expected[name].output_ids == cold.output_ids
            flood(engine)
        # Each has its own pages, whatever the other one has stored in between.
        check_hit(first, "A", expected["A"])
        check_hit(second, "B", expected["B"])
        assert places(first.ask("B")) == {}
        used = in_use(device)
        assert used & set(range(SIZE))
        assert used & set(range(SIZE, 2 * SIZE))
        assert used <= set(range(2 * SIZE))

        options = {"hicache_use_xmem": True, "hicache_xmem_tier": "dax"}
        refusal = harness.start_refused(
            {**options, "hicache_xmem_config": {"dax": range_from(device, 8)}},
            str(starter.model),
            [],
            environment={harness.DAX_ROOT: str(device.root)},
        )
        check_refusal(refusal, ["dax9.0, 8 MiB to 24 MiB, is in use by process", "'dax.offset_gib'"])

        # The range of one that is killed is the next one's, and the other one does not notice.
        first.kill()
        third = engines.enter_context(starter.start("dax", range_from(device, 0)))
        cold = third.ask("A")
        assert places(cold) == {}  # what the dead one left is nobody's
        assert cold.output_ids == expected["A"].output_ids
        flood(third)
        check_hit(third, "A", expected["A"])
        flood(second)
        check_hit(second, "B", expected["B"])

        # Negative control: bytes that lie elsewhere would survive this.
        flood(second)
        with device.path.open("r+b") as file:
            file.seek(SIZE * MIB)
            file.write(bytes(SIZE * MIB))
        with pytest.raises(AssertionError):
            check_hit(second, "B", expected["B"])


# ---- one bank for all, which the service has ----


class Service:
    """mtierd with a bank on the device."""

    def __init__(self, folder: Path, device: FakeDax) -> None:
        self._folder, self._device = folder, device
        self.start()

    def start(self) -> None:
        arguments = ("--bank", f"dax:{self._device.path}:{32 * MIB}")
        environment = {"MTIER_SYSFS_ROOT": str(self._device.root)}
        self.daemon = Daemon(built(testing=True), self._folder / "mtierd.sock", arguments, environment=environment)

    def start_anew(self) -> None:
        """Kill all of it, with every descriptor that it has."""
        self.daemon.stop(signal.SIGKILL)
        self.start()

    def pages(self) -> int:
        return sum(space["pages"] for space in self.daemon.status()["spaces"])

    def engines(self) -> int:
        return sum(len(space["sessions"]) for space in self.daemon.status()["spaces"])


@pytest.fixture
def service(tmp_path: Path, device: FakeDax) -> Iterator[Service]:
    service = Service(tmp_path, device)
    yield service
    service.daemon.stop(signal.SIGKILL)


def blocks(device: FakeDax) -> set[bytes]:
    """What the device has of KV: parts of pages that are not zeros, 1 KiB each."""
    content = device.path.read_bytes()[4 * MIB : 32 * MIB]  # behind superblock and ledger
    parts = (content[at : at + 1024] for at in range(0, len(content), 1024))
    return {part for part in parts if len(set(part)) > 16}


def test_a_bank_on_a_device_outlasts_engines_and_service(starter: Starter, device: FakeDax, service: Service) -> None:
    def start(**settings: str) -> AbstractContextManager[Engine]:
        variables = {"MTIER_SOCKET": str(service.daemon.socket_path)}
        return starter.start("bank", {"memory": "dax", **settings}, **variables)

    with contextlib.ExitStack() as engines:
        first, second = map(engines.enter_context, [start(), start()])
        assert places(first.ask("A")) == {}
        expected = first.ask("A")
        until(lambda: service.pages() >= HIT // 16)
        found = find_in_bank(second, "A")
        assert (found.output_ids, found.logprobs) == (expected.output_ids, expected.logprobs)
        assert second.ask("A with another prefix").output_ids != expected.output_ids
        first.kill()

        # An engine that lives through the service's end joins again, and has what both had stored.
        service.start_anew()
        until(lambda: service.engines() == 1 or second.ask("to join") is None)
        until(second.client.flush_cache)
        assert find_in_bank(second, "A").logprobs == expected.logprobs

        # Nothing is left but the device.
        second.kill()
        service.start_anew()
        assert service.pages() >= HIT // 16
        assert service.engines() == 0
        third = engines.enter_context(start())
        assert find_in_bank(third, "A").logprobs == expected.logprobs
        third.kill()

    until(lambda: service.engines() == 0)
    left = blocks(device)
    canary = 64  # blocks: a page of the same bytes for every engine, which may be there already
    assert len(left) > 4 * canary  # there is something to see
    with start(tag="other") as other:
        assert len(blocks(device) & left) <= canary
        assert places(other.ask("A")) == {}
