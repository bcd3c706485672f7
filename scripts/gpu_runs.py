#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record test runs on GPUs, and list the changes since: gpu_runs.py record|check

    python scripts/gpu_runs.py record copies tiers -- python -m pytest tests/gpu -m "gpu or gpus"
    python scripts/gpu_runs.py check

`record` runs the command and appends a row per subject to docs/results/gpu_runs.jsonl: date, GPUs, result, and a digest
of each file of the code under test. On a machine without git, set --output FILE and append its rows to that file later.
`check` compares these digests with the current files and prints one line per subject. Changes are a failure only with
--strict. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("docs/results/gpu_runs.jsonl")

_COPIES = ("kernels/*", "sglang_xmem/copies/*.py", "sglang_xmem/sums.py", "sglang_xmem/cache.py")
_MEMORY = ("sglang_xmem/tiers/base.py", "sglang_xmem/tiers/hostmem.py", "sglang_xmem/gpus.py", "sglang_xmem/machine.py")
_ENGINE = (
    *_COPIES,
    *_MEMORY,
    "sglang_xmem/arena.py",
    "sglang_xmem/canary.py",
    "sglang_xmem/config.py",
    "sglang_xmem/gpu_events.py",
    "sglang_xmem/plan.py",
    "sglang_xmem/session.py",
    "sglang_xmem/watch.py",
    "sglang_xmem/engines/sglang/*.py",
    "sglang_xmem/engines/sglang/versions/*.py",
)
#: Subjects of tests on GPUs, with the files whose change makes a run out of date.
SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "copies": _COPIES,
    "tiers": (*_MEMORY, "sglang_xmem/tiers/dram.py", "sglang_xmem/tiers/peer.py"),
    "mtier": (*_MEMORY, "sglang_xmem/tiers/mtier.py", "sglang_xmem/mtier/*.py", "sglang_xmem/mtier/native/*"),
    "bank": (*_ENGINE, "sglang_xmem/bank*.py", "sglang_xmem/tiers/bank.py", "sglang_xmem/mtier/native/*"),
    "dax": (*_MEMORY, "sglang_xmem/tiers/dax.py"),
    "engines": (*_ENGINE, "sglang_xmem/tiers/dram.py", "sglang_xmem/tiers/peer.py"),
    "doctor": (*_MEMORY, "sglang_xmem/doctor/*.py"),
    "metrics": ("sglang_xmem/metrics.py", "sglang_xmem/scrape.py", "sglang_xmem/top.py"),
    "bench": ("sglang_xmem/bench/*.py",),
}
#: Files of the package whose behaviour does not depend on a GPU.
WITHOUT_GPU = (
    "sglang_xmem/__init__.py",
    "sglang_xmem/cli.py",
    "sglang_xmem/engines/__init__.py",
    "sglang_xmem/errors.py",
    "sglang_xmem/kernels/*",  # a link to kernels/
    "sglang_xmem/plugin.py",
    "sglang_xmem/tiers/__init__.py",
)

#: pytest's closing counts.
_COUNT = re.compile(r"\b(\d+) (passed|failed|skipped|errors?)\b")
_C_COMMENTS = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


def code_of(path: Path) -> str:
    """Return a file's text without comments, docstrings and blank lines, so that prose changes need no new run."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = _without_docstrings(text)
    elif path.suffix in {".cu", ".cuh", ".h", ".cpp"}:
        text = _C_COMMENTS.sub(lambda match: match[1] or " ", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _without_docstrings(text: str) -> str:
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            number, column = token.start
            lines[number - 1] = lines[number - 1][:column].rstrip() + "\n"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            string = node.body[0]
            for number in range(string.lineno, (string.end_lineno or string.lineno) + 1):
                lines[number - 1] = "\n"
    return "".join(lines)


def files_of(subject: str, root: Path = ROOT) -> dict[str, str]:
    """Digest each file of a subject's code, by its path in the repository."""
    found = {path for pattern in SUBJECTS[subject] for path in root.glob(pattern) if path.is_file()}
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(code_of(path).encode()).hexdigest()[:12]
        for path in sorted(found)
        if path.suffix in {".py", ".cu", ".cuh", ".h", ".cpp"}
    }


# ---- record ----


def gpus() -> list[str]:
    """List this machine's GPUs by nvidia-smi."""
    return _nvidia_smi("name")


def _nvidia_smi(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "sglang", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for driver in _nvidia_smi("driver_version")[:1]:
        found["driver"] = driver
    return found


def counts_in(output: str) -> dict[str, int]:
    """Parse pytest's final counts, by word; empty without them."""
    for line in reversed(output.splitlines()):
        found = {word.rstrip("s") if word.startswith("error") else word: int(n) for n, word in _COUNT.findall(line)}
        if found and re.search(r"\bin [0-9.]+s\b", line):
            return found
    return {}


def run_command(command: Sequence[str]) -> tuple[int, str]:
    """Run a command and show its output; return exit status and output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line)
    return process.wait(), "".join(lines)


def rows_of(subjects: Sequence[str], command: Sequence[str], root: Path = ROOT) -> list[dict[str, Any]]:
    """Run a command and return a row per subject; digests are those before the run."""
    files = {subject: files_of(subject, root) for subject in subjects}
    begun = datetime.now(timezone.utc)
    status, output = run_command(command)
    counts = counts_in(output)
    # If all tests were skipped, nothing ran.
    passed = status == 0 and (not counts or counts.get("passed", 0) > 0)
    run = {
        "bench": "gpu_runs",
        "date": begun.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round((datetime.now(timezone.utc) - begun).total_seconds(), 1),
        "gpus": gpus(),
        "versions": versions(),
        "command": shlex.join(command),
        "status": status,
        "passed": passed,
        "counts": counts,
    }
    return [{**run, "subject": subject, "files": digests} for subject, digests in files.items()]


# ---- check ----


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the last passed run of each subject."""
    return {row["subject"]: row for row in sorted(rows, key=lambda row: row["date"]) if row["passed"] and row["gpus"]}


def changed(row: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """List files that were added, removed or changed since a run."""
    then: Mapping[str, str] = row["files"]
    return sorted(path for path in {*then, *now} if then.get(path) != now.get(path))


def report(rows: Sequence[Mapping[str, Any]], root: Path = ROOT) -> Iterator[tuple[bool, str]]:
    """Report for each subject whether its code is unchanged since its run on GPUs, and a line about it."""
    last = latest(rows)
    for subject in SUBJECTS:
        row = last.get(subject)
        if row is None:
            yield False, f"{subject}: no run on a GPU is recorded"
            continue
        ran = f"{row['date'][:10]} on {len(row['gpus'])} x {row['gpus'][0]}"
        files = changed(row, files_of(subject, root))
        if files:
            shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
            yield False, f"{subject}: ran {ran}; changed since: {shown}"
        else:
            yield True, f"{subject}: ran {ran}, unchanged since"


def read(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a file; none if the file is missing, as in a source distribution."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    record = commands.add_parser("record", help="run a command on this machine's GPUs, append rows")
    record.add_argument("subjects", nargs="+", metavar="SUBJECT", help=f"subjects under test: {', '.join(SUBJECTS)}")
    record.add_argument("--output", type=Path, default=root / RUNS, help="file to append to")
    check = commands.add_parser("check", help="list the changes since the last runs on GPUs")
    check.add_argument("--runs", type=Path, default=root / RUNS, help="file with the rows")
    check.add_argument("--strict", action="store_true", help="end with status 1 if a subject is out of date")
    words = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options = parser.parse_args(words)
    if options.action == "check":
        lines = list(report(read(options.runs), root))
        for _, line in lines:
            print(f"gpu runs: {line}")
        return int(options.strict and not all(current for current, _ in lines))
    unknown = sorted(set(options.subjects) - set(SUBJECTS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not a subject. Give one or more of {', '.join(SUBJECTS)}.")
    if not command:
        parser.error("no command to run. Give it after `--`.")
    if not gpus():
        parser.error("nvidia-smi lists no GPU. Run this on a machine with one.")
    rows = rows_of(options.subjects, command, root)
    with options.output.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(rows[0]["status"])


if __name__ == "__main__":
    sys.exit(main())
