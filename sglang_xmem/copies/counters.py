"""Per-layer completion of a load that is one kernel launch for all layers: device counters for the forward pass.

An event per layer would take a launch per layer. Here the copy kernel raises one counter per layer in GPU memory, and a
stream that needs the layer waits for the counter's value (cuStreamWaitValue32), which occupies no multiprocessor. The
program's steps define the *part* of the load that a counter stands for; a part without steps is raised with the
previous one.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_xmem import gpus
from sglang_xmem.copies.remote import ordinal
from sglang_xmem.errors import CopyError


class LayerCounters:
    """Counters of one load at a time. The next load may use them once the previous one is complete.

    Args:
        num_parts: parts of a load, such as layers.
        device: the rank's GPU.
        remote: another GPU copies.

    Raises:
        CopyError: the memory cannot be allocated.
    """

    def __init__(self, num_parts: int, device: torch.device, *, remote: bool = False) -> None:
        from cuda.bindings import driver

        self.num_parts = num_parts
        self._device = device
        try:
            self._counters = torch.zeros(num_parts, dtype=torch.int32, device=device)
        except torch.OutOfMemoryError as error:
            raise CopyError(f"No memory for the counters of a load: {error}") from None
        # Any stream may wait, and must not see the memory's previous contents.
        torch.cuda.current_stream(device).synchronize()
        self.address = self._counters.data_ptr()
        #: The value of each counter after the last announced load, modulo 2^32.
        self._target = 0
        #: Stream that last waited for that load, and the part. Parts complete in order, so no further wait is needed up
        #: to that part: SGLang waits for K and for V of each layer.
        self._waited = (0, -1)
        self._wait: Any = driver.cuStreamWaitValue32
        flags = driver.CUstreamWaitValue_flags
        self._flags = int(flags.CU_STREAM_WAIT_VALUE_GEQ)  # cyclic, so it may wrap around
        #: Whether each wait flushes writes of other GPUs, which costs time.
        self.flushes = remote and bool(gpus.attribute(ordinal(device), "CAN_FLUSH_REMOTE_WRITES"))
        if self.flushes:
            # A GPU may reorder writes of other GPUs. The copying GPU's fences order pages before counters; if the
            # driver supports it, the wait does too.
            self._flags |= int(flags.CU_STREAM_WAIT_VALUE_FLUSH)

    def announce(self, raises: int) -> None:
        """Announce an enqueued load that adds `raises` to each counter; later waits are for it."""
        self._target = self.value_after(raises)
        self._waited = (0, -1)

    def value_after(self, raises: int) -> int:
        """Return each counter's value after a load that adds `raises`, for a copier that writes values directly."""
        return (self._target + raises) & 0xFFFFFFFF

    def restore(self) -> None:
        """Restore the counters to the last announced load, after a load was enqueued only in part.

        Runs on the device's current stream, which must be ordered after all of that load.
        """
        # As int32, the counters' type in torch.
        self._counters.fill_(self._target - (1 << 32) if self._target >> 31 else self._target)

    def wait(self, part: int) -> None:
        """Make the device's current stream wait until a part of the last announced load is in place.

        Raises:
            CopyError: the driver refuses; nothing waits then.
        """
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if self._waited[0] == stream and part <= self._waited[1]:
            return
        status = self._wait(stream, self.address + 4 * part, self._target, self._flags)[0]
        if status.value:
            raise CopyError(f"The driver refuses to let a stream wait for a load: {status.name}.")
        self._waited = (stream, part)


def supported(device: torch.device, copying_gpu: int | None = None) -> bool:
    """Whether streams of this GPU can wait for values that `copying_gpu` (or this GPU) adds to.

    A lost addition would block the forward pass forever, so the copying GPU needs atomic additions.
    """
    index = ordinal(device)
    if not gpus.attribute(index, "CAN_USE_64_BIT_STREAM_MEM_OPS"):
        return False
    return copying_gpu is None or gpus.peer_atomics(copying_gpu, index)
