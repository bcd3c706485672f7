"""Memory of other ranks' GPUs in this process, by CUDA's interprocess handles."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang_xmem import gpus
from sglang_xmem.copies.geometry import Plane
from sglang_xmem.copies.remote import check_access, ordinal
from sglang_xmem.errors import CopyError, Unavailable

#: Brings every rank's object to all ranks: a list by rank. All ranks have to call it.
Gather = Callable[[Any], "list[Any]"]

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class Group(NamedTuple):
    """Memory of all ranks at this process's addresses.

    Attributes:
        me: this rank's number.
        own: this rank's memory for the others to read; kept as long as the group.
        shared: address of the memory that each rank set aside for the others to read.
        planes: for each plane of this rank's pools, the address of its unit 0 in each rank's.
    """

    me: int
    own: torch.Tensor
    shared: tuple[int, ...]
    planes: dict[Plane, tuple[int, ...]]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.shared)


class Offer(NamedTuple):
    """What a rank shows the others.

    Attributes:
        host: name and boot of the machine.
        gpu: PCI address.
        handles: of each allocation.
        shared: allocation and offset of the memory set aside.
        places: allocation and offset of each plane's unit 0.
        shapes: of its planes, which have to be the same on all ranks.
    """

    host: str
    gpu: str
    handles: tuple[bytes, ...]
    shared: tuple[int, int]
    places: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, ...], ...]


def join(
    device: torch.device, planes: Sequence[Plane], own: torch.Tensor | None, gather: Gather, me: int, unfit: str = ""
) -> Group:
    """Map the pools of all ranks into each, for the life of these processes.

    All ranks call this at the same time; it waits for them.

    Args:
        device: this rank's GPU.
        planes: of this rank's pools; all ranks name theirs in the same order.
        own: memory on `device` for the others to read; None where there is none.
        me: this rank's number.
        unfit: why this rank cannot; empty if it can.

    Raises:
        CopyError: some rank cannot; then every rank raises it.
    """
    mine, problem = None, unfit
    if not problem:
        try:
            mine = _offer(device, planes, own)
        except (CopyError, Unavailable) as error:
            problem = str(error)
    answers = gather((problem, mine))
    problem = next((why for why, _ in answers if why), "")
    offers = [one for _, one in answers]
    problem = problem or mismatch(offers)
    group = None
    if not problem and own is not None:
        try:
            group = _open(device, planes, own, offers, me)
        except (CopyError, Unavailable) as error:
            problem = str(error)
    problem = next((why for why in gather(problem) if why), "")
    if group is None or problem:
        raise CopyError(problem)
    return group


def mismatch(offers: Sequence[Offer]) -> str:
    """Why ranks with these offers cannot reach each other's pools; empty if they can."""
    first = offers[0]
    if any(one.host != first.host for one in offers):
        return "Ranks run on several hosts."
    if len({one.gpu for one in offers}) < len(offers):
        return "Several ranks compute on one GPU."
    if any(one.shapes != first.shapes for one in offers):
        return "Ranks have different pools."
    return ""


def _offer(device: torch.device, planes: Sequence[Plane], own: torch.Tensor | None) -> Offer:
    if own is None or not planes:
        raise CopyError("No pool has the same bytes on all ranks.")
    driver = gpus.driver()
    check_access(ordinal(device), device, [own.data_ptr(), *(plane.device_address for plane in planes)])
    numbers: dict[int, int] = {}
    handles: list[bytes] = []

    def place(address: int) -> tuple[int, int]:
        base, _ = gpus.checked(driver.cuMemGetAddressRange(address), "looking up an allocation")
        if int(base) not in numbers:
            numbers[int(base)] = len(handles)
            handle = gpus.checked(driver.cuIpcGetMemHandle(base), "sharing GPU memory with other ranks")
            handles.append(ctypes.string_at(handle.getPtr(), _HANDLE_BYTES))
        return numbers[int(base)], address - int(base)

    with torch.cuda.device(device):
        bus = gpus.checked(driver.cuDeviceGetPCIBusId(32, ordinal(device)), "asking for a GPU's PCI address")
        return Offer(
            host=f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}",
            gpu=bus.partition(b"\0")[0].decode(),
            shared=place(own.data_ptr()),
            places=tuple(place(plane.device_address) for plane in planes),
            handles=tuple(handles),
            shapes=tuple(tuple(plane[1:]) for plane in planes),
        )


def _open(device: torch.device, planes: Sequence[Plane], own: torch.Tensor, offers: Sequence[Offer], me: int) -> Group:
    driver = gpus.driver()
    everywhere: list[int] = []
    columns: list[list[int]] = []
    for rank, one in enumerate(offers):
        if rank == me:
            everywhere.append(own.data_ptr())
            columns.append([plane.device_address for plane in planes])
            continue
        peer = int(gpus.checked(driver.cuDeviceGetByPCIBusId(one.gpu.encode()), f"looking for GPU {one.gpu}"))
        # Only NVLink has atomic additions; over PCIe a fetch would gain nothing.
        if not gpus.peer_atomics(ordinal(device), peer):
            raise CopyError(f"GPU {ordinal(device)} does not reach GPU {peer} over NVLink.")
        bases = []
        with torch.cuda.device(device):
            for content in one.handles:
                handle = driver.CUipcMemHandle()
                ctypes.memmove(handle.getPtr(), content, _HANDLE_BYTES)
                flags = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
                opened = gpus.checked(driver.cuIpcOpenMemHandle(handle, flags), f"mapping memory of GPU {peer}")
                bases.append(int(opened))
        everywhere.append(bases[one.shared[0]] + one.shared[1])
        columns.append([bases[number] + offset for number, offset in one.places])
    rows = zip(*columns, strict=True)
    return Group(me, own, tuple(everywhere), dict(zip(planes, rows, strict=True)))
