"""Tier `mtier`: banks of X-Mem memory, or of a service with its interface such as mtierd, through X-Mem's own SDK.

Only the SDK's thin calls are used: malloc, free and status. The SDK gives a range of addresses an allocation, in one
bank, with no way to put two side by side; so a pool over several banks is one allocation in each, and the parts that it
was asked for in (the pool's planes) are dealt to these in turn. Ranks are dealt over the banks in turn too.
`mTierResetAll`, which frees every process's memory, is never called.

Importing the SDK opens its library and connects to the service, and its failures are of many kinds, so it is imported
where it is used and each failure becomes a sentence.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from sglang_xmem import gpus
from sglang_xmem.errors import ConfigError, TierUnavailable
from sglang_xmem.tiers.base import Locality, MemoryTier, Ranks, Region

LIBRARY_VARIABLE = "MTIER_LIB_PATH"
DEFAULT_LIBRARY = "/usr/local/lib/libmtier.so"
#: What allocations are whole multiples of, in mtierd as it starts and on GPUs.
GRANULE_BYTES = 2 << 20
_START = "start X-Mem's service or `sglang-xmem mtierd`"
#: What to do about an error, by the name of the SDK's class.
_WAYS_OUT = {
    "MTierNotInitializedError": _START,
    "MTierOutOfMemoryError": "lower --hicache-size or --hicache-ratio, or give the service larger banks",
    "MTierInvalidArgumentError": "name banks that the service has in --hicache-xmem-config 'mtier.banks'",
    "MTierServiceUnavailableError": _START,
    "MTierEmptyCudaContextError": "check that SGLang runs on a GPU, which this service's banks need",
    "MTierServerError": "look into the service's log, and start it again",
    "MTierMallocError": "lower --hicache-size or --hicache-ratio, or free memory where the bank is",
}

#: The SDK's malloc and free are not thread-safe, so all of its calls in this process take turns.
_lock = threading.Lock()
_Value = TypeVar("_Value")


class MTierSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `mtier` in --hicache-xmem-config.

    Attributes:
        banks: the SDK's bank numbers to use; dealt to the ranks in turn, and each rank's pool is striped over all of
            its banks. Default: all.
    """

    banks: tuple[int, ...] | None = None


class MTierSeat(msgspec.Struct, frozen=True):
    """One rank's banks, and the bytes that it may take of each: ranks that share a bank share its room."""

    banks: tuple[int, ...]
    shares: tuple[int, ...]


class MTierTier(MemoryTier):
    name = "mtier"
    # Above tier peer, whose link it is where banks are other GPUs' memory: who runs the service wants it used.
    nominal_gbps = 400.0
    locality = Locality.DEVICE
    Settings = MTierSettings

    settings: MTierSettings
    seat: MTierSeat

    def __init__(self, settings: Any, seat: Any, gpu: int | None) -> None:
        super().__init__(settings, seat, gpu)
        if gpu is None:
            self.locality = Locality.HOST

    @classmethod
    def seats(cls, settings: MTierSettings, ranks: Ranks) -> tuple[MTierSeat, ...]:
        option = "--hicache-xmem-config 'mtier.banks'"
        named = settings.banks
        if named is not None and (not named or len(set(named)) != len(named)):
            raise ConfigError(f"{option} is {list(named)}; name at least one bank, and none twice.")
        count = int(_call(lambda sdk: sdk.get_status().num_banks, "asking the service for its banks"))
        for bank in named or ():
            if not 0 <= bank < count:
                raise ConfigError(f"{option} names bank {bank}, but the service has {count}, counted from 0.")
        banks = named if named is not None else tuple(range(count))
        if not banks:
            raise TierUnavailable("the service has no bank; give it one")
        n_ranks = len(ranks.gpus)
        room = {bank: _available_bytes(bank) for bank in banks}
        dealt = [banks[rank::n_ranks] or (banks[rank % len(banks)],) for rank in range(n_ranks)]
        users = {bank: sum(bank in mine for mine in dealt) for bank in banks}
        # Whole granules, so that what each rank takes of its share fits beside the others'.
        shares = {bank: room[bank] // users[bank] // GRANULE_BYTES * GRANULE_BYTES for bank in banks}
        return tuple(MTierSeat(mine, tuple(shares[bank] for bank in mine)) for mine in dealt)

    def capacity_bytes(self) -> int:
        return sum(self._rooms().values())

    def _rooms(self) -> dict[int, int]:
        """Bytes that the rank may take of each of its banks now, the roomiest bank first."""
        rooms = {
            bank: min(_available_bytes(bank), share)
            for bank, share in zip(self.seat.banks, self.seat.shares, strict=True)
        }
        return dict(sorted(rooms.items(), key=lambda item: -item[1]))

    def allocate(self, nbytes: int, parts: int = 1) -> Region:
        size = nbytes // parts
        dealt = _deal(self._rooms(), size, parts)
        kind = "host memory" if self.gpu is None else "memory"
        banks = sorted(set(dealt))
        for bank in banks:
            self._check_kind(bank)
        with contextlib.ExitStack() as undo:
            start = {}
            for bank in banks:
                start[bank] = self._malloc(bank, dealt.count(bank) * size)
                release = _releaser(start[bank], self._context)
                undo.callback(release)
                atexit.register(release)
            keep = undo.pop_all()
        summary = f"{kind} of mtier bank {', '.join(map(str, banks))}"
        if len(banks) == 1:
            return Region(start[banks[0]], nbytes, summary, keep.close)
        addresses = tuple(start[bank] + dealt[:index].count(bank) * size for index, bank in enumerate(dealt))
        return Region(addresses[0], nbytes, summary, keep.close, parts=addresses)

    def _malloc(self, bank: int, nbytes: int) -> int:
        with self._context():
            return int(_call(lambda sdk: sdk.malloc(bank, nbytes), f"allocating {nbytes / 1e9:.2f} GB in bank {bank}"))

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """The SDK maps memory in the current CUDA context: the rank's own."""
        if self.gpu is None:
            yield
            return
        import torch

        with torch.cuda.device(self.gpu):
            torch.cuda.synchronize(self.gpu)  # makes the context where nothing has; nothing is freed under a copy
            yield

    def _check_kind(self, bank: int) -> None:
        """Refuse a bank of the wrong kind of memory, which would end in a crash at the first copy.

        By a little of it: the whole of a host bank would be filled before it turned out that GPUs cannot use it.
        """
        address = self._malloc(bank, GRANULE_BYTES)
        release = _releaser(address, self._context)
        try:
            self._check_address(bank, address)
        finally:
            release()

    def _check_address(self, bank: int, address: int) -> None:
        if self.gpu is None:
            if not _is_mapped(address, GRANULE_BYTES):
                raise TierUnavailable(f"bank {bank} is GPU memory, which SGLang on the CPU cannot use")
            return
        d = gpus.driver()
        attribute = d.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        try:
            kind = gpus.checked(d.cuPointerGetAttribute(attribute, address), "asking for the memory's kind")
        except TierUnavailable:
            kind = None  # nothing that the driver knows
        if kind is None or int(kind) != int(d.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            raise TierUnavailable(
                f"bank {bank} is host memory that GPUs cannot address; use --hicache-xmem-tier dram, or serve GPU "
                "memory with `sglang-xmem mtierd --bank gpu:ORDINAL`"
            )


def _deal(rooms: dict[int, int], size: int, parts: int) -> list[int]:
    """The bank of each of `parts` parts of `size` bytes: `rooms`' banks in turn, without those that are full.

    Raises:
        TierUnavailable: they do not all fit.
    """
    left = {bank: room // size for bank, room in rooms.items()}
    if sum(left.values()) < parts:
        room = ", ".join(f"{room / 1e9:.2f} GB in bank {bank}" for bank, room in rooms.items())
        raise TierUnavailable(
            f"the service has {room} available, which holds {sum(left.values())} of the pool's {parts} part(s) of "
            f"{size / 1e9:.2f} GB; lower --hicache-size or --hicache-ratio, or give the service larger banks"
        )
    dealt: list[int] = []
    while len(dealt) < parts:
        for bank, count in left.items():
            if count and len(dealt) < parts:
                left[bank] -= 1
                dealt.append(bank)
    return dealt


def _releaser(address: int, context: Callable[[], contextlib.AbstractContextManager[None]]) -> Callable[[], None]:
    """What frees an allocation: once, quietly, and only in the process that made it."""
    owner = os.getpid()
    done = threading.Lock()

    def release() -> None:
        if not done.acquire(blocking=False):
            return
        atexit.unregister(release)
        if os.getpid() == owner:
            # A service that is gone has its memory back already.
            with contextlib.suppress(Exception), context():
                _call(lambda sdk: sdk.free(address), "freeing")

    return release


def bank_rooms() -> list[tuple[int, int]]:
    """(total, available) bytes of each of the service's banks, for people; planning asks for what it needs itself.

    Raises:
        TierUnavailable: the SDK, its library or the service is missing or fails.
    """
    count = int(_call(lambda sdk: sdk.get_status().num_banks, "asking the service for its banks"))
    return [_bank_room(bank) for bank in range(count)]


def _bank_room(bank: int) -> tuple[int, int]:
    def ask(sdk: Any) -> tuple[int, int]:
        status = sdk.get_bank_status(bank)
        return int(status.total_memory), int(status.available_memory)

    return _call(ask, f"asking for the room of bank {bank}")


def _available_bytes(bank: int) -> int:
    return _bank_room(bank)[1]


def _call(function: Callable[[Any], _Value], doing: str) -> _Value:
    """The value of `function(SDK module)`, as the only SDK call of this process at a time.

    Raises:
        TierUnavailable: the SDK, its library or the service is missing, or the call failed.
    """
    with _lock:
        sdk = _sdk()
        try:
            return function(sdk)
        except sdk.MTierError as error:
            raise TierUnavailable(_sentence(error, doing)) from None


def _sdk() -> Any:
    """Module `xmem.mtier_sdk`, its library loaded and connected.

    Raises:
        TierUnavailable: one of these failed.
    """
    loaded = sys.modules.get("xmem.mtier_sdk")
    if loaded is not None and "xmem" in sys.modules:
        return loaded
    with _quiet():
        reason = _import_failure()
        gc.collect()  # what a failed import leaves half made says so when it is collected; not after _quiet
    if reason is not None:
        raise TierUnavailable(reason)
    return sys.modules["xmem.mtier_sdk"]


def _import_failure() -> str | None:
    """Import the SDK; returns what is wrong with it."""
    try:
        import xmem.mtier_sdk  # noqa: F401
    except ImportError as error:
        if (error.name or "").split(".")[0] == "xmem":
            return "X-Mem's SDK is not installed; run pip install --no-deps xmem-mtier==0.1.2"
        return f"X-Mem's SDK cannot be imported ({_one_line(error)}); install what it needs"
    except OSError as error:
        path = os.environ.get(LIBRARY_VARIABLE, DEFAULT_LIBRARY)
        if not os.path.exists(path):
            return (
                f"X-Mem's library is not at {path}; set {LIBRARY_VARIABLE} to libmtier.so, which "
                "`python -m sglang_xmem.mtier.build DIRECTORY` makes on machines without X-Mem"
            )
        return f"X-Mem's library {path} cannot be loaded ({_one_line(error)}); set {LIBRARY_VARIABLE} to another"
    except AttributeError as error:
        return f"the library at {LIBRARY_VARIABLE} is not X-Mem's ({_one_line(error)}); set it to libmtier.so"
    except Exception as error:  # MTierError, whose class is out of reach while the import fails
        return _sentence(error, "connecting to the service")
    return None


def _sentence(error: Exception, doing: str) -> str:
    way_out = _WAYS_OUT.get(type(error).__name__, "look into the service's log")
    return f"{doing} failed: {_one_line(error)}; {way_out}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The SDK prints to stdout, and its half-made objects complain as they are collected."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.unraisablehook = before


def _is_mapped(address: int, nbytes: int) -> bool:
    """Whether this process's CPU can read and write all of a range."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:  # in ascending order: "7f00-7f01 rw-s ..."
            bounds, access = line.split()[:2]
            start, end = (int(number, 16) for number in bounds.split("-"))
            if start <= address < end and access.startswith("rw"):
                if address + nbytes <= end:
                    return True
                nbytes -= end - address
                address = end
    return False
