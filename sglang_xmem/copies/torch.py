"""The page copy as torch index operations on CPU memory: the contract's plain path, and the one without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_xmem.copies.base import PageCopier


class TorchPageCopier(PageCopier):
    """Copies at once, on the calling thread; arguments as PageCopier's, all planes on the CPU.

    Raises:
        ValueError: also for planes that are not CPU tensors.
    """

    name = "torch"

    def __init__(
        self, tier_planes: Sequence[torch.Tensor], device_planes: Sequence[torch.Tensor], page_size: int
    ) -> None:
        super().__init__(tier_planes, device_planes, page_size)
        for plane in (*tier_planes, *device_planes):
            if plane.device.type != "cpu":
                raise ValueError(f"the copier 'torch' is for planes on the CPU, not on {plane.device}")
        word = torch.int64.itemsize
        offsets = (plane.storage_offset() for plane in (*tier_planes, *device_planes))
        #: One answer for all planes, since the two sides of a copy must agree.
        self._in_words = self.page_bytes % word == 0 and all(offset % word == 0 for offset in offsets)
        self._tier_pages = [self._as_pages(plane) for plane in tier_planes]
        self._device_pages = [self._as_pages(plane) for plane in device_planes]

    def _as_pages(self, plane: torch.Tensor) -> torch.Tensor:
        """View of shape (pages, page_bytes), less the rows behind the last whole page; in words where that is possible.

        Torch indexes element by element, so bytes would take many times as long.
        """
        pages = plane.shape[0] // self.page_size
        paged = plane[: pages * self.page_size].view(pages, self.page_bytes)
        return paged.view(torch.int64) if self._in_words else paged

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        tier_pages, device_pages = tier_rows // self.page_size, device_rows // self.page_size
        for plane in planes:
            tier, device = self._tier_pages[plane], self._device_pages[plane]
            if load:
                device[device_pages] = tier[tier_pages]
            else:
                tier[tier_pages] = device[device_pages]
