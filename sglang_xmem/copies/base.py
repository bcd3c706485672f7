"""What every page copier does: move pages between a memory tier and the GPU's KV pool.

Words used here. A *row* is one token's K or V of one layer. A *page* is `page_size` consecutive rows,
contiguous in memory. A *plane* is all rows of one layer's K or of one layer's V; plane `2 * layer` is K and
plane `2 * layer + 1` is V, so a layer is two consecutive planes. *Load* moves tier -> GPU, *store* GPU -> tier
(SGLang calls the latter backup or write-back).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from sglang_xmem.copies.signals import LoadSignals

PLANES_PER_LAYER = 2

#: Rows that are on the CPU too, or not.
OnCpu = torch.Tensor | None


class PageCopier(ABC):
    """Copies pages between `tier_planes` and `device_planes`, which stay fixed for its whole life.

    Args:
        tier_planes: one uint8 tensor a plane, shape (tier_tokens, row_bytes), rows packed. The tensor is only
            a typed address: for memory outside this GPU no torch operation may be run on it.
        device_planes: the same of the GPU's KV pool, shape (device_tokens, row_bytes), rows packed.
        page_size: tokens a page, >= 1; a page's rows are consecutive on both sides.

    Raises:
        ValueError: planes that do not match in number, row_bytes or packing.
    """

    name: ClassVar[str]

    def __init__(
        self, tier_planes: Sequence[torch.Tensor], device_planes: Sequence[torch.Tensor], page_size: int
    ) -> None:
        if not tier_planes or len(tier_planes) != len(device_planes):
            raise ValueError(f"{len(tier_planes)} tier planes against {len(device_planes)} device planes")
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        row_bytes = tier_planes[0].shape[-1]
        for plane in (*tier_planes, *device_planes):
            if plane.dim() != 2 or plane.element_size() != 1 or plane.shape[1] != row_bytes:
                raise ValueError(f"a plane must be bytes of shape (tokens, {row_bytes}), not {tuple(plane.shape)}")
            if not plane.is_contiguous():
                raise ValueError(f"a plane's rows must be packed; strides are {plane.stride()}")
        self.tier_planes = tuple(tier_planes)
        self.device_planes = tuple(device_planes)
        self.num_planes = len(tier_planes)
        self._device = device_planes[0].device
        self.row_bytes = row_bytes
        self.page_size = page_size
        self.page_bytes = page_size * row_bytes

    def load(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range) -> None:
        """Enqueue tier -> GPU for `planes` on the current stream; never synchronizes.

        Args:
            tier_rows, device_rows: int64, shape (num_pages,), on the device of the KV pool, any element stride:
                the index of the first row of each page, a multiple of `page_size`. Page i goes from
                tier_rows[i] to device_rows[i]. A destination must not occur twice. The caller keeps both alive
                until the stream has passed this point.
            planes: consecutive plane numbers, a subrange of range(num_planes).
        """
        if self._num_pages(tier_rows, device_rows, planes):
            self._copy(tier_rows, device_rows, planes, load=True)

    def make_signals(self, num_parts: int) -> LoadSignals | None:
        """Counters for `load_signalling`; None where this copier or this GPU has none. Waits for the GPU."""
        return None

    def load_signalling(
        self,
        tier_rows: torch.Tensor,
        device_rows: torch.Tensor,
        planes: range,
        signals: LoadSignals,
        tier_rows_on_cpu: OnCpu = None,
    ) -> None:
        """`load` that tells when each of `signals.num_parts` equal parts of `planes`, in order, is there.

        Args:
            signals: from `make_signals`; the load before that used them is complete.
            tier_rows_on_cpu: the same values as `tier_rows`, which a copier may use.
        """
        signals.check_parts(planes)
        if self._num_pages(tier_rows, device_rows, planes):
            self._copy_signalling(tier_rows, device_rows, planes, signals, tier_rows_on_cpu)

    def store(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range) -> None:
        """Enqueue GPU -> tier for `planes` on the current stream; as `load`, the other way."""
        if self._num_pages(tier_rows, device_rows, planes):
            self._copy(tier_rows, device_rows, planes, load=False)

    def describe(self) -> str:
        """What this copier is and how it is set, for one log line."""
        return self.name

    def _num_pages(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range) -> int:
        """Pages that one call moves, 0 if there is nothing to do; the checks that a launch can afford."""
        for rows in (tier_rows, device_rows):
            if rows.dtype is not torch.int64 or rows.ndim != 1 or rows.device != self._device:
                raise ValueError(f"rows must be a vector of int64 on {self._device}, not {rows.dtype} on {rows.device}")
        num_pages = tier_rows.numel()
        if num_pages != device_rows.numel():
            raise ValueError(f"{num_pages} tier rows against {device_rows.numel()} device rows")
        if planes.step != 1 or planes.start < 0 or planes.stop > self.num_planes:
            raise ValueError(f"planes must be consecutive numbers below {self.num_planes}, not {planes}")
        return num_pages * len(planes)

    @abstractmethod
    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        """Enqueue one direction; arguments are checked and there is at least one page and one plane."""

    def _copy_signalling(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, signals: LoadSignals, on_cpu: OnCpu
    ) -> None:
        """`load_signalling`, likewise, of a copier that makes signals; `on_cpu` is its `tier_rows_on_cpu`."""
        raise NotImplementedError(f"the copier {self.name!r} has no signals")
