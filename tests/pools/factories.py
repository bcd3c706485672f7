"""Tiny real pools of SGLang on a CPU, assembled into HiCache by SGLang's own code, as a scheduler does it.

`make(kind)` builds the device pools of a kind of model, and has SGLang's `attach_hybrid_pool_to_unified_cache` build
host pools, `HostPoolGroup` and `HybridCacheController` over them; so whatever hooks these is exercised unchanged. The
transfers are those of the controller. `Pools.arrays` names the device's own tensors, by which a test sees whether a
page has come back.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

#: Index spaces: pools that ride on another's numbers are in its space.
KV, SWA, MAMBA = "kv", "swa", "mamba"

DEVICE_PAGES = 12
HOST_RATIO = 2.0


class Array(NamedTuple):
    """A tensor of a device pool.

    Attributes:
        pool: name of the host pool that backs it up.
        tensor: rows on axis 0.
        slots: index numbers of a row: 1 where rows are tokens or states, a page's tokens where rows are pages.
        part: transfer layer by whose end its rows have to be there.
    """

    pool: str
    tensor: torch.Tensor
    slots: int
    part: int


@dataclass
class Pools:
    """A kind's pools, on the device and in HiCache.

    Attributes:
        page_size: tokens of a page; of Mamba states it is 1.
        spaces: index space of each host pool.
        arrays: what has to survive a trip.
        draft_pools: device pools of draft models, packed or sidecar.
    """

    kind: str
    page_size: int
    kvcache: Any
    params: Any
    cache: Any
    arrays: list[Array]
    spaces: dict[str, str] = field(default_factory=dict)
    draft_pools: tuple[Any, ...] = ()
    _closers: ExitStack = field(default_factory=ExitStack)

    @property
    def controller(self) -> Any:
        """SGLang's HybridCacheController."""
        return self.cache.cache_controller

    @property
    def group(self) -> Any:
        """SGLang's HostPoolGroup."""
        return self.controller.mem_pool_host

    @property
    def host_pools(self) -> dict[str, Any]:
        """Host pools by name, in the group's order."""
        return {name_of(entry): entry.host_pool for entry in self.group.entries}

    def slots_of(self, space: str) -> int:
        """Index numbers of a page of a space."""
        return 1 if space == MAMBA else self.page_size

    def device_pages(self, space: str) -> int:
        """Pages of a space on the device, the reserved first one left out."""
        return DEVICE_PAGES

    def indices(self, space: str, pages: Sequence[int]) -> torch.Tensor:
        """Index numbers of pages, page after page."""
        slots = self.slots_of(space)
        starts = torch.tensor(list(pages), dtype=torch.int64)[:, None] * slots
        return (starts + torch.arange(slots)).flatten()

    def alloc_host(self, space: str, pages: int) -> torch.Tensor:
        """Host index numbers for pages of a space, from SGLang's allocators."""
        pool = None if space == KV else self._owner(space)
        indices: torch.Tensor | None = self.group.alloc(pages * self.slots_of(space), pool=pool)
        assert indices is not None, f"the host pool of {space} is full"
        return indices

    def free_host(self, space: str, indices: torch.Tensor) -> None:
        """Give host index numbers back."""
        self.group.free(indices, pool=None if space == KV else self._owner(space))

    def _owner(self, space: str) -> Any:
        return next(entry.name for entry in self.group.entries if name_of(entry) == space)

    def store_transfers(self, host: dict[str, torch.Tensor], device: dict[str, torch.Tensor]) -> list[Any]:
        """L2Transfers of a store, as the controller makes them.

        Args:
            host: host index numbers by space; spaces that are left out are not stored.
            device: device index numbers by space.
        """
        anchor = self._anchor(host, device)
        transfers: list[Any] = self.controller._l2_transfers(*anchor, self._pool_transfers(host, device))
        return transfers

    def load_transfers(
        self,
        host: dict[str, torch.Tensor],
        device: dict[str, torch.Tensor],
        *,
        again: Sequence[tuple[str, torch.Tensor, torch.Tensor]] = (),
        rng: random.Random | None = None,
    ) -> list[Any]:
        """L2Transfers of a load, as the controller makes them: packed drafts come with a new closure each time.

        Args:
            again: (pool, host, device) that are loaded too, so a pool may occur twice.
            rng: shuffles the list, since its order differs from load to load.
        """
        extra = self._pool_transfers(host, device) + [self._pool_transfer(*each) for each in again]
        if rng is not None:
            rng.shuffle(extra)
        transfers: list[Any] = self.controller._l2_load_transfers(*self._anchor(host, device), extra)
        if rng is not None:
            rng.shuffle(transfers)
        return transfers

    def _anchor(
        self, host: dict[str, torch.Tensor], device: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nothing = torch.empty(0, dtype=torch.int64)
        return self.controller.move_indices(host.get(KV, nothing), device.get(KV, nothing))

    def _pool_transfers(self, host: dict[str, torch.Tensor], device: dict[str, torch.Tensor]) -> list[Any]:
        anchor = name_of(self.group.anchor_entry)
        return [
            self._pool_transfer(name, host[space], device[space])
            for name, space in self.spaces.items()
            if name != anchor and space in host
        ]

    def _pool_transfer(self, name: str, host: torch.Tensor, device: torch.Tensor) -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolTransfer

        entry = next(entry for entry in self.group.entries if name_of(entry) == name)
        # Indices of each pool are moved by themselves, so riders have equal tensors and not the same one.
        host, device = self.controller.move_indices(host.clone(), device.clone())
        return PoolTransfer(name=entry.name, host_indices=host, device_indices=device)

    def submit_store(self, transfers: list[Any]) -> Any:
        """Store, as `HiCacheController.start_writing` does; returns SGLang's TransferCompletion."""
        completion = self.controller.l2_transfer_engine.submit_device_to_host(transfers)
        completion.finish_event.synchronize()
        return completion

    def submit_load(self, transfers: list[Any], on_layer: Callable[[int], None] | None = None) -> int:
        """Load, as `HiCacheController.start_loading` does; returns the consumer's number for `wait`.

        Args:
            on_layer: called with each transfer layer once a reader has waited for it.
        """
        counter = self.controller.layer_done_counter
        producer = counter.update_producer()
        event = counter.events[producer]
        event.start_event.record()
        self.controller.l2_transfer_engine.submit_host_to_device(
            transfers,
            transfer_layer_id_max=self.controller.transfer_layer_id_max,
            start_event=event.start_event,
            on_layer_done=event.complete,
        )
        counter.set_consumer(producer)
        for layer in range(self.controller.transfer_layer_id_max):
            counter.wait_until(layer)
            if on_layer is not None:
                on_layer(layer)
        counter.set_consumer(-1)
        return int(producer)

    def close(self) -> None:
        """Give everything back, and take SGLang's configuration away."""
        self._closers.close()


def name_of(entry: Any) -> str:
    """Name of a pool entry or of a PoolName, as a plain string."""
    name = getattr(entry, "name", entry) if not isinstance(entry, str) else entry
    return str(getattr(name, "value", name))


# ---------------------------------------------------------------------------------------------------- the scheduler


@contextmanager
def configured(**fields: Any) -> Iterator[Any]:
    """SGLang's process-wide configuration, as if published; restored behind it."""
    from sglang.srt.runtime_context import get_context, get_parallel

    override = get_context().override_server_args(device="cpu", **fields)
    record = override.install()
    widths = {"attn_dcp_rank": 0, "tp_rank": 0, "pp_rank": 0, "attn_tp_rank": 0, "attn_dp_rank": 0, "attn_cp_rank": 0}
    try:
        with get_parallel().override(**widths):
            yield record
    finally:
        override.restore()


class _Tree:
    """What the assembler reads and sets of a UnifiedRadixCache."""

    def __init__(self, page_size: int, components: set[Any]) -> None:
        self.page_size = page_size
        self.components = {component: types.SimpleNamespace() for component in components}
        self._enable_metrics_flag = False
        self.cache_controller: Any = None
        self.sidecars: list[Any] = []

    def register_sidecar_pool(self, spec: Any, entry: Any = None) -> None:
        self.sidecars.append(spec)
        if entry is not None:
            self.cache_controller.register_host_pool_entry(entry)

    def evict_host(self, *args: Any) -> int:
        return 0


class _Allocator:
    """A device allocator: the assembler asks it for the pool, and binds some functions."""

    def __init__(self, kvcache: Any, size: int) -> None:
        self._kvcache = kvcache
        self.size_full = size
        self.swa_attn_allocator = self

    def get_kvcache(self) -> Any:
        return self._kvcache

    def alloc(self, n: int) -> None:
        return None

    def free(self, indices: Any) -> None:
        return None

    def set_hicache_transfer_done_event(self, *args: Any) -> None:
        return None


class Built(NamedTuple):
    """What a kind's builder made."""

    kvcache: Any
    components: tuple[str, ...]
    arrays: list[Array]
    spaces: dict[str, str]
    mamba_pool: Any = None
    packed: tuple[Any, ...] = ()
    packed_mamba: tuple[Any, ...] = ()
    sidecar: tuple[Any, ...] = ()


class Shape(NamedTuple):
    """What a builder is asked for."""

    page_size: int
    dtype: torch.dtype
    size: int  # tokens, without the reserved first page


Builder = Callable[[Shape], Built]


class Kind(NamedTuple):
    """A kind of pools.

    Attributes:
        page_sizes: those that SGLang allows and that are worth a test.
        layouts: of those that SGLang's host pools accept, all that are stocked here.
        dtypes: of the device's KV pool.
        since: the first SGLang version that has it.
    """

    build: Builder
    page_sizes: tuple[int, ...] = (1, 16, 64)
    layouts: tuple[str, ...] = ("layer_first", "page_first", "page_first_direct")
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    since: tuple[int, int, int] = (0, 5, 21)


KINDS: dict[str, Kind] = {}


def make(
    kind: str,
    *,
    page_size: int | None = None,
    dtype: torch.dtype | None = None,
    layout: str = "page_first",
    attach: Callable[[], Any] | None = None,
) -> Pools:
    """Build a kind of pools, on the device and in HiCache.

    Args:
        kind: one of KINDS.
        attach: makes a context manager in which HiCache is attached and its sidecars are built; an adapter's hooks
            are placed by the caller.
    """
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    spec = KINDS[kind]
    page_size = page_size or spec.page_sizes[-1]
    closers = ExitStack()
    try:
        record = closers.enter_context(
            configured(
                page_size=page_size,
                hicache_mem_layout=layout,
                hicache_io_backend="direct" if layout == "page_first_direct" else "kernel",
                hicache_ratio=HOST_RATIO,
                hicache_size=0,
                hicache_write_policy="write_through",
                enable_hierarchical_cache=True,
                served_model_name="tiny",
            )
        )
        built = spec.build(Shape(page_size, dtype or spec.dtypes[0], DEVICE_PAGES * page_size))
        params = types.SimpleNamespace(
            token_to_kv_pool_allocator=_Allocator(built.kvcache, DEVICE_PAGES * page_size),
            req_to_token_pool=_RequestPool(built.mamba_pool),
            page_size=page_size,
            pp_size=1,
            pp_rank=0,
            tp_cache_group=None,
            attn_cp_cache_group=None,
            attn_tp_cache_group=None,
            pp_cache_group=None,
            mtp_draft_device_pools=built.packed,
            mtp_draft_mamba_pools=built.packed_mamba,
            sidecar_draft_device_pools=built.sidecar,
        )
        tree = _Tree(page_size, {ComponentType[name] for name in built.components})
        draft_plan = _draft_plan(built)
        if attach is not None:
            closers.enter_context(attach())
        with _auto_size(params, draft_plan):
            # By its module at the time of the call: hooks replace the attribute.
            assembler.attach_hybrid_pool_to_unified_cache(
                tree, params, record, load_cache_event=threading.Event(), storage_backend=None
            )
            _register_draft(tree, draft_plan)
        return Pools(
            kind,
            page_size,
            built.kvcache,
            params,
            tree,
            built.arrays,
            built.spaces,
            (*built.packed, *built.packed_mamba, *built.sidecar),
            closers,
        )
    except BaseException:
        closers.close()
        raise


class _RequestPool:
    """The part of a HybridReqToTokenPool that the assembler reads."""

    def __init__(self, mamba_pool: Any) -> None:
        self.mamba_pool = mamba_pool
        self.mamba_allocator = _Allocator(None, 0)
        self.mamba_map: dict[int, int] = (
            {layer: index for index, layer in enumerate(mamba_pool.mamba_layer_ids)} if mamba_pool is not None else {}
        )

    def register_layer_transfer_counter(self, counter: Any) -> None:
        self.counter = counter


def _draft_plan(built: Built) -> Any:
    from sglang.srt.speculative.base_spec_worker import HiCacheDraftMode, HiCacheDraftPlan

    if built.sidecar:
        return HiCacheDraftPlan(mode=HiCacheDraftMode.SIDECAR, device_pools=built.sidecar)
    if built.packed:
        return HiCacheDraftPlan(mode=HiCacheDraftMode.PACKED, device_pools=built.packed)
    return None


def _auto_size(params: Any, draft_plan: Any) -> Any:
    """As `kv_cache_builder` enters it around the tree's construction."""
    from sglang.srt.mem_cache import kv_cache_builder

    return kv_cache_builder.auto_size_hicache(params, draft_plan, enabled=False)


def _register_draft(tree: _Tree, draft_plan: Any) -> None:
    """As `kv_cache_builder.maybe_register_hicache_draft`, which wants a real tree."""
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler

    if draft_plan is None or draft_plan.mode.value != "sidecar":
        return
    specs, entries = assembler.build_hicache_draft_sidecars(draft_device_pools=draft_plan.device_pools, tree_cache=tree)
    for spec, entry in zip(specs, entries, strict=True):
        tree.register_sidecar_pool(spec, entry)


# -------------------------------------------------------------------------------------------------------- the kinds


def _kind(name: str, **traits: Any) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        KINDS[name] = Kind(build, **traits)
        return build

    return register


FP8 = torch.float8_e4m3fn
PAGE_FIRST = ("page_first", "page_first_direct")


def _mha_pool(shape: Shape, layers: int, *, heads: int = 2, dim: int = 8, **more: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        size=more.pop("size", shape.size),
        page_size=shape.page_size,
        dtype=shape.dtype,
        head_num=heads,
        head_dim=dim,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
        **more,
    )


def _mla_pool(shape: Shape, layers: int, *, rank: int = 64, rope: int = 16, **more: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return MLATokenToKVPool(
        size=shape.size,
        page_size=shape.page_size,
        dtype=shape.dtype,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
        **more,
    )


def _dsa_pool(shape: Shape, layers: int, skip: Sequence[bool] | None = None, **more: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    return DSATokenToKVPool(
        size=shape.size,
        page_size=shape.page_size,
        kv_lora_rank=512,
        dtype=shape.dtype,
        qk_rope_head_dim=64,
        layer_num=layers,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=656 if shape.dtype is FP8 else 576,
        skip_topk_layers=list(skip) if skip is not None else None,
        **more,
    )


def _mamba_pool(layer_ids: Sequence[int], *, convs: Sequence[tuple[int, ...]], temporal: tuple[int, ...]) -> Any:
    """States by slot: `convs` are of bf16, the temporal state of fp32."""
    from sglang.srt.configs.mamba_utils import Mamba2StateDType
    from sglang.srt.mem_cache.memory_pool import MambaPool

    shape = types.SimpleNamespace(conv=list(convs), temporal=temporal, disable_conv_window_dedup=True)
    cache_params = types.SimpleNamespace(
        shape=shape,
        dtype=Mamba2StateDType(conv=torch.bfloat16, temporal=torch.float32),
        layers=list(layer_ids),
        is_kda=False,
    )
    return MambaPool(
        size=DEVICE_PAGES,
        spec_state_size=0,
        cache_params=cache_params,
        mamba_layer_ids=list(layer_ids),
        device="cpu",
    )


GDN: dict[str, Any] = {"convs": [(24, 3)], "temporal": (2, 4, 8)}


def _tokens(pool: str, tensors: Sequence[torch.Tensor], parts: Sequence[int]) -> list[Array]:
    return [Array(pool, tensor, 1, part) for tensor, part in zip(tensors, parts, strict=True)]


def _mha_arrays(name: str, pool: Any, parts: Sequence[int]) -> list[Array]:
    return _tokens(name, pool.k_buffer, parts) + _tokens(name, pool.v_buffer, parts)


def _states(name: str, pool: Any, layer_ids: Sequence[int]) -> list[Array]:
    cache = pool.mamba_cache
    return [
        Array(name, states[index], 1, layer)
        for states in (cache.temporal, *cache.conv)
        if states[0].numel()
        for index, layer in enumerate(layer_ids)
    ]


@_kind("mha", dtypes=(torch.bfloat16, FP8, torch.float32))
def _mha(shape: Shape) -> Built:
    """Qwen3, Llama-3, GLM-4.6: K and V of one shape."""
    pool = _mha_pool(shape, 3)
    return Built(pool, ("FULL",), _mha_arrays("kv", pool, range(3)), {"kv": KV})


@_kind("asymmetric", layouts=PAGE_FIRST)
def _asymmetric(shape: Shape) -> Built:
    """K and V of two widths on a plain pool."""
    pool = _mha_pool(shape, 3, dim=24, v_head_dim=16)
    return Built(pool, ("FULL",), _mha_arrays("kv", pool, range(3)), {"kv": KV})


@_kind("mla", dtypes=(torch.bfloat16, FP8))
def _mla(shape: Shape) -> Built:
    """DeepSeek-V3, Kimi-K2: one latent row per token."""
    pool = _mla_pool(shape, 4)
    return Built(pool, ("FULL",), _tokens("kv", pool.kv_buffer, range(4)), {"kv": KV})


@_kind("dsa", page_sizes=(64,), dtypes=(torch.bfloat16, FP8))
def _dsa(shape: Shape) -> Built:
    """DeepSeek-V3.2: latent rows (656 B in fp8), and index rows of whole pages."""
    pool = _dsa_pool(shape, 3)
    arrays = _tokens("kv", pool.kv_buffer, range(3))
    arrays += [Array("indexer", rows, shape.page_size, i) for i, rows in enumerate(pool.index_k_with_scale_buffer)]
    return Built(pool, ("FULL",), arrays, {"kv": KV, "indexer": KV})


@_kind("dsa_skip", page_sizes=(64,), since=(0, 5, 22))
def _dsa_skip(shape: Shape) -> Built:
    """GLM-5: layers that take another's top-k own no index."""
    skip = [False, True, False, True]
    pool = _dsa_pool(shape, 4, skip)
    arrays = _tokens("kv", pool.kv_buffer, range(4))
    arrays += [
        Array("indexer", rows, shape.page_size, i)
        for i, rows in enumerate(pool.index_k_with_scale_buffer)
        if not skip[i]
    ]
    return Built(pool, ("FULL",), arrays, {"kv": KV, "indexer": KV})


def _swa_pool(shape: Shape, full: Sequence[int], sliding: Sequence[int], **more: Any) -> Any:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    return SWAKVPool(
        size=shape.size,
        size_swa=shape.size,
        page_size=shape.page_size,
        dtype=shape.dtype,
        head_num=2,
        head_dim=8,
        swa_attention_layer_ids=list(sliding),
        full_attention_layer_ids=list(full),
        device="cpu",
        **more,
    )


@_kind("swa", dtypes=(torch.bfloat16, FP8))
def _swa(shape: Shape) -> Built:
    """gpt-oss, Llama-4: full and sliding layers, each with numbers of its own."""
    full, sliding = (2, 5), (0, 1, 3, 4)
    pool = _swa_pool(shape, full, sliding)
    arrays = _mha_arrays("kv", pool.full_kv_pool, full) + _mha_arrays("swa", pool.swa_kv_pool, sliding)
    return Built(pool, ("FULL", "SWA"), arrays, {"kv": KV, "swa": SWA})


@_kind("swa_asymmetric", layouts=PAGE_FIRST)
def _swa_asymmetric(shape: Shape) -> Built:
    """MiMo-V2: 192/128 heads, other head counts in sliding layers."""
    full, sliding = (0, 3), (1, 2)
    pool = _swa_pool(shape, full, sliding, v_head_dim=4, swa_head_num=4, swa_head_dim=12, swa_v_head_dim=8)
    arrays = _mha_arrays("kv", pool.full_kv_pool, full) + _mha_arrays("swa", pool.swa_kv_pool, sliding)
    return Built(pool, ("FULL", "SWA"), arrays, {"kv": KV, "swa": SWA})


def _linear_pool(shape: Shape, full: Sequence[int], mamba_pool: Any, **more: Any) -> Any:
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool

    return HybridLinearKVPool(
        size=shape.size,
        dtype=shape.dtype,
        page_size=shape.page_size,
        head_num=2,
        head_dim=8,
        full_attention_layer_ids=list(full),
        device="cpu",
        mamba_pool=mamba_pool,
        **more,
    )


def _mamba_kind(
    shape: Shape, convs: Sequence[tuple[int, ...]], temporal: tuple[int, ...], side_states: int = 0
) -> Built:
    linear, full = (0, 1, 2, 4), (3, 5)
    states = _mamba_pool(linear, convs=convs, temporal=temporal)
    sides = [_SideState(DEVICE_PAGES + 1, 5 + 2 * i) for i in range(side_states)]
    for side in sides:
        states.register_slot_state(side)
    pool = _linear_pool(shape, full, states)
    arrays = _mha_arrays("kv", pool.full_kv_pool, full) + _states("mamba", states, linear)
    # SGLang moves them with the first Mamba layer; their reader waits for the last one.
    arrays += [Array("mamba", side.rows, 1, linear[0]) for side in sides]
    return Built(pool, ("FULL", "MAMBA"), arrays, {"kv": KV, "mamba": MAMBA}, mamba_pool=states)


class _SideState:
    """A state that rides along with a Mamba slot (SGLang's `SlotIndexedState`)."""

    def __init__(self, slots: int, width: int) -> None:
        self.rows = torch.zeros(slots, width, dtype=torch.int32)

    def reset_slots(self, indices: torch.Tensor) -> None:
        self.rows[indices] = 0

    def copy_slots(self, src_index: torch.Tensor, dst_index: torch.Tensor) -> None:
        self.rows[dst_index] = self.rows[src_index]

    def get_cpu_slots(self, indices: torch.Tensor) -> Any:
        return self.rows[indices].clone()

    def load_cpu_slots(self, data: Any, indices: torch.Tensor) -> None:
        self.rows[indices] = data

    def host_buffers(self) -> list[torch.Tensor]:
        return [self.rows]

    def iter_transfer_state_entries(self) -> Iterator[Any]:
        return iter(())


@_kind("gdn", layouts=PAGE_FIRST)
def _gdn(shape: Shape) -> Built:
    """Qwen3-Next: one conv state and a temporal state per layer."""
    return _mamba_kind(shape, [(24, 3)], (2, 4, 8))


@_kind("mamba_convs", page_sizes=(16,), layouts=PAGE_FIRST)
def _mamba_convs(shape: Shape) -> Built:
    """Several conv states per layer, of different shapes."""
    return _mamba_kind(shape, [(24, 3), (5, 2), (16, 1)], (2, 4, 8))


@_kind("mamba_conv_only", page_sizes=(16,), layouts=PAGE_FIRST)
def _mamba_conv_only(shape: Shape) -> Built:
    """LFM2: conv states and no temporal one."""
    return _mamba_kind(shape, [(24, 3)], (0, 0, 0))


@_kind("mla_mamba", page_sizes=(1, 64), layouts=PAGE_FIRST)
def _mla_mamba(shape: Shape) -> Built:
    """Kimi-K3, Kimi-Linear: MLA and KDA."""
    linear, full = (0, 1, 2), (3, 4)
    states = _mamba_pool(linear, convs=[(3, 40)], temporal=(2, 4, 4))
    pool = _linear_pool(shape, full, states, use_mla=True, kv_lora_rank=64, qk_rope_head_dim=16)
    arrays = _tokens("kv", pool.full_kv_pool.kv_buffer, full) + _states("mamba", states, linear)
    return Built(pool, ("FULL", "MAMBA"), arrays, {"kv": KV, "mamba": MAMBA}, mamba_pool=states)


@_kind("dsa_mamba", page_sizes=(64,), layouts=PAGE_FIRST, since=(0, 5, 22))
def _dsa_mamba(shape: Shape) -> Built:
    """GLM-5-Next: MLA with an indexer, and states."""
    linear, full = (0, 2), (1, 3)
    states = _mamba_pool(linear, convs=[(24, 3)], temporal=(2, 4, 8))
    pool = _linear_pool(
        shape,
        full,
        states,
        use_mla=True,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        use_dsa=True,
        index_head_dim=128,
        kv_cache_dim=576,
    )
    inner = pool.full_kv_pool
    arrays = _tokens("kv", inner.kv_buffer, full) + _states("mamba", states, linear)
    arrays += [
        Array("indexer", rows, shape.page_size, layer)
        for rows, layer in zip(inner.index_k_with_scale_buffer, full, strict=True)
    ]
    spaces = {"kv": KV, "indexer": KV, "mamba": MAMBA}
    return Built(pool, ("FULL", "MAMBA"), arrays, spaces, mamba_pool=states)


@_kind("swa_mamba", page_sizes=(1, 16), layouts=PAGE_FIRST)
def _swa_mamba(shape: Shape) -> Built:
    """Inkling: full, sliding and conv layers."""
    full, sliding, linear = (2, 5), (0, 3), (1, 4)
    states = _mamba_pool(linear, convs=[(24, 3)], temporal=(2, 4, 8))
    pool = _swa_pool(shape, full, sliding)
    arrays = (
        _mha_arrays("kv", pool.full_kv_pool, full)
        + _mha_arrays("swa", pool.swa_kv_pool, sliding)
        + _states("mamba", states, linear)
    )
    spaces = {"kv": KV, "swa": SWA, "mamba": MAMBA}
    return Built(pool, ("FULL", "SWA", "MAMBA"), arrays, spaces, mamba_pool=states)


# HiCache of 0.5.21 does not start with this pool: a K-only pool lacks `can_use_write_back_jit` there.
@_kind("minimax", page_sizes=(1, 16, 64), since=(0, 5, 22))
def _minimax(shape: Shape) -> Built:
    """MiniMax-M3: dense and sparse layers; sparse ones have an index of keys alone."""
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool

    dense, sparse = [0], [1, 2, 3]
    pool = MiniMaxSparseKVPool(
        size=shape.size,
        page_size=shape.page_size,
        dtype=shape.dtype,
        head_num=2,
        head_dim=8,
        idx_head_dim=16,
        dense_layer_ids=dense,
        sparse_layer_ids=sparse,
        device="cpu",
        disable_value_sparse_layer_ids=sparse,
        start_layer=0,
        end_layer=4,
    )
    arrays = _mha_arrays("kv", pool.main_pool, range(4)) + _tokens("indexer", pool.index_k_pool.k_buffer, sparse)
    return Built(pool, ("FULL",), arrays, {"kv": KV, "indexer": KV})


@_kind("nvfp4", page_sizes=(128,), since=(0, 5, 23))
def _nvfp4(shape: Shape) -> Built:
    """MiniMax-M3.1 in NVFP4: page rows of payload and scales, for K/V and for the index."""
    from sglang.srt.mem_cache.minimax_m3_nvfp4_pool import MiniMaxM3Nvfp4KVPool

    sparse = [0, 1, 2]
    pool = MiniMaxM3Nvfp4KVPool(
        size=shape.size,
        page_size=shape.page_size,
        dtype=shape.dtype,
        head_num=1,
        head_dim=128,
        idx_head_dim=128,
        dense_layer_ids=[],
        sparse_layer_ids=sparse,
        device="cpu",
        disable_value_sparse_layer_ids=sparse,
        start_layer=0,
        end_layer=3,
    )
    arrays = [Array("kv", rows, shape.page_size, i) for i, rows in enumerate(pool.main_pool.rows)]
    arrays += [Array("indexer", rows, shape.page_size, i) for i, rows in enumerate(pool.index_k_pool.rows)]
    return Built(pool, ("FULL",), arrays, {"kv": KV, "indexer": KV})


def _qsa_pool(shape: Shape, full: Sequence[int], states: Any, ratio: int) -> Any:
    from sglang.srt.mem_cache.qsa_kv_pool import QSATokenToKVPool

    return QSATokenToKVPool(
        size=shape.size,
        dtype=shape.dtype,
        page_size=shape.page_size,
        head_num=2,
        head_dim=8,
        full_attention_layer_ids=list(full),
        device="cpu",
        mamba_pool=states,
        qsa_index_kv_heads=1,
        qsa_index_head_dim=16,
        qsa_compress_ratio=ratio,
        qsa_token_topk=4 * ratio,
        num_request_slots=4,
    )


@_kind("qsa", page_sizes=(16, 64), layouts=PAGE_FIRST, since=(0, 5, 22))
def _qsa(shape: Shape) -> Built:
    """Qwen4-Exp: compressed index keys, a page's groups in one row."""
    linear, full, ratio = (0, 1), (2, 3), 4
    states = _mamba_pool(linear, convs=[(24, 3)], temporal=(2, 4, 8))
    pool = _qsa_pool(shape, full, states, ratio)
    arrays = _mha_arrays("kv", pool.full_kv_pool, full) + _states("mamba", states, linear)
    arrays += [
        Array(
            "indexer",
            keys.view(torch.uint8).reshape(-1, keys[0].nbytes * (shape.page_size // ratio)),
            shape.page_size,
            p,
        )
        for keys, p in zip(pool.qsa_compressed_k_buffer_pool, full, strict=True)
    ]
    spaces = {"kv": KV, "indexer": KV, "mamba": MAMBA}
    return Built(pool, ("FULL", "MAMBA"), arrays, spaces, mamba_pool=states)


def _v4_pool(shape: Shape, ratios: Sequence[int]) -> Any:
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    return DeepSeekV4TokenToKVPool(
        max_num_reqs=2,
        swa_size=shape.size,
        c4_size=shape.size // 4,
        c128_size=shape.size // 128,
        c4_state_pool_size=shape.size // shape.page_size * 8,
        c128_state_pool_size=shape.size // shape.page_size * 128,
        page_size=shape.page_size,
        swa_page_size=shape.page_size,
        dtype=FP8,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=len(ratios),
        device="cpu",
        enable_memory_saver=False,
        compression_ratios=list(ratios),
        start_layer=0,
        end_layer=len(ratios),
    )


def _v4(shape: Shape, ratios: Sequence[int]) -> Built:
    pool, page = _v4_pool(shape, ratios), shape.page_size
    by_ratio = {wanted: [i for i, ratio in enumerate(ratios) if ratio == wanted] for wanted in (4, 128)}
    arrays = [Array("swa", rows, page, i) for i, rows in enumerate(pool.swa_kv_pool.kv_buffer)]
    spaces = {"kv": KV, "swa": SWA}
    for name, buffers, layers, space in (
        ("deepseek_v4_c4", pool.c4_kv_pool.kv_buffer, by_ratio[4], KV),
        ("deepseek_v4_c4_indexer", pool.c4_indexer_kv_pool.index_k_with_scale_buffer, by_ratio[4], KV),
        ("deepseek_v4_c128", pool.c128_kv_pool.kv_buffer, by_ratio[128], KV),
        ("deepseek_v4_c4_state", _v4_states(pool.compress_state_pools), by_ratio[4], SWA),
        ("deepseek_v4_c4_indexer_state", _v4_states(pool.indexer_compress_state_pools), by_ratio[4], SWA),
    ):
        if layers:
            spaces[name] = space
            arrays += [Array(name, rows, page, layer) for rows, layer in zip(buffers, layers, strict=False)]
    return Built(pool, ("FULL", "SWA"), arrays, spaces)


def _v4_states(pools: Sequence[Any]) -> list[torch.Tensor]:
    """Rings of compressor states, one a page: views of the device's own tensors."""
    views = []
    for pool in pools:
        if pool is not None and pool.ratio == 4:
            state = pool.kv_score_buffer.kv_score
            usable = state.shape[0] // pool.ring_size * pool.ring_size
            views.append(state[:usable].view(torch.uint8).reshape(usable // pool.ring_size, -1))
    return views


@_kind("deepseek_v4", page_sizes=(256,))
def _deepseek_v4(shape: Shape) -> Built:
    """DeepSeek-V4: sliding pages, compressed pages, indexers and states; the anchor has no bytes."""
    return _v4(shape, [0, 4, 128, 4])


@_kind("deepseek_v4_packed_draft", page_sizes=(256,))
def _deepseek_v4_packed_draft(shape: Shape) -> Built:
    """DeepSeek-V4's MTP: the draft's sliding pages follow the target's, and its "pool" is a tensor."""
    built, draft = _v4(shape, [0, 4, 128]), _v4_pool(shape, [0])
    arrays = [Array("swa", rows, shape.page_size, 0) for rows in draft.swa_kv_pool.kv_buffer]
    return built._replace(packed=(draft,), arrays=built.arrays + arrays)


# ----------------------------------------------------------------------------------------------------------- drafts


@_kind("mha_packed_draft", page_sizes=(1, 16))
def _mha_packed_draft(shape: Shape) -> Built:
    """MTP: the draft's layers follow the target's in its host pool, and are in the first transfer layers."""
    pool, drafts = _mha_pool(shape, 3), tuple(_mha_pool(shape, 1) for _ in range(2))
    arrays = _mha_arrays("kv", pool, range(3))
    for depth, draft in enumerate(drafts):
        arrays += _mha_arrays("kv", draft, [depth])
    return Built(pool, ("FULL",), arrays, {"kv": KV}, packed=drafts)


# 0.5.21 does not load drafts beyond the number of the target's layers.
@_kind("mla_packed_draft", page_sizes=(1, 64), since=(0, 5, 22))
def _mla_packed_draft(shape: Shape) -> Built:
    """DeepSeek-V3's MTP: a chain that is deeper than the target has layers comes with the last one."""
    pool, drafts = _mla_pool(shape, 2), tuple(_mla_pool(shape, 1) for _ in range(3))
    arrays = _tokens("kv", pool.kv_buffer, range(2))
    for depth, draft in enumerate(drafts):
        arrays += _tokens("kv", draft.kv_buffer, [min(depth, 1)])
    return Built(pool, ("FULL",), arrays, {"kv": KV}, packed=drafts)


@_kind("dsa_packed_draft", page_sizes=(64,))
def _dsa_packed_draft(shape: Shape) -> Built:
    """DeepSeek-V3.2's MTP: a latent row and an index row of its own."""
    pool, draft = _dsa_pool(shape, 3), _dsa_pool(shape, 1)
    arrays = _tokens("kv", pool.kv_buffer, range(3)) + _tokens("kv", draft.kv_buffer, [0])
    for owner in (pool, draft):
        arrays += [Array("indexer", rows, shape.page_size, i) for i, rows in enumerate(owner.index_k_with_scale_buffer)]
    return Built(pool, ("FULL",), arrays, {"kv": KV, "indexer": KV}, packed=(draft,))


@_kind("gdn_packed_draft", page_sizes=(16,), layouts=PAGE_FIRST, since=(0, 5, 22))
def _gdn_packed_draft(shape: Shape) -> Built:
    """Qwen3-Next's MTP: the draft has an attention layer alone."""
    built = _mamba_kind(shape, **GDN)
    draft = _mha_pool(shape, 1)
    return built._replace(packed=(draft,), arrays=built.arrays + _mha_arrays("kv", draft, [0]))


@_kind("mha_draft_sidecar", page_sizes=(1, 16))
def _mha_draft_sidecar(shape: Shape) -> Built:
    """EAGLE3: a host pool of its own, in the target's numbers, with another row."""
    pool, draft = _mha_pool(shape, 3), _mha_pool(shape, 2, heads=1, dim=16)
    arrays = _mha_arrays("kv", pool, range(3)) + _mha_arrays("draft", draft, range(2))
    return Built(pool, ("FULL",), arrays, {"kv": KV, "draft": KV}, sidecar=(draft,))


@_kind("mla_draft_sidecar", page_sizes=(64,))
def _mla_draft_sidecar(shape: Shape) -> Built:
    """An MHA draft with an MLA target."""
    pool, draft = _mla_pool(shape, 3), _mha_pool(shape, 1)
    arrays = _tokens("kv", pool.kv_buffer, range(3)) + _mha_arrays("draft", draft, [0])
    return Built(pool, ("FULL",), arrays, {"kv": KV, "draft": KV}, sidecar=(draft,))


@_kind("dsa_draft_sidecar", page_sizes=(64,))
def _dsa_draft_sidecar(shape: Shape) -> Built:
    """A DSA draft brings its index as a second sidecar."""
    pool, draft = _dsa_pool(shape, 3), _dsa_pool(shape, 1)
    arrays = _tokens("kv", pool.kv_buffer, range(3)) + _tokens("draft", draft.kv_buffer, [0])
    arrays += [Array("indexer", rows, shape.page_size, i) for i, rows in enumerate(pool.index_k_with_scale_buffer)]
    arrays += [Array("draft_indexer", rows, shape.page_size, 0) for rows in draft.index_k_with_scale_buffer]
    spaces = {"kv": KV, "indexer": KV, "draft": KV, "draft_indexer": KV}
    return Built(pool, ("FULL",), arrays, spaces, sidecar=(draft,))


@_kind("gdn_draft_sidecar", page_sizes=(16,), layouts=PAGE_FIRST)
def _gdn_draft_sidecar(shape: Shape) -> Built:
    """A draft of its own with states."""
    built = _mamba_kind(shape, **GDN)
    draft = _mha_pool(shape, 1)
    return built._replace(
        sidecar=(draft,), arrays=built.arrays + _mha_arrays("draft", draft, [0]), spaces={**built.spaces, "draft": KV}
    )


@_kind("swa_draft_sidecar", page_sizes=(1, 16))
def _swa_draft_sidecar(shape: Shape) -> Built:
    """A draft with sliding layers rides on the sliding pages."""
    full, sliding = (2,), (0, 1)
    pool = _swa_pool(shape, full, sliding)
    draft = _swa_pool(shape, (), (0,))
    arrays = _mha_arrays("kv", pool.full_kv_pool, full) + _mha_arrays("swa", pool.swa_kv_pool, sliding)
    arrays += _mha_arrays("draft_swa", draft.swa_kv_pool, [0])
    return Built(pool, ("FULL", "SWA"), arrays, {"kv": KV, "swa": SWA, "draft_swa": SWA}, sidecar=(draft,))
