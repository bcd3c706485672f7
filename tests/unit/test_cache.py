"""The folder of compiled code: whose it is, and what is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sglang_xmem.cache import CACHE_VARIABLE, CacheError, cache_dir, read_own
from sglang_xmem.copies import nvrtc

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / ".cache" / "sglang_xmem"
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    assert cache_dir() == tmp_path / ".cache" / "sglang_xmem"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sglang_xmem"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "chosen"))
    assert cache_dir() == tmp_path / "chosen"


@pytest.mark.parametrize(("variable", "value"), [("HOME", "~"), ("HOME", "here"), (CACHE_VARIABLE, "here")])
def test_a_place_relative_to_the_working_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(CacheError, match=CACHE_VARIABLE):
        cache_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_where_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    with pytest.raises(CacheError, match="others can write to .*; run chmod go-w on it"):
        cache_dir()
    folder.chmod(0o755)
    assert cache_dir() == folder
    tmp_path.chmod(0o777)  # where others could replace it
    with pytest.raises(CacheError, match="others can write"):
        cache_dir()


@needs_root
def test_another_user_s_folder_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    nvrtc._write(cache_dir() / "kernel.bin", b"image")
    assert nvrtc._read(folder / "kernel.bin") == b"image"
    os.symlink("kernel.bin", folder / "link")
    assert read_own(folder / "link") is None
    os.chown(folder / "kernel.bin", NOBODY, NOBODY)
    assert nvrtc._read(folder / "kernel.bin") is None
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(CacheError, match="others can write"):
        cache_dir()


def test_kernels_are_compiled_where_there_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Nvrtc:
        __name__ = "nvrtc"

        class Status:
            value = 0

        def nvrtcVersion(self) -> tuple[object, int, int]:
            return self.Status(), 13, 0

        def nvrtcGetSupportedArchs(self) -> tuple[object, list[int]]:
            return self.Status(), [90]

    monkeypatch.setattr(nvrtc, "_bindings", lambda name: Nvrtc())
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: b"image")
    tmp_path.chmod(0o777)
    assert nvrtc.build("source", "kernel.cu", {}, (9, 0)) == b"image"
    assert "recompiled at each start: others can write to" in caplog.text
    assert not list(tmp_path.rglob("*.bin"))
