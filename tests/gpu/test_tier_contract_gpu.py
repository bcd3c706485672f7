"""Tiers keep their contract on real GPUs: dram and dax pinned by the driver, peer over its virtual memory management.

The bytes go in and out by the driver's copies from the rank's GPU, so what it cannot reach is an error here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from sglang_xmem import gpus, machine
from sglang_xmem.tiers.dram import DramSettings, DramTier
from sglang_xmem.tiers.peer import PeerSettings, PeerTier
from tests.contracts.tiers import MIB, Case, TierContract, planned
from tests.unit.tiers.test_dax import Device, device

__all__ = ["device"]

RANK = 0
#: What a driver may keep of a context and of page tables.
SLACK = 256 * MIB


@pytest.fixture
def rank() -> Iterator[None]:
    """The context of the rank's GPU, current."""
    d = gpus.driver()
    with ExitStack() as undo:
        gpus.checked(d.cuCtxPushCurrent(gpus.hold_context(RANK, undo)), "using a context")
        yield
        d.cuCtxPopCurrent()


def write(address: int, content: bytes) -> None:
    """By way of the rank's GPU."""
    d = gpus.driver()
    staging = gpus.checked(d.cuMemAlloc(len(content)), "allocating")
    gpus.checked(d.cuMemcpyHtoD(staging, content, len(content)), "copying in")
    gpus.checked(d.cuMemcpyDtoD(address, staging, len(content)), "copying to the tier")
    gpus.checked(d.cuCtxSynchronize(), "waiting")
    d.cuMemFree(staging)


def read(address: int, nbytes: int) -> bytes:
    d = gpus.driver()
    staging = gpus.checked(d.cuMemAlloc(nbytes), "allocating")
    gpus.checked(d.cuMemcpyDtoD(staging, address, nbytes), "copying from the tier")
    out = ctypes.create_string_buffer(nbytes)
    gpus.checked(d.cuMemcpyDtoH(ctypes.addressof(out), staging, nbytes), "copying out")
    d.cuMemFree(staging)
    return out.raw


@pytest.mark.gpu
class TestDram(TierContract):
    @pytest.fixture
    def case(self, rank: None, monkeypatch: pytest.MonkeyPatch) -> Case:
        monkeypatch.setattr(machine, "host_available_bytes", lambda: 1 << 34)
        monkeypatch.setattr(machine, "node_available_bytes", lambda node: 1 << 34)
        return Case(planned(DramTier, DramSettings(), RANK), write=write, read=read, counts=False)


@pytest.mark.gpu
class TestDax(TierContract):
    @pytest.fixture
    def case(self, device: Device, rank: None) -> Case:
        def check() -> None:
            device.plans()  # no range is claimed

        return Case(device.tier(gpu=RANK), check, write=write, read=read)


@pytest.mark.gpus(2)
class TestPeer(TierContract):
    @pytest.fixture
    def case(self, rank: None) -> Case:
        torch.cuda.empty_cache()  # memory of earlier tests on the peer, which would be freed during the test
        tier = planned(PeerTier, PeerSettings(gpus=(1,)), RANK)
        before = tier.capacity_bytes()

        def check() -> None:
            assert abs(tier.capacity_bytes() - before) <= SLACK

        return Case(tier, check, write=write, read=read, counts=False, slack=SLACK)
