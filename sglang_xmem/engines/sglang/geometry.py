"""SGLang's host pools as data: the device arrays in which each page has a contiguous unit.

One function per pool class (`DESCRIBERS`) reads SGLang's device tensors and maps. To add a pool kind, add its function.
No other module depends on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from sglang_xmem.arena import aligned
from sglang_xmem.copies.geometry import Plane

#: Index spaces, by the names of SGLang's pools. A pool that is not listed here rides on the anchor's numbers.
KV, SWA, MAMBA = "KV", "SWA", "MAMBA"
_SPACES = {
    "swa": SWA,
    "draft_swa": SWA,
    "deepseek_v4_c4_state": SWA,
    "deepseek_v4_c4_indexer_state": SWA,
    "deepseek_v4_c128_state": SWA,
    "mamba": MAMBA,
}


class Unsupported(ValueError):
    """A pool that this package cannot describe; the message is a clause with the reason."""


class Unit(NamedTuple):
    """A plane before its offset in a frame is known; fields as in `Plane`."""

    device_address: int
    device_stride: int
    device_units: int
    unit_bytes: int
    divisor: int


class Description(NamedTuple):
    """A host pool.

    Attributes:
        components: arrays of a page in the order of SGLang's storage keys; units of one component are adjacent in a
            frame. Each is a list of (host layer, unit).
        slots: index numbers (tokens, or states) of a page.
        host_layer: the host layer for a controller's layer number; None if there is nothing to move.
        device: of the arrays.
    """

    components: tuple[tuple[tuple[int, Unit], ...], ...]
    slots: int
    host_layer: Callable[[int, bool], int | None]
    device: torch.device

    @property
    def section_bytes(self) -> int:
        """Return the bytes of a page, all components."""
        return sum(unit.unit_bytes for component in self.components for _, unit in component)


class Section(NamedTuple):
    """A pool's part of each frame of a space.

    Attributes:
        space: the index space.
        offset: bytes from a frame's start.
        nbytes: bytes of a page of this pool.
    """

    space: str
    offset: int
    nbytes: int


def space_of(name: str) -> str:
    """Return the index space of a pool, by SGLang's name."""
    return _SPACES.get(name.lower(), KV)


def pages_of(indices: torch.Tensor, slots: int) -> torch.Tensor:
    """Convert slot indices to page numbers: int64 (n / slots,), on the CPU.

    Args:
        indices: all slots of each page, in order; on the CPU.
        slots: of a page.
    """
    if slots == 1:
        return indices
    first = indices.numpy()[::slots]
    return torch.from_numpy(first >> slots.bit_length() - 1 if slots & slots - 1 == 0 else first // slots)


def lay_out(
    sections: Iterable[tuple[str, str, int]],
) -> tuple[dict[str, Section], dict[str, int]]:
    """Place pools in the frames of their spaces.

    Args:
        sections: (pool, space, bytes of a page) each.

    Returns: each pool's section, and each space's frame size in bytes.
    """
    placed: dict[str, Section] = {}
    frames: dict[str, int] = {}
    for pool, space, nbytes in sections:
        offset = frames.get(space, 0)
        placed[pool] = Section(space, offset, nbytes)
        frames[space] = offset + aligned(nbytes)
    return placed, {space: nbytes for space, nbytes in frames.items() if nbytes}


def planes_by_layer(description: Description, section: Section) -> dict[int, list[Plane]]:
    """Return the planes of each host layer, with their offsets in the section."""
    layers: dict[int, list[Plane]] = {}
    offset = section.offset
    for component in description.components:
        for layer, unit in component:
            plane = Plane(
                unit.device_address, unit.device_stride, unit.device_units, offset, unit.unit_bytes, unit.divisor
            )
            layers.setdefault(layer, []).append(plane)
            offset += unit.unit_bytes
    assert offset - section.offset == section.nbytes
    return layers


def describe(pool: Any) -> Description | None:
    """Describe a host pool; None for one that holds no bytes.

    Raises:
        Unsupported: this class or this pool has no description.
    """
    for cls in type(pool).__mro__:
        describer = DESCRIBERS.get(cls.__name__)
        if describer is not None:
            return describer(pool)
    raise Unsupported(f"pool class {type(pool).__name__} is unknown")


# ----------------------------------------------------------------------------------------------------------- arrays


def token_rows(buffers: Sequence[torch.Tensor], page_size: int) -> list[Unit]:
    """Describe arrays of shape (tokens, ...): a unit is the adjacent rows of a page's tokens."""
    units = []
    for buffer in buffers:
        row_bytes = _packed_row_bytes(buffer)
        if buffer.stride(0) * buffer.element_size() != row_bytes:
            raise Unsupported(
                f"rows of {row_bytes} B of the GPU's KV pool are {buffer.stride(0) * buffer.element_size()} B apart"
            )
        nbytes = page_size * row_bytes
        units.append(Unit(buffer.data_ptr(), nbytes, buffer.shape[0] // page_size, nbytes, page_size))
    return units


def indexed_rows(buffers: Sequence[torch.Tensor], divisor: int) -> list[Unit]:
    """Describe arrays of shape (n, ...), one row per unit: page rows (divisor: slots per page), or states (1)."""
    return [
        Unit(
            buffer.data_ptr(),
            buffer.stride(0) * buffer.element_size(),
            buffer.shape[0],
            _packed_row_bytes(buffer),
            divisor,
        )
        for buffer in buffers
    ]


def _packed_row_bytes(buffer: torch.Tensor) -> int:
    row = buffer[0]
    if not row.is_contiguous():
        raise Unsupported(f"a row of shape {tuple(row.shape)} of the GPU's KV pool is not contiguous")
    return row.numel() * row.element_size()


def _same_layer(layer: int, is_draft: bool) -> int | None:
    return layer


def _numbered(units: Sequence[Unit]) -> tuple[tuple[int, Unit], ...]:
    return tuple(enumerate(units))


# ----------------------------------------------------------------------------------------------------- pool classes


def _mha(pool: Any) -> Description:
    layout = getattr(getattr(pool, "_buffer_infos", [None])[0], "buffers", None)
    if layout is not None and getattr(getattr(layout, "layout", None), "name", "NHD") != "NHD":
        raise Unsupported("the GPU's KV cache is in HND order; unset SGLANG_USE_HND_KVCACHE")
    keys, values = _kv_buffers(pool)
    return Description(
        (_numbered(token_rows(keys, pool.page_size)), _numbered(token_rows(values, pool.page_size))),
        pool.page_size,
        _same_layer,
        keys[0].device,
    )


def _kv_buffers(pool: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    if hasattr(pool, "device_k_buffers"):
        return pool.device_k_buffers, pool.device_v_buffers
    pools = (pool.device_pool, *_drafts(pool))  # SGLang 0.5.21 and 0.5.22
    return [b for p in pools for b in p.k_buffer], [b for p in pools for b in p.v_buffer]


def _drafts(pool: Any) -> Sequence[Any]:
    return getattr(pool, "mtp_draft_device_pools", None) or ()


def _key_only(pool: Any) -> Description:
    buffers = pool.device_pool.k_buffer
    return Description(
        (_numbered(token_rows(buffers, pool.page_size)),), pool.page_size, _same_layer, buffers[0].device
    )


def _mla(pool: Any) -> Description | None:
    if getattr(pool, "_is_dummy", False):
        return None
    if getattr(pool, "_native_buffers", None) is not None:
        raise Unsupported("the GPU's MLA cache keeps its parts in separate arrays")
    host_layer: Callable[[int, bool], int | None]
    if hasattr(pool, "_host_layer_by_controller"):
        buffers = pool.device_kv_buffers
        owned = pool._target_layer_indices
        drafts = range(pool.target_layer_num, pool.target_layer_num + len(buffers) - len(owned))
        host_layers = [*range(len(owned)), *drafts]

        def host_layer(layer: int, is_draft: bool) -> int | None:
            if not is_draft and layer not in owned:
                return None
            found: int | None = pool._host_layer_by_controller.get(layer)
            return found
    else:  # SGLang 0.5.21 and 0.5.22
        if getattr(pool.device_pool, "layer_shard_enabled", False):
            raise Unsupported("layers of the GPU's MLA cache are sharded over ranks")
        buffers = [b for p in (pool.device_pool, *_drafts(pool)) for b in p.kv_buffer]
        host_layers, host_layer = list(range(len(buffers))), _same_layer
    units = token_rows(buffers, pool.page_size)
    return Description((tuple(zip(host_layers, units, strict=True)),), pool.page_size, host_layer, buffers[0].device)


def _dsa_indexer(pool: Any) -> Description | None:
    if getattr(pool, "_is_dummy", False):
        return None
    buffers = pool.packed_device_index_buffers

    def host_layer(layer: int, is_draft: bool) -> int | None:
        if not hasattr(pool, "_device_to_host_layer"):  # SGLang 0.5.21: one host layer per layer, including drafts
            return layer
        if is_draft:
            return int(pool._draft_host_layer(layer))
        found: int | None = pool._device_to_host_layer.get(layer)
        return found

    return Description(
        (_numbered(indexed_rows(buffers, pool.page_size)),), pool.page_size, host_layer, buffers[0].device
    )


def _mamba(pool: Any) -> Description:
    if not hasattr(pool, "temporal_device_layers"):  # SGLang 0.5.21
        state = pool.device_pool.mamba_cache
        temporal = [state.temporal[layer] for layer in range(pool.num_mamba_layers)]
        parts = [temporal, *([conv[layer] for layer in range(pool.num_mamba_layers)] for conv in state.conv)]
        units = tuple(_numbered(indexed_rows(part, 1)) for part in parts if part[0][0].numel())
        return Description(units, 1, _same_layer, temporal[0].device)
    components = []
    if pool.temporal_state_elem_size:
        components.append(_numbered(indexed_rows(pool.temporal_device_layers, 1)))
    components += [_numbered(indexed_rows(layers, 1)) for layers in pool.conv_device_layers]
    # Side states belong to a slot, not to a layer; SGLang moves them with the first layer.
    components += [((0, unit),) for unit in indexed_rows(pool.slot_state_device_tensors, 1)]
    return Description(tuple(components), 1, _same_layer, pool.temporal_device_layers[0].device)


def _page_rows(buffers: Sequence[torch.Tensor], row_bytes: int, slots: int) -> Description | None:
    if not buffers:
        return None
    units = indexed_rows(buffers, slots)
    for unit in units:
        if unit.unit_bytes < row_bytes:
            raise Unsupported(f"page rows of {unit.unit_bytes} B are shorter than the host's {row_bytes} B")
    trimmed = [unit._replace(unit_bytes=row_bytes) for unit in units]
    return Description((_numbered(trimmed),), slots, _same_layer, buffers[0].device)


def _deepseek_v4_paged(pool: Any) -> Description | None:
    return _page_rows(pool.device_buffers, pool.item_bytes, pool.slot_page_size)


def _deepseek_v4_state(pool: Any) -> Description | None:
    return _page_rows(pool.device_page_views, pool.state_page_bytes, pool.swa_page_size)


def _minimax_nvfp4(pool: Any) -> Description | None:
    return _page_rows(pool.device_rows, pool.row_bytes, pool.page_size)


def _no_bytes(pool: Any) -> None:
    return None


def _refuse(why: str) -> Callable[[Any], Description | None]:
    def describer(pool: Any) -> Description | None:
        raise Unsupported(why)

    return describer


#: By class name, since a SGLang version may lack a class. Subclasses are found through their bases, so a class that
#: differs from its base needs its own entry.
DESCRIBERS: dict[str, Callable[[Any], Description | None]] = {
    "MHATokenToKVPoolHost": _mha,
    "AsymmetricMHATokenToKVPoolHost": _mha,
    "MHATokenToKVPoolMXFP8Host": _refuse("its MXFP8 scales are tied to SGLang's own copy kernels"),
    "MHATokenToKOnlyPoolHost": _key_only,
    "MLATokenToKVPoolHost": _mla,
    "DSAIndexerPoolHost": _dsa_indexer,
    "MambaPoolHost": _mamba,
    "DeepSeekV4PagedHostPool": _deepseek_v4_paged,
    "DeepSeekV4StateHostPool": _deepseek_v4_state,
    "MiniMaxM3Nvfp4IndexKPoolHost": _minimax_nvfp4,
    "MiniMaxM3Nvfp4MainKVPoolHost": _minimax_nvfp4,
    "LogicalHostPool": _no_bytes,
    "UnifiedPageEnvelopeHostPool": _refuse("unified memory keeps several pools in one envelope"),
    "PageInterleaveHostPool": _refuse("its pages are sharded over ranks"),
}
