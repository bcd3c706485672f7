"""Watch for GPU errors that the driver reports: a thread waits for NVML's events, and checks counters and links.

A transient error sets the tier aside until a canary comes back. An error that requires a GPU reset sets it aside until
a restart: reading the GPU's memory may end the rank's CUDA context.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from sglang_xmem import gpus
from sglang_xmem.errors import Unavailable

logger = logging.getLogger(__name__)

#: Milliseconds of one wait for events of all GPUs.
WAIT_MS = 2000

#: Numbers of the driver's error reports (Xid) after which a GPU continues. Those caused by programs, such as 13, 31, 43
#: and 45, say nothing about the hardware and are not listed.
PASSING: Final[Mapping[int, str]] = {
    63: "a row of its memory was replaced",
    74: "an NVLink failed",
    92: "many errors of its memory were corrected",
    94: "an error of its memory was contained",
    **dict.fromkeys((144, 145, 146, 147, 148, 149, 150, 155), "an NVLink failed"),
    156: "a part of its memory was retired",
}
#: Those after which it has to be reset.
LASTING: Final[Mapping[int, str]] = {
    48: "an error of its memory could not be corrected",
    64: "a row of its memory could not be replaced",
    79: "it has fallen off the bus",
    95: "an error of its memory was not contained",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "an error of its memory could not be corrected",
    143: "it could not be started",
    154: "it has to be reset",
    157: "a part of its memory could not be retired",
    171: "an error of its memory could not be corrected",
    172: "an error of its memory could not be corrected",
}


class Failed(Protocol):
    """Called for an error, with a clause and whether it lasts until a GPU reset."""

    def __call__(self, why: str, *, for_good: bool) -> None: ...


class GpuEvents:
    """Watches GPUs.

    Args:
        watched: CUDA ordinals.
        failed: called for each error.

    Raises:
        Unavailable: NVML is not there, or does not know a GPU.
    """

    def __init__(self, watched: Sequence[int], failed: Failed) -> None:
        nvml = gpus.nvml_library()
        self._failed = failed
        self._gpus = [_Gpu(gpu, nvml, gpus.nvml_handle(gpu)) for gpu in dict.fromkeys(watched)]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang_xmem-gpu-events", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()

    def look(self, wait_ms: int) -> None:
        """Report what has happened since the last look, or happens within `wait_ms`."""
        for gpu in self._gpus:
            for words, for_good in gpu.errors(wait_ms // len(self._gpus)):
                self._failed(f"GPU {gpu.ordinal}: {words}", for_good=for_good)

    def _run(self) -> None:
        while self._gpus and not self._stopped.is_set():
            try:
                self.look(WAIT_MS)
            except Exception as error:  # serving matters more
                logger.warning("sglang_xmem: errors of GPUs are not noticed any more: %s", error)
                return
            if not any(gpu.has_events for gpu in self._gpus):
                self._stopped.wait(WAIT_MS / 1e3)


class _Gpu:
    """One GPU: its events where it has any, else its count of errors, and its links."""

    def __init__(self, ordinal: int, nvml: Any, handle: Any) -> None:
        self.ordinal = ordinal
        self._nvml = nvml
        self._handle = handle
        self._events: Any = None
        self._lost = False
        with suppress(nvml.NVMLError):  # virtual machines and old drivers have none
            offered = nvml.nvmlDeviceGetSupportedEventTypes(handle)
            wanted = offered & (nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError)
            if wanted:
                events = nvml.nvmlEventSetCreate()
                nvml.nvmlDeviceRegisterEvents(handle, wanted, events)
                self._events = events
        self._wrong = None if self._events is not None else self._wrong_words()
        self._links = self._active_links()

    @property
    def has_events(self) -> bool:
        """Whether a look waits."""
        return self._events is not None and not self._lost

    def errors(self, wait_ms: int) -> Iterator[tuple[str, bool]]:
        """What went wrong since the last time, in words, and whether it lasts."""
        if self._lost:
            return
        try:
            yield from self._reported(wait_ms)
            yield from self._counted()
        except self._nvml.NVMLError as error:
            if error.value != self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            self._lost = True
            yield "it is lost", True

    def _reported(self, wait_ms: int) -> Iterator[tuple[str, bool]]:
        """Events, until there are no more."""
        nvml = self._nvml
        while self._events is not None:
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, wait_ms)
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_TIMEOUT:
                    return
                raise
            wait_ms = 0
            if event.eventType == nvml.nvmlEventTypeDoubleBitEccError:
                yield LASTING[48], True
            elif event.eventData in LASTING:
                yield f"{LASTING[event.eventData]} (Xid {event.eventData})", True
            elif event.eventData in PASSING:
                yield f"{PASSING[event.eventData]} (Xid {event.eventData})", False

    def _counted(self) -> Iterator[tuple[str, bool]]:
        if self._wrong is not None:
            before, self._wrong = self._wrong, self._wrong_words()
            if self._wrong is not None and self._wrong > before:
                yield LASTING[48], True
        before_links, self._links = self._links, self._active_links()
        for link in sorted(before_links - self._links):
            yield f"NVLink {link} is down", False

    def _wrong_words(self) -> int | None:
        """Errors of memory that were not corrected since the driver was loaded; None where it does not count."""
        nvml = self._nvml
        return self._asked(
            lambda: int(
                nvml.nvmlDeviceGetTotalEccErrors(
                    self._handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            )
        )

    def _active_links(self) -> frozenset[int]:
        nvml = self._nvml
        found = set()
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            state = self._asked(lambda link=link: nvml.nvmlDeviceGetNvLinkState(self._handle, link))
            if state is None:
                break  # there are no more
            if state == nvml.NVML_FEATURE_ENABLED:
                found.add(link)
        return frozenset(found)

    def _asked(self, question: Any) -> Any:
        """An answer; None where this GPU has none."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            return None


def watch(watched: Sequence[int], failed: Failed) -> GpuEvents | None:
    """Start to watch GPUs; None without GPUs, or if NVML cannot report their errors."""
    if not watched:
        return None
    try:
        events = GpuEvents(watched, failed)
    except Unavailable as error:
        logger.info("sglang_xmem: errors of GPUs are not watched for: %s", error)
        return None
    events.start()
    return events
