"""A CUDA driver that pins, with its rules: what the driver would refuse is an AssertionError here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cuda.bindings import driver as bindings

from sglang_xmem import gpus
from sglang_xmem.tiers import hostmem

MIB = 1 << 20
SUCCESS = bindings.CUresult.CUDA_SUCCESS


class PinDriver:
    """
    Attributes:
        registered: bytes pinned, by address.
        tried: bytes of every registration that was asked for.
        fail_at: which of the calls that acquire something fails, counted from 0, and all that follow; None for none.
        most_bytes: larger registrations fail.
        error: what a failing registration answers.
        seen_at: added to the address that the GPU sees.
    """

    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = 2

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.tried: list[int] = []
        self.contexts: list[int] = []
        self.current: list[int] = []
        self.held_when_pinned: list[list[int]] = []
        self.fail_at: int | None = None
        self.most_bytes = 1 << 60
        self.error = bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        self.seen_at = 0
        self.acquired = 0

    def _fails(self) -> bool:
        self.acquired += 1
        return self.fail_at is not None and self.acquired > self.fail_at

    def cuDeviceGet(self, gpu: int) -> tuple[Any, int]:
        return SUCCESS, gpu

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, Any]:
        if self._fails():
            return self.error, None
        self.contexts.append(device)
        return SUCCESS, device

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        self.contexts.remove(device)
        return (SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any]:
        assert context in self.contexts
        if self._fails():
            return (self.error,)
        self.current.append(context)
        return (SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, int]:
        return SUCCESS, self.current.pop()

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple[Any]:
        assert flags == 3
        assert self.current, "registered without a context"
        for at, length in self.registered.items():
            assert address + size <= at or at + length <= address, "registered twice"
        self.tried.append(size)
        if self._fails() or size > self.most_bytes:
            return (self.error,)
        self.registered[address] = size
        self.held_when_pinned.append(list(self.contexts))
        return (SUCCESS,)

    def cuMemHostUnregister(self, address: int) -> tuple[Any]:
        del self.registered[address]
        return (SUCCESS,)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> tuple[Any, Any]:
        assert any(at <= address < at + size for at, size in self.registered.items())
        if self._fails():
            return self.error, None
        return SUCCESS, bindings.CUdeviceptr(address + self.seen_at)

    def check_untouched(self) -> None:
        assert self.registered == {}
        assert self.contexts == []
        assert self.current == []


@contextmanager
def pinning(register_bytes: int = 2 * MIB) -> Iterator[PinDriver]:
    """A driver instead of this machine's, which pins at most the given bytes at a time."""
    driver = PinDriver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "driver", lambda: driver)
        patch.setattr(bindings, "cuGetErrorString", lambda status: (SUCCESS, f"error {int(status)}".encode()))
        patch.setattr(hostmem, "REGISTER_BYTES", register_bytes)
        patch.setattr(hostmem, "LEAST_REGISTER_BYTES", register_bytes)
        yield driver
