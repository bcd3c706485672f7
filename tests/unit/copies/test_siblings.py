"""Loads that ranks share: who is asked for what, and what happens when a rank cannot; the kernel's own tests are in
tests/emulation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_xmem import gpus
from sglang_xmem.copies import ipc, siblings
from sglang_xmem.copies.base import Pages, Program, Step
from sglang_xmem.copies.geometry import Plane, Slab
from sglang_xmem.copies.ipc import Group
from sglang_xmem.copies.siblings import ENTRY_HEAD, MOST_MISSES, RING, SiblingCopier, entry_bytes
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.errors import CopyError

CPU = torch.device("cpu")
UNIT, PAGES = 1 << 20, 8


class FakeCounters:
    num_parts, address = 1, 0xC0

    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    def announce(self, raises: int) -> None:
        self._calls.append(("announced", raises))

    def restore(self) -> None:
        self._calls.append("restored")


class Inner(TorchPageCopier):
    """A copier that notes what it is asked for and copies nothing."""

    def __init__(self, slabs: Sequence[Slab], calls: list[Any]) -> None:
        super().__init__(slabs, CPU)
        self.calls, self.refuse = calls, False

    def raises(self, program: Program, pages: Sequence[Pages]) -> int:
        return 64

    def start(self, program: Program, pages: Sequence[Pages], *, load: bool, counters: int) -> int:
        self.calls.append(("start", [one.frames.numel() for one in pages], load, counters))
        if self.refuse:
            raise CopyError("no.")
        return 64

    def load(self, *args: Any) -> None:
        self.calls.append("load alone")

    def store(self, *args: Any) -> None:
        self.calls.append("store")


class Rig:
    """Rank 1 of two, with one plane that both have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.tier = torch.zeros(PAGES * UNIT, dtype=torch.uint8)
        self.device = torch.zeros(PAGES * UNIT, dtype=torch.uint8)
        slabs = [Slab(self.tier.data_ptr(), PAGES, UNIT)]
        self.plane = Plane(self.device.data_ptr(), UNIT, PAGES, 0, UNIT, 1)
        self.inner = Inner(slabs, self.calls)
        self.missed = torch.zeros(siblings.MAX_RANKS, dtype=torch.int64)
        group = Group(1, torch.empty(0), (0x1000000, 0x2000000), {self.plane: (1, 2)})
        calls = self.calls

        class FakeTables:
            def __init__(self, *args: Any) -> None:
                pass

            def announce(self, entry: int, number: int, raises: int, pages: Sequence[Pages]) -> None:
                calls.append(("announce", entry, number, raises))

            def fetch(
                self, counters: int, entries: Sequence[int], missed: int, number: int, pages: Any, stream: int
            ) -> int:
                calls.append(("fetch", counters, list(entries), number, stream))
                return 128

        class Order:
            def begin(self) -> int:
                calls.append("fork")
                return 7

            def end(self) -> None:
                calls.append("join")

        monkeypatch.setattr(siblings, "Tables", FakeTables)
        self.copier = SiblingCopier(self.inner, group, 4, self.missed, Order())  # type: ignore[arg-type]
        self.program = self.copier.compile([Step(self.plane, 0, 0)], 1)

    def load(self, count: int = PAGES, *, counters: bool = True, program: Any = None) -> list[Any]:
        """What a load of so many pages asks for."""
        self.calls.clear()
        pages = [Pages(torch.arange(count) * UNIT + self.tier.data_ptr(), torch.arange(count))]
        self.copier.load(program or self.program, pages, FakeCounters(self.calls) if counters else None)  # type: ignore[arg-type]
        return list(self.calls)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_a_load_is_announced_copied_in_part_and_fetched(rig: Rig) -> None:
    for number in (1, 2):
        offset = number * entry_bytes(4)
        assert rig.load() == [
            ("announce", 0x2000000 + offset, number, 64),
            "fork",
            ("start", [PAGES // 2], True, 0x2000000 + offset + ENTRY_HEAD),
            ("fetch", 0xC0, [0x1000000 + offset, 0x2000000 + offset], number, 7),
            "join",
            ("announced", 128),
        ]
    for _ in range(3, RING + 1):
        announced = rig.load()[0]
    assert announced == ("announce", 0x2000000, RING, 64)  # the ring's first entry again


def test_other_moves_are_this_rank_s_alone(rig: Rig) -> None:
    assert rig.load(counters=False) == ["load alone"]
    assert rig.load(3) == ["load alone"], "less than a share for each rank"
    other = rig.plane._replace(device_address=rig.plane.device_address + UNIT, device_units=PAGES - 1)
    program = rig.copier.compile([Step(rig.plane, 0, 0), Step(other, 0, 0)], 1)
    assert rig.load(PAGES - 1, program=program) == ["load alone"], "a plane that the other ranks do not know"
    program = rig.copier.compile([Step(rig.plane, 0, 0)], 5)
    assert program.tables is None, "more parts than an entry has counters"
    rig.calls.clear()
    some = [Pages(torch.tensor([rig.tier.data_ptr()]), torch.tensor([0]))]
    rig.copier.store(rig.program, some)
    assert rig.calls == ["store"]
    assert rig.load()[0][2] == 1, "none of them counts"


def test_a_refused_share_is_a_refused_load(rig: Rig) -> None:
    rig.inner.refuse = True
    with pytest.raises(CopyError):
        rig.load()
    assert rig.calls[-1] == "restored"
    assert not any(call[0] == "fetch" for call in rig.calls)


def test_ranks_that_are_late_too_often_are_left_alone(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, MOST_MISSES + 1):
        assert rig.load()[0][0] == "announce"
        rig.missed[0] = number
    assert rig.load() == ["load alone"]
    assert rig.load() == ["load alone"]
    assert "not shared" in rig.copier.describe()
    assert len([line for line in caplog.messages if "not shared" in line]) == 1


def test_a_rank_that_is_late_now_and_then_is_forgiven(rig: Rig) -> None:
    for number in range(1, 3 * RING * MOST_MISSES):
        assert rig.load()[0][0] == "announce"
        if number % (2 * RING) == 0:
            rig.missed[0] = number
    assert "shared by 2 ranks" in rig.copier.describe()


# ------------------------------------------------------------------------------------------- memory of other processes


class FakeDriver:
    """Allocations of one rank, 1 GiB apart, that other ranks map 1 TiB higher.

    Attributes:
        fails: name of a call that fails.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)

    def __init__(self, rank: int) -> None:
        self.rank, self.fails = rank, ""
        self._kept: list[Any] = []

    def cuMemGetAddressRange(self, address: int) -> Any:
        return self._answer("cuMemGetAddressRange", (address >> 30 << 30, 1 << 30))

    def cuIpcGetMemHandle(self, base: int) -> Any:
        handle = self.CUipcMemHandle()
        handle.buffer[:8] = int(base).to_bytes(8, "little")
        return self._answer("cuIpcGetMemHandle", handle)

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> Any:
        return self._answer("cuIpcOpenMemHandle", int.from_bytes(bytes(handle.buffer[:8]), "little") + (1 << 40))

    def cuDeviceGetPCIBusId(self, length: int, gpu: int) -> Any:
        return self._answer("cuDeviceGetPCIBusId", f"0000:0{self.rank}:00.0".encode() + b"\0" * 9)

    def cuDeviceGetByPCIBusId(self, bus: bytes) -> Any:
        return self._answer("cuDeviceGetByPCIBusId", int(bus[6:7]))

    def CUipcMemHandle(self) -> Any:
        import ctypes

        buffer = (ctypes.c_char * 64)()
        self._kept.append(buffer)
        return SimpleNamespace(buffer=buffer, getPtr=lambda: ctypes.addressof(buffer))

    def _answer(self, call: str, value: Any) -> Any:
        if call == self.fails:
            raise gpus.Unavailable(f"{call} failed")
        return value


def joined(
    monkeypatch: pytest.MonkeyPatch,
    count: int = 2,
    change: Callable[[int, FakeDriver], None] = lambda rank, driver: None,
    planes_of: Callable[[int], list[Plane]] | None = None,
    unfit: Sequence[str] = ("", "", ""),
) -> list[Group | str]:
    """What each rank gets."""
    local = threading.local()
    barrier = threading.Barrier(count)
    board: list[Any] = [None] * count

    def gather(rank: int, mine: Any) -> list[Any]:
        board[rank] = mine
        barrier.wait(30)
        found = list(board)
        barrier.wait(30)
        return found

    monkeypatch.setattr(gpus, "driver", lambda: local.driver)
    monkeypatch.setattr(gpus, "checked", lambda answer, doing: answer)
    monkeypatch.setattr(gpus, "peer_atomics", lambda gpu, peer: peer != 9)
    monkeypatch.setattr(ipc, "check_access", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    results: list[Group | str] = [""] * count

    def run(rank: int) -> None:
        local.driver = FakeDriver(rank)
        change(rank, local.driver)
        planes = planes_of(rank) if planes_of else planes_at(rank)
        own = SimpleNamespace(data_ptr=lambda: (rank + 1 << 32) + 64)
        device = torch.device("cuda", rank)
        try:
            results[rank] = ipc.join(device, planes, own, lambda mine: gather(rank, mine), rank, unfit[rank])  # type: ignore[arg-type]
        except CopyError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def planes_at(rank: int) -> list[Plane]:
    """Two planes in one allocation and one in another, at other offsets on each rank."""
    base = rank + 1 << 32
    places = (base + 4096 * (rank + 1), base + 8192 * (rank + 1), base + (3 << 30))
    return [Plane(address, 64, 9, 64 * number, 64, 16) for number, address in enumerate(places)]


def test_ranks_map_each_other_s_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = joined(monkeypatch, 3)
    for rank, group in enumerate(groups):
        assert isinstance(group, Group)
        assert group.me == rank
        assert group.size == 3
        for other in range(3):
            higher = 0 if other == rank else 1 << 40
            assert group.shared[other] == (other + 1 << 32) + 64 + higher
            for mine, theirs in zip(planes_at(rank), planes_at(other), strict=True):
                assert group.planes[mine][other] == theirs.device_address + higher


@pytest.mark.parametrize("call", ["cuMemGetAddressRange", "cuIpcGetMemHandle", "cuIpcOpenMemHandle"])
def test_one_rank_that_cannot_is_all_ranks(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def change(rank: int, driver: FakeDriver) -> None:
        if rank == 1:
            driver.fails = call

    assert joined(monkeypatch, 2, change) == [f"{call} failed"] * 2


def test_ranks_that_do_not_fit_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_shape(rank: int) -> list[Plane]:
        return [plane._replace(unit_bytes=64 - rank) for plane in planes_at(rank)]

    assert joined(monkeypatch, planes_of=other_shape) == ["Ranks have different pools."] * 2
    assert joined(monkeypatch, planes_of=lambda rank: []) == ["No pool has the same bytes on all ranks."] * 2
    assert joined(monkeypatch, unfit=("", "It is busy.")) == ["It is busy."] * 2

    def same_gpu(rank: int, driver: FakeDriver) -> None:
        driver.rank = 0

    assert joined(monkeypatch, change=same_gpu) == ["Several ranks compute on one GPU."] * 2

    def far(rank: int, driver: FakeDriver) -> None:
        driver.rank = 9 if rank else 0

    assert joined(monkeypatch, change=far) == ["GPU 0 does not reach GPU 9 over NVLink."] * 2
    hosts = iter("ab")
    monkeypatch.setattr(ipc.socket, "gethostname", lambda: next(hosts))
    assert joined(monkeypatch) == ["Ranks run on several hosts."] * 2


def test_a_copier_that_cannot_share_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    memory = torch.zeros(64, dtype=torch.uint8)
    copier = TorchPageCopier([Slab(memory.data_ptr(), 1, 64)], CPU)
    asked = []

    def gather(mine: Any) -> list[Any]:
        asked.append(mine)
        return [mine, mine]

    assert siblings.share_loads(copier, [], gather, 0) is copier
    assert len(asked) == 2, "the other ranks wait for it"
    assert "Its pages are copied by torch" in caplog.text
