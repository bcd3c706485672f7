"""Memory that the CPU addresses: mapping, placement and pinning for GPUs. Shared by the tiers in host memory."""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import mmap
import os
import resource
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from sglang_xmem import gpus
from sglang_xmem.errors import LOWER_SIZE, ConfigError, Remedy, Unavailable

logger = logging.getLogger(__name__)

#: Bytes that one cuMemHostRegister pins; very large registrations fail on some systems.
REGISTER_BYTES = 64 << 30
#: Bytes below which a refused registration is not retried with half the size.
LEAST_REGISTER_BYTES = 64 << 20
#: Bytes that a thread touches at a time.
TOUCH_BYTES = 256 << 20

# SGLang's variables for the allocation that this one replaces.
HUGEPAGE_VARIABLE = "SGLANG_HUGEPAGE_SIZE"
REGISTER_VARIABLE = "SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB"
THREADS_VARIABLE = "SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS"

_HUGEPAGE_BYTES = {"2MB": 2 << 20, "1GB": 1 << 30}
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_EHWPOISON = getattr(errno, "EHWPOISON", 133)


# ---- SGLang's variables ----


def hugepage_bytes() -> int | None:
    """Return the size of reserved hugepages that SGLANG_HUGEPAGE_SIZE sets, in bytes; None if unset.

    Raises:
        ConfigError: the size is neither 2MB nor 1GB.
    """
    value = os.environ.get(HUGEPAGE_VARIABLE, "").strip().upper()
    if not value:
        return None
    if value not in _HUGEPAGE_BYTES:
        raise ConfigError(f"{HUGEPAGE_VARIABLE} is {os.environ[HUGEPAGE_VARIABLE]!r}. Give 2MB or 1GB, or unset it.")
    return _HUGEPAGE_BYTES[value]


def register_bytes() -> int:
    """Return the bytes to pin at a time: SGLANG_HICACHE_HOST_REGISTER_CHUNK_GB (GiB, at least 1), or 64 GiB.

    Raises:
        ConfigError: it is not a whole number.
    """
    chunk = _variable(REGISTER_VARIABLE)
    return REGISTER_BYTES if chunk is None else max(chunk, 1) << 30


def touch_threads(setting: int = 0) -> int:
    """Return the threads that place memory: `setting`, SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS, or half the CPUs.

    Raises:
        ConfigError: the variable is not a whole number.
    """
    asked = setting or min(_variable(THREADS_VARIABLE) or 0, 1024)
    return asked or max(1, min(16, (os.cpu_count() or 2) // 2))


def _variable(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or len(value) > 6:
        raise ConfigError(f"{name} is {value!r}. Give a whole number from 0 to 999999, or unset it.")
    return int(value)


# ---- mapping ----


class Mapping:
    """Mapped memory.

    Attributes:
        address, nbytes: of the memory.
        owner: buffer over the bytes, which keeps them mapped; None after `close`.
    """

    def __init__(self, mapping: mmap.mmap, nbytes: int) -> None:
        self._mapping = mapping
        self.owner: Any = (ctypes.c_uint8 * nbytes).from_buffer(mapping)
        self.address = ctypes.addressof(self.owner)
        self.nbytes = nbytes

    def close(self) -> None:
        """Unmap, or leave it to the last view of the memory; never raises."""
        self.owner = None
        with suppress(BufferError):  # a view exists
            self._mapping.close()


def map_anonymous(nbytes: int, *, hugepage: int | None = None) -> Mapping:
    """Map private memory without touching it.

    Args:
        hugepage: size of the reserved hugepages to use, in bytes; None: ordinary pages, transparent hugepages if the
            kernel provides them.

    Raises:
        Unavailable: the kernel refuses.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    length, what = nbytes, "host memory"
    if hugepage is not None:
        flags |= _MAP_HUGETLB | (hugepage.bit_length() - 1) << _MAP_HUGE_SHIFT
        length, what = -(-nbytes // hugepage) * hugepage, f"hugepages of {hugepage >> 20} MiB"
    try:
        mapping = mmap.mmap(-1, length, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        remedies = [LOWER_SIZE]
        if hugepage is not None:
            remedies += [Remedy("do", value="reserve more hugepages (vm.nr_hugepages)"), UNSET_HUGEPAGES]
        raise Unavailable(f"mapping {nbytes / 1e9:.2f} GB of {what} failed: {reason}", *remedies) from None
    if hugepage is None:
        with suppress(AttributeError, OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)  # fewer faults and TLB misses; a hint, so no error if refused
    return Mapping(mapping, nbytes)


UNSET_HUGEPAGES = Remedy("set_variable", HUGEPAGE_VARIABLE)


def map_file(fd: int, offset: int, nbytes: int) -> Mapping:
    """Map a range of a file or device, shared. The mapping keeps a duplicate of `fd` open, and thereby its locks.

    Raises:
        OSError: the kernel refuses.
    """
    return Mapping(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, offset=offset), nbytes)


def keep_from_children(address: int, nbytes: int) -> None:
    """Exclude memory that a GPU writes to from forked children: copy-on-write would give this process other pages."""
    _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_DONTFORK)  # a precaution


# ---- placing ----


def touch(address: int, nbytes: int, *, threads: int, cpus: Collection[int] = ()) -> None:
    """Write zeros to memory on several threads, so that its pages exist before they are pinned or used.

    Args:
        cpus: CPUs to run the threads on: without a binding, a page is on the node of the CPU that touches it first.
            Empty: any.
    """
    # ctypes releases the GIL, so the kernel zeroes pages on all threads at once.
    _on_threads(lambda at, size: ctypes.memset(address + at, 0, size), nbytes, threads, cpus)


def populate(address: int, nbytes: int, *, threads: int, page_bytes: int) -> None:
    """Make the kernel map all pages of a range for writing, without changing their bytes.

    Args:
        page_bytes: page size, for kernels before 5.14, where each page is touched.

    Raises:
        OSError: a page is unavailable; EHWPOISON if its memory is broken.
    """
    old_kernel: list[int] = []

    def piece(at: int, size: int) -> None:
        start = ctypes.c_void_p(address + at)
        if not old_kernel and _libc().madvise(start, ctypes.c_size_t(size), _MADV_POPULATE_WRITE) == 0:
            return
        number = errno.EINVAL if old_kernel else ctypes.get_errno()
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))
        old_kernel.append(at)
        for byte in range(at, at + size, page_bytes):
            there = ctypes.c_uint8.from_address(address + byte)
            there.value = there.value

    _on_threads(piece, nbytes, threads, ())


def is_poisoned(error: OSError) -> bool:
    """Whether a page's memory is broken."""
    return error.errno == _EHWPOISON


def _on_threads(do: Callable[[int, int], object], nbytes: int, threads: int, cpus: Collection[int]) -> None:
    def settle() -> None:
        if cpus:
            with suppress(OSError):  # affects only speed
                os.sched_setaffinity(0, cpus)  # of this thread alone

    with ThreadPoolExecutor(threads, initializer=settle) as pool:
        list(pool.map(lambda at: do(at, min(TOUCH_BYTES, nbytes - at)), range(0, nbytes, TOUCH_BYTES)))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# ---- pinning ----


def pin(address: int, nbytes: int, gpu: int, undo: ExitStack, others: Collection[int] = ()) -> None:
    """Pin memory for a GPU at its CPU addresses, until `undo`.

    Pins in pieces. A piece that the driver refuses is retried with half the size, down to LEAST_REGISTER_BYTES, since
    the largest size that the driver accepts differs by system and over time.

    Args:
        others: CUDA ordinals of further GPUs that access it: memory is pinned only for existing contexts.

    Raises:
        Unavailable: the driver refuses even small pieces, or GPUs see other addresses; nothing remains pinned.
    """
    d = gpus.driver()
    with ExitStack() as pinned:
        for other in others:
            gpus.hold_context(other, pinned)
        context = gpus.hold_context(gpu, pinned)
        gpus.checked(d.cuCtxPushCurrent(context), f"using the context of GPU {gpu}")
        try:
            _register(d, address, nbytes, pinned)
        finally:
            d.cuCtxPopCurrent()
        undo.push(pinned.pop_all())


def _register(d: Any, address: int, nbytes: int, undo: ExitStack) -> None:
    piece, at = register_bytes(), 0
    flags = d.CU_MEMHOSTREGISTER_PORTABLE | d.CU_MEMHOSTREGISTER_DEVICEMAP
    while at < nbytes:
        size = min(piece, nbytes - at)
        (status,) = d.cuMemHostRegister(address + at, size, flags)
        if int(status) != 0 and size > LEAST_REGISTER_BYTES:
            piece = max(LEAST_REGISTER_BYTES, _whole_pages(size // 2))
            words = "sglang_xmem: pinning %.2f GB failed with CUDA error %d; retrying with less"
            logger.warning(words, size / 1e9, status)
            continue
        try:
            gpus.checked((status,), f"pinning {size / 1e9:.2f} of {nbytes / 1e9:.2f} GB")
        except Unavailable as error:
            raise Unavailable(error.reason, *_pin_remedies(int(status), nbytes)) from None
        undo.callback(d.cuMemHostUnregister, address + at)
        seen = gpus.checked(d.cuMemHostGetDevicePointer(address + at, 0), "mapping pinned memory for the GPU")
        if int(seen) != address + at:
            raise Unavailable("the GPU sees pinned memory at another address than the CPU, which is not supported")
        at += size


def _whole_pages(nbytes: int) -> int:
    return max(1, nbytes // (2 << 20)) * (2 << 20)


#: Errors that a locked-memory limit causes: out of memory, operating system call failed, unknown.
_LIMIT_ERRORS = (2, 304, 999)


def _pin_remedies(status: int, nbytes: int) -> list[Remedy]:
    remedies = [LOWER_SIZE]
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if status in _LIMIT_ERRORS and limit != resource.RLIM_INFINITY and limit < nbytes:
        remedies.append(Remedy("do", value=f"raise the locked-memory limit of {limit / 1e9:.2f} GB (ulimit -l)"))
    return remedies
