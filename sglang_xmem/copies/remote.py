"""Copies that another GPU executes: the tier's GPU, or one that relays host memory through its own link.

A load then occupies no multiprocessor of the rank's own GPU, and its kernels do not wait at their end for reads of
another GPU's memory in flight. The other GPU must be idle, and needs a CUDA context (about 0.6 GB).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sglang_xmem.errors import CopyError

#: The fix where another GPU cannot copy for the rank's.
WITHOUT_IT = "set peer.copy_on to rank, or leave out dram.relays"


class CopyingGpu:
    """Stream order of one direction: work on another GPU is ordered as on the rank's current stream.

    Args:
        gpu: CUDA ordinal of the GPU that executes the copies.
        rank: the GPU whose streams order them.
    """

    def __init__(self, gpu: int, rank: torch.device) -> None:
        self.device = torch.device("cuda", gpu)
        self._rank = rank
        self._stream = torch.cuda.Stream(self.device, priority=-1)
        self._before, self._after = torch.cuda.Event(), torch.cuda.Event()
        self._behind: torch.cuda.Stream

    def begin(self) -> int:
        """Order the launch after the rank's current stream; return the stream to launch on, as an address."""
        self._behind = torch.cuda.current_stream(self._rank)
        self._before.record(self._behind)
        self._stream.wait_event(self._before)
        return int(self._stream.cuda_stream)

    def end(self) -> None:
        """Make the stream of `begin` wait for the launch."""
        self._after.record(self._stream)
        self._behind.wait_event(self._after)


def ordinal(device: torch.device) -> int:
    """Return the CUDA ordinal of a device; the current one's if the device does not say."""
    return device.index if device.index is not None else torch.cuda.current_device()


def give_access(gpu: int, rank: torch.device) -> None:
    """Let kernels on `gpu` access current and later allocations of the rank's GPU. Waits for `gpu`.

    Raises:
        CopyError: the driver refuses.
    """
    from cuda.bindings import driver

    with torch.cuda.device(gpu):
        torch.cuda.current_stream().synchronize()  # creates the context
        status, context = driver.cuDevicePrimaryCtxRetain(rank.index or 0)
        if not status.value:
            (status,) = driver.cuCtxEnablePeerAccess(context, 0)
        if status.value and status.name != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
            raise CopyError(f"GPU {gpu} cannot access the memory of {rank} ({status.name}); {WITHOUT_IT}.")


def check_access(gpu: int, rank: torch.device, addresses: Iterable[int]) -> None:
    """Check that `give_access` covers memory of the rank's GPU; does not block.

    Args:
        addresses: one in each allocation.

    Raises:
        CopyError: the memory is mapped only for the rank's GPU.
    """
    from cuda.bindings import driver

    # Memory of cuMemMap is mapped for one GPU at a time; the attribute distinguishes it from memory of cuMemAlloc.
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
    for address in addresses:
        status, plain = driver.cuPointerGetAttribute(attribute, address)
        if status.value or not plain:
            raise CopyError(
                f"GPU {gpu} cannot access memory that is mapped only for {rank}; {WITHOUT_IT}, or leave out "
                "expandable_segments in PYTORCH_CUDA_ALLOC_CONF and --enable-memory-saver."
            )
