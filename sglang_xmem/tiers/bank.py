"""Tier `bank`: page frames in memory of mtierd, shared by all engines of this user on this machine.

Engines with equal pages (`share_as`) find each other's pages, and those of earlier engines. A rank maps its space's
whole slab and pins it for its GPU; the frames that it owns change page by page. On a devdax that the service owns, the
slab is a range of the device, pinned in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import msgspec

from sglang_xmem import gpus
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.mtier.build import BuildError, built
from sglang_xmem.mtier.client import DAX, GPU, HOST, bank_info
from sglang_xmem.tiers import hostmem
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

#: Smallest frames. Each also uses 64 bytes of the ledger, which is on the devdax if the frames are. Arenas never
#: request smaller frames; a smaller granule is one of plain bytes. The service refuses frames
#: below the first (native/pages_protocol.h).
LEAST_FRAME_BYTES = 256
LEAST_DAX_FRAME_BYTES = 4096


Memory = Literal["host", "gpu", "dax"]


class BankSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `bank` in --hicache-xmem-config.

    Attributes:
        tag: engines share pages only with engines of the same tag.
        memory: kind of the service's banks to use; all engines of a model must agree. Default: "host" if the service
            has such a bank, else "gpu"; a devdax is used only if named.
    """

    tag: str = ""
    memory: Memory | None = None


class BankRankPlan(msgspec.Struct, frozen=True):
    """The bytes that one rank may use, their kind of memory, and the granule of its slabs."""

    share_bytes: int
    memory: Memory = "host"
    granule_bytes: int = 2 << 20

    @property
    def kind(self) -> int:
        return _KINDS[self.memory]


_KINDS: dict[Memory, int] = {"host": HOST, "gpu": GPU, "dax": DAX}
_OPTIONS: dict[Memory, str] = {"host": "host:SIZE", "gpu": "gpu:ORDINAL", "dax": "dax:DEVICE"}
_WORDS: dict[Memory, str] = {"host": "host memory", "gpu": "GPU memory", "dax": "a devdax"}


class BankTier(MemoryTier):
    name = "bank"
    nominal_gbps = 56.0  # dram's memory; a hit on another engine's page saves its prefill
    traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="pcie", shared=True)
    Settings = BankSettings

    settings: BankSettings
    rank_plan: BankRankPlan

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        super().__init__(settings, rank_plan, gpu)
        #: Of the next allocations, in order; further allocations are private.
        self._identities: list[bytes] = []
        self._label = ""
        self._pool_bytes = 0
        if gpu is None:
            self.traits = msgspec.structs.replace(type(self).traits, link="none")
        elif self.rank_plan.memory == "gpu":
            self.traits = msgspec.structs.replace(type(self).traits, cpu_addressable=False, link="nvlink")
        elif self.rank_plan.memory == "dax":
            self.traits = msgspec.structs.replace(type(self).traits, link="cxl")

    @classmethod
    def plan_ranks(cls, settings: BankSettings, ranks: Ranks) -> tuple[BankRankPlan, ...]:
        on_gpus = None not in ranks.gpus
        memory: Memory = settings.memory or ("gpu" if on_gpus and bank_info(HOST).banks == 0 else "host")
        info = bank_info(_KINDS[memory])
        if memory == "gpu" and not on_gpus:
            raise SettingError("bank.memory", "is gpu, but the engine runs on the CPU", "give host")
        if info.banks == 0:
            give = [Remedy("do", value=f"start it with --bank {_OPTIONS[memory]}")]
            if bank_info(DAX).banks:
                give.append(Remedy("set_option", "bank.memory", "dax"))
            raise Unavailable(f"the service has no bank of {_WORDS[memory]}", *give)
        try:
            built()
        except BuildError as error:
            raise Unavailable(str(error).rstrip(".")) from None
        return (BankRankPlan(info.available // len(ranks.gpus), memory, info.granularity),) * len(ranks.gpus)

    def capacity_bytes(self) -> int:
        """As MemoryTier.capacity_bytes; of the rank's own model once that is known.

        Raises:
            Unavailable: all that is left is for pages of other models.
        """
        info = bank_info(self.rank_plan.kind, self._label)
        if info.available < self.rank_plan.granule_bytes and self._label:
            others = bank_info(self.rank_plan.kind).available
            if others > info.available:
                raise Unavailable(
                    f"the bank has {info.available / 1e9:.2f} GB for {self._label}, and {others / 1e9:.2f} GB more for "
                    "engines of another model",
                    Remedy("do", value="start the service with a lower --share, or stop the engines of other models"),
                )
        return min(self.rank_plan.share_bytes, info.available)

    def waste_bytes(self, granule: int) -> int:
        # The rounding of a slab and, on a devdax, of its ledger.
        return granule + (2 if self.rank_plan.memory == "dax" else 1) * self.rank_plan.granule_bytes

    def share_as(self, identities: Sequence[bytes], label: str) -> None:
        self._identities, self._label = list(identities), label

    def expect(self, nbytes: int) -> None:
        self._pool_bytes = nbytes

    def _allocate(self, nbytes: int, granule: int) -> Region:
        from sglang_xmem.bank import BankSession

        if nbytes > self.capacity_bytes():
            needs = f"the pool needs {nbytes / 1e9:.2f} GB, which exceeds the bank's free capacity"
            raise Unavailable(needs, LOWER_SIZE)
        with ExitStack() as undo:
            least = LEAST_DAX_FRAME_BYTES if self.rank_plan.memory == "dax" else LEAST_FRAME_BYTES
            frame = granule * -(-least // granule)
            identity = self._identities.pop(0) if self._identities else None
            with self._context(undo):
                session = BankSession(
                    identity,
                    frame,
                    -(-nbytes // frame),
                    self._label,
                    max(nbytes, self._pool_bytes),
                    kind=self.rank_plan.kind,
                )
            undo.callback(session.close)
            slab = session.slab
            if self.rank_plan.memory == "dax":
                self._populate(slab.address, slab.nbytes)
            if self.gpu is not None and self.rank_plan.memory != "gpu":
                hostmem.keep_from_children(slab.address, slab.nbytes)
                hostmem.pin(slab.address, slab.nbytes, self.gpu, undo)
            keep = undo.pop_all()
        return Region(
            [Extent(slab.address, slab.nbytes)],
            self._summary(),
            keep.close,
            granule=granule,
            owner=None if slab.owner is None else (slab.owner,),
            bank=session,
        )

    def _populate(self, address: int, nbytes: int) -> None:
        """Map all pages of a devdax, so that broken ones are found now.

        Raises:
            Unavailable: a page is broken.
        """
        page_bytes = min(self.rank_plan.granule_bytes, 2 << 20)
        try:
            hostmem.populate(address, nbytes, threads=hostmem.touch_threads(), page_bytes=page_bytes)
        except OSError as error:
            why = "is poisoned" if hostmem.is_poisoned(error) else f"cannot be mapped ({error.strerror})"
            # Another tag gets another slab, and the service excludes what it cannot clear.
            anew = Remedy("set_option", "bank.tag", "a new name")
            raise Unavailable(f"a page of the bank's device {why}", anew) from None

    def _summary(self) -> str:
        if self.gpu is None:
            return "mtierd's page bank"
        pinned = "" if self.rank_plan.memory == "gpu" else "pinned, "
        return f"mtierd's page bank, {pinned}in {_WORDS[self.rank_plan.memory]}"

    @contextmanager
    def _context(self, undo: ExitStack) -> Iterator[None]:
        """Make the rank's GPU current; its context stays until `undo`, because GPU memory is mapped for it."""
        if self.gpu is None or self.rank_plan.memory != "gpu":
            yield
            return
        d = gpus.driver()
        context = gpus.hold_context(self.gpu, undo)
        gpus.checked(d.cuCtxPushCurrent(context), f"using the context of GPU {self.gpu}")
        try:
            yield
        finally:
            d.cuCtxPopCurrent()
