"""Errors of GPUs, over a fake NVML: which set the tier aside, for how long, and what is no error of a GPU."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_xmem import gpu_events, gpus
from sglang_xmem.errors import Unavailable
from sglang_xmem.gpu_events import GpuEvents
from sglang_xmem.session import Session


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """NVML of two GPUs; handles are their numbers.

    Attributes:
        events: to come, by GPU; None where it has none.
        ecc: errors that were not corrected, by GPU; None where it does not count.
        links: by GPU.
        lost: GPUs that are.
    """

    NVMLError = NVMLError
    NVML_ERROR_TIMEOUT, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_NOT_SUPPORTED = 10, 15, 3
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_FEATURE_ENABLED = 1, 0, 1
    NVML_NVLINK_MAX_LINKS = 36
    nvmlEventTypeSingleBitEccError, nvmlEventTypeDoubleBitEccError, nvmlEventTypeXidCriticalError = 1, 2, 8

    def __init__(self) -> None:
        self.events: dict[int, deque[Any] | None] = defaultdict(deque)
        self.ecc: dict[int, int | None] = {0: 0, 1: 0}
        self.links = {0: [1, 1, 1], 1: [1, 1, 1]}
        self.lost: set[int] = set()
        self.registered: dict[int, int] = {}

    def _here(self, gpu: int) -> None:
        if gpu in self.lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)

    def nvmlDeviceGetSupportedEventTypes(self, gpu: int) -> int:
        return 0 if self.events[gpu] is None else 0xFF

    def nvmlEventSetCreate(self) -> list[int]:
        return []

    def nvmlDeviceRegisterEvents(self, gpu: int, kinds: int, events: list[int]) -> None:
        events.append(gpu)
        self.registered[gpu] = kinds

    def nvmlEventSetWait_v2(self, events: list[int], wait_ms: int) -> Any:
        (gpu,) = events
        self._here(gpu)
        waiting = self.events[gpu]
        if not waiting:
            raise NVMLError(self.NVML_ERROR_TIMEOUT)
        return waiting.popleft()

    def nvmlDeviceGetTotalEccErrors(self, gpu: int, kind: int, counter: int) -> int:
        self._here(gpu)
        found = self.ecc[gpu]
        if found is None:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return found

    def nvmlDeviceGetNvLinkState(self, gpu: int, link: int) -> int:
        self._here(gpu)
        if link >= len(self.links[gpu]):
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return self.links[gpu][link]

    def xid(self, gpu: int, number: int) -> None:
        waiting = self.events[gpu]
        assert waiting is not None
        waiting.append(SimpleNamespace(eventType=self.nvmlEventTypeXidCriticalError, eventData=number))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    made = FakeNvml()
    monkeypatch.setattr(gpus, "nvml_library", lambda: made)
    monkeypatch.setattr(gpus, "nvml_handle", lambda gpu: gpu)
    return made


class Rank:
    """A session with a tier in GPU 1."""

    def __init__(self) -> None:
        arena = SimpleNamespace(tier=SimpleNamespace(name="peer"), gpus=(0, 1))
        made: Any = SimpleNamespace(options=SimpleNamespace())
        self.session = Session(made, made)
        self.session.arenas = [arena]  # type: ignore[list-item]
        self.events = GpuEvents([0, 1], self.session._gpu_failed)

    def look(self) -> str:
        self.events.look(0)
        return self.session.trouble


@pytest.fixture
def rank(nvml: FakeNvml) -> Rank:
    return Rank()


def test_a_sound_gpu_is_no_trouble(rank: Rank, nvml: FakeNvml) -> None:
    assert rank.look() == ""
    assert nvml.registered == {0: 10, 1: 10}, "not errors that were corrected"
    assert rank.session.counts["failures:gpu"] == 0


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68])
def test_what_programs_do_wrong_is_no_error_of_the_gpu(rank: Rank, nvml: FakeNvml, xid: int) -> None:
    nvml.xid(1, xid)
    assert rank.look() == ""


@pytest.mark.parametrize(("xid", "words"), [(74, "an NVLink failed"), (94, "contained")])
def test_an_error_that_passes(rank: Rank, nvml: FakeNvml, xid: int, words: str) -> None:
    nvml.xid(1, xid)
    assert rank.look().startswith("GPU 1: ")
    assert words in rank.session.trouble
    assert f"Xid {xid}" in rank.session.trouble
    assert rank.session.counts["failures:gpu"] == 1
    rank.session.take_again()
    assert rank.look() == ""


@pytest.mark.parametrize("xid", [48, 79, 95])
def test_an_error_that_lasts(rank: Rank, nvml: FakeNvml, xid: int, caplog: pytest.LogCaptureFixture) -> None:
    """No canary ends it, no later trouble hides it, and none is sent soon."""
    nvml.xid(1, 74)
    nvml.xid(1, xid)
    said = rank.look()
    assert f"Xid {xid}" in said
    rank.session.set_aside("a load was refused")
    rank.session.take_again()
    assert rank.look() == said
    assert not rank.session._may_be_well()
    assert "tier peer is set aside until the server is restarted: GPU 1: " in caplog.text


def test_a_double_bit_error(rank: Rank, nvml: FakeNvml) -> None:
    waiting = nvml.events[0]
    assert waiting is not None
    waiting.append(SimpleNamespace(eventType=nvml.nvmlEventTypeDoubleBitEccError, eventData=0))
    assert rank.look() == "GPU 0: an error of its memory could not be corrected"


def test_counters_where_there_are_no_events(nvml: FakeNvml) -> None:
    nvml.events[1] = None
    nvml.ecc[1] = 3  # of another day
    rank = Rank()
    assert rank.look() == ""
    nvml.ecc[1] = 4
    assert rank.look() == "GPU 1: an error of its memory could not be corrected"


def test_a_link_that_goes_down(rank: Rank, nvml: FakeNvml) -> None:
    nvml.links[1][2] = 0
    assert rank.look() == "GPU 1: NVLink 2 is down"
    rank.session.take_again()
    assert rank.look() == "", "it is not news twice"


@pytest.mark.parametrize("events", [True, False])
def test_a_lost_gpu(nvml: FakeNvml, events: bool) -> None:
    if not events:
        nvml.events[1] = None
    rank = Rank()
    nvml.lost.add(1)
    assert rank.look() == "GPU 1: it is lost"
    rank.look()
    assert rank.session.counts["failures:gpu"] == 1


def test_a_gpu_that_says_nothing(nvml: FakeNvml) -> None:
    nvml.events[1], nvml.ecc[1], nvml.links[1] = None, None, []
    assert Rank().look() == ""


def test_without_nvml_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise Unavailable("the Python package nvidia-ml-py is missing")

    monkeypatch.setattr(gpus, "nvml_library", missing)
    assert gpu_events.watch([0], lambda why, *, for_good: None) is None
    assert gpu_events.watch([], lambda why, *, for_good: None) is None


def test_the_thread_reports(nvml: FakeNvml) -> None:
    """By itself, and it ends when it is stopped."""
    import threading

    heard, said = threading.Event(), []

    def failed(why: str, *, for_good: bool) -> None:
        said.append(why)
        heard.set()

    nvml.xid(1, 79)
    events = gpu_events.watch([0, 1], failed)
    assert events is not None
    assert heard.wait(60)
    events.stop()
    events._thread.join(60)
    assert not events._thread.is_alive()
    assert said == ["GPU 1: it has fallen off the bus (Xid 79)"]


def test_the_installed_nvml_has_what_is_asked() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = [name for name in vars(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert [name for name in names if not hasattr(pynvml, name)] == []
    assert pynvml.NVMLError(15).value == FakeNvml.NVML_ERROR_GPU_IS_LOST == pynvml.NVML_ERROR_GPU_IS_LOST
    assert pynvml.NVML_ERROR_TIMEOUT == FakeNvml.NVML_ERROR_TIMEOUT
