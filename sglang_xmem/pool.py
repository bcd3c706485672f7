"""A rank's pool in a tier: one region of planes (a layer's K or V), and the copies to and from it.

Nothing here knows SGLang; an adapter puts it behind SGLang's host-pool class. All methods but the page functions
for storage run on the scheduler thread: they never wait for the GPU and never loop over tokens.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_xmem.copies import make_copier, on_peer_or_rank, with_staging
from sglang_xmem.copies.base import PLANES_PER_LAYER, PageCopier
from sglang_xmem.plan import Placement, describe_passed_over
from sglang_xmem.tiers import Locality, Region

if TYPE_CHECKING:
    from sglang_xmem.config import CopySettings
    from sglang_xmem.copies.signals import LoadSignals

logger = logging.getLogger(__name__)

#: Loads whose layers may be waited for at a time; SGLang's LayerDoneCounter has 3.
LOADS_IN_FLIGHT = 3


class TierPool:
    """KV pages of one rank in tier memory.

    Args:
        placement: gives the memory.
        num_layers, num_tokens, page_size: shape; num_tokens is a multiple of page_size.
        row_bytes: bytes of one token's K (equally V) of one layer.
        device: device of SGLang's KV pool.

    Raises:
        ConfigError: no tier can hold the pool.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        num_layers: int,
        num_tokens: int,
        page_size: int,
        row_bytes: int,
        device: torch.device,
        copy: CopySettings,
    ) -> None:
        self.num_layers = num_layers
        self.num_tokens = num_tokens
        self.page_size = page_size
        self.row_bytes = row_bytes
        self.device = device
        self._copy = copy
        self._copier: PageCopier | None = None
        nbytes = PLANES_PER_LAYER * num_layers * num_tokens * row_bytes
        self.tier, self._region = placement.allocate(nbytes, PLANES_PER_LAYER * num_layers)
        #: By kind (K before V) and layer: a plane's bytes, shape (num_tokens, row_bytes). Where the tier gave one
        #: range, the tensor of all of them, shape (2, num_layers, num_tokens, row_bytes): HiCache's layer_first.
        self.bytes: torch.Tensor | list[list[torch.Tensor]] = _planes_of(
            self._region, device, (PLANES_PER_LAYER, num_layers, num_tokens, row_bytes)
        )
        self._planes = [range(PLANES_PER_LAYER * layer, PLANES_PER_LAYER * (layer + 1)) for layer in range(num_layers)]
        self._all_planes = range(PLANES_PER_LAYER * num_layers)
        self._signals: list[LoadSignals] = []
        self._storage_lock = threading.Lock()  # SGLang's storage threads may still run when the pool is closed
        self._closed = False
        self._storage_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cuda":
            self._warm_pinned_cache()
        logger.info(
            "sglang_xmem: tier=%s pool=%.2f GB (%d tokens) in %s for %s%s",
            self.tier.name,
            nbytes / 1e9,
            num_tokens,
            self._region.summary,
            device,
            f"; passed over: {describe_passed_over(placement.passed_over)}" if placement.passed_over else "",
        )

    def attach(self, device_k: Sequence[torch.Tensor], device_v: Sequence[torch.Tensor]) -> None:
        """Name the GPU's buffers: a tensor a layer, first dimension tokens, rows packed.

        Raises:
            ValueError: rows of another width than the pool's, or not packed.
            CopyError: the copier cannot be built.
        """
        device_planes, tier_planes = [], []
        for layer, pair in enumerate(zip(device_k, device_v, strict=True)):
            for kind, buffer in enumerate(pair):
                device_planes.append(buffer.view(buffer.shape[0], -1).view(torch.uint8))
                tier_planes.append(self.bytes[kind][layer])
        make = functools.partial(
            make_copier,
            self._copy.kernel,
            tier_planes,
            device_planes,
            self.page_size,
            tier_locality=self.tier.locality.value,
            load=self._copy.load,
            store=self._copy.store,
            relays=self._region.relays,
        )
        gpu = self._region.copying_gpu
        self._copier, refused = on_peer_or_rank(make, gpu, required=self._region.copying_required)
        if refused is not None:
            logger.info("sglang_xmem: %s runs the copies, not GPU %d: %s", self.device, gpu, refused)
        if self.tier.locality is Locality.HOST:
            mib = self._copy.staging_mib
            nbytes = None if mib is None else mib << 20
            self._copier, refused = with_staging(self._copier, nbytes, self._region.pinned)
            if refused is not None and self.device.type == "cuda":
                logger.info("sglang_xmem: loads are not staged for the copy engine: %s", refused)
        made = (self._copier.make_signals(self.num_layers) for _ in range(LOADS_IN_FLIGHT))
        self._signals = [signals for signals in made if signals is not None]
        told = "no signals of layers" if not self._signals else "layers told by counters"
        if self._signals and self._signals[0].flushes:
            told += ", waits for them flush"
        logger.info(
            "sglang_xmem: pages of %d B copied by %s; %s", self._copier.page_bytes, self._copier.describe(), told
        )

    @property
    def copier(self) -> PageCopier:
        assert self._copier is not None, "attach() comes first"
        return self._copier

    def stage_rows(self, indices: torch.Tensor) -> torch.Tensor:
        """First row of each page of `indices` (int64 token indices in whole pages), on the pool's device.

        For CPU indices on a GPU pool: one small copy through pinned memory, enqueued on the current stream.
        """
        rows = indices[:: self.page_size]
        if rows.device.type == self.device.type:
            return rows
        # Pageable memory would make the copy wait for the stream. torch keeps a pinned block until the copies
        # that read it are done.
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows)
        return pinned.to(self.device, non_blocking=True)

    def load_layer(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, layer: int) -> None:
        """Enqueue tier -> GPU of one layer's pages on the current stream; rows as from `stage_rows`."""
        self.copier.load(tier_rows, device_rows, self._planes[layer])

    def take_signals(self) -> LoadSignals | None:
        """Signals for `load_layers`, for good; None where there are none (left): load layer by layer then."""
        return self._signals.pop() if self._signals else None

    def load_layers(
        self,
        tier_rows: torch.Tensor,
        device_rows: torch.Tensor,
        signals: LoadSignals | None = None,
        tier_indices: torch.Tensor | None = None,
    ) -> None:
        """Enqueue tier -> GPU of all layers' pages on the current stream, in the order of layers.

        Args:
            signals: tell when a layer is in place, as `signals.wait(layer)` on another stream.
            tier_indices: what `tier_rows` were staged from; on the CPU they let the copy engine help.
        """
        if signals is None:
            self.copier.load(tier_rows, device_rows, self._all_planes)
        else:
            on_cpu = None
            if tier_indices is not None and tier_indices.device.type == "cpu":
                on_cpu = tier_indices[:: self.page_size]
            self.copier.load_signalling(tier_rows, device_rows, self._all_planes, signals, on_cpu)

    def store(self, tier_rows: torch.Tensor, device_rows: torch.Tensor) -> None:
        """Enqueue GPU -> tier of all layers' pages on the current stream."""
        self.copier.store(tier_rows, device_rows, self._all_planes)

    def read_page(self, row: int) -> torch.Tensor:
        """One page's bytes on the CPU, flat, in the order (K|V, layer, token); waits for the copy.

        For storage threads, not the scheduler thread.
        """
        with self._storage_lock:
            rows = self._rows_of_page(row)
            if rows[0].device.type == "cpu":
                return torch.stack(rows).flatten()
            with torch.cuda.stream(self._storage_stream):
                return torch.stack(rows).flatten().cpu()

    def write_page(self, row: int, page: torch.Tensor) -> None:
        """Put bytes that `read_page` gave back; in place when this returns.

        For storage threads, not the scheduler thread.
        """
        with self._storage_lock:
            rows = self._rows_of_page(row)
            source = page.view(torch.uint8).view(len(rows), *rows[0].shape)
            if rows[0].device.type == "cpu":
                for target, part in zip(rows, source, strict=True):
                    target.copy_(part)
                return
            assert self._storage_stream is not None
            with torch.cuda.stream(self._storage_stream):
                torch._foreach_copy_(rows, list(source.to(self.device).unbind()))
                self._storage_stream.synchronize()

    def as_kv(self, dtype: torch.dtype, heads: int, head_dim: int) -> Any:
        """The bytes as HiCache's K and V: what `[kind][layer]` takes a plane of shape (tokens, heads, head_dim) out of.

        One tensor where the bytes are one range.
        """
        if isinstance(self.bytes, torch.Tensor):
            shape = (PLANES_PER_LAYER, self.num_layers, self.num_tokens, heads, head_dim)
            return self.bytes.view(dtype).view(shape)
        return [[plane.view(dtype).view(self.num_tokens, heads, head_dim) for plane in kind] for kind in self.bytes]

    def _rows_of_page(self, row: int) -> list[torch.Tensor]:
        """A page's rows of each plane, in the order of a storage page: K of all layers before V.

        Raises:
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        return [plane[row : row + self.page_size] for kind in self.bytes for plane in kind]

    def close(self) -> None:
        """Give the memory back; idempotent. Waits for the device and for storage threads: no copy is under way."""
        with self._storage_lock:
            self._closed = True
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._copier = None
            self.bytes = []
            self._region.release()

    def _warm_pinned_cache(self) -> None:
        """Have torch's pinned cache hold a block of every size that `stage_rows` asks for.

        It caches by powers of two, and allocating pinned memory later would stall the GPU.
        """
        nbytes = 1 << 12
        while nbytes < 2 * 8 * (self.num_tokens // self.page_size):
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            nbytes *= 2


def region_bytes(region: Region, device: torch.device) -> torch.Tensor:
    """All bytes of a region in one range as a uint8 tensor of shape (region.nbytes,); see `_bytes_at`.

    Host memory becomes a CPU tensor that keeps it mapped.
    """
    assert region.parts is None, "the region was asked for in parts and lies apart"
    if region.owner is not None:
        return torch.frombuffer(region.owner, dtype=torch.uint8, count=region.nbytes)
    return _bytes_at(region.address, region.nbytes, device)


def _bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """A tensor with the label `device`, the rank's own GPU, wherever the bytes are: operations run on that GPU, which
    can address them. Asking the driver for the owner, as other ways to wrap a pointer do, would name the peer and run
    torch's kernels there. It is valid until the region is released.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


def _planes_of(
    region: Region, device: torch.device, shape: tuple[int, int, int, int]
) -> torch.Tensor | list[list[torch.Tensor]]:
    """A region of planes by kind and layer; one tensor of `shape` (kinds, layers, tokens, row_bytes) in one range."""
    if region.parts is None:
        return region_bytes(region, device).view(shape)
    kinds, layers, tokens, row_bytes = shape
    # Parts are dealt to their places in turn: K and V of a layer take neighbouring ones, so that they lie in two places
    # and a layer's load uses both.
    planes = [_bytes_at(address, tokens * row_bytes, device).view(tokens, row_bytes) for address in region.parts]
    return [[planes[kinds * layer + kind] for layer in range(layers)] for kind in range(kinds)]
