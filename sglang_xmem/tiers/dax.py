"""Tier `dax`: CXL memory that the kernel provides as a device (devdax), mapped and pinned for the GPU's copies.

The user's range is divided among the ranks. A rank claims its part by an OFD lock on exactly its bytes of the device.
The kernel drops the lock with the claim's last descriptor and mapping (including those of a forked child), even after a
crash, so nothing needs recovery. Locks through two nodes of one device, as in two containers, are independent: there
the configuration must keep the ranges apart.

Memory that cannot be pinned is refused, since copies to pageable memory are slow and unsafe. The bytes are those of the
previous owner; nothing is cleared.

A poisoned page (an uncorrectable error of the device) ends the rank that reads it: the CPU gets SIGBUS, or a GPU's copy
fails its context. A kernel that refuses to map such a page makes the start fail instead; Linux 6.1 maps it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang_xmem import machine
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.tiers import hostmem
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

GIB = 1 << 30
_DEVICE, _OFFSET, _SIZE = "dax.device", "dax.offset_gib", "dax.size_gib"
#: struct flock of Linux: type, whence, start, length, process; padded to 8 bytes.
_FLOCK = struct.Struct("@hhqqixxxx")
#: The record of mtierd's pages on its device: the first fields of Superblock in native/dax.h.
_SUPERBLOCK_HEAD = struct.Struct("=QQ")  # magic, bytes of the device that the service owns
_SUPERBLOCK_MAGIC = 0x314B4E4142584144
_SUPERBLOCK_BYTES, _SUPERBLOCK_COPIES = 32 << 10, 2
_NAME_DEVICE = Remedy("set_option", _DEVICE, "a device such as /dev/dax0.0")


class DaxSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `dax` in --hicache-xmem-config.

    Attributes:
        device: the device's node, such as "/dev/dax9.0". `auto` uses this tier only if a device is named.
        offset_gib: start of this engine's range on the device, in GiB (2^30 bytes).
        size_gib: size of the range in GiB, for all ranks together. Default: to the device's end.
    """

    device: str | None = None
    offset_gib: float = 0
    size_gib: float | None = None


class DaxRankPlan(msgspec.Struct, frozen=True):
    """A rank's bytes of the device.

    Attributes:
        identity: st_rdev of the device, or (in tests) a file's st_ino, to detect a replaced device.
        offset, nbytes: multiples of `align`.
    """

    device: str
    identity: int
    offset: int
    nbytes: int
    align: int


class StandIn(NamedTuple):
    """For tests on machines without a device: a file instead of it, described in a temporary tree.

    Attributes:
        root: directory that holds `sys`.
    """

    root: Path


class DaxTier(MemoryTier):
    """See the module.

    Args:
        stand_in: only for tests.
    """

    name = "dax"
    nominal_gbps = 25.0  # typical of known devices
    traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="cxl")
    Settings = DaxSettings

    settings: DaxSettings
    rank_plan: DaxRankPlan

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None, *, stand_in: StandIn | None = None) -> None:
        super().__init__(settings, rank_plan, gpu)
        self._stand_in = stand_in
        self._claim: _Claim | None = None
        if gpu is None:
            self.traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="none")

    @classmethod
    def is_automatic(cls, settings: DaxSettings) -> bool:
        return settings.device is not None

    @classmethod
    def plan_ranks(
        cls, settings: DaxSettings, ranks: Ranks, *, stand_in: StandIn | None = None
    ) -> tuple[DaxRankPlan, ...]:
        for setting, gib in ((_OFFSET, settings.offset_gib), (_SIZE, settings.size_gib)):
            if gib is not None and not 0 <= gib <= 1 << 24:  # excludes NaN too
                raise SettingError(setting, f"is {gib:g}", "give GiB >= 0")
        if settings.device is None:
            raise Unavailable("no device is named", _NAME_DEVICE)
        fd, identity, device = _open(settings.device, stand_in)
        try:
            offset, nbytes = _range(settings, device)
            each = nbytes // len(ranks.gpus) // device.align_bytes * device.align_bytes
            if each == 0:
                raise SettingError(
                    _SIZE,
                    f"gives {nbytes / GIB:g} GiB of {settings.device} to {len(ranks.gpus)} rank(s), but each needs at "
                    f"least {_size(device.align_bytes)}",
                    "give more",
                )
            plans = tuple(
                DaxRankPlan(settings.device, identity, offset + rank * each, each, device.align_bytes)
                for rank in range(len(ranks.gpus))
            )
            for plan in plans:
                _check_free(fd, plan)
        finally:
            os.close(fd)
        return plans

    def capacity_bytes(self) -> int:
        if self._claim is None:
            fd = self._reopen()
            try:
                _check_free(fd, self.rank_plan)
            finally:
                os.close(fd)
            return self.rank_plan.nbytes
        return self._claim.largest_gap()

    def waste_bytes(self, granule: int) -> int:
        return self.rank_plan.align

    def _reopen(self) -> int:
        fd, identity, _ = _open(self.rank_plan.device, self._stand_in)
        if identity != self.rank_plan.identity:
            os.close(fd)
            raise Unavailable(f"{self.rank_plan.device} was replaced by another device since startup")
        return fd

    def _allocate(self, nbytes: int, granule: int) -> Region:
        plan = self.rank_plan
        with ExitStack() as undo:
            if self._claim is None:
                self._claim = _Claim(self._reopen(), plan, self._forget_claim)
            claim = self._claim
            whole = -(-nbytes // plan.align) * plan.align
            offset = claim.take(whole)
            undo.callback(claim.give_back, offset)
            try:
                mapping = hostmem.map_file(claim.fd, offset, whole)
                undo.callback(mapping.close)
                hostmem.populate(
                    mapping.address, whole, threads=hostmem.touch_threads(), page_bytes=min(plan.align, 2 << 20)
                )
            except OSError as error:
                raise _map_failure(plan, whole, error) from None
            if self.gpu is not None:
                hostmem.keep_from_children(mapping.address, whole)
                hostmem.pin(mapping.address, whole, self.gpu, undo)
            keep = undo.pop_all()
        words = f"{plan.device}, {_size(offset)} to {_size(offset + whole)}"
        if self.gpu is not None:
            words += ", pinned"
        extents = [Extent(mapping.address, nbytes)]
        return Region(extents, words, keep.close, granule=granule, owner=(mapping.owner,))

    def _forget_claim(self) -> None:
        self._claim = None


class _Claim:
    """A rank's lock on its bytes, and the ranges in use. Releases the lock with the last range.

    Args:
        fd: of the device; the claim closes it.
        forget: called when the lock is released.

    Raises:
        Unavailable: another process uses some of the bytes.
    """

    def __init__(self, fd: int, plan: DaxRankPlan, forget: Any) -> None:
        self.fd = fd
        self._plan = plan
        self._forget = forget
        self._used: dict[int, int] = {}
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, plan.offset, plan.nbytes, 0))
        except OSError as error:
            holder = _holder(fd, plan)
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise _in_use(plan, holder) from None
            raise Unavailable(f"locking {plan.device} failed: {error.strerror}") from None
        try:
            _forget_pages(fd, plan)
        except OSError as error:
            os.close(fd)
            raise _map_failure(plan, plan.align, error) from None

    def gaps(self) -> list[tuple[int, int]]:
        """Return (offset, bytes) of each free range."""
        at, found = self._plan.offset, []
        for offset, nbytes in sorted(self._used.items()):
            found.append((at, offset - at))
            at = offset + nbytes
        found.append((at, self._plan.offset + self._plan.nbytes - at))
        return [(offset, nbytes) for offset, nbytes in found if nbytes]

    def largest_gap(self) -> int:
        return max((nbytes for _, nbytes in self.gaps()), default=0)

    def take(self, nbytes: int) -> int:
        """Allocate a range and return its offset."""
        for offset, free in self.gaps():
            if nbytes <= free:
                self._used[offset] = nbytes
                return offset
        most = self.largest_gap()
        self._end_if_idle()
        raise Unavailable(
            f"{nbytes / 1e9:.2f} GB are needed, but this rank's largest free range of {self._plan.device} has "
            f"{most / 1e9:.2f} GB",
            LOWER_SIZE,
            Remedy("set_option", _SIZE, "more"),
        )

    def give_back(self, offset: int) -> None:
        del self._used[offset]
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self._used:
            os.close(self.fd)
            self._forget()


def _open(path: str, stand_in: StandIn | None) -> tuple[int, int, machine.DaxDevice]:
    """Open a device; return its descriptor, identity and facts.

    Raises:
        SettingError: the path is not a devdax, or cannot be opened.
    """
    root = machine.ROOT if stand_in is None else stand_in.root
    try:
        status = os.stat(path)
        facts = _facts(path, status, root, accept_file=stand_in is not None)
        # Only now: opening some other devices has side effects.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except SettingError:
        raise
    except FileNotFoundError:
        raise _no_device(path, root) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # the node stays when the driver leaves
            raise _no_device(path, root) from None
        why = error.strerror if isinstance(error, OSError) else "the path has a zero byte"
        allow = isinstance(error, PermissionError)
        fix = "give this user (and container) read and write access" if allow else "give another device"
        raise SettingError(_DEVICE, f"is {path!r}, which cannot be opened ({why})", fix) from None
    return fd, status.st_rdev or status.st_ino, facts


def _facts(path: str, status: os.stat_result, root: Path, *, accept_file: bool) -> machine.DaxDevice:
    facts: machine.DaxDevice | None = None
    if stat.S_ISCHR(status.st_mode) or (accept_file and stat.S_ISREG(status.st_mode)):
        facts = machine.dax_device(status.st_rdev, root)
    if facts is None:
        kinds = ((stat.S_ISREG, "a file"), (stat.S_ISBLK, "a block device"), (stat.S_ISDIR, "a directory"))
        kind = next((words for test, words in kinds if test(status.st_mode)), "another kind of device")
        fix = "give a devdax such as /dev/dax0.0 (daxctl list shows them)"
        raise SettingError(_DEVICE, f"is {path!r}, which is {kind}, not a devdax", fix)
    return facts


def _no_device(path: str, root: Path) -> SettingError:
    name = os.path.basename(path)
    node = machine.dax_as_system_ram(name, root)
    if node is None:
        return SettingError(_DEVICE, f"is {path!r}, which does not exist", "give a device such as /dev/dax0.0")
    return SettingError(
        _DEVICE,
        f"is {path!r}, which the kernel uses as system memory, NUMA node {node}",
        f"use tier dram with 'dram.numa_node' {node}, or run daxctl reconfigure-device --mode=devdax {name}",
    )


def _range(settings: DaxSettings, device: machine.DaxDevice) -> tuple[int, int]:
    """Return (offset, bytes) of the configured range, checked against the device."""
    align, has = device.align_bytes, f"{settings.device} has {device.size_bytes / GIB:g} GiB"
    offset = int(settings.offset_gib * GIB)
    rest = max(0, device.size_bytes - offset)
    nbytes = rest // align * align if settings.size_gib is None else int(settings.size_gib * GIB)
    for setting, gib, value in ((_OFFSET, settings.offset_gib, offset), (_SIZE, settings.size_gib, nbytes)):
        if gib is not None and value % align:
            raise SettingError(setting, f"is {gib:g}", f"give a multiple of the device's alignment, {_size(align)}")
    if rest == 0:
        raise SettingError(_OFFSET, f"is {settings.offset_gib:g}, but {has}", "give less")
    if nbytes > rest:
        problem = f"is {settings.size_gib:g} at offset {settings.offset_gib:g}, but {has}"
        raise SettingError(_SIZE, problem, f"give {rest / GIB:g} or less")
    return offset, nbytes


def _check_free(fd: int, plan: DaxRankPlan, lock: int = fcntl.F_WRLCK) -> None:
    """Refuse a range that overlaps with another process's.

    Raises:
        Unavailable: it overlaps.
    """
    asked = _FLOCK.pack(lock, 0, plan.offset, plan.nbytes, 0)
    try:
        kind = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    except OSError as error:
        raise Unavailable(f"querying the locks of {plan.device} failed: {error.strerror}") from None
    if kind != fcntl.F_UNLCK:
        raise _in_use(plan, _holder(fd, plan))


def _forget_pages(fd: int, plan: DaxRankPlan) -> None:
    """Erase mtierd's record of pages in a claimed range, so that mtierd never reads overwritten pages.

    A service with pages in the range does not run, since it would hold a lock there. Another service may run and write
    its record at the same time; its pages may then not survive it.

    Raises:
        OSError: the device's first page cannot be mapped.
    """
    mapping = hostmem.map_file(fd, 0, -(-_SUPERBLOCK_COPIES * _SUPERBLOCK_BYTES // plan.align) * plan.align)
    try:
        hostmem.populate(mapping.address, mapping.nbytes, threads=1, page_bytes=min(plan.align, 2 << 20))
        for copy in range(_SUPERBLOCK_COPIES):
            magic, nbytes = _SUPERBLOCK_HEAD.unpack_from(mapping.owner, copy * _SUPERBLOCK_BYTES)
            if magic == _SUPERBLOCK_MAGIC and plan.offset < nbytes:
                _SUPERBLOCK_HEAD.pack_into(mapping.owner, copy * _SUPERBLOCK_BYTES, 0, 0)
    finally:
        mapping.close()


def bank_bytes(path: str, wanted: int | None, granule: int, *, stand_in: StandIn | None = None) -> int:
    """Return the bytes of a device, from its start, that mtierd can use as a bank.

    Args:
        wanted: requested bytes; None: all.
        granule: granule of the service's memory, in bytes.

    Raises:
        SettingError: the path is not a devdax, cannot be opened, or is too small.
        Unavailable: another process uses some of the bytes.
    """
    fd, identity, device = _open(path, stand_in)
    try:
        granule = max(granule, device.align_bytes)
        nbytes = (device.size_bytes if wanted is None else wanted) // granule * granule
        if wanted is not None and wanted % granule:
            raise SettingError(_SIZE, f"is {wanted} bytes", f"give a multiple of {_size(granule)}")
        if not 3 * granule <= nbytes <= device.size_bytes:
            problem = f"is {_size(nbytes)}, but {path} has {device.size_bytes / GIB:g} GiB"
            raise SettingError(_SIZE, problem, f"give at least {_size(3 * granule)} and at most the device's size")
        # Engines of an earlier service may still use the rest: private ranges are locked for writing.
        _check_free(fd, DaxRankPlan(path, identity, 0, granule, device.align_bytes))
        _check_free(fd, DaxRankPlan(path, identity, granule, nbytes - granule, device.align_bytes), fcntl.F_RDLCK)
    finally:
        os.close(fd)
    return nbytes


def _in_use(plan: DaxRankPlan, holder: str) -> Unavailable:
    span = f"{_size(plan.offset)} to {_size(plan.offset + plan.nbytes)}"
    return Unavailable(
        f"{plan.device}, {span}, is in use by {holder}", Remedy("set_option", _OFFSET, "a free range"), _NAME_DEVICE
    )


def _holder(fd: int, plan: DaxRankPlan) -> str:
    """Name the process with a lock on some of a plan's bytes, from the kernel's list of each process's locks."""
    own = os.fstat(fd)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it exited, or is another user's
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    there = link.stat()
                    if (there.st_dev, there.st_ino, there.st_rdev) != (own.st_dev, own.st_ino, own.st_rdev):
                        continue
                    if _overlaps((process / "fdinfo" / link.name).read_text(encoding="ascii"), plan):
                        name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                        return f"process {process.name} ({name})"
    return "a process that is not visible from here"


def _overlaps(fdinfo: str, plan: DaxRankPlan) -> bool:
    for first, last in re.findall(r"^lock:.* (?:READ|WRITE) .* (\d+) (\d+|EOF)$", fdinfo, re.MULTILINE):
        if int(first) < plan.offset + plan.nbytes and (last == "EOF" or int(last) >= plan.offset):
            return True
    return False


def _map_failure(plan: DaxRankPlan, nbytes: int, error: OSError) -> Unavailable:
    if hostmem.is_poisoned(error):
        return Unavailable(
            f"a page of {plan.device} in the range is poisoned", Remedy("set_option", _OFFSET, "a range without it")
        )
    return Unavailable(f"mapping {nbytes / 1e9:.2f} GB of {plan.device} failed: {error.strerror}", LOWER_SIZE)


def _size(nbytes: int) -> str:
    """Format bytes in the largest binary unit with a whole value."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"
