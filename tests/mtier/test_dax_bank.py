"""The page bank on a devdax that the service owns, over a file on tmpfs in the device's place."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.bank import BankSession
from sglang_xmem.errors import SettingError, Unavailable
from sglang_xmem.mtier import daemon as command
from sglang_xmem.mtier.client import DAX, HOST, bank_info
from sglang_xmem.tiers import Ranks, hostmem
from sglang_xmem.tiers.bank import BankSettings, BankTier
from sglang_xmem.tiers.dax import DaxSettings, DaxTier, StandIn, bank_bytes
from tests import REPOSITORY
from tests.mtier.conftest import StartDaemon
from tests.mtier.service import MIB, PATIENCE_S, AskedProcess, Daemon, wait_until
from tests.mtier.test_bank_sessions import FRAME, MODEL, OTHER, fill, key, view
from tests.unit.tiers.fake_dax import FakeDax
from tests.unit.tiers.fake_pinning import pinning

#: Of a service's memory here, its superblock's included.
GRANULE = 2 * MIB
BYTES = 32 * MIB
SECRET = b"\xaa"


class Bank:
    """The device, and services that have it."""

    def __init__(self, device: FakeDax, start: StartDaemon, setenv: Callable[[str, str], None]) -> None:
        self.device = device
        self._start = start
        self._setenv = setenv

    def arguments(self, nbytes: int = BYTES) -> tuple[str, str]:
        return "--bank", f"dax:{self.device.path}:{nbytes}"

    def start(self, *more: str, nbytes: int = BYTES) -> Daemon:
        daemon = self._start(*self.arguments(nbytes), *more, environment={"MTIER_SYSFS_ROOT": str(self.device.root)})
        self._setenv("MTIER_SOCKET", str(daemon.socket_path))
        return daemon

    def tier(self, offset: int, nbytes: int) -> DaxTier:
        """Tier dax, without the service."""
        settings = DaxSettings(str(self.device.path), offset / (1 << 30), nbytes / (1 << 30))
        (plan,) = DaxTier.plan_ranks(settings, Ranks((None,)), stand_in=StandIn(self.device.root))
        return DaxTier(settings, plan, None, stand_in=StandIn(self.device.root))


@pytest.fixture
def device(tmpfs: Path) -> FakeDax:
    return FakeDax(tmpfs)


@pytest.fixture
def bank(device: FakeDax, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> Bank:
    return Bank(device, start_daemon, monkeypatch.setenv)


def session(identity: bytes | None = MODEL, frames: int = 8) -> BankSession:
    return BankSession(identity, FRAME, frames, kind=DAX)


def store(numbers: list[int], identity: bytes = MODEL) -> None:
    """Leave pages in the bank, and no session."""
    one = session(identity)
    fill(one, numbers)
    one.close()


def found(numbers: list[int], identity: bytes = MODEL) -> list[int]:
    """The first bytes of the pages that a new session finds."""
    one = session(identity)
    adopted = one.adopt([key(number) for number in numbers])
    values = [int(view(one, address)[0]) for address in adopted]
    assert all(set(view(one, address)) == {value} for address, value in zip(adopted, values, strict=True))
    one.close()
    return values


ENGINE = """
import ctypes, json, sys
from tests.mtier.test_dax_bank import *
from sglang_xmem.errors import sentence
def join(**more):
    global mine
    try:
        mine = session(**more)
    except Exception as error:
        return str(error)
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Engine(AskedProcess):
    """A process with a session of its own."""

    def __init__(self) -> None:
        super().__init__(["-c", ENGINE], {**os.environ, "PYTHONPATH": str(REPOSITORY)})


# ---- pages ----


def test_engines_share_and_pages_outlast_each_of_them(bank: Bank) -> None:
    daemon = bank.start()
    assert bank_info(HOST).banks == 0
    assert bank_info(DAX)[:2] == (1, BYTES - GRANULE)
    with Engine() as one, Engine() as two:
        assert one.ask("join()") is None
        assert one.ask("fill(mine, [1, 2, 3]).size") == 3
        assert two.ask("join()") is None
        assert two.ask("[int(view(mine, a)[5]) for a in mine.adopt([key(n) for n in (1, 2, 3, 4)])]") == [1, 2, 3]
        one.kill()
        daemon.restart()
        wait_until(lambda: two.ask("mine.find([key(n) for n in (1, 2)])") == 2, PATIENCE_S)  # it has joined again
        assert found([1, 2, 3]) == [1, 2, 3]
        # The keeper too: nothing but the device is left, and a lock that the engine's mapping has on it.
        daemon.stop(signal.SIGKILL)
        daemon = bank.start()
        wait_until(lambda: two.ask("mine.find([key(n) for n in (1, 2)])") == 2, PATIENCE_S)
        assert two.ask("[int(view(mine, a)[5]) for a in mine.adopt([key(3)])]") == [3]
        assert two.ask("fill(mine, [7]).size") == 1
        assert two.ask("mine.lost") is False
        assert found([1, 7]) == [1, 7]
    daemon.stop()
    bank.start()
    assert found([1, 2, 3, 7, 8]) == [1, 2, 3, 7]


def test_mappings_begin_and_end_as_the_device_wants(bank: Bank) -> None:
    """A devdax refuses others, a file does not."""
    daemon = bank.start()
    one = session()
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (daemon.serving, os.getpid())]
    for text in maps:
        ranges = re.findall(rf"^(\w+)-(\w+) \S+ (\w+) .*{re.escape(str(bank.device.path))}$", text, re.MULTILINE)
        assert len(ranges) == 2  # superblock and ledger; ledger and frames
        assert all((int(end, 16) - int(start, 16)) % GRANULE == int(offset, 16) % GRANULE == 0
                   for start, end, offset in ranges)  # fmt: skip
    one.close()


@pytest.mark.parametrize("of_another_namespace", [False, True])
def test_a_full_restart_ends_the_sessions_of_the_dead(bank: Bank, of_another_namespace: bool) -> None:
    """Also those of processes that cannot be looked up, since none of them has the memory."""
    daemon = bank.start()
    with Engine() as one:
        assert one.ask("join(frames=100)") is None
        assert one.ask("fill(mine, [1]).size + mine.claim(50).size") == 51
        daemon.stop(signal.SIGKILL)
    if of_another_namespace:
        hide_process(bank.device.path)
    daemon = bank.start()
    (space,) = daemon.status()["spaces"]
    assert (space["sessions"], space["pages"], space["cached"]) == ([], 1, 1)
    assert space["free"] == space["frames"] - 1


def sum_of(content: bytes, total: int) -> int:
    """native/pages.h's."""
    for (word,) in struct.iter_unpack("=Q", content):
        total = ((total ^ word) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        total ^= total >> 32
    return total


def hide_process(path: Path) -> None:
    """Give the first session's line the process number of one in another PID namespace."""
    line = struct.Struct("=QQq72s")
    at = GRANULE + 320  # of the first slab's record, behind its head
    content = bytearray(path.read_bytes())
    session, quota, pid, process = line.unpack_from(content, at)
    assert quota == 100
    assert pid > 0
    line.pack_into(content, at, session, quota, 0, process)
    struct.pack_into("=Q", content, at + line.size, sum_of(content[at : at + line.size], 1) | 1)
    path.write_bytes(content)


# ---- never another owner's, never stale ----


def test_whoever_gets_memory_finds_zeros(bank: Bank) -> None:
    bank.device.path.write_bytes(SECRET * (64 * MIB))  # of the device's previous owner
    bank.start()
    one = session(frames=400)  # no space for another one of this size
    address = int(one.claim(400)[0])
    assert not any(ctypes.string_at(address, FRAME))
    ctypes.memset(address, SECRET[0], FRAME)
    assert SECRET * FRAME in bank.device.path.read_bytes()[GRANULE:BYTES]  # the negative control
    one.close()
    two = session(OTHER, frames=400)
    assert not any(any(ctypes.string_at(int(address), FRAME)) for address in two.claim(400))
    assert SECRET * 64 not in bank.device.path.read_bytes()[GRANULE:BYTES]
    # Bytes that are not the service's are not touched.
    assert bank.device.path.read_bytes()[BYTES:] == SECRET * (32 * MIB)
    two.close()


SUPERBLOCK = struct.Struct("=QQQQ64s64sQ")
_COPY, _SUM_AT = 32 << 10, SUPERBLOCK.size + 512 * 32


def rewrite(path: Path, **changes: Any) -> int:
    """Change fields of both copies of the superblock, and make their sums right. Returns how many copies there are."""
    content = bytearray(path.read_bytes()[: 2 * _COPY])
    names = ("magic", "range", "generation", "user", "boot", "device", "slabs")
    copies = 0
    for start in (0, _COPY):
        fields = dict(zip(names, SUPERBLOCK.unpack_from(content, start), strict=True))
        if fields["magic"] == 0:
            continue
        copies += 1
        SUPERBLOCK.pack_into(content, start, *{**fields, **changes}.values())
        total = sum_of(content[start : start + _SUM_AT], fields["magic"])
        struct.pack_into("=Q", content, start + _SUM_AT, total | 1)
    with path.open("r+b") as file:
        file.write(content)
    return copies


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"boot": b"11111111-2222-3333-4444-555555555555"}, False),
        ({"user": os.geteuid() + 1}, False),
        ({"device": b"0:0 1 1"}, False),
        ({"range": BYTES - GRANULE}, False),
    ],
)
def test_pages_of_another_boot_user_device_or_range_are_not_there(
    bank: Bank, changes: dict[str, Any], kept: bool
) -> None:
    daemon = bank.start()
    store([1, 2])
    daemon.stop()
    assert rewrite(bank.device.path, **changes) == 2
    daemon = bank.start()
    assert len(daemon.status()["spaces"]) == kept
    one = session()
    assert one.find([key(1), key(2)]) == (2 if kept else 0)
    if not kept:
        assert not any(view(one, address).any() for address in one.claim(8))
    one.close()


def test_a_damaged_superblock_is_an_empty_bank(bank: Bank) -> None:
    daemon = bank.start("--share", "50")
    store([1])
    daemon.stop()
    content = bytearray(bank.device.path.read_bytes())
    newer = max((0, _COPY), key=lambda at: SUPERBLOCK.unpack_from(content, at)[2])
    content[newer + SUPERBLOCK.size + 18] ^= 0x40  # its ledger has 4 MiB more, and frames follow it
    bank.device.path.write_bytes(content)
    daemon = bank.start()
    assert daemon.status()["spaces"] == []
    assert found([1]) == []


def test_a_slab_whose_head_is_damaged_is_nobodys(bank: Bank) -> None:
    daemon = bank.start()
    store([1])
    daemon.stop()
    content = bytearray(bank.device.path.read_bytes())
    content[content.index(MODEL, GRANULE)] ^= 1
    bank.device.path.write_bytes(content)
    daemon = bank.start()
    assert daemon.status()["spaces"] == []
    assert daemon.status()["devices"][0]["available"] == bank_info(DAX).available == BYTES - 2 * GRANULE
    assert found([1]) == []


def test_a_service_that_cannot_start_with_what_was_left_starts_empty(bank: Bank) -> None:
    daemon = bank.start()
    store([1])
    content = bank.device.path.read_bytes()
    os.truncate(bank.device.path, 0)
    daemon.send(signal.SIGKILL)
    wait_until(lambda: "which is dropped now" in daemon.log(), PATIENCE_S)
    with bank.device.path.open("r+b") as file:
        file.write(content)
    wait_until(lambda: daemon.log().count("serving") == 2, PATIENCE_S)
    assert daemon.status()["spaces"] == []
    assert found([1]) == []


# ---- whose the device is ----


def test_a_service_and_the_tier_exclude_each_other(bank: Bank) -> None:
    daemon = bank.start()
    for offset, nbytes in ((0, GRANULE), (GRANULE, GRANULE), (BYTES - GRANULE, 2 * GRANULE)):
        with pytest.raises(
            Unavailable, match=rf"is in use by process (?:{daemon.serving}|{daemon.process.pid}) \(mtierd"
        ):
            bank.tier(offset, nbytes).allocate(MIB)
    next_to_it = bank.tier(BYTES, GRANULE).allocate(MIB)
    with Engine() as one:
        assert one.ask("join()") is None
        daemon.stop(signal.SIGKILL)
        # The service is gone, and the engine uses the bytes still.
        with pytest.raises(Unavailable, match=rf"is in use by process {one.process.pid} \(python"):
            bank.tier(0, BYTES).allocate(MIB)
    region: Any = []

    def claimed() -> bool:
        try:
            region.append(bank.tier(0, GRANULE).allocate(MIB))
        except Unavailable:
            return False
        return True

    wait_until(claimed, PATIENCE_S)  # the kernel takes a moment with the memory of the dead
    refused = bank.start()
    assert refused.process.wait(PATIENCE_S) == 1
    assert "cannot be served: another process uses some of its bytes" in refused.log()
    region[0].release()
    bank.start()
    next_to_it.release()


def test_what_a_tier_has_overwritten_is_never_found(bank: Bank) -> None:
    daemon = bank.start()
    store([1])
    daemon.stop()
    bank.tier(BYTES, GRANULE).allocate(MIB).release()  # next to it
    daemon = bank.start()
    assert found([1]) == [1]
    daemon.stop()
    bank.tier(BYTES - GRANULE, GRANULE).allocate(MIB).release()
    daemon = bank.start()
    assert daemon.status()["spaces"] == []
    assert found([1]) == []


def test_of_two_services_that_race_one_has_the_device(bank: Bank, build: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "MTIER_SYSFS_ROOT": str(bank.device.root)}
    for _ in range(5):
        with ExitStack() as stack:
            logs = [tmp_path / name for name in ("a", "b")]
            both = []
            for log in logs:
                words = [str(build / "mtierd"), "--socket", f"{log}.sock", *bank.arguments()]
                file = stack.enter_context(log.open("wb"))
                both.append(subprocess.Popen(words, stderr=file, env=environment))
                stack.callback(both[-1].wait, PATIENCE_S)
                stack.callback(both[-1].terminate)

            def settled(logs: list[Path] = logs, both: list[Any] = both) -> bool:
                served = ["serving" in log.read_text() for log in logs]
                return all(one or each.poll() is not None for one, each in zip(served, both, strict=True))

            wait_until(settled, PATIENCE_S)
            assert sum("serving" in log.read_text() for log in logs) <= 1
            assert sum("another process uses some of its bytes" in log.read_text() for log in logs) >= 1


def test_memory_of_an_engine_that_stays_is_not_given_away(bank: Bank) -> None:
    """Its session is lost with the superblock, and what it maps is not."""
    daemon = bank.start()
    with Engine() as one:
        assert one.ask("join(frames=400)") is None
        assert one.ask("fill(mine, [9]).size") == 1
        daemon.stop(signal.SIGKILL)
        rewrite(bank.device.path, user=os.geteuid() + 1)
        daemon = bank.start()
        with pytest.raises(Unavailable, match="another process still uses bytes of .* that were the bank's; end it"):
            session(OTHER)
        assert bank_info(DAX).available < BYTES - 8 * GRANULE
        with pytest.raises(Unavailable, match="bank has 0.00 GB for it"):
            session(OTHER)
        assert one.ask("int(view(mine, mine.slab.address + 0)[0]) in (0, 9)") is True
        assert SECRET not in bank.device.path.read_bytes()[:1]
    wait_until(lambda: bank_info(DAX).available == BYTES - 2 * GRANULE, PATIENCE_S)
    session(OTHER).close()


# ---- broken pages ----


def test_a_broken_page_is_a_sentence_and_left_out(bank: Bank) -> None:
    """The end of the file is missing, for which the kernel has the error of a broken page: a SIGBUS if touched."""
    daemon = bank.start()
    os.truncate(bank.device.path, BYTES - GRANULE)
    with pytest.raises(Unavailable, match=r"a page of .*dax9\.0 at 30 MiB is poisoned; the bytes are excluded"):
        session()
    assert daemon.status()["devices"][0]["available"] == BYTES - 3 * GRANULE
    store([1])
    assert found([1]) == [1]
    assert daemon.status()["restarts"] == 0


# ---- as a tier ----


def tier_of(settings: BankSettings, gpu: int | None) -> BankTier:
    (plan,) = BankTier.plan_ranks(settings, Ranks((gpu,)))
    return BankTier(settings, plan, gpu)


def test_an_engine_pins_all_of_its_slab_or_refuses(bank: Bank) -> None:
    daemon = bank.start()
    with pinning(8 * MIB) as pins:
        with pytest.raises(Unavailable, match=r"no bank of GPU memory; start it with --bank gpu:ORDINAL, or .*dax"):
            tier_of(BankSettings(), 0)  # it is for those who name it
        tier = tier_of(BankSettings(memory="dax"), 0)
        assert (tier.traits.link, tier.traits.counts_as_host_ram, tier.traits.cpu_addressable) == ("cxl", False, True)
        tier.share_as([MODEL], "m")
        region = tier.allocate(MIB, FRAME)
        assert region.summary == "mtierd's page bank, pinned, in a devdax"
        assert sum(pins.registered.values()) == BYTES - 2 * GRANULE
        region.release()
        pins.check_untouched()
        for failing in range(pins.acquired):
            pins.fail_at, pins.acquired = failing, 0
            tier.share_as([MODEL], "m")
            with pytest.raises(Unavailable, match="failed with CUDA error 2"):
                tier.allocate(MIB, FRAME)
            pins.check_untouched()
            assert daemon.status()["spaces"][0]["sessions"] == []


def test_a_page_that_breaks_later_is_a_refusal(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def populate(*_: object, **__: object) -> None:
        raise OSError(133, "Memory page has hardware error")

    daemon = bank.start()
    tier = tier_of(BankSettings(memory="dax"), None)
    assert tier.traits.link == "none"
    tier.share_as([MODEL, MODEL], "m")
    tier.allocate(MIB, FRAME).release()
    monkeypatch.setattr(hostmem, "populate", populate)
    with pytest.raises(Unavailable, match=r"a page of the bank's device is poisoned; .*bank.tag"):
        tier.allocate(MIB, FRAME)
    assert daemon.status()["spaces"][0]["sessions"] == []


def test_a_service_without_a_device_says_what_to_give_it(start_daemon: StartDaemon, monkeypatch: Any) -> None:
    monkeypatch.setenv("MTIER_SOCKET", str(start_daemon().socket_path))
    with pytest.raises(Unavailable, match="has no bank of a devdax; start it with --bank dax:DEVICE"):
        BankTier.plan_ranks(BankSettings(memory="dax"), Ranks((None,)))


# ---- the command ----


def test_wrong_banks_are_one_sentence_each(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*texts: str) -> str:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        with pytest.raises(ValueError, match="--bank") as caught:
            command.service_arguments(parser.parse_args([word for text in texts for word in ("--bank", text)]))
        text = str(caught.value)
        assert text.endswith(".")
        assert "\n" not in text
        return text

    path = bank.device.path
    assert f"its device is '{path}', which is a file, not a devdax. Give a devdax" in refusal(f"dax:{path}")
    assert "its device is '/dev/dax77.7', which does not exist. Give a device" in refusal("dax:/dev/dax77.7:4GiB")
    assert "which is another kind of device, not a devdax" in refusal("dax:/dev/null")
    for text in ("dax", "dax:", "dax:relative", "dax:/dev/dax0.0:", "dax:/dev/dax0.0:0", "dax:/dev/dax0.0:4XB"):
        assert f"--bank is '{text}'. Give" in refusal(text)
    monkeypatch.setattr(command, "bank_bytes", lambda *_: 64 * MIB)
    assert "--bank names /dev/dax9.0 twice" in refusal("dax:/dev/dax9.0", "dax:/dev/dax9.0:64MiB")


def test_the_command_gives_all_of_a_device_or_what_is_asked(bank: Bank) -> None:
    path, stand_in = str(bank.device.path), StandIn(bank.device.root)
    assert bank_bytes(path, None, GRANULE, stand_in=stand_in) == 64 * MIB
    assert bank_bytes(path, 8 * MIB, GRANULE, stand_in=stand_in) == 8 * MIB
    for wanted, words in (
        (65 * MIB, "give a multiple of 2 MiB"),
        (66 * MIB, "has 0.0625 GiB"),
        (4 * MIB, "give at least 6 MiB"),
    ):
        with pytest.raises(SettingError) as caught:
            bank_bytes(path, wanted, GRANULE, stand_in=stand_in)
        assert words in caught.value.problem + caught.value.fix
    region = bank.tier(16 * MIB, GRANULE).allocate(MIB)
    with pytest.raises(Unavailable, match=rf"is in use by process {os.getpid()} "):
        bank_bytes(path, None, GRANULE, stand_in=stand_in)
    assert bank_bytes(path, 16 * MIB, GRANULE, stand_in=stand_in) == 16 * MIB
    region.release()


def test_status_names_the_device(bank: Bank) -> None:
    daemon = bank.start("--bank", f"host:{8 * MIB}")
    store([1])
    status = daemon.status()
    assert [(each["bank"], each["total"]) for each in status["devices"]] == [(1, BYTES - GRANULE)]
    assert status["spaces"][0]["bank"] == 1
    row = rf"1 +dax:{re.escape(str(bank.device.path))} +0\.03 +0\.03 +0\.00"
    assert re.search(row, command.status_text(status))
