"""Storage backends that are attached while SGLang serves: unsupported ones are refused, and SGLang continues."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from sglang_xmem import session
from tests.pools.factories import KINDS, Pools, make
from tests.pools.seam import XMEM, sglang  # noqa: F401  (sglang is a fixture)


@pytest.fixture
def pools() -> Iterator[Pools]:
    """Pools of an MHA model in tier dram."""
    with XMEM.setup():
        built = make("mha", page_size=16, layout="page_first", attach=XMEM.attach)
        try:
            yield built
        finally:
            built.close()


@pytest.mark.parametrize("backend", ["aibrix", "seaweedfs", "tensorcast"])
def test_a_backend_with_memory_of_its_own_is_refused(pools: Pools, backend: str) -> None:
    with pytest.raises(ValueError, match=f"sglang_xmem: storage backend {backend} does not work over a tier. Use file"):
        pools.controller.attach_storage_backend(backend)


@pytest.mark.parametrize(
    ("backend", "extra"), [("mooncake", None), ("nixl", None), ("hf3fs", {}), ("dynamic", {"interface_v1": 1})]
)
def test_gpu_memory_has_no_addresses(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, backend: str, extra: dict[str, Any] | None
) -> None:
    arena = session.current().arenas[-1]
    monkeypatch.setattr(type(arena), "cpu_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match=f"storage backend {backend} needs addresses, and tier dram is GPU memory"):
        pools.controller.attach_storage_backend(backend, storage_backend_extra_config=extra)


def test_a_backend_of_flat_pages_is_attached(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also over GPU memory."""
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path_factory.mktemp("pages")))
    arena = session.current().arenas[-1]
    monkeypatch.setattr(type(arena), "cpu_addressable", property(lambda self: False))
    pools.controller.attach_storage_backend("file", model_name="model")
    try:
        assert pools.controller.storage_backend_type == "file"
    finally:
        pools.controller.detach_storage_backend()


@pytest.mark.parametrize("kind", ["mha", "dsa", "swa", "gdn_draft_sidecar", "deepseek_v4"])
def test_memory_is_registered_once(kind: str) -> None:
    """Backends refuse registered memory; and every page of every pool is in the memory that they get."""
    with XMEM.setup():
        built = make(kind, page_size=KINDS[kind].page_sizes[-1], layout="page_first", attach=XMEM.attach)
        try:
            given: list[tuple[int, int]] = []
            wanted: list[tuple[int, int]] = []
            for name, pool in built.host_pools.items():
                if not hasattr(pool, "get_hybrid_pool_buffer"):
                    continue  # without bytes
                given += [(b.data_ptr(), b.data_ptr() + b.numel()) for b in pool.get_hybrid_pool_buffer()]
                space = built.spaces[name]
                addresses, sizes = pool.get_page_buffer_meta(built.alloc_host(space, 2))
                wanted += [(start, start + nbytes) for start, nbytes in zip(addresses, sizes, strict=True)]
            given.sort()
            assert all(end <= start for (_, end), (start, _) in pairwise(given))
            assert wanted
            for start, end in wanted:
                assert any(first <= start and end <= last for first, last in given)
        finally:
            built.close()
