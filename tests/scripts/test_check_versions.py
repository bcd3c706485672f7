"""The tables of SGLang's versions against SGLang's sources, which are read and not imported."""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import check_versions
from sglang_xmem.engines.sglang import versions

SEAM = "sglang/srt/mem_cache/l2_transfer.py"
NVFP4 = "sglang/srt/mem_cache/pool_host/minimax_m3_nvfp4.py"


def installed() -> Path:
    """The folder that the installed SGLang is in."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        pytest.skip("SGLang is not installed")
    return Path(found.origin).parents[1]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed SGLang's Python sources under another root."""
    root = tmp_path_factory.mktemp("sources")
    kept = shutil.ignore_patterns("*.pyc", "*.so", "*.json", "*.cu*", "*.h", "multimodal_gen", "test")
    shutil.copytree(installed() / "sglang", root / "sglang", ignore=kept)
    (root / f"sglang-{versions.installed()}.dist-info").mkdir()
    return root


def test_the_installed_version_is_as_its_table_says() -> None:
    report = check_versions.check(installed())
    assert report.findings == []
    assert report.targets >= 20
    assert report.members >= 100


@pytest.mark.parametrize("version", versions.known())
def test_every_version_is_as_its_table_says(version: str) -> None:
    try:
        root = check_versions.fetch(version)
    except OSError as error:
        pytest.skip(str(error))
    assert check_versions.check(root).findings == []


def test_every_member_that_the_adapter_reads_is_in_a_table() -> None:
    assert check_versions.unlisted() == []


@pytest.mark.parametrize(
    ("path", "old", "new", "finding"),
    [
        (SEAM, "def submit_host_to_device(", "def load(", "submit_host_to_device does not exist, needed to load pages"),
        (SEAM, "transfer_layer_id_max: int,", "", "takes (self, transfers, start_event, on_layer_done) instead of"),
        (SEAM, "    is_draft: bool = False\n", "", "L2Transfer.is_draft does not exist"),
        (NVFP4, "self.row_bytes", "self.bytes_of_a_row", "MiniMaxM3Nvfp4IndexKPoolHost.row_bytes does not exist"),
    ],
    ids=["function renamed", "parameter removed", "field removed", "attribute renamed"],
)
def test_a_change_is_found(copied: Path, path: str, old: str, new: str, finding: str) -> None:
    """Negative control: the sources that pass above, with one thing changed."""
    source = (copied / path).read_text()
    assert old in source
    (copied / path).write_text(source.replace(old, new))
    try:
        findings = check_versions.check(copied).findings
    finally:
        (copied / path).write_text(source)
    assert len(findings) == 1
    assert finding in findings[0]


def test_a_read_that_is_in_no_table_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "geometry.py").write_text("def size(pool):\n    return getattr(pool, 'grand_total', 0) + pool.size\n")
    monkeypatch.setattr(check_versions, "ADAPTER", tmp_path)
    assert check_versions.unlisted() == ["geometry.py:2 reads pool.grand_total, which no table lists in its `reads`"]


def test_processes_that_fetch_the_same_wheel_get_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(command: list[str], **_: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "sglang.whl"), "w") as wheel:
            wheel.writestr("sglang/version.py", "")
        (tmp_path / "sglang_sources" / "1.2" / "sglang").mkdir(parents=True)  # another process
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setenv("SGLANG_XMEM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(check_versions, "subprocess", SimpleNamespace(run=download))
    assert check_versions.fetch("1.2") == tmp_path / "sglang_sources" / "1.2"
    assert [each.name for each in (tmp_path / "sglang_sources").iterdir()] == ["1.2"]


def test_tables_of_hooks_lose_no_line() -> None:
    """A line that is not understood would be a function that is not patched."""
    for module in ("v0_5_21", "v0_5_22", "v0_5_23"):
        text = (check_versions.ADAPTER / "versions" / f"{module}.py").read_text()
        assert len(text.splitlines()) < 120
    handlers = [line for line in text.splitlines() if line.startswith(("    after ", "    around "))]
    table = versions.load("0.5.23")
    hooks = [hook for hook in table.all_hooks if hook not in table.bank_hooks]
    assert len(table.bank_hooks) == 4, "one per way of new weights"
    assert [f"    {h.kind} {h.function.rpartition('.')[2]}: {h.why}" for h in hooks] == handlers
