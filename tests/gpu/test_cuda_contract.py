"""The CUDA and Triton kernels on a GPU, over every kind of tier memory: the contract, for each variant."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sglang_xmem.copies import CopyPolicy, dma, make_copier, shared
from sglang_xmem.copies.base import PageCopier
from sglang_xmem.copies.cuda import CudaPageCopier
from sglang_xmem.copies.geometry import Slab
from sglang_xmem.copies.triton import TritonPageCopier
from sglang_xmem.copies.tuning import DEFAULT_TUNING, SMALL_UNIT_TUNING, CudaTuning
from tests.contracts.copiers import CopierContract, Limits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cache_of_kernels")]

GPU = "cuda:0"
TUNINGS = [
    CudaTuning(),
    CudaTuning(unroll=16, streaming=True),
    CudaTuning(ctas=3, threads=96, unroll=3),
    CudaTuning(variant="bulk"),
    CudaTuning(variant="bulk", ctas=5, rings=4, stages=3, stage_bytes=4096, pending_stores=1),
    CudaTuning(variant="bulk", stages=7, stage_bytes=32768, pending_stores=3),
    CudaTuning(variant="bulk", ctas=2, stages=2, stage_bytes=2048, pending_stores=0),
    CudaTuning(variant="bulk", ctas=2, stages=32, stage_bytes=1024, pending_stores=0),
    *DEFAULT_TUNING.values(),
    *SMALL_UNIT_TUNING.values(),
]


@pytest.fixture
def peer_access() -> None:
    """Let kernels on GPU 0 reach the memory of GPU 1 that torch allocates."""
    from cuda.bindings import driver

    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("the two GPUs cannot reach each other's memory")
    torch.ones(1, device="cuda:1")
    with torch.cuda.device(GPU):
        torch.cuda.synchronize()
        status, context = driver.cuDevicePrimaryCtxRetain(1)
        assert status.value == 0, status
        (status,) = driver.cuCtxEnablePeerAccess(context, 0)
        assert status.name in ("CUDA_SUCCESS", "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"), status


class OnGpu(CopierContract):
    device = GPU
    made = 0

    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        """Each time with the next settings."""
        tuning = TUNINGS[self.made % len(TUNINGS)]
        type(self).made += 1
        return CudaPageCopier(slabs, device, load=tuning, store=tuning)


class TestHbm(OnGpu):
    tier = GPU
    seeds = range(60)


class TestPinned(OnGpu):
    tier = "pinned"
    seeds = range(100, 130)


@pytest.mark.gpus(2)
@pytest.mark.usefixtures("peer_access")
class TestPeer(OnGpu):
    tier = "cuda:1"
    seeds = range(200, 230)


@pytest.mark.gpus(2)
class TestRunByThePeer(OnGpu):
    tier = "cuda:1"
    reads_all_units = True  # it asks the driver about unit 0
    seeds = range(300, 330)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        copier, reason = make_copier("auto", slabs, device, link="nvlink", policy=CopyPolicy(1, required=True))
        assert reason is None
        return copier


@pytest.mark.gpus(2)
class TestRelayed(OnGpu):
    tier = "pinned"
    reads_all_units = True
    seeds = range(400, 430)

    @pytest.fixture(autouse=True)
    def _small_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared, "MIN_SHARE_BYTES", 4096)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        return make_copier("auto", slabs, device, link="pcie", policy=CopyPolicy(relays=(1,)))[0]


class TestEngines(OnGpu):
    tier = "pinned"
    seeds = range(600, 630)

    @pytest.fixture(autouse=True)
    def _any_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"MIN_LOAD_BYTES": 1, "MIN_CHUNK_BYTES": 5000, "MOST_CALLS": 1 << 20}.items():
            monkeypatch.setattr(dma, name, value)
        for name in ("MIN_ROW_BYTES", "MIN_COPY_BYTES"):
            monkeypatch.setattr(dma, name, 0)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        staging = (1 << 15, 1 << 18, 1 << 24)[self.made % 3]
        type(self).made += 1
        copier, _ = make_copier("auto", slabs, device, link="pcie", staging_bytes=staging)
        assert isinstance(copier, dma.DmaCopier)
        return copier

    def test_scenes_are_loaded_by_engines(self) -> None:
        """Else the contract would be the kernel's, also where the driver refuses a call."""
        loads = {"engines": 0, "kernel": 0}
        for seed in range(640, 650):
            scene = self.scene(seed)
            scene.run()
            assert isinstance(scene.copier, dma.DmaCopier)
            for way, count in scene.copier.loads.items():
                loads[way] += count
        assert loads["engines"] > 5
        assert loads["engines"] > loads["kernel"]


class TestTriton(OnGpu):
    tier = "pinned"
    seeds = range(500, 508)  # it compiles for many of them
    limits = Limits(units=1 << 20, large=False)

    def make(self, slabs: Sequence[Slab], device: torch.device) -> PageCopier:
        pytest.importorskip("triton")
        return TritonPageCopier(slabs, device)
