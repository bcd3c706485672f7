"""Pages in storage end with a sum of their bytes and key: damaged, short and swapped ones are not found."""

from __future__ import annotations

import subprocess
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
    return made_in(tmp_path)


def made_in(folder: Path) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    fields = dict.fromkeys(HiCacheStorageConfig.__dataclass_fields__, None)
    config = HiCacheStorageConfig(
        **{**fields, "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "model_name": "m"}
        | {"attn_cp_rank": 0, "attn_cp_size": 1, "dcp_size": 1, "dcp_rank": 0, "is_mla_model": False}
    )
    made = HiCacheFile(config, str(folder))
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user mounts no file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_drops_pages_and_keeps_those_it_has(small_disk: Path, counts: Any) -> None:
    backend = made_in(small_disk)
    pages = [torch.full((30_000,), number, dtype=torch.uint8) for number in range(5)]
    keys = [f"{number}" for number in range(5)]
    assert [backend.set(key, data) for key, data in zip(keys, pages, strict=True)] == [True, True, False, False, False]
    assert (counts["storage:write"], counts["storage:write_failed"]) == (2, 3)
    found = backend.batch_get(keys, [torch.zeros_like(data) for data in pages])
    assert [data is None for data in found] == [False, False, True, True, True]
    assert torch.equal(found[1], pages[1])
    assert len(list(small_disk.iterdir())) == 2, "nothing half-written stays"
    for path in small_disk.iterdir():  # space is freed
        path.unlink()
    assert backend.set(keys[4], pages[4])


def test_a_disk_with_errors_is_a_miss(backend: Any, tmp_path: Path, counts: Any) -> None:
    """Reading a folder is an error of the kernel (EISDIR), as a bad block is (EIO)."""
    backend.batch_set(["a", "b"], [page(1), page(2)])
    path = files(tmp_path)["a"]
    path.unlink()
    path.mkdir()
    found = read(backend, "a", "b")
    assert found[0] is None
    assert torch.equal(found[1], page(2))  # type: ignore[arg-type]
    assert counts["storage:read_failed"] == 1
