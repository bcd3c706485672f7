"""Host memory: pinning in pieces and what a refusal says, touching and populating, SGLang's variables."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import resource
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import driver as bindings

from sglang_xmem.errors import LOWER_SIZE, ConfigError, Unavailable
from sglang_xmem.tiers import hostmem
from tests.unit.tiers.fake_pinning import MIB, PinDriver, pinning

ADDRESS = 1 << 40


def pin(driver: PinDriver, nbytes: int, *others: int) -> ExitStack:
    undo = ExitStack()
    hostmem.pin(ADDRESS, nbytes, 0, undo, others)
    return undo


def pieces(driver: PinDriver) -> list[int]:
    """MiB of each registration, which follow each other."""
    at = ADDRESS
    for address, size in sorted(driver.registered.items()):
        assert address == at
        at += size
    return [size // MIB for _, size in sorted(driver.registered.items())]


# ---- pinning ----


def test_pinning_in_pieces_and_back() -> None:
    with pinning() as driver:
        undo = pin(driver, 5 * MIB)
        assert pieces(driver) == [2, 2, 1]
        assert driver.current == []
        undo.close()
        driver.check_untouched()


def test_others_have_a_context_when_memory_is_pinned() -> None:
    """Registered as portable it is pinned for the contexts that there are."""
    with pinning() as driver:
        undo = pin(driver, 3 * MIB, 2, 1)
        assert driver.held_when_pinned == [[2, 1, 0]] * 2
        undo.close()
        driver.check_untouched()


@pytest.mark.parametrize("error", ["INVALID_VALUE", "OUT_OF_MEMORY"])
def test_what_is_too_large_is_tried_in_halves(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    with pinning(1024 * MIB) as driver:
        monkeypatch.setattr(hostmem, "LEAST_REGISTER_BYTES", 64 * MIB)
        driver.most_bytes = 300 * MIB
        driver.error = getattr(bindings.CUresult, f"CUDA_ERROR_{error}")
        undo = pin(driver, 600 * MIB)
        assert [size // MIB for size in driver.tried] == [600, 300, 300]
        undo.close()
        driver.check_untouched()
        driver.tried.clear()
        # Down to the least, and to no less; a rest that is smaller is tried once.
        driver.most_bytes = 63 * MIB
        with pytest.raises(Unavailable):
            pin(driver, 520 * MIB)
        assert [size // MIB for size in driver.tried] == [520, 260, 130, 64]
        driver.check_untouched()
        driver.tried.clear()
        driver.most_bytes = 64 * MIB
        undo = pin(driver, 130 * MIB)
        assert pieces(driver) == [64, 64, 2]
        undo.close()


def test_a_registration_that_fails_once_does_not_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pinning(256 * MIB) as driver:
        monkeypatch.setattr(hostmem, "LEAST_REGISTER_BYTES", 64 * MIB)
        plain, calls = driver.cuMemHostRegister, itertools.count()

        def register(address: int, size: int, flags: int) -> tuple[Any]:
            return (driver.error,) if next(calls) == 1 else plain(address, size, flags)

        monkeypatch.setattr(driver, "cuMemHostRegister", register)
        undo = pin(driver, 512 * MIB)
        assert pieces(driver) == [256, 128, 128]
        undo.close()
        driver.check_untouched()


@pytest.mark.parametrize(
    ("error", "limit", "advice"),
    [
        ("INVALID_VALUE", 8 * MIB, False),
        ("OUT_OF_MEMORY", 8 * MIB, True),
        ("OPERATING_SYSTEM", 8 * MIB, True),
        ("OUT_OF_MEMORY", resource.RLIM_INFINITY, False),
        ("OUT_OF_MEMORY", 1 << 40, False),
    ],
)
def test_the_limit_is_advised_where_it_can_be_the_cause(
    monkeypatch: pytest.MonkeyPatch, error: str, limit: int, advice: bool
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    with pinning(1024 * MIB) as driver:
        driver.most_bytes, driver.error = 0, getattr(bindings.CUresult, f"CUDA_ERROR_{error}")
        with pytest.raises(Unavailable) as caught:
            pin(driver, 512 * MIB)
    number = int(driver.error)
    assert caught.value.reason.endswith(f"of 0.54 GB failed with CUDA error {number}: error {number}")
    assert caught.value.remedies[0] == LOWER_SIZE
    assert ("ulimit -l" in str(caught.value)) is advice


#: Two contexts, one made current, two registrations and what the GPU sees of each.
CALLS = 2 + 1 + 2 * 2


@pytest.mark.parametrize("failing", range(CALLS))
def test_a_failure_of_any_call_leaves_nothing_pinned(failing: int) -> None:
    with pinning() as driver:
        driver.fail_at = failing
        with pytest.raises(Unavailable, match="failed with CUDA error 2"):
            pin(driver, 4 * MIB, 1)
        driver.check_untouched()
        driver.fail_at, driver.acquired = None, 0
        pin(driver, 4 * MIB, 1).close()
        assert driver.acquired == CALLS


def test_another_address_on_the_gpu_is_refused() -> None:
    with pinning() as driver:
        driver.seen_at = 4096
        with pytest.raises(Unavailable, match="another address"):
            pin(driver, 5 * MIB)
        driver.check_untouched()


# ---- variables ----


@pytest.mark.parametrize(("value", "nbytes"), [("", None), ("2MB", 2 << 20), (" 2mb ", 2 << 20), ("1GB", 1 << 30)])
def test_hugepages_as_sglang_names_them(monkeypatch: pytest.MonkeyPatch, value: str, nbytes: int | None) -> None:
    monkeypatch.setenv("SGLANG_HUGEPAGE_SIZE", value)
    assert hostmem.hugepage_bytes() == nbytes


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("SGLANG_HUGEPAGE_SIZE", "4MB", hostmem.hugepage_bytes),
        ("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "1234567", hostmem.register_bytes),
        ("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "some", hostmem.register_bytes),
        ("SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS", "-1", hostmem.touch_threads),
    ],
)
def test_wrong_variables_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Any) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name} is '{value}'\. Give "):
        read()


def test_the_chunk_of_sglang_is_what_is_pinned_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "3")
    with pinning() as driver:
        pin(driver, 7 << 30).close()
    assert driver.tried == [3 << 30, 3 << 30, 1 << 30]
    monkeypatch.setenv("SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB", "0")
    assert hostmem.register_bytes() == 1 << 30


def test_the_threads_of_sglang_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS", "7")
    assert hostmem.touch_threads() == 7
    assert hostmem.touch_threads(3) == 3
    monkeypatch.setenv("SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS", "0")
    assert 1 <= hostmem.touch_threads() <= 16


# ---- mapping and touching ----


def test_every_byte_is_touched_once_on_cpus_that_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[int, int, set[int]]] = []
    together = threading.Barrier(4)
    plain = ctypes.memset

    def memset(address: int, value: int, count: int) -> int:
        touched.append((address, count, os.sched_getaffinity(0)))
        if len(touched) <= 4:  # else one thread could do it all before the others start
            together.wait(10)
        return plain(address, value, count)

    monkeypatch.setattr(ctypes, "memset", memset)
    monkeypatch.setattr(hostmem, "TOUCH_BYTES", MIB)
    mapping = hostmem.map_anonymous(9 * MIB + 123)
    before = os.sched_getaffinity(0)
    cpu = min(before)
    hostmem.touch(mapping.address, mapping.nbytes, threads=4, cpus={cpu})
    at = mapping.address
    for address, count, cpus in sorted(touched, key=lambda each: each[0]):
        assert (address, cpus) == (at, {cpu})
        at += count
    assert at == mapping.address + mapping.nbytes
    assert os.sched_getaffinity(0) == before, "the caller keeps its own"
    mapping.close()


@pytest.mark.parametrize("old_kernel", [False, True])
def test_populating_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_kernel: bool) -> None:
    if old_kernel:
        monkeypatch.setattr(hostmem, "_MADV_POPULATE_WRITE", 9999)
    content = bytes(range(256)) * (MIB // 256)
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("r+b") as file:
        mapping = hostmem.map_file(file.fileno(), 0, MIB)
        hostmem.populate(mapping.address, MIB, threads=2, page_bytes=mmap.PAGESIZE)
        assert bytes(mapping.owner) == content
        mapping.close()


def test_a_broken_page_is_an_error_and_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def madvise(self, *_: object) -> int:
            ctypes.set_errno(133)
            return -1

    monkeypatch.setattr(hostmem, "_libc", Libc)
    with pytest.raises(OSError, match="133|hardware|Hardware") as caught:
        hostmem.populate(ADDRESS, MIB, threads=1, page_bytes=4096)
    assert hostmem.is_poisoned(caught.value)
    assert not hostmem.is_poisoned(OSError(errno.EFAULT, ""))


def test_hugepages_that_are_not_reserved_are_told() -> None:
    if int(Path("/proc/sys/vm/nr_hugepages").read_text()):
        pytest.skip("this machine has reserved hugepages")
    with pytest.raises(
        Unavailable, match=r"mapping 0\.00 GB of hugepages of 2 MiB failed: .*unset SGLANG_HUGEPAGE_SIZE"
    ):
        hostmem.map_anonymous(MIB, hugepage=2 * MIB)


def test_hugepages_are_asked_for_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Recorded(mmap.mmap):
        def __new__(cls, fd: int, length: int, flags: int) -> Any:
            asked.append((length, flags))
            return super().__new__(cls, fd, length, flags=flags & 0x3FFFF)  # less the kind and size of the pages

    monkeypatch.setattr(mmap, "mmap", Recorded)
    for size, bits in ((2 * MIB, 21), (1 << 30, 30)):
        mapping = hostmem.map_anonymous(3 * MIB, hugepage=size)
        assert mapping.nbytes == 3 * MIB
        mapping.close()
        length, flags = asked.pop()
        assert length == -(-3 * MIB // size) * size
        assert flags == mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | bits << 26
