"""A page of random bytes, copied to the tier and back once per minute to detect the failure of an idle tier.

A separate thread and stream copy it from scratch memory on the device to a reserved page of each pool. If it comes back
unchanged, a tier that was set aside is used again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sglang_xmem.copies.base import Pages, Program, Step

if TYPE_CHECKING:
    from sglang_xmem.arena import Arena
    from sglang_xmem.copies.geometry import Plane

logger = logging.getLogger(__name__)

#: Seconds between canaries: normally, and while the tier is set aside.
PERIOD_S = 60.0
RETRY_S = 2.0
#: Seconds until a canary is late.
LATE_S = 10.0


class Perch(NamedTuple):
    """A page of a pool that is reserved for the canary.

    Attributes:
        name: of the pool, for messages.
        arena: of the pool.
        space: its index space.
        page: number of the page.
        planes: of the pool.
    """

    name: str
    arena: Arena
    space: str
    page: int
    planes: Sequence[Plane]


class Canary:
    """Sends a page through each perch.

    Args:
        perches: reserved pages; their arenas have begun.
        failed: called with the reason if a page is lost, damaged or late.
        came_back: called when all pages came back.
        eager: whether to send soon.
    """

    def __init__(
        self,
        perches: Sequence[Perch],
        failed: Callable[[str], None],
        came_back: Callable[[], None],
        eager: Callable[[], bool],
    ) -> None:
        self._failed, self._came_back, self._eager = failed, came_back, eager
        self._cages = [Cage(perch) for perch in perches]
        self._begun: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang_xmem-canary", daemon=True)

    def start(self) -> None:
        """Start to send pages; does nothing without a perch."""
        if self._cages:
            self._thread.start()

    def stop(self) -> None:
        """Stop. Does not wait for a page in flight."""
        self._stopped.set()

    def check_time(self) -> None:
        """Report a late page; for a thread that nothing blocks."""
        begun = self._begun
        if begun is not None and time.monotonic() - begun > LATE_S:
            self._failed(f"a canary page has not come back within {LATE_S:g} s")

    def send(self) -> None:
        """Send a page through each perch and report the result; waits for the device."""
        self._begun = time.monotonic()
        try:
            wrong = [cage.name for cage in self._cages if not cage.there_and_back()]
        except Exception as error:  # any exception of a copy means that the tier does not work
            self._failed(f"a canary page was refused: {error}")
        else:
            if wrong:
                self._failed(f"canary pages of {', '.join(wrong)} came back with wrong bytes")
            elif time.monotonic() - self._begun <= LATE_S:
                self._came_back()
        finally:
            self._begun = None

    def _run(self) -> None:
        waited = 0.0
        while not self._stopped.wait(RETRY_S):
            waited += RETRY_S
            if waited >= PERIOD_S or self._eager():
                waited = 0.0
                self.send()


class Cage:
    """Scratch memory on the device for the units of one pool's page, and the program that copies them."""

    def __init__(self, perch: Perch) -> None:
        self.name = perch.name
        self._arena = arena = perch.arena
        on_gpu = arena.device.type == "cuda"
        self._generator = torch.Generator(arena.device)  # separate from the engine's generator, which samples tokens
        self._bytes = torch.zeros(sum(p.unit_bytes for p in perch.planes), dtype=torch.uint8, device=arena.device)
        self._stream = torch.cuda.Stream(arena.device) if on_gpu else None
        steps, at = [], self._bytes.data_ptr()
        for plane in perch.planes:
            scratch = plane._replace(device_address=at, device_stride=plane.unit_bytes, device_units=1)
            steps.append(Step(scratch, 0, 0))
            at += plane.unit_bytes
        self._program: Program = arena.compile(steps, 1)
        (frames,) = arena.frames([(perch.space, torch.tensor([perch.page]))])
        self._pages = [Pages(frames, torch.zeros(1, dtype=torch.int64, device=arena.device))]
        if on_gpu:
            torch.cuda.current_stream(arena.device).synchronize()

    def there_and_back(self) -> bool:
        """Whether random bytes come back unchanged; waits for the device. True for a closed arena.

        Raises:
            CopyError: a copy was refused.
        """
        place: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with self._arena.kept_open() as is_open, place:
            if not is_open:
                return True
            self._bytes.random_(0, 256, generator=self._generator)
            sent = self._bytes.clone()
            self._arena.store(self._program, self._pages)
            self._bytes.fill_(0xFF)
            self._arena.load(self._program, self._pages)
            return torch.equal(self._bytes, sent)
