# SPDX-License-Identifier: Apache-2.0
"""The record of GPU runs: what makes a run out of date and what does not, and that it covers the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts import gpu_runs
from tests import REPOSITORY


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with code of two subjects, on a machine that seems to have two GPUs."""
    monkeypatch.setattr(gpu_runs, "_nvidia_smi", lambda field: ["Some GPU", "Some GPU"])
    for path in ("kernels/copy.cu", "sglang_xmem/copies/base.py", "sglang_xmem/bench/ttft.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(TEXTS[Path(path).suffix])
    (tmp_path / gpu_runs.RUNS).parent.mkdir(parents=True)
    return tmp_path


TEXTS = {
    ".py": '"""What it is."""\n\nUNIT = "# 16"  # bytes\n\n\ndef f() -> int:\n    """Give 1."""\n    return 1\n',
    ".cu": '// What it is.\nint f() {\n  return "//"[0]; /* a\n  slash */\n}\n',
}


def record(root: Path, *subjects: str, status: int = 0, says: str = "== 3 passed, 1 skipped in 1.20s ==") -> int:
    code = f"import sys; print({says!r}); sys.exit({status})"
    return gpu_runs.main(["record", *subjects, "--", sys.executable, "-c", code], root)


def check(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Lines of the report by subject."""
    capsys.readouterr()
    assert gpu_runs.main(["check"], root) == 0
    lines = capsys.readouterr().out.splitlines()
    return dict(line.removeprefix("gpu runs: ").split(": ", 1) for line in lines)


def test_a_run_counts_until_its_code_changes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run on a GPU is recorded" in check(root, capsys)["copies"]
    assert record(root, "copies", "bench") == 0
    rows = gpu_runs.read(root / gpu_runs.RUNS)
    assert [row["subject"] for row in rows] == ["copies", "bench"]
    assert rows[0]["counts"] == {"passed": 3, "skipped": 1}
    assert set(rows[0]["files"]) == {"kernels/copy.cu", "sglang_xmem/copies/base.py"}
    assert check(root, capsys)["copies"].endswith("on 2 x Some GPU, unchanged since")
    for name in ("kernels/copy.cu", "sglang_xmem/copies/base.py"):
        path = root / name
        before = path.read_text()
        path.write_text(before.replace("return", "return  2 +"))
        assert check(root, capsys)["copies"].endswith(f"changed since: {name}")
        assert check(root, capsys)["bench"].endswith("unchanged since")
        assert gpu_runs.main(["check", "--strict"], root) == 1
        path.write_text(before)
    new = root / "sglang_xmem/copies/new.py"
    new.write_text("")
    assert check(root, capsys)["copies"].endswith("changed since: sglang_xmem/copies/new.py")


def test_prose_asks_for_no_new_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(root, "copies")
    for suffix, path in ((".py", root / "sglang_xmem/copies/base.py"), (".cu", root / "kernels/copy.cu")):
        text = TEXTS[suffix].replace("What it is.", "What it is,\nand why." if suffix == ".py" else "Other.")
        path.write_text(
            text.replace("  # bytes", "").replace('    """Give 1."""\n', "").replace("/* a\n  slash */", "")
        )
        assert path.read_text() != TEXTS[suffix]
    assert check(root, capsys)["copies"].endswith("unchanged since")


@pytest.mark.parametrize("mark", ['"# 16"', '"//"'])
def test_what_looks_like_a_comment_is_code(root: Path, capsys: pytest.CaptureFixture[str], mark: str) -> None:
    record(root, "copies")
    for path in (root / "sglang_xmem/copies/base.py", root / "kernels/copy.cu"):
        path.write_text(path.read_text().replace(mark, '"##"'))
    assert "changed since" in check(root, capsys)["copies"]


@pytest.mark.parametrize(("status", "says"), [(1, "1 failed, 2 passed in 1s"), (0, "4 skipped in 0.5s")])
def test_what_did_not_pass_does_not_count(
    root: Path, capsys: pytest.CaptureFixture[str], status: int, says: str
) -> None:
    assert record(root, "copies", status=status, says=says) == status
    assert "no run on a GPU is recorded" in check(root, capsys)["copies"]


def test_a_machine_without_gpus_records_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runs, "_nvidia_smi", lambda field: [])
    with pytest.raises(SystemExit):
        record(root, "copies")
    with pytest.raises(SystemExit):
        record(root, "floppy")
    assert not (root / gpu_runs.RUNS).exists()


def test_every_file_of_the_package_belongs_to_a_subject() -> None:
    """Else a change of it would never show."""
    covered = {path for subject in gpu_runs.SUBJECTS for path in gpu_runs.files_of(subject)}
    exempt = {path.relative_to(REPOSITORY).as_posix() for p in gpu_runs.WITHOUT_GPU for path in REPOSITORY.glob(p)}
    suffixes = {".py", ".cu", ".h", ".cpp"}
    ours = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("sglang_xmem", "kernels")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    assert ours - covered - exempt == set(), "add these to SUBJECTS of scripts/gpu_runs.py"
    assert covered & exempt == set()


def test_the_committed_record_can_be_read() -> None:
    path = REPOSITORY / gpu_runs.RUNS
    for row in gpu_runs.read(path):
        assert set(row) >= {"subject", "date", "gpus", "versions", "command", "passed", "files"}
        assert row["subject"] in gpu_runs.SUBJECTS
    assert len(list(gpu_runs.report(gpu_runs.read(path)))) == len(gpu_runs.SUBJECTS)
