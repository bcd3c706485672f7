"""Tier `bank`: page frames in memory of mtierd, which all engines of this user on this machine share.

Engines whose pages are equal (`share_as`) find each other's pages, and those that an engine before them left. A rank
maps the slab of its space as a whole, and pins host memory for its GPU; which frames are its own changes page by page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import msgspec

from sglang_xmem import gpus
from sglang_xmem.errors import LOWER_SIZE, Remedy, SettingError, Unavailable
from sglang_xmem.mtier.build import BuildError, built
from sglang_xmem.mtier.client import GPU, HOST, bank_info
from sglang_xmem.tiers import hostmem
from sglang_xmem.tiers.base import Extent, MemoryTier, Ranks, Region, Traits

#: What the service makes slabs in whole multiples of, as it starts.
GRANULE_BYTES = 2 << 20
#: A frame takes 64 bytes of the ledger too. No arena asks for smaller ones: a smaller granule is one of plain bytes.
LEAST_FRAME_BYTES = 256


class BankSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys of `bank` in --hicache-xmem-config.

    Attributes:
        tag: engines with different tags do not share pages.
        memory: of the service's banks; all engines of a model name the same. Default: "host" where the service has such
            a bank, else "gpu".
    """

    tag: str = ""
    memory: Literal["host", "gpu"] | None = None


class BankRankPlan(msgspec.Struct, frozen=True):
    """The bytes that one rank may take, and of which memory."""

    share_bytes: int
    memory: Literal["host", "gpu"] = "host"

    @property
    def kind(self) -> int:
        return _KINDS[self.memory]


_KINDS = {"host": HOST, "gpu": GPU}


class BankTier(MemoryTier):
    name = "bank"
    nominal_gbps = 56.0  # dram's memory, and a hit of another engine's page costs no prefill
    traits = Traits(cpu_addressable=True, counts_as_host_ram=False, link="pcie", shared=True)
    Settings = BankSettings

    settings: BankSettings
    rank_plan: BankRankPlan

    def __init__(self, settings: Any, rank_plan: Any, gpu: int | None) -> None:
        super().__init__(settings, rank_plan, gpu)
        #: Of the next allocations; those behind them are shared with nobody.
        self._identities: list[bytes] = []
        self._label = ""
        self._pool_bytes = 0
        if gpu is None:
            self.traits = msgspec.structs.replace(type(self).traits, link="none")
        elif self.rank_plan.memory == "gpu":
            self.traits = msgspec.structs.replace(type(self).traits, cpu_addressable=False, link="nvlink")

    @classmethod
    def plan_ranks(cls, settings: BankSettings, ranks: Ranks) -> tuple[BankRankPlan, ...]:
        on_gpus = None not in ranks.gpus
        memory = settings.memory or ("gpu" if on_gpus and bank_info(HOST).banks == 0 else "host")
        info = bank_info(_KINDS[memory])
        if memory == "gpu" and not on_gpus:
            raise SettingError("bank.memory", "is gpu, which an engine on the CPU cannot use", "give host")
        if info.banks == 0:
            give = Remedy("do", value="give it --bank " + ("host:SIZE" if memory == "host" else "gpu:ORDINAL"))
            raise Unavailable(f"the service has no bank of {memory} memory", give)
        try:
            built()
        except BuildError as error:
            raise Unavailable(str(error).rstrip(".")) from None
        return (BankRankPlan(info.available // len(ranks.gpus), memory),) * len(ranks.gpus)

    def capacity_bytes(self) -> int:
        return min(self.rank_plan.share_bytes, bank_info(self.rank_plan.kind).available)

    def waste_bytes(self, granule: int) -> int:
        return granule + GRANULE_BYTES

    def share_as(self, identities: Sequence[bytes], label: str) -> None:
        self._identities, self._label = list(identities), label

    def expect(self, nbytes: int) -> None:
        self._pool_bytes = nbytes

    def _allocate(self, nbytes: int, granule: int) -> Region:
        from sglang_xmem.bank import BankSession

        if nbytes > self.capacity_bytes():
            raise Unavailable(f"the pool needs {nbytes / 1e9:.2f} GB, which the bank does not have", LOWER_SIZE)
        with ExitStack() as undo:
            frame = granule * -(-LEAST_FRAME_BYTES // granule)
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
            if self.gpu is not None and self.rank_plan.memory == "host":
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

    def _summary(self) -> str:
        if self.gpu is None:
            return "mtierd's page bank"
        kind = "pinned host memory" if self.rank_plan.memory == "host" else "GPU memory"
        return f"{kind} of mtierd's page bank"

    @contextmanager
    def _context(self, undo: ExitStack) -> Iterator[None]:
        """The rank's GPU is current, and its context stays until `undo`: GPU memory is mapped for it."""
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
