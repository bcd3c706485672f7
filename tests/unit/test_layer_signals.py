"""The adapter's choice between one launch that signals its layers and SGLang's loop with an event a layer."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_xmem.adapters import sglang_0_5_23 as adapter
from sglang_xmem.pool import TierPool

pytestmark = pytest.mark.cpu_engine

LAYERS = 4


class Signals:
    def __init__(self) -> None:
        self.waits: list[int] = []

    def wait(self, part: int) -> None:
        self.waits.append(part)


class Engine:
    """Stands in for SGLang's L2TransferEngine."""

    host_to_device_stream = None

    @contextmanager
    def _submission(self, transfers: Any, stream: Any, key: str, start_event: Any) -> Any:
        yield transfers, "completion"


def pool(signals: int = 3, layers: int = LAYERS) -> Any:
    made = object.__new__(TierPool)
    made.num_layers = layers
    made._signals = [Signals() for _ in range(signals)]  # type: ignore[misc]
    made.loads = []  # type: ignore[attr-defined]
    made.load_layers = lambda *load: made.loads.append(load)  # type: ignore[method-assign, attr-defined]
    return made


def transfer(of: Any, **more: Any) -> Any:
    rows = torch.arange(3)
    fields = {"host_pool": SimpleNamespace(tier_pool=of), "layer_mapper": None}
    return SimpleNamespace(**{**fields, "host_indices": rows, "device_indices": rows + 1, **more})


@pytest.fixture
def counter() -> Any:
    from sglang.srt.managers.cache_controller import LayerLoadingEvent

    made = LayerLoadingEvent(LAYERS)
    made.load_events = [SimpleNamespace(record=lambda stream: None) for _ in range(LAYERS)]
    return made


def submit(transfers: list[Any], counter: Any, **more: Any) -> Any:
    def stock(self: Any, transfers: Any, **more: Any) -> str:
        return "stock"

    done = {"on_layer_done": counter.complete, "transfer_layer_id_max": LAYERS, **more}
    return adapter._submit_host_to_device(stock, Engine(), transfers, **done)


def stock_wait(self: Any, layer: int) -> None:
    self.stock_waits = [*getattr(self, "stock_waits", []), layer]


def test_a_load_is_one_launch_and_its_layers_are_waited_for_by_signals(counter: Any) -> None:
    tier = pool()
    assert submit([transfer(tier)], counter) == "completion"
    ((host, device, signals, indices),) = tier.loads
    assert (host.tolist(), device.tolist(), indices.tolist()) == ([0, 1, 2], [1, 2, 3], [0, 1, 2])
    for layer in range(LAYERS):
        adapter._layer_wait(stock_wait, counter, layer)
    assert signals.waits == list(range(LAYERS))
    assert not hasattr(counter, "stock_waits")


def test_the_signals_of_a_counter_stay_its_own(counter: Any) -> None:
    tier = pool()
    for _ in range(5):
        submit([transfer(tier)], counter)
    assert len({id(load[2]) for load in tier.loads}) == 1
    assert len(tier._signals) == 2


def _mapped(layer: int) -> int | None:
    return layer if layer else None


@pytest.mark.parametrize(
    "case", ["two_pools", "no_tier_pool", "other_layers", "mapped_layers", "no_signals_left", "delayed"]
)
def test_what_signals_cannot_tell_takes_sglangs_loop(case: str, counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submit([transfer(pool())], counter)  # a load before it, whose signals must not be waited for
    transfers = {
        "two_pools": [transfer(pool()), transfer(pool())],
        "no_tier_pool": [transfer(object())],
        "other_layers": [transfer(pool(layers=LAYERS + 1))],
        "mapped_layers": [transfer(pool(), layer_mapper=_mapped)],
        "no_signals_left": [transfer(pool(signals=0))],
        "delayed": [transfer(pool())],
    }[case]
    if case == "no_signals_left":
        delattr(counter, adapter._TAKEN)
    if case == "delayed":
        monkeypatch.setenv("SGLANG_TEST_HICACHE_H2D_DELAY_CYCLES", "1000")
    assert submit(transfers, counter) == "stock"
    adapter._layer_wait(stock_wait, counter, 2)
    assert counter.stock_waits == [2]


def test_a_mapper_that_changes_nothing_is_no_obstacle(counter: Any) -> None:
    assert submit([transfer(pool(), layer_mapper=lambda layer: layer)], counter) == "completion"


def test_another_pools_load_does_not_take_this_pools_signals(counter: Any) -> None:
    submit([transfer(pool())], counter)
    assert submit([transfer(pool())], counter) == "stock"
