"""Which KV caches get our host pool, and which are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_xmem.adapters import sglang_0_5_23 as adapter

pytestmark = pytest.mark.cpu_engine


def test_mha_gets_our_pool() -> None:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    info = SimpleNamespace(buffers=SimpleNamespace(layout=KVBufferLayout.NHD))
    assert adapter._get_mha_host_pool_cls(MHATokenToKVPoolHost, info) is adapter.tier_host_pool_class()


def test_other_layouts_of_the_gpus_cache_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    for layout in set(KVBufferLayout) - {KVBufferLayout.NHD}:
        info = SimpleNamespace(buffers=SimpleNamespace(layout=layout))
        with pytest.raises(SystemExit, match="78"):
            adapter._get_mha_host_pool_cls(MHATokenToKVPoolHost, info)
        assert f"the layout {layout.value} of the GPU's KV cache" in capsys.readouterr().err


def test_other_pools_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    class SomeHostPool: ...

    with pytest.raises(SystemExit, match="78"):
        adapter._get_mha_host_pool_cls(SomeHostPool, None)
    assert "the KV cache of SomeHostPool" in capsys.readouterr().err
