"""SGLang's loads and stores as moves of an arena: any pools, one launch, one counter per transfer layer.

Replaces the two `submit_*` of `L2TransferEngine`, and `LayerLoadingEvent.wait`, which waits for a load's layers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_xmem import session
from sglang_xmem.copies.base import Pages, Step
from sglang_xmem.engines.sglang import checks
from sglang_xmem.engines.sglang.checks import Checked, Vectors
from sglang_xmem.engines.sglang.geometry import pages_of
from sglang_xmem.errors import CopyError

if TYPE_CHECKING:
    from sglang_xmem.copies.base import Program
    from sglang_xmem.copies.counters import LayerCounters
    from sglang_xmem.engines.sglang.pools import AdoptedPool
    from sglang_xmem.watch import InFlight

logger = logging.getLogger(__name__)

#: Attribute of a host pool: its AdoptedPool.
ADOPTED = "_sglang_xmem"
#: Attributes of a LayerLoadingEvent: counters of its load, None if events signal completion; and the counters made for
#: it, by number of layers.
_COUNTERS = "_sglang_xmem_counters"
_MADE = "_sglang_xmem_made"
#: Attribute of a LayerLoadingEvent: the Check of its current load, or None.
CHECK = "_sglang_xmem_check"


def adopted(transfer: Any) -> AdoptedPool:
    """Return the adopted pool of a transfer.

    Raises:
        RuntimeError: SGLang made this pool without the adapter, so its memory is not in the tier.
    """
    pool: AdoptedPool | None = getattr(transfer.host_pool, ADOPTED, None)
    if pool is None:
        raise RuntimeError(
            f"sglang_xmem: {type(transfer.host_pool).__name__} was not put into the tier. Report this SGLang "
            "configuration, or leave out --hicache-use-xmem."
        )
    return pool


def submit_host_to_device(
    original: Any,
    self: Any,
    transfers: Any,
    *,
    transfer_layer_id_max: int,
    start_event: Any = None,
    on_layer_done: Any = None,
) -> Any:
    """Enqueue a load: one launch, however many pools and layers (hook)."""
    begun = time.perf_counter_ns()
    active = session.current()
    bytes_before = active.counts["bytes:load"]
    event: Any = getattr(on_layer_done, "__self__", None)
    stream = self.host_to_device_stream
    with active.watch.over("load") as flight:
        with self._submission(transfers, stream, "host_to_device", start_event) as (prepared, completion):
            moves = [t for t in prepared if adopted(t).layers]
            counters, check = _load(moves, transfer_layer_id_max, event, on_layer_done, completion)
            if hasattr(event, "finish_event"):
                setattr(event, _COUNTERS, counters)
                forgotten = getattr(event, CHECK, None)
                if forgotten is not None:  # its batch's results were not used, or are pending
                    active.checks.append(forgotten)
                setattr(event, CHECK, check)
                if counters is not None:
                    event.finish_event.record(stream)
            elif check is not None:  # belongs to no batch
                active.checks.append(check)
        _note(flight, completion, active.counts["bytes:load"] - bytes_before)
    active.counts["enqueue_ns:load"] += time.perf_counter_ns() - begun
    return completion


def _load(
    moves: Sequence[Any], num_parts: int, event: Any, on_layer_done: Any, completion: Any
) -> tuple[LayerCounters | None, checks.Check | None]:
    """Enqueue a load's copies, the events of its layers if there are no counters, and its comparison."""
    counters = None
    if moves:
        arena = adopted(moves[0]).arena
        counters = _counters_of(event, arena, num_parts)
        key = ("load", num_parts, *_identity(moves))
        prepared = arena.programs.get(key)
        if prepared is None:
            prepared = arena.programs[key] = Prepared.of(arena, moves, load_steps(moves, num_parts), num_parts)
        vectors = _vectors(arena, moves, prepared.checked, claim=False)
        pages = vectors.pages
        wait = completion.finish_event.synchronize
        if counters is None and on_layer_done is not None and arena.device.type != "cpu":
            _load_by_layers(arena, ("layers", *key), prepared, pages, num_parts, on_layer_done)
            return None, checks.compare(arena, prepared.checked, vectors, wait)
        try:
            arena.load(prepared.program, pages, counters, vectors.addresses)
        except CopyError as error:
            _refused("load", error)
            arena.copy_plainly(prepared.steps, pages, load=True)
            counters = None
        _count("load", prepared, pages)
        if counters is None and on_layer_done is not None:
            for layer in range(num_parts):
                on_layer_done(layer)
        return counters, checks.compare(arena, prepared.checked, vectors, wait)
    if on_layer_done is not None:
        for layer in range(num_parts):
            on_layer_done(layer)
    return None, None


def submit_device_to_host(original: Any, self: Any, transfers: Any) -> Any:
    """Enqueue a store: one launch, however many pools (hook)."""
    begun = time.perf_counter_ns()
    active = session.current()
    bytes_before = active.counts["bytes:store"]
    with active.watch.over("store") as flight:
        with self._submission(transfers, self.device_to_host_stream, "device_to_host") as (prepared, completion):
            moves = [t for t in prepared if adopted(t).layers]
            if moves:
                _store(moves)
        _note(flight, completion, active.counts["bytes:store"] - bytes_before)
    active.counts["enqueue_ns:store"] += time.perf_counter_ns() - begun
    return completion


def _note(flight: InFlight, completion: Any, nbytes: int) -> None:
    """Give the watch thread a way to detect the end of an enqueued copy."""
    flight.nbytes = nbytes
    if completion.timing_enabled:
        flight.elapsed_s = lambda: completion.start_event.elapsed_time(completion.finish_event) / 1e3
    flight.done = completion.finish_event.query


def _store(moves: Sequence[Any]) -> None:
    arena = adopted(moves[0]).arena
    key = ("store", *_identity(moves))
    prepared = arena.programs.get(key)
    if prepared is None:
        prepared = arena.programs[key] = Prepared.of(arena, moves, _store_steps(moves), 1)
    vectors = _vectors(arena, moves, prepared.checked, claim=True)
    pages = vectors.pages
    try:
        arena.store(prepared.program, pages)
    except CopyError as error:
        _refused("store", error)
        arena.copy_plainly(prepared.steps, pages, load=False)
    _count("store", prepared, pages)
    checks.write(arena, prepared.checked, vectors)


def _refused(what: str, error: CopyError) -> None:
    """Record that the copier refused a copy; torch makes it instead, so the server continues."""
    active = session.current()
    active.counts["failures:refused"] += 1
    active.counts["fallbacks:plain"] += 1
    active.set_aside(f"a {what} was refused: {error}")
    logger.warning("sglang_xmem: the copier refused a %s; plain copies replace it: %s", what, error)


class Prepared(NamedTuple):
    """A compiled load or store.

    Attributes:
        steps: its source.
        page_bytes: bytes per page of each vector.
        checked: the pools whose pages have sums.
    """

    program: Program
    steps: tuple[Step, ...]
    page_bytes: tuple[int, ...]
    checked: Checked | None

    @classmethod
    def of(cls, arena: Any, moves: Sequence[Any], steps: Sequence[Step], num_parts: int) -> Prepared:
        """Compile `steps`."""
        page_bytes: Counter[int] = Counter()
        for step in steps:
            page_bytes[step.vector] += step.plane.unit_bytes
        vectors = range(max(page_bytes, default=-1) + 1)
        return cls(
            arena.compile(steps, num_parts),
            tuple(steps),
            tuple(page_bytes[vector] for vector in vectors),
            Checked.of(arena, [adopted(move) for move in moves], steps),
        )


def _count(direction: str, prepared: Prepared, pages: Sequence[Pages]) -> None:
    counts = session.current().counts
    counts[f"copies:{direction}"] += 1
    for each, nbytes in zip(pages, prepared.page_bytes, strict=False):
        pages_moved = each.frames.numel()
        counts[f"pages:{direction}"] += pages_moved
        counts[f"bytes:{direction}"] += pages_moved * nbytes


def layer_wait(original: Any, self: Any, layer_index: int) -> None:
    """Make the current stream wait for a layer of a LayerLoadingEvent's load."""
    counters = getattr(self, _COUNTERS, None)
    if counters is None:
        original(self, layer_index)
    else:
        counters.wait(layer_index)


def prepare_counters(result: Any, self: Any, num_layers: int) -> None:
    """Make the counters of a LayerDoneCounter's loads at startup, since making them waits for the GPU."""
    if not session.active() or not session.current().arenas:
        return
    arena = session.current().arenas[-1]
    for event in self.events:
        _make_counters(event, arena, num_layers)


def _counters_of(event: Any, arena: Any, num_layers: int) -> LayerCounters | None:
    if event is None or not hasattr(event, "finish_event"):
        return None
    made = getattr(event, _MADE, None)
    if made is None or made[0] is not arena.counting or made[1] != num_layers:
        made = _make_counters(event, arena, num_layers)
    counters: LayerCounters | None = made[2]
    return counters


def _make_counters(event: Any, arena: Any, num_layers: int) -> Any:
    made = (arena.counting, num_layers, arena.make_counters(num_layers))
    setattr(event, _MADE, made)
    return made


def _vectors(arena: Any, moves: Sequence[Any], checked: Checked | None, *, claim: bool) -> Vectors:
    """Look up one vector per pool; riders share the tensor of frame addresses of the pool whose numbers they use.

    Everything is copied to the device in one copy.
    """
    wanted: list[tuple[str, torch.Tensor]] = []
    known: dict[tuple[int, str, int], int] = {}
    numbers, slots = [], []
    for transfer in moves:
        pool = adopted(transfer)
        host, device = pool.narrow(transfer.host_indices, transfer.device_indices)
        key = (id(transfer.host_indices), pool.section.space, pool.slots)
        number = known.get(key)
        if number is None:
            number = known[key] = len(wanted)
            wanted.append((pool.section.space, pages_of(_on_cpu(host), pool.slots)))
        numbers.append(number)
        slots.append(device[:: pool.slots])
    chosen = [] if checked is None else checked.chosen([wanted[number][1] for number in numbers])
    some = checked is not None and any(len(these.rows) for these in chosen)
    others = arena.summer.lists(checked.prepared, chosen) if checked is not None and some else []
    there = arena.look_up(wanted, claim=claim)
    found = arena.upload([*there, *others])
    pages = [Pages(found[number], slot) for number, slot in zip(numbers, slots, strict=True)]
    return Vectors(pages, [there[number] for number in numbers], chosen, found[len(wanted) :])


def _on_cpu(indices: torch.Tensor) -> torch.Tensor:
    # `move_indices` keeps host indices on the CPU. Indices on the GPU cost a copy here, but are correct.
    return indices if indices.device.type == "cpu" else indices.cpu()


def _identity(moves: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return the key of a compiled move: the pools, since drafts pass a new layer map each time."""
    return tuple((adopted(t).number, id(t.device_pool) if t.is_draft else 0) for t in moves)


def _store_steps(moves: Sequence[Any]) -> list[Step]:
    return [
        Step(plane, vector, 0)
        for vector, transfer in enumerate(moves)
        for planes in adopted(transfer).layers.values()
        for plane in planes
    ]


def load_steps(moves: Sequence[Any], num_parts: int) -> list[Step]:
    """List the copies of SGLang's loop over layers and transfers, in its order."""
    steps = []
    for layer in range(num_parts):
        for vector, transfer in enumerate(moves):
            pool = adopted(transfer)
            local = layer if transfer.layer_mapper is None else transfer.layer_mapper(layer)
            if local is None or (transfer.layer_mapper is None and layer >= pool.pool.layer_num):
                continue
            host_layer = pool.host_layer(local, transfer.is_draft)
            if host_layer is not None:
                steps += [Step(plane, vector, layer) for plane in pool.layers[host_layer]]
    return steps


def _load_by_layers(arena: Any, key: Any, prepared: Prepared, pages: Any, num_parts: int, on_layer_done: Any) -> None:
    """Enqueue a launch and an event per layer, for GPUs whose streams cannot wait for counters."""
    programs = arena.programs.get(key)
    if programs is None:
        by_layer: list[list[Step]] = [[] for _ in range(num_parts)]
        for step in prepared.steps:
            by_layer[step.part].append(step._replace(part=0))
        programs = arena.programs[key] = [arena.compile(steps, 1) if steps else None for steps in by_layer]
        logger.warning("sglang_xmem: loads use one launch per layer, since this GPU's streams cannot wait for counters")
    session.current().counts["fallbacks:layers"] += 1
    _count("load", prepared, pages)
    for layer, program in enumerate(programs):
        if program is not None:
            arena.load(program, pages)
        on_layer_done(layer)
