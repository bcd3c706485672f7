"""SGLang's loads and stores as moves of an arena: any pools, one launch, one counter per transfer layer.

Replaces the two `submit_*` of `L2TransferEngine`, and `LayerLoadingEvent.wait`, the other half of a load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_xmem import session
from sglang_xmem.copies.base import Pages, Step

if TYPE_CHECKING:
    from sglang_xmem.copies.base import Program
    from sglang_xmem.copies.counters import LayerCounters
    from sglang_xmem.engines.sglang.pools import AdoptedPool

logger = logging.getLogger(__name__)

#: Attribute of a host pool: its AdoptedPool.
ADOPTED = "_sglang_xmem"
#: Attributes of a LayerLoadingEvent: counters of the load that it stands for at present, None where its events signal
#: completion; and the counters that were once made for it, by number of layers.
_COUNTERS = "_sglang_xmem_counters"
_MADE = "_sglang_xmem_made"


def adopted(transfer: Any) -> AdoptedPool:
    """The adopted pool of a transfer.

    Raises:
        RuntimeError: SGLang made this pool behind the adapter's back, so its memory is not in the tier.
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
    """Enqueue a load: one launch, however many pools and layers."""
    moves = [t for t in transfers if adopted(t).layers]
    counts = session.current().counts
    event: Any = getattr(on_layer_done, "__self__", None)
    stream = self.host_to_device_stream
    with self._submission(transfers, stream, "host_to_device", start_event) as (prepared, completion):
        prepared_moves = [t for t in prepared if adopted(t).layers]
        counters = None
        if moves:
            arena = adopted(moves[0]).arena
            pages = _pages(arena, prepared_moves)
            counters = _counters_of(event, arena, transfer_layer_id_max)
            if counters is not None or on_layer_done is None or arena.device.type == "cpu":
                arena.load(_load_program(arena, moves, transfer_layer_id_max), pages, counters)
            else:
                _load_by_layers(arena, moves, pages, transfer_layer_id_max, on_layer_done)
            counts["loads"] += 1
        if event is not None and hasattr(event, "finish_event"):
            setattr(event, _COUNTERS, counters)
        if on_layer_done is not None and (counters is not None or not moves or arena.device.type == "cpu"):
            if counters is not None:
                event.finish_event.record(stream)
            else:
                for layer in range(transfer_layer_id_max):
                    on_layer_done(layer)
    return completion


def submit_device_to_host(original: Any, self: Any, transfers: Any) -> Any:
    """Enqueue a store: one launch, however many pools."""
    moves = [t for t in transfers if adopted(t).layers]
    with self._submission(transfers, self.device_to_host_stream, "device_to_host") as (prepared, completion):
        prepared_moves = [t for t in prepared if adopted(t).layers]
        if moves:
            arena = adopted(moves[0]).arena
            arena.store(_store_program(arena, moves), _pages(arena, prepared_moves))
            session.current().counts["stores"] += 1
    return completion


def layer_wait(original: Any, self: Any, layer_index: int) -> None:
    """Make the current stream wait for a layer of the load that a LayerLoadingEvent stands for."""
    counters = getattr(self, _COUNTERS, None)
    if counters is None:
        original(self, layer_index)
    else:
        counters.wait(layer_index)


def prepare_counters(result: Any, self: Any, num_layers: int) -> None:
    """Make the counters of a LayerDoneCounter's loads at start, for making them waits for the GPU."""
    if not session.active() or not session.current().arenas:
        return
    arena = session.current().arenas[-1]
    for event in self.events:
        _make_counters(event, arena, num_layers)


def _counters_of(event: Any, arena: Any, num_layers: int) -> LayerCounters | None:
    if event is None or not hasattr(event, "finish_event"):
        return None
    made = getattr(event, _MADE, None)
    if made is None or made[0] is not arena or made[1] != num_layers:
        made = _make_counters(event, arena, num_layers)
    counters: LayerCounters | None = made[2]
    return counters


def _make_counters(event: Any, arena: Any, num_layers: int) -> Any:
    made = (arena, num_layers, arena.make_counters(num_layers))
    setattr(event, _MADE, made)
    return made


def _pages(arena: Any, moves: Sequence[Any]) -> list[Pages]:
    """One vector per distinct pair of index tensors: pools that ride on another's numbers share its vector's tensors."""
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
            wanted.append((pool.section.space, _on_cpu(host)[:: pool.slots] // pool.slots))
        numbers.append(number)
        slots.append(device[:: pool.slots])
    frames = arena.frames(wanted)
    return [Pages(frames[number], slot) for number, slot in zip(numbers, slots, strict=True)]


def _on_cpu(indices: torch.Tensor) -> torch.Tensor:
    # `move_indices` keeps host indices on the CPU. Whoever brings others pays for it, rather than getting wrong pages.
    return indices if indices.device.type == "cpu" else indices.cpu()


def _load_program(arena: Any, moves: Sequence[Any], num_parts: int) -> Program:
    """The compiled load of these pools in this order. The order differs from load to load, and drafts bring a new layer
    map each time, so the key is the pools and not the maps."""
    key = ("load", num_parts, *((adopted(t).number, id(t.device_pool) if t.is_draft else 0) for t in moves))
    program: Program | None = arena.programs.get(key)
    if program is None:
        program = arena.programs[key] = arena.compile(load_steps(moves, num_parts), num_parts)
    return program


def _store_program(arena: Any, moves: Sequence[Any]) -> Program:
    key = ("store", *(adopted(t).number for t in moves))
    program: Program | None = arena.programs.get(key)
    if program is None:
        steps = [
            Step(plane, vector, 0)
            for vector, transfer in enumerate(moves)
            for planes in adopted(transfer).layers.values()
            for plane in planes
        ]
        program = arena.programs[key] = arena.compile(steps, 1)
    return program


def load_steps(moves: Sequence[Any], num_parts: int) -> list[Step]:
    """What SGLang's loop over layers and transfers copies, in its order."""
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


def _load_by_layers(arena: Any, moves: Sequence[Any], pages: Any, num_parts: int, on_layer_done: Any) -> None:
    """A launch and an event per layer, for GPUs whose streams cannot wait for counters."""
    key = ("layers", num_parts, *((adopted(t).number, id(t.device_pool) if t.is_draft else 0) for t in moves))
    programs = arena.programs.get(key)
    if programs is None:
        by_layer: list[list[Step]] = [[] for _ in range(num_parts)]
        for step in load_steps(moves, num_parts):
            by_layer[step.part].append(step._replace(part=0))
        programs = arena.programs[key] = [arena.compile(steps, 1) if steps else None for steps in by_layer]
        logger.warning("sglang_xmem: a load is one launch per layer here, since streams cannot wait for counters")
    session.current().counts["loads_by_layers"] += 1
    for layer, program in enumerate(programs):
        if program is not None:
            arena.load(program, pages)
        on_layer_done(layer)
