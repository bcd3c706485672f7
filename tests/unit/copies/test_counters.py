"""Counters of a load, without a GPU: what a stream is asked to wait for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver

from sglang_xmem import gpus
from sglang_xmem.copies import counters
from sglang_xmem.copies.counters import LayerCounters
from sglang_xmem.errors import CopyError

CPU = torch.device("cpu", 0)
STREAM = 4711


class Driver:
    """Notes the waits that a stream is given."""

    def __init__(self) -> None:
        self.waits: list[tuple[int, int, int, int]] = []
        self.status = driver.CUresult.CUDA_SUCCESS

    def wait(self, *arguments: Any) -> tuple[Any]:
        self.waits.append(arguments)
        return (self.status,)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(driver, "cuStreamWaitValue32", made.wait)
    monkeypatch.setattr(gpus, "attribute", lambda gpu, name: 1)
    return made


def test_a_part_is_its_own_counter_and_loads_add_up(fake: Driver) -> None:
    made = LayerCounters(3, CPU)
    assert made._counters.tolist() == [0, 0, 0]
    made.wait(0)  # before any load: nothing to wait for
    made.announce(64)
    made.wait(2)
    made.announce(16)
    made.wait(1)
    geq = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
    first = made.address
    assert fake.waits == [(STREAM, first, 0, geq), (STREAM, first + 8, 64, geq), (STREAM, first + 4, 80, geq)]


def test_a_stream_waits_once_for_what_it_needs(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = LayerCounters(4, CPU)
    made.announce(8)
    for part in (0, 0, 2, 1, 2, 3):
        made.wait(part)
    assert [address - made.address for _, address, _, _ in fake.waits] == [0, 8, 12]
    other = SimpleNamespace(cuda_stream=STREAM + 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: other)
        made.wait(1)  # has not waited for anything
    made.wait(1)  # the other stream's waiting does nothing for this one
    made.announce(8)
    made.wait(1)  # another load
    seen = [(stream - STREAM, (address - made.address) // 4, value) for stream, address, value, _ in fake.waits[3:]]
    assert seen == [(1, 1, 8), (0, 1, 8), (0, 1, 16)]


@pytest.mark.parametrize("target", [0, 7, 2**31 - 1, 2**31, 2**32 - 1])
def test_counters_stand_again_where_the_last_load_was(fake: Driver, target: int) -> None:
    made = LayerCounters(3, CPU)
    made.announce(target)
    made._counters.copy_(torch.tensor([5, 1, 0]))
    made.restore()
    assert [value % 2**32 for value in made._counters.tolist()] == [target] * 3


def test_a_refused_wait_is_asked_for_again(fake: Driver) -> None:
    made = LayerCounters(1, CPU)
    made.announce(8)
    fake.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CopyError):
        made.wait(0)
    fake.status = driver.CUresult.CUDA_SUCCESS
    made.wait(0)
    assert len(fake.waits) == 2


def test_the_target_wraps_around_as_the_counters_do(fake: Driver) -> None:
    made = LayerCounters(1, CPU)
    made._target = 2**32 - 10
    made.announce(64)
    made.wait(0)
    assert fake.waits[0][2] == 54


@pytest.mark.parametrize(("remote", "able", "flush"), [(False, 1, False), (True, 1, True), (True, 0, False)])
def test_writes_of_another_gpu_are_flushed(
    fake: Driver, monkeypatch: pytest.MonkeyPatch, remote: bool, able: int, flush: bool
) -> None:
    monkeypatch.setattr(gpus, "attribute", lambda gpu, name: able)
    made = LayerCounters(1, CPU, remote=remote)
    made.wait(0)
    flag = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_FLUSH)
    assert bool(fake.waits[0][3] & flag) is made.flushes is flush


def test_a_refused_wait_is_an_error(fake: Driver) -> None:
    made = LayerCounters(1, CPU)
    fake.status = driver.CUresult.CUDA_ERROR_NOT_SUPPORTED
    with pytest.raises(CopyError, match="CUDA_ERROR_NOT_SUPPORTED"):
        made.wait(0)


def test_support_is_asked_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attribute(gpu: int, name: str) -> int:
        asked.append((gpu, name))
        return 0

    monkeypatch.setattr(gpus, "attribute", attribute)
    assert counters.supported(torch.device("cuda", 3)) is False
    assert asked == [(3, "CAN_USE_64_BIT_STREAM_MEM_OPS")]


class Links:
    """A driver that says 1 for some attributes of the link from GPU 5 to GPU 3 alone, and refuses others."""

    CUdevice_P2PAttribute = driver.CUdevice_P2PAttribute

    def __init__(self, has: str, refuses: str) -> None:
        self.has, self.refuses = has, refuses

    def cuDeviceGet(self, gpu: int) -> tuple[Any, int]:
        return driver.CUresult.CUDA_SUCCESS, gpu

    def cuDeviceGetP2PAttribute(self, attribute: Any, source: int, target: int) -> tuple[Any, int | None]:
        if self.refuses and attribute.name.endswith(self.refuses):
            return driver.CUresult.CUDA_ERROR_INVALID_VALUE, None
        has = bool(self.has) and attribute.name == f"CU_DEVICE_P2P_ATTRIBUTE_{self.has}_SUPPORTED"
        return driver.CUresult.CUDA_SUCCESS, int(has and (source, target) == (5, 3))


@pytest.mark.parametrize(
    ("has", "refuses", "atomic"),
    [
        ("NATIVE_ATOMIC", "", True),
        ("NATIVE_ATOMIC", "_ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED", True),
        ("ONLY_PARTIAL_NATIVE_ATOMIC", "", True),
        ("ACCESS", "", False),
        ("", "_ONLY_PARTIAL_NATIVE_ATOMIC_SUPPORTED", False),
    ],
)
def test_another_gpu_counts_where_its_additions_are_atomic(
    monkeypatch: pytest.MonkeyPatch, has: str, refuses: str, atomic: bool
) -> None:
    """Peers over PCIe have access and no atomic additions, and one that is lost is waited for without end."""
    monkeypatch.setattr(gpus, "attribute", lambda gpu, name: 1)
    monkeypatch.setattr(gpus, "driver", lambda: Links(has, refuses))
    device = torch.device("cuda", 3)
    assert counters.supported(device) is True, "the rank's own GPU needs no link"
    assert counters.supported(device, 5) is atomic
    assert counters.supported(device, 4) is False
