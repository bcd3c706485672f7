"""Adoption: SGLang builds its host pools as usual, but without memory; their pages are in an arena.

SGLang's classes stay. Inside `tier_memory` their tensors are on the `meta` device, so all dimensions are known and no
byte is allocated. When SGLang puts the pools into a `HostPoolGroup`, the group is *adopted*: its pools are described,
an arena with frames for all of them is allocated, and each instance gets the arena's functions for storage pages.
Transfers never use the pools' tensors (transfer.py), so SGLang's kernels cannot run on tensors without memory.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from sglang_xmem.arena import Arena, SpaceSpec, bytes_at
from sglang_xmem.bank_space import TRAILER_BYTES
from sglang_xmem.canary import Perch
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.engines.sglang import identity, sharing, storage
from sglang_xmem.engines.sglang.geometry import (
    KV,
    MAMBA,
    Description,
    Section,
    Unsupported,
    describe,
    lay_out,
    planes_by_layer,
    space_of,
)
from sglang_xmem.engines.sglang.transfer import ADOPTED
from sglang_xmem.errors import ConfigError, CopyError, Remedy, Unavailable, refuse, sentence

if TYPE_CHECKING:
    from sglang_xmem.copies.ipc import Gather
    from sglang_xmem.session import Session
    from sglang_xmem.sums import SectionSums

#: Attribute of a HostPoolGroup: sections of its arena's frames that are reserved for later pools.
_RESERVED = "_sglang_xmem_reserved"


class AdoptedPool:
    """A host pool of SGLang with its pages in an arena.

    Attributes:
        pool: SGLang's pool.
        number: number of this pool in its session.
        arena: arena of its pages.
        section: its part of a frame.
        slots: slots per page.
        layers: planes by host layer; empty for a pool without bytes.
        component_bytes: bytes of each component of a page, in the order of SGLang's storage keys.
        sums: sums of its pages; None if no page has one.
    """

    def __init__(
        self, pool: Any, number: int, arena: Arena | None, description: Description | None, section: Section
    ) -> None:
        self.pool = pool
        self.number = number
        self._arena = arena
        self.section = section
        self.layers: dict[int, list[Plane]] = {}
        self.slots = 1
        self.component_bytes: tuple[int, ...] = ()
        self.sums: SectionSums | None = None
        if description is not None:
            self.slots = description.slots
            self.host_layer = description.host_layer
            self.layers = planes_by_layer(description, section)
            self.component_bytes = tuple(
                sum(unit.unit_bytes for _, unit in component) for component in description.components
            )
            planes = [plane for layer in self.layers.values() for plane in layer]
            self.sums = self.arena.sums_of(section.space, planes)

    @property
    def arena(self) -> Arena:
        assert self._arena is not None
        return self._arena

    def narrow(self, host: torch.Tensor, device: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Select this rank's indices, if decode context parallelism spreads tokens over ranks."""
        if getattr(self.pool, "dcp_size", 1) == 1:
            return host, device
        from sglang.srt.mem_cache.pool_host.mla import maybe_dcp_kernel_indices

        size, rank = self.pool.dcp_size, self.pool.dcp_rank
        return maybe_dcp_kernel_indices(host, size, rank), maybe_dcp_kernel_indices(device, size, rank)


@contextmanager
def tier_memory() -> Iterator[None]:
    """Build SGLang's host pools without memory inside this context."""
    from sglang.srt.mem_cache.pool_host import common

    functions = common.ALLOC_MEMORY_FUNCS
    saved, factory = dict(functions), functions.default_factory
    functions.clear()  # a defaultdict: a look-up adds its key
    functions.default_factory = lambda: _without_memory
    quiet = [(module, name, getattr(module, name)) for module, name in _kernel_questions()]
    for module, name, _ in quiet:
        setattr(module, name, _no if name != "_resolve_device_accessible_ptr_fn" else _none)
    try:
        yield
    finally:
        functions.clear()
        functions.update(saved)
        functions.default_factory = factory
        for module, name, original in quiet:
            setattr(module, name, original)


def _without_memory(dims: Any, dtype: torch.dtype, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(tuple(dims), dtype=dtype, device="meta")


def _kernel_questions() -> list[tuple[types.ModuleType, str]]:
    """List the functions by which pools prepare SGLang's own copy kernels, which never run with a tier."""
    import importlib

    found = []
    for name in ("common", "mha", "mla", "dsa", "mamba", "qsa", "minimax_m3_nvfp4"):
        try:
            module = importlib.import_module(f"sglang.srt.mem_cache.pool_host.{name}")
        except ImportError:
            continue
        found += [
            (module, function)
            for function in (
                "can_use_hicache_jit_kernel",
                "can_use_write_back_jit_kernel",
                "_resolve_device_accessible_ptr_fn",
            )
            if hasattr(module, function)
        ]
    return found


def _no(*args: Any, **kwargs: Any) -> bool:
    return False


def _none() -> None:
    return None


# ---------------------------------------------------------------------------------------------------------- adoption


def adopt_group(active: Session, group: Any, sidecars: Sequence[tuple[str, Any]] = ()) -> None:
    """Put all pools of a HostPoolGroup into a new arena.

    Ends the process with one sentence if a pool cannot be described, or no tier can hold the pools.

    Args:
        sidecars: (name, pool) that will join the group later; frames include their sections.
    """
    try:
        described = [(_name(entry.name), entry.host_pool, describe(entry.host_pool)) for entry in group.entries]
        later = [(name, pool, describe(pool)) for name, pool in sidecars]
        placed, frames = lay_out(
            (name, space_of(name), description.section_bytes)
            for name, _, description in (*described, *later)
            if description is not None
        )
        if active.placement.may_share:
            frames = {space: nbytes + TRAILER_BYTES for space, nbytes in frames.items()}
        pages: dict[str, int] = {}
        for name, pool, description in (*described, *later):
            if description is not None:
                space = space_of(name)
                pages[space] = max(pages.get(space, 0), -(-int(pool.size) // description.slots))
        device = next(d.device for _, _, d in described if d is not None)
        if described[0][2] is None:
            active.placement.skip_shared(
                Unavailable(
                    "it does not support models whose first pool has no bytes", Remedy("use_tier", value="dram")
                )
            )
        elif identity.is_settled(active):
            assert active.facts is not None
            identities = [identity.of_space(active.facts, placed, [*described, *later], space) for space in frames]
            active.placement.share_as(identities, active.label)
        arena = Arena(
            active.placement,
            [SpaceSpec(space, pages[space], nbytes) for space, nbytes in frames.items()],
            device=device,
            copy=active.plan.options.copy,
            integrity=active.plan.options.integrity,
        )
    except (Unsupported, ConfigError, CopyError) as error:
        refuse(_sentence(error))
    active.arenas.append(arena)
    for name, pool, description in described:
        section = placed.get(name, Section(space_of(name), 0, 0))
        _attach(active, arena, name, pool, description, section, group.anchor_entry.host_pool)
    try:
        arena.begin(_all_planes(active, arena))
    except CopyError as error:
        refuse(_sentence(error))
    setattr(group, _RESERVED, {name: placed[name] for name, _, description in later if description is not None})


def adopt_another(active: Session, entry: Any) -> None:
    """Put a pool with its own index space that joins an adopted group into the group's arena."""
    if getattr(entry.host_pool, ADOPTED, None) is not None:
        return
    arena = active.arenas[-1]
    name = _name(entry.name)
    try:
        description = describe(entry.host_pool)
        section = None
        if description is not None:
            placed, frames = lay_out([(name, space_of(name), description.section_bytes)])
            section = placed[name]
            if section.space in arena.spaces:
                raise Unsupported(f"pool {name} joins the index space {section.space} after its frames were made")
            if arena.tier.traits.shared:
                raise Unsupported(f"pool {name} is added after the others, which tier bank does not support")
            pages = -(-int(entry.host_pool.size) // description.slots)
            arena.extend(SpaceSpec(section.space, pages, frames[section.space]))
        _attach(active, arena, name, entry.host_pool, description, section)
        arena.begin(_all_planes(active, arena))
    except (Unsupported, ConfigError, CopyError) as error:
        refuse(_sentence(error))


def _all_planes(active: Session, arena: Arena) -> list[Step]:
    views = [view for view in active.pools if view.layers and view.arena is arena]
    return [Step(plane, 0, 0) for view in views for planes in view.layers.values() for plane in planes]


def adopt_sidecar(active: Session, group: Any, name: str, pool: Any) -> None:
    """Put a pool that joins an adopted group into its reserved sections."""
    try:
        description = describe(pool)
    except Unsupported as error:
        refuse(_sentence(error))
    section = getattr(group, _RESERVED).get(name)
    if description is not None and (section is None or section.nbytes != description.section_bytes):
        refuse(
            f"pool {name} joined HiCache unexpectedly. Leave out --hicache-use-xmem for this draft "
            "model, and report this error."
        )
    _attach(active, active.arenas[-1], name, pool, description, section)


def _attach(
    active: Session,
    arena: Arena,
    name: str,
    pool: Any,
    description: Description | None,
    section: Section | None,
    anchor: Any = None,
) -> None:
    view = AdoptedPool(
        pool, len(active.pools) + 1, arena, description, section or Section(space="", offset=0, nbytes=0)
    )
    active.pools.append(view)
    setattr(pool, ADOPTED, view)
    pool.can_use_write_back_jit = False
    # Some classes convert indices to page numbers here, or wait for a copy from the GPU.
    pool.prepare_transfer_indices = _as_they_are
    if description is not None:
        storage.attach(view)
        if pool is anchor or view.section.space == name.upper():
            sharing.attach(view)
    if hasattr(pool, "alloc"):
        _forget_what_is_allocated(active, view)


def _forget_what_is_allocated(active: Session, view: AdoptedPool) -> None:
    """Clear the sums of pages that SGLang allocates: not every writer of a page writes its sum."""
    alloc = view.pool.alloc
    space = view.section.space or KV
    size = _allocated_at_once(view)

    def alloc_anew(*args: Any, **kwargs: Any) -> Any:
        indices = alloc(*args, **kwargs)
        if indices is not None:
            for other in active.pools:
                if other.sums is not None and other.arena is view.arena and other.section.space == space:
                    other.sums.forget(indices[:: math.gcd(size, other.slots)] // other.slots)
        return indices

    view.pool.alloc = alloc_anew


def keep_pages(active: Session) -> list[Perch]:
    """Reserve the first pages of SGLang's allocators for canaries, now and after every flush.

    Runs before anything is served. The allocator of a rider is unused, so a reservation there is harmless. A pool
    without bytes may provide the numbers of any other pool.

    Returns: a page of every pool with bytes, or nothing if an allocator has no free page.
    """
    views = [view for view in active.pools if view.layers]
    indices = max((view.slots for view in views), default=0)
    kept = []
    for view in active.pools:
        size = _allocated_at_once(view)
        count = -(-indices // size) * size if view.section.space != MAMBA else view.slots
        has_allocator = all(hasattr(view.pool, name) for name in ("alloc", "clear", "available_size"))
        if not has_allocator or view.pool.available_size() <= 2 * count:
            return []
        kept.append((view.pool, count))
    for pool, count in kept:
        if not torch.equal(pool.alloc(count), torch.arange(count)):
            return []
        _keep_when_cleared(pool, count)
    for view in views:
        space = view.arena.spaces[view.section.space]
        space.kept = max(space.kept, -(-indices // view.slots) if view.section.space != MAMBA else 1)
    return [
        Perch(
            type(view.pool).__name__,
            view.arena,
            view.section.space,
            0,
            [plane for layer in view.layers.values() for plane in layer],
        )
        for view in views
    ]


def _allocated_at_once(view: AdoptedPool) -> int:
    """Return the indices per unit of a pool's allocator."""
    return int(getattr(view.pool, "logical_page_size", 0) or getattr(view.pool, "page_size", view.slots))


def _keep_when_cleared(pool: Any, count: int) -> None:
    clear, alloc = pool.clear, pool.alloc

    def clear_but_the_first() -> None:
        clear()
        alloc(count)

    pool.clear = clear_but_the_first


def _as_they_are(host_indices: Any, device_indices: Any, io_backend: str) -> tuple[Any, Any]:
    return host_indices, device_indices


def used_fraction(active: Session, arena: Arena, space: str) -> float:
    """Return the fraction of an arena's space that holds KV cache: the fullest pool's, as riders allocate nothing."""
    fullest = 0.0
    for view in active.pools:
        if view.arena is arena and view.section.space == space:
            with suppress(NotImplementedError):  # a rider without an allocator
                fullest = max(fullest, 1 - view.pool.available_size() / view.pool.logical_size)
    return fullest


def share_loads(active: Session, gather: Gather, me: int) -> None:
    """Share loads among ranks of tensor parallelism, where the user asked for it; see `Arena.share_loads`."""
    if not active.plan.options.copy.share_loads:
        return
    for arena in active.arenas:
        views = [view for view in active.pools if view.layers and view.arena is arena and _is_replicated(view.pool)]
        arena.share_loads([plane for v in views for layer in v.layers.values() for plane in layer], gather, me)


def _is_replicated(pool: Any) -> bool:
    # With DCP each rank has its part of the tokens.
    return identity.is_replicated([pool]) and getattr(pool, "dcp_size", 1) == 1


def self_test(active: Session) -> None:
    """Copy a page of random bytes through every pool and back, before anything is served.

    Restores the GPU's page. Waits for the GPU.

    Raises:
        CopyError: wrong bytes came back, or a copy was refused.
    """
    for view in active.pools:
        if not view.layers:
            continue
        arena = view.arena
        planes = [plane for layer in view.layers.values() for plane in layer]
        unit = 1 if all(plane.device_units > 1 for plane in planes) else 0
        arrays = [bytes_at(p.device_address + unit * p.device_stride, p.unit_bytes, arena.device) for p in planes]
        before = [array.clone() for array in arrays]
        slots = torch.tensor([unit * view.slots], dtype=torch.int64, device=arena.device)
        page = torch.zeros(1, dtype=torch.int64)
        (frames,) = arena.frames([(view.section.space, page)])
        program = arena.compile([Step(plane, 0, 0) for plane in planes], 1)
        random = [torch.randint(0, 256, array.shape, dtype=torch.uint8, device=array.device) for array in arrays]
        for array, data in zip(arrays, random, strict=True):
            array.copy_(data)
        arena.store(program, [Pages(frames, slots)])
        for array in arrays:
            array.fill_(0xFF)
        arena.load(program, [Pages(frames, slots)])
        wrong = sum(not torch.equal(array, data) for array, data in zip(arrays, random, strict=True))
        for array, data in zip(arrays, before, strict=True):
            array.copy_(data)
        arena.spaces[view.section.space].free(page)
        if wrong:
            raise CopyError(
                f"{wrong} of {len(planes)} arrays of {type(view.pool).__name__} came back from tier {arena.tier.name} "
                "with wrong bytes. Leave out --hicache-use-xmem, and report this error."
            )


def _name(name: Any) -> str:
    return str(getattr(name, "value", name))


def _sentence(error: Exception) -> str:
    if isinstance(error, Unsupported):
        return f"--hicache-use-xmem cannot hold this model's KV cache: {error}. Leave the flag out for this model."
    return sentence(error)


def draft_sidecars(group: Any, device_pools: Sequence[Any], build: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Build a draft model's host pools before SGLang does, only to get their sizes.

    Args:
        group: the target's HostPoolGroup.
        device_pools: the draft's pools.
        build: SGLang's `build_hicache_draft_sidecars`.
    """
    if not device_pools:
        return []
    controller = types.SimpleNamespace(mem_pool_host=group, page_size=group.page_size, transfer_layer_id_max=1 << 16)
    _, entries = build(draft_device_pools=device_pools, tree_cache=types.SimpleNamespace(cache_controller=controller))
    return [(_name(entry.name), entry.host_pool) for entry in entries]
