"""Tier `mtier`: banks of X-Mem memory, or of a service with its interface such as mtierd, through X-Mem's own SDK.

Uses only the SDK's malloc, free and status. An allocation of the SDK is one range of addresses in one bank, and two
cannot be made contiguous. So a region over several banks has one extent per bank, of equal sizes as far as the banks'
free capacity allows. Banks are assigned to ranks round-robin. `mTierResetAll`, which frees every process's memory, is
never called.

Importing the SDK loads its library and connects to the service, which fails in many ways. So it is imported where it is
used, and each failure becomes one sentence.
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
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

LIBRARY_VARIABLE = "MTIER_LIB_PATH"
DEFAULT_LIBRARY = "/usr/local/lib/libmtier.so"
#: Allocations are multiples of this, in mtierd by default and on GPUs.
GRANULE_BYTES = 2 << 20
_START = (Remedy("start_service", value="X-Mem's service or `sglang-xmem mtierd`"),)
_LARGER = (LOWER_SIZE, Remedy("do", value="start the service with larger banks"))
_LOG = (Remedy("do", value="see the service's log"),)
#: Remedies of an error, by the name of the SDK's class.
_FIXES: dict[str, tuple[Remedy, ...]] = {
    "MTierNotInitializedError": _START,
    "MTierOutOfMemoryError": _LARGER,
    "MTierInvalidArgumentError": (Remedy("set_option", "mtier.banks", "existing banks"),),
    "MTierServiceUnavailableError": _START,
    "MTierEmptyCudaContextError": (Remedy("do", value="run the engine on a GPU, which this service's banks need"),),
    "MTierServerError": (Remedy("do", value="see the service's log, and restart it"),),
    "MTierMallocError": (LOWER_SIZE, Remedy("do", value="free memory in the bank's device")),
}

#: The SDK's malloc and free are not thread-safe, so this process serializes all SDK calls.
_lock = threading.Lock()
_Value = TypeVar("_Value")


class MTierSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `mtier` in --hicache-xmem-config.

    Attributes:
        banks: the SDK's bank numbers to use, assigned to ranks round-robin; a rank's pool is striped over all of its
            banks. Default: all.
    """

    banks: tuple[int, ...] | None = None


class MTierRankPlan(msgspec.Struct, frozen=True):
    """One rank's banks, and the bytes that it may use in each: ranks that share a bank share its free capacity."""

    banks: tuple[int, ...]
    shares: tuple[int, ...]


class MTierTier(MemoryTier):
    name = "mtier"
    # Above tier peer, which has the same link if banks are GPU memory: a user who runs the service wants it used.
    nominal_gbps = 400.0
    traits = Traits(cpu_addressable=False, counts_as_host_ram=False, link="nvlink")
    Settings = MTierSettings

    settings: MTierSettings
    rank_plan: MTierRankPlan

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        super().__init__(settings, rank_plan, gpu)
        if gpu is None:
            self.traits = Traits(cpu_addressable=True, counts_as_host_ram=True, link="none")

    @classmethod
    def plan_ranks(cls, settings: MTierSettings, ranks: Ranks) -> tuple[MTierRankPlan, ...]:
        named = settings.banks
        if named is not None and (not named or len(set(named)) != len(named)):
            raise SettingError("mtier.banks", f"is {list(named)}", "name at least one bank, and none twice")
        count = int(_call(lambda sdk: sdk.get_status().num_banks, "asking the service for its banks"))
        for bank in named or ():
            if not 0 <= bank < count:
                problem = f"names bank {bank}, but the service has {count}, counted from 0"
                raise SettingError("mtier.banks", problem, "name one of these")
        banks = named if named is not None else tuple(range(count))
        if not banks:
            raise Unavailable("the service has no bank", Remedy("do", value="start it with --bank"))
        n_ranks = len(ranks.gpus)
        free = {bank: _available_bytes(bank) for bank in banks}
        parts = [banks[rank::n_ranks] or (banks[rank % len(banks)],) for rank in range(n_ranks)]
        users = {bank: sum(bank in mine for mine in parts) for bank in banks}
        # Whole granules, so that all ranks' shares fit into the bank.
        shares = {bank: free[bank] // users[bank] // GRANULE_BYTES * GRANULE_BYTES for bank in banks}
        return tuple(MTierRankPlan(mine, tuple(shares[bank] for bank in mine)) for mine in parts)

    def capacity_bytes(self) -> int:
        return sum(self._free().values())

    def waste_bytes(self, granule: int) -> int:
        # Per bank: a granule that does not fit, and the service's rounding.
        return (granule + GRANULE_BYTES) * len(self.rank_plan.banks)

    def _free(self) -> dict[int, int]:
        """Return the bytes that the rank may use in each of its banks now."""
        return {
            bank: min(_available_bytes(bank), share)
            for bank, share in zip(self.rank_plan.banks, self.rank_plan.shares, strict=True)
        }

    def _allocate(self, nbytes: int, granule: int) -> Region:
        parts = _deal(self._free(), nbytes // granule, granule)
        kind = "host memory" if self.gpu is None else "memory"
        banks = sorted(parts)
        for bank in banks:
            self._check_kind(bank)
        with contextlib.ExitStack() as undo:
            extents = []
            for bank in banks:
                size = parts[bank] * granule
                extents.append(Extent(self._malloc(bank, size), size))
                release = _releaser(extents[-1].address, self._context)
                undo.callback(release)
                atexit.register(release)
            keep = undo.pop_all()
        summary = f"{kind} of mtier bank {', '.join(map(str, banks))}"
        return Region(extents, summary, keep.close, granule=granule)

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
            torch.cuda.synchronize(self.gpu)  # creates the context if there is none; waits for copies before a free
            yield

    def _check_kind(self, bank: int) -> None:
        """Refuse a bank of the wrong kind of memory, which would crash at the first copy.

        Tries a small allocation: a full one would fill a host bank before the check fails.
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
                raise Unavailable(f"bank {bank} is GPU memory, but the engine runs on the CPU")
            return
        d = gpus.driver()
        attribute = d.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        try:
            kind = gpus.checked(d.cuPointerGetAttribute(attribute, address), "asking for the memory's kind")
        except Unavailable:
            kind = None  # unknown to the driver
        if kind is None or int(kind) != int(d.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            raise Unavailable(
                f"bank {bank} is host memory that GPUs cannot address",
                Remedy("use_tier", value="dram"),
                Remedy("do", value="serve GPU memory with `sglang-xmem mtierd --bank gpu:ORDINAL`"),
            )


def _deal(free: dict[int, int], granules: int, size: int) -> dict[int, int]:
    """Divide `granules` of `size` bytes among the banks, as equally as their free bytes allow.

    Raises:
        Unavailable: the granules do not fit.
    """
    most = {bank: nbytes // size for bank, nbytes in free.items()}
    if sum(most.values()) < granules:
        there = ", ".join(f"{nbytes / 1e9:.2f} GB in bank {bank}" for bank, nbytes in free.items())
        raise Unavailable(
            f"the pool needs {granules} piece(s) of {size / 1e9:.2f} GB, but the service has {there} free, which holds "
            f"{sum(most.values())}",
            *_LARGER,
        )
    parts: dict[int, int] = {}
    left = granules
    # The bank with the least free memory first: the others get what exceeds its capacity.
    for index, bank in enumerate(sorted(most, key=lambda bank: most[bank])):
        parts[bank] = min(most[bank], left // (len(most) - index))
        left -= parts[bank]
    return {bank: count for bank, count in parts.items() if count}


def _releaser(address: int, context: Callable[[], contextlib.AbstractContextManager[None]]) -> Callable[[], None]:
    """Return a function that frees an allocation: once, without errors, and only in the process that made it."""
    owner = os.getpid()
    done = threading.Lock()

    def release() -> None:
        if not done.acquire(blocking=False):
            return
        atexit.unregister(release)
        if os.getpid() == owner:
            # A service that is gone has already reclaimed its memory.
            with contextlib.suppress(Exception), context():
                _call(lambda sdk: sdk.free(address), "freeing")

    return release


def bank_rooms() -> list[tuple[int, int]]:
    """Return (total, available) bytes of each bank of the service, for reports; planning makes its own queries.

    Raises:
        Unavailable: the SDK, its library or the service is missing or fails.
    """
    count = int(_call(lambda sdk: sdk.get_status().num_banks, "asking the service for its banks"))
    return [_bank_capacity(bank) for bank in range(count)]


def _bank_capacity(bank: int) -> tuple[int, int]:
    def ask(sdk: Any) -> tuple[int, int]:
        status = sdk.get_bank_status(bank)
        return int(status.total_memory), int(status.available_memory)

    return _call(ask, f"asking for the free capacity of bank {bank}")


def _available_bytes(bank: int) -> int:
    return _bank_capacity(bank)[1]


def _call(function: Callable[[Any], _Value], doing: str) -> _Value:
    """Return `function(SDK module)`, serialized with this process's other SDK calls.

    Raises:
        Unavailable: the SDK, its library or the service is missing, or the call failed.
    """
    with _lock:
        sdk = _sdk()
        try:
            return function(sdk)
        except sdk.MTierError as error:
            raise _failed(error, doing) from None


def _sdk() -> Any:
    """Return module `xmem.mtier_sdk`, with its library loaded and connected.

    Raises:
        Unavailable: one of these failed.
    """
    loaded = sys.modules.get("xmem.mtier_sdk")
    if loaded is not None and "xmem" in sys.modules:
        return loaded
    with _quiet():
        failure = _import_failure()
        gc.collect()  # half-made objects of a failed import print when collected; do that within _quiet
    if failure is not None:
        raise failure
    return sys.modules["xmem.mtier_sdk"]


def _import_failure() -> Unavailable | None:
    """Import the SDK; return the reason if that fails."""
    library = Remedy("set_variable", LIBRARY_VARIABLE, "the path of libmtier.so")
    try:
        import xmem.mtier_sdk  # noqa: F401
    except ImportError as error:
        if (error.name or "").split(".")[0] == "xmem":
            command = Remedy("install", value="pip install --no-deps xmem-mtier==0.1.2")
            return Unavailable("X-Mem's SDK is not installed", command)
        return Unavailable(
            f"X-Mem's SDK cannot be imported ({_one_line(error)})", Remedy("do", value="install its dependencies")
        )
    except OSError as error:
        path = os.environ.get(LIBRARY_VARIABLE, DEFAULT_LIBRARY)
        if not os.path.exists(path):
            build = "on a machine without X-Mem, build it with `python -m sglang_xmem.mtier.build DIRECTORY`"
            return Unavailable(f"X-Mem's library {path} does not exist", library, Remedy("do", value=build))
        return Unavailable(f"X-Mem's library {path} cannot be loaded ({_one_line(error)})", library)
    except AttributeError as error:
        return Unavailable(f"the library at {LIBRARY_VARIABLE} is not X-Mem's ({_one_line(error)})", library)
    except Exception as error:  # MTierError, whose class is out of reach while the import fails
        return _failed(error, "connecting to the service")
    return None


def _failed(error: Exception, doing: str) -> Unavailable:
    words = _one_line(error)
    remedies = _FIXES.get(type(error).__name__, _LOG)
    if remedies is _START and "sglang-xmem mtierd" in words:
        remedies = ()  # mtierd's own library already names the command
    return Unavailable(f"{doing} failed: {words}", *remedies)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Redirect the SDK's output to stderr, and silence errors of its half-made objects when they are collected."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.unraisablehook = before


def _is_mapped(address: int, nbytes: int) -> bool:
    """Whether the CPU can read and write a whole range."""
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
