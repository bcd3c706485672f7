"""Pages in storage end with a sum of their bytes and key: damaged, short and swapped ones are not found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_xmem import session
from sglang_xmem.engines.sglang import storage

PAGE_BYTES = 100


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from collections import Counter

    active: Any = SimpleNamespace(counts=Counter())
    monkeypatch.setattr(session, "_session", active)
    return active.counts


@pytest.fixture
def backend(tmp_path: Path, counts: Any) -> Any:
    """SGLang's backend `file`."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    fields = dict.fromkeys(HiCacheStorageConfig.__dataclass_fields__, None)
    config = HiCacheStorageConfig(
        **{**fields, "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "model_name": "m"}
        | {"attn_cp_rank": 0, "attn_cp_size": 1, "dcp_size": 1, "dcp_rank": 0, "is_mla_model": False}
    )
    made = HiCacheFile(config, str(tmp_path))
    storage.guard(made)
    return made


def page(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (PAGE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read(backend: Any, *keys: str) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = backend.batch_get(list(keys), [torch.zeros_like(page(0)) for _ in keys])
    return found


def files(tmp_path: Path) -> dict[str, Path]:
    """Each page's file, by the key that its name begins with."""
    return {path.name[0]: path for path in tmp_path.iterdir()}


def test_pages_come_back(backend: Any, tmp_path: Path, counts: Any) -> None:
    assert backend.batch_set(["a", "b"], [page(1), page(2)])
    found = read(backend, "a", "b", "c")
    assert torch.equal(found[0], page(1))  # type: ignore[arg-type]
    assert torch.equal(found[1], page(2))  # type: ignore[arg-type]
    assert found[2] is None
    assert counts["integrity:mismatch"] == 0
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {PAGE_BYTES + storage.SUM_BYTES}


@pytest.mark.parametrize("at", [0, PAGE_BYTES - 1, PAGE_BYTES])
def test_a_damaged_page_is_missing(backend: Any, tmp_path: Path, counts: Any, at: int) -> None:
    """Also one whose sum is damaged."""
    backend.batch_set(["a"], [page(1)])
    path = files(tmp_path)["a"]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert read(backend, "a") == [None]
    assert counts["integrity:mismatch"] == 1


def test_swapped_pages_are_missing(backend: Any, tmp_path: Path, counts: Any) -> None:
    backend.batch_set(["a", "b"], [page(1), page(2)])
    paths = files(tmp_path)
    one, other = paths["a"].read_bytes(), paths["b"].read_bytes()
    paths["a"].write_bytes(other)
    paths["b"].write_bytes(one)
    assert read(backend, "a", "b") == [None, None]
    assert counts["integrity:mismatch"] == 2


def test_a_short_page_is_missing(backend: Any, tmp_path: Path) -> None:
    """And the pages behind it are still found: SGLang stops at the first that is missing by itself."""
    backend.batch_set(["a", "b"], [page(1), page(2)])
    path = files(tmp_path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    found = read(backend, "a", "b")
    assert found[0] is None
    assert found[1] is not None
