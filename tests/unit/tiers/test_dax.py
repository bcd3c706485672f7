"""Tier dax without a device: a file on tmpfs in its place, described by a temporary tree; the driver is a stand-in."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.errors import SettingError, Unavailable
from sglang_xmem.tiers import Ranks, hostmem
from sglang_xmem.tiers.dax import DaxRankPlan, DaxSettings, DaxTier, StandIn
from tests.unit.tiers.fake_dax import FakeDax
from tests.unit.tiers.fake_pinning import PinDriver, pinning

MIB = 1 << 20
GIB = 1 << 30


class Device(FakeDax):
    """With what a tier makes of it."""

    @property
    def stand_in(self) -> StandIn:
        return StandIn(self.root)

    def plans(self, ranks: int = 1, *, gpu: int | None = None, **settings: Any) -> tuple[DaxRankPlan, ...]:
        return DaxTier.plan_ranks(self.settings(**settings), Ranks(gpus=(gpu,) * ranks), stand_in=self.stand_in)

    def settings(self, *, offset_mib: float = 0, mib: float | None = None, device: str | None = None) -> DaxSettings:
        return DaxSettings(device or str(self.path), offset_mib / 1024, None if mib is None else mib / 1024)

    def tier(self, *, gpu: int | None = None, **settings: Any) -> DaxTier:
        (plan,) = self.plans(gpu=gpu, **settings)
        return DaxTier(self.settings(**settings), plan, gpu, stand_in=self.stand_in)


@pytest.fixture
def device(tmpfs: Path) -> Device:
    return Device(tmpfs)


@pytest.fixture
def pins() -> Iterator[PinDriver]:
    with pinning(4 * MIB) as driver:
        yield driver
        driver.check_untouched()


def ranges(plans: tuple[DaxRankPlan, ...]) -> list[tuple[int, int]]:
    """(offset, size) in MiB."""
    return [(plan.offset // MIB, plan.nbytes // MIB) for plan in plans]


# ---- ranges ----


def test_ranks_divide_the_range_in_aligned_parts(device: Device) -> None:
    assert ranges(device.plans()) == [(0, 64)]
    assert ranges(device.plans(3)) == [(0, 20), (20, 20), (40, 20)]
    assert ranges(device.plans(2, offset_mib=4, mib=10)) == [(4, 4), (8, 4)]
    assert ranges(device.plans(offset_mib=62)) == [(62, 2)]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"offset_mib": 1}, "'dax.offset_gib' is 0.000976562. Give a multiple of the device's alignment, 2 MiB."),
        ({"mib": 3}, "'dax.size_gib' is 0.00292969. Give a multiple of the device's alignment, 2 MiB."),
        ({"offset_mib": -2}, "'dax.offset_gib' is -0.00195312. Give GiB >= 0."),
        ({"mib": -2}, "'dax.size_gib' is -0.00195312. Give GiB >= 0."),
        ({"mib": float("nan")}, "'dax.size_gib' is nan. Give GiB >= 0."),
        ({"offset_mib": float("inf")}, "'dax.offset_gib' is inf. Give GiB >= 0."),
        ({"offset_mib": 64}, "has 0.0625 GiB. Give less."),
        ({"offset_mib": 32, "mib": 34}, "'dax.size_gib' is 0.0332031 at offset 0.03125, but "),
        ({"mib": 0}, "to 1 rank(s), but each needs at least 2 MiB. Give more."),
        ({"mib": 2, "ranks": 2}, "to 2 rank(s), but each needs at least 2 MiB. Give more."),
    ],
)
def test_wrong_ranges_are_refused(device: Device, settings: dict[str, Any], problem: str) -> None:
    ranks = settings.pop("ranks", 1)
    with pytest.raises(SettingError) as caught:
        device.plans(ranks, **settings)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_named_is_nothing_tried(device: Device) -> None:
    assert not DaxTier.is_automatic(DaxSettings())
    assert DaxTier.is_automatic(DaxSettings(device="/dev/dax9.0"))
    with pytest.raises(Unavailable, match="no device is named"):
        DaxTier.plan_ranks(DaxSettings(), Ranks(gpus=(None,)))


def test_what_is_no_devdax_is_refused(device: Device) -> None:
    def sentence(path: str, stand_in: StandIn | None = None) -> str:
        with pytest.raises(SettingError) as caught:
            DaxTier.plan_ranks(DaxSettings(path), Ranks(gpus=(None,)), stand_in=stand_in)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # A setting never names a file.
    assert "which is a file, not a devdax. Give a devdax" in sentence(str(device.path))
    assert "which is a directory, not a devdax" in sentence("/dev")
    assert "which is another kind of device, not a devdax" in sentence("/dev/null")
    assert "which does not exist. Give a device such as" in sentence("/dev/dax77.7")
    assert "cannot be opened (the path has a zero byte)" in sentence("/dev/\0")
    kmem = device.root / "sys/bus/dax/devices/dax5.0"
    kmem.mkdir(parents=True)
    (kmem / "driver").symlink_to("../drivers/kmem")
    (kmem / "target_node").write_text("2\n")
    assert "uses as system memory, NUMA node 2. Use tier dram with 'dram.numa_node' 2, or run daxctl" in sentence(
        "/dev/dax5.0", device.stand_in
    )


def test_a_node_without_its_driver_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux leaves the node of a device that it uses as system memory."""

    def no_driver(*_: object, **__: object) -> int:
        raise OSError(errno.ENXIO, "No such device or address")

    monkeypatch.setattr(os, "open", no_driver)
    with pytest.raises(SettingError, match="which does not exist"):
        device.plans()
    kmem = device.root / "sys/bus/dax/devices/dax9.0"
    kmem.mkdir(parents=True)
    (kmem / "driver").symlink_to("../drivers/kmem")
    (kmem / "target_node").write_text("1\n")
    with pytest.raises(SettingError, match="uses as system memory, NUMA node 1. Use tier dram"):
        device.plans()


def test_a_block_device_is_refused() -> None:
    block = next((path for path in Path("/dev").iterdir() if path.is_block_device()), None)
    if block is None:
        pytest.skip("this machine shows no block device")
    with pytest.raises(SettingError, match="which is a block device, not a devdax"):
        DaxTier.plan_ranks(DaxSettings(str(block)), Ranks(gpus=(None,)))


def test_no_permission_is_told(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    words = r"\(Permission denied\)\. Give this user \(and container\) read and write access"
    with pytest.raises(SettingError, match=words):
        device.plans()


# ---- memory ----


def test_memory_is_the_devices_bytes(device: Device) -> None:
    tier = device.tier(offset_mib=8, mib=16)
    assert tier.capacity_bytes() == 16 * MIB
    region = tier.allocate(3 * MIB + 17)
    assert re.fullmatch(r".*/dax9\.0, 8 MiB to 12 MiB", region.summary)
    ctypes.memset(region.extents[0].address, 7, 3 * MIB + 17)
    with device.path.open("rb") as file:
        content = file.read()
    assert content[8 * MIB : 11 * MIB + 17] == b"\7" * (3 * MIB + 17)
    assert not any(content[: 8 * MIB])
    assert not any(content[11 * MIB + 17 :])
    region.release()


def test_regions_fill_gaps(device: Device) -> None:
    tier = device.tier()
    regions = [tier.allocate(16 * MIB) for _ in range(4)]
    assert tier.capacity_bytes() == 0
    with pytest.raises(
        Unavailable, match=r"0\.00 GB are needed, but this rank's largest free range of .* has 0\.00 GB"
    ):
        tier.allocate(1)
    regions[1].release()
    assert tier.capacity_bytes() == 16 * MIB
    with pytest.raises(Unavailable):
        tier.allocate(16 * MIB + 1)
    regions[1] = tier.allocate(16 * MIB)
    assert len({region.extents[0].address for region in regions}) == 4
    for region in regions:
        region.release()
    assert tier.capacity_bytes() == 64 * MIB


def test_pinned_and_checked(device: Device, pins: PinDriver) -> None:
    tier = device.tier(gpu=0)
    assert (tier.traits.link, tier.traits.counts_as_host_ram, tier.traits.cpu_addressable) == ("cxl", False, True)
    region = tier.allocate(10 * MIB)
    assert sum(pins.registered.values()) == 10 * MIB
    assert region.summary.endswith(", pinned")
    region.release()


#: A context, made current, three registrations and what the GPU sees of each.
CALLS = 1 + 1 + 3 * 2


@pytest.mark.parametrize("failing", range(CALLS))
def test_memory_that_is_not_pinned_is_refused(device: Device, pins: PinDriver, failing: int) -> None:
    """Never pageable memory; and the claim is given back."""
    pins.fail_at = failing
    tier = device.tier(gpu=0)
    with pytest.raises(Unavailable, match="failed with CUDA error 2"):
        tier.allocate(10 * MIB)
    pins.check_untouched()
    assert ranges(device.plans()) == [(0, 64)]
    pins.fail_at, pins.acquired = None, 0
    tier.allocate(10 * MIB).release()
    assert pins.acquired == CALLS


def test_a_poisoned_page_is_a_refusal(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def populate(*_: object, **__: object) -> None:
        raise OSError(133, "Memory page has hardware error")

    monkeypatch.setattr(hostmem, "populate", populate)
    tier = device.tier()
    with pytest.raises(Unavailable, match=r"a page of .*/dax9\.0 in the range is poisoned"):
        tier.allocate(MIB)
    assert tier.capacity_bytes() == 64 * MIB


def test_another_device_by_the_same_name_is_refused(device: Device) -> None:
    tier = device.tier()
    content = device.path.read_bytes()
    other = device.path.with_suffix(".new")
    other.write_bytes(content)
    other.rename(device.path)
    for call in (tier.capacity_bytes, lambda: tier.allocate(MIB)):
        with pytest.raises(Unavailable, match="was replaced by another device since startup"):
            call()


def test_a_view_keeps_the_claim(device: Device) -> None:
    """The bytes are in use as long as they are mapped."""
    region = device.tier().allocate(MIB)
    assert region.owner is not None
    (view,) = region.owner
    region.release()
    with pytest.raises(Unavailable, match="is in use by process"):
        device.plans()
    view[0] = 1
    del view
    device.plans()


# ---- claims between processes ----

CLAIM = """
import sys
from pathlib import Path
from sglang_xmem.errors import Unavailable
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.dax import DaxSettings, DaxTier, StandIn
path, root, offset, mib = sys.argv[1:]
settings = DaxSettings(path, int(offset) / 1024, int(mib) / 1024)
stand_in = StandIn(Path(root))
try:
    (plan,) = DaxTier.plan_ranks(settings, Ranks(gpus=(None,)), stand_in=stand_in)
    tier = DaxTier(settings, plan, None, stand_in=stand_in)
    print("ready", flush=True)
    sys.stdin.readline()
    region = tier.allocate(1 << 20)
    print("claimed", flush=True)
except Unavailable as error:
    print(error, flush=True)
sys.stdin.readline()
"""


class Process:
    """Claims a range of the device on request."""

    def __init__(self, device: Device, offset_mib: int, mib: int) -> None:
        command = [sys.executable, "-c", CLAIM, str(device.path), str(device.root), str(offset_mib), str(mib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def claim(self) -> str:
        self.go()
        return self.line()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(device: Device) -> Iterator[Any]:
    started: list[Process] = []

    def make(offset_mib: int, mib: int) -> Process:
        started.append(Process(device, offset_mib, mib))
        return started[-1]

    yield make
    for process in started:
        process.kill()


def test_a_range_is_one_processs(device: Device, start: Any) -> None:
    owner = start(0, 16)
    assert owner.line() == "ready"
    # Planned by both while it was free.
    late = start(8, 16)
    assert late.line() == "ready"
    mine = device.tier(offset_mib=14, mib=8)
    assert owner.claim() == "claimed"
    held = rf"dax9\.0, 8 MiB to 24 MiB, is in use by process {owner.process.pid} \(python"
    assert re.search(held, late.claim())
    for call in (mine.capacity_bytes, lambda: mine.allocate(MIB), lambda: device.plans(offset_mib=14, mib=8)):
        with pytest.raises(Unavailable, match=rf"in use by process {owner.process.pid} "):
            call()
    # The range next to it is free, and so is everything but the first rank's.
    device.tier(offset_mib=16, mib=48).allocate(MIB).release()
    owner.kill()
    deadline = time.monotonic() + 10
    while True:  # the kernel takes a moment with the memory of the dead
        try:
            mine.allocate(MIB).release()
            break
        except Unavailable:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_of_two_that_race_one_wins(device: Device, start: Any) -> None:
    racing = [start(0, 32), start(16, 32)]
    assert [process.line() for process in racing] == ["ready"] * 2
    for process in racing:
        process.go()
    answers = sorted(process.line() for process in racing)
    assert answers[1] == "claimed"
    assert "is in use by process" in answers[0]


def test_disjoint_ranges_do_not_meet(device: Device, start: Any) -> None:
    two = [start(0, 32), start(32, 32)]
    assert [process.line() for process in two] == ["ready"] * 2
    assert [process.claim() for process in two] == ["claimed"] * 2
