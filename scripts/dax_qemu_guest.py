# SPDX-License-Identifier: Apache-2.0
"""Checks tier `dax` and mtierd's bank on /dev/dax0.0, a real devdax; scripts/dax_qemu.sh boots a machine with one.

Prints a line for each check; the last line says how many there were. Not for a machine whose device holds anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from sglang_xmem.bank import NEW, BankSession
from sglang_xmem.errors import ConfigError, SettingError, Unavailable, sentence
from sglang_xmem.mtier.client import DAX
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers.dax import DaxSettings, DaxTier

DEVICE = "/dev/dax0.0"
MIB, GIB = 1 << 20, 1 << 30
FRAME = 64 << 10
#: Emulated memory is slow, so ranges are small.
RANGE = 8 * MIB

Check = Callable[[], None]


def tier(offset: int, nbytes: int = RANGE) -> DaxTier:
    settings = DaxSettings(DEVICE, offset / GIB, nbytes / GIB)
    (plan,) = DaxTier.plan_ranks(settings, Ranks((None,)))
    return DaxTier(settings, plan, None)


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (Unavailable, ConfigError, SettingError) as error:
        text = sentence(error) if isinstance(error, Unavailable) else str(error)
        print("   ", text)
        assert "\n" not in text
        return text
    raise AssertionError("nothing was refused")


def until(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def claimant(offset: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a range."""
    command = [sys.executable, __file__, "claim", str(offset)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# ---- tier dax ----


def bytes_lie_where_the_range_is() -> None:
    region = tier(RANGE).allocate(3 * MIB)
    address = region.extents[0].address
    ctypes.memset(address, 7, 3 * MIB)
    assert region.summary == f"{DEVICE}, 8 MiB to 12 MiB", region.summary
    region.release()
    with other_mapping(RANGE, 4 * MIB) as content:
        assert content[: 3 * MIB] == b"\7" * (3 * MIB), content[:16]


@contextlib.contextmanager
def other_mapping(offset: int, nbytes: int) -> Iterator[mmap.mmap]:
    fd = os.open(DEVICE, os.O_RDWR)
    try:
        with mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, offset=offset) as mapping:
            yield mapping
    finally:
        os.close(fd)


def the_driver_refuses_what_is_not_aligned() -> None:
    """So that the checks of offsets are of use, and mappings of whole granules too."""
    fd = os.open(DEVICE, os.O_RDWR)
    for offset, nbytes in ((4096, 2 * MIB), (0, 4096)):
        try:
            mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, offset=offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            raise AssertionError("it does not")
    os.close(fd)


def wrong_ranges_are_refused() -> None:
    assert "Give a multiple of the device's alignment, 2 MiB" in refusal(lambda: tier(1 * MIB))
    assert "Give less" in refusal(lambda: tier(64 * GIB))
    assert "or less" in refusal(lambda: tier(0, 64 * GIB))
    settings = DaxSettings("/dev/dax0.7")
    assert "which does not exist" in refusal(lambda: DaxTier.plan_ranks(settings, Ranks((None,))))
    settings = DaxSettings("/dev/zero")
    assert "not a devdax" in refusal(lambda: DaxTier.plan_ranks(settings, Ranks((None,))))


def another_user_is_refused() -> None:
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        os._exit("read and write access" not in refusal(lambda: tier(0)))
    assert os.waitpid(pid, 0)[1] == 0


def a_range_belongs_to_one_process() -> None:
    with claimant(0) as owner:
        assert f"is in use by process {owner.pid} (python" in refusal(lambda: tier(4 * MIB))
        tier(RANGE).allocate(MIB).release()
    until(lambda: not in_use(0))
    tier(0).allocate(MIB).release()


def in_use(offset: int) -> bool:
    try:
        tier(offset)
    except Unavailable:
        return True
    return False


def a_forked_child_keeps_the_claim() -> None:
    with claimant(0) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdin.write("fork\n")
        owner.stdin.flush()
        child = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
        assert in_use(0)
        os.kill(child, signal.SIGKILL)
        until(lambda: not in_use(0))


def locks_of_two_nodes_of_a_device_are_independent() -> None:
    """A second node is a file of its own: locks on one do not show on the other."""
    other = "/dev/dax-other"
    number = os.stat(DEVICE).st_rdev
    os.mknod(other, 0o600 | 0o020000, number)
    try:
        with claimant(0):
            fd = os.open(other, os.O_RDWR)
            settings = DaxSettings(other, 0, RANGE / GIB)
            DaxTier.plan_ranks(settings, Ranks((None,)))
            os.close(fd)
    finally:
        os.unlink(other)


# ---- the bank of mtierd ----


class Service:
    """mtierd with a bank of 32 MiB on the device."""

    def __enter__(self) -> Service:
        os.environ["MTIER_SOCKET"] = "/run/mtier/mtierd.sock"
        Path("/run/mtier").mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--bank", f"dax:{DEVICE}:32MiB"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("MTIER_LIB_PATH")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # of the keeper: the service goes with it
        self.process.wait()


def page(number: int) -> bytes:
    return bytes([number]) * FRAME


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def session(identity: bytes) -> BankSession:
    return BankSession(identity * 32, FRAME, 8, kind=DAX)


def pages_survive_the_service_and_no_other_owner_sees_them() -> None:
    with Service():
        one = session(b"m")
        claimed = one.claim(1)
        assert ctypes.string_at(int(claimed[0]), FRAME) == bytes(FRAME)
        ctypes.memmove(int(claimed[0]), page(5), FRAME)
        assert one.publish([key(5)], claimed) == [NEW]
        assert "is in use by process" in refusal(lambda: tier(RANGE))
        one.close()
    until(lambda: not in_use(RANGE))
    with Service():
        again = session(b"m")
        (address,) = again.adopt([key(5)])
        assert ctypes.string_at(int(address), FRAME) == page(5)
        again.close()
        other = session(b"o")
        assert other.find([key(5)]) == 0
        assert not any(ctypes.string_at(int(address), FRAME).strip(b"\0") for address in other.claim(8))
        other.close()


# ---- what breaks ----


def pfn_of(offset: int) -> int:
    """The page frame of a byte of the device."""
    with other_mapping(offset // (2 * MIB) * (2 * MIB), 2 * MIB) as mapping:
        at = offset % (2 * MIB)
        mapping[at] = mapping[at]
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))  # keeps the mapping
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek((start + at) // mmap.PAGESIZE * 8)
            entry = int.from_bytes(pagemap.read(8), "little")
        assert entry >> 63
        return entry & ((1 << 55) - 1)


def a_page_that_the_kernel_knows_to_be_broken() -> None:
    """Not a check: says what this kernel does."""
    break_page(48 * MIB + 5 * mmap.PAGESIZE)
    try:
        tier(48 * MIB).allocate(MIB).release()
        print("    is still mapped")
    except Unavailable as error:
        print("   ", sentence(error))


def break_page(offset: int) -> None:
    number = pfn_of_child(offset)
    Path("/sys/kernel/debug/hwpoison/corrupt-pfn").write_text(str(number))


def pfn_of_child(offset: int) -> int:
    """By a child, so that nobody has the page mapped when it breaks."""
    done = subprocess.run([sys.executable, __file__, "pfn", str(offset)], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def a_page_that_breaks_in_use_ends_the_process() -> None:
    # As a CPU's machine check does; an injected fault alone is no access.
    Path("/proc/sys/vm/memory_failure_early_kill").write_text("1")
    with claimant(64 * MIB) as owner:
        break_page(64 * MIB)
        assert owner.wait(60) == -signal.SIGBUS, owner.returncode
    until(lambda: not in_use(64 * MIB))


def as_system_memory_it_is_another_tiers() -> None:
    subprocess.run(["daxctl", "reconfigure-device", "--mode=system-ram", "--no-movable", "-f", "dax0.0"], check=True)
    assert "which the kernel uses as system memory, NUMA node 1. Use tier dram" in refusal(lambda: tier(0))
    subprocess.run([sys.executable, "-m", "sglang_xmem.cli", "doctor", "--no-bandwidth"], check=False)


CHECKS: tuple[Check, ...] = (
    bytes_lie_where_the_range_is,
    the_driver_refuses_what_is_not_aligned,
    wrong_ranges_are_refused,
    another_user_is_refused,
    a_range_belongs_to_one_process,
    a_forked_child_keeps_the_claim,
    locks_of_two_nodes_of_a_device_are_independent,
    pages_survive_the_service_and_no_other_owner_sees_them,
    a_page_that_breaks_in_use_ends_the_process,
    a_page_that_the_kernel_knows_to_be_broken,
    as_system_memory_it_is_another_tiers,
)


def claim(offset: int) -> None:
    """Body of `claimant`."""
    region = tier(offset).allocate(MIB)  # noqa: F841  until this process ends
    print("claimed", flush=True)
    for line in sys.stdin:
        if line == "fork\n":
            child = os.fork()
            if child == 0:
                signal.pause()
            print(child, flush=True)


def main() -> int:
    doctor = [sys.executable, "-m", "sglang_xmem.cli", "doctor", "--no-bandwidth", "--hicache-size", "0.1"]
    config = f'{{"dax": {{"device": "{DEVICE}"}}}}'
    subprocess.run([*doctor, "--hicache-xmem-tier", "dax", "--hicache-xmem-config", config], check=False)
    failed = 0
    for check in CHECKS:
        words = check.__name__.replace("_", " ")
        try:
            check()
            print(f"ok: {words}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED: {words}: {traceback.format_exc()}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["claim"]:
        claim(int(sys.argv[2]))
    elif sys.argv[1:2] == ["pfn"]:
        print(pfn_of(int(sys.argv[2])))
    else:
        sys.exit(main())
