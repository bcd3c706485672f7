"""The list of proofs that run on GPUs: what can be known of it without one."""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts import proofs
from scripts.proofs import PROOFS, Proof
from tests import REPOSITORY


class Parsed(Exception):
    """Raised as soon as a command line is accepted."""


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Parse a command line of Python as its program does, and go no further."""
    original = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            found, unknown = original(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth:
            return found, unknown
        raise Parsed(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)

    def accept(command: Sequence[str]) -> None:
        is_module = command[0] == "-m"
        arguments = list(command[2:] if is_module else command[1:])
        monkeypatch.setattr(sys, "argv", [command[0], *arguments])
        run = runpy.run_module if is_module else runpy.run_path
        with pytest.raises(Parsed) as reached:
            run(command[1] if is_module else str(REPOSITORY / command[0]), run_name="__main__")
        if unknown := reached.value.args[0]:
            # integrity.py hands on what it does not know itself.
            assert command[0].endswith("integrity.py"), unknown
            accept(["-m", "sglang_xmem.cli", "bench", "ttft", *unknown])

    return accept


@pytest.mark.parametrize("proof", PROOFS, ids=[proof.name for proof in PROOFS])
def test_every_command_line_is_accepted(proof: Proof, accept: Callable[[Sequence[str]], None], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = proofs.command_of(proof, tmp_path, proof.seconds)
    assert command[0] == sys.executable
    accept(command[1:])
    assert proof.rows.endswith(".jsonl")
    assert "{" not in "".join(command).replace('{"', "")


def test_a_command_line_that_is_wrong_is_noticed(accept: Callable[[Sequence[str]], None]) -> None:
    """Negative control: an option that does not exist, of a script and of the command."""
    for command in (["scripts/bench/sums.py", "--no-such"], ["-m", "sglang_xmem.cli", "bench", "soak", "--no-such"]):
        with pytest.raises((AssertionError, SystemExit)):
            accept(command)


SLEEPER = """
import os, time
child = os.fork()
if child:
    open(PATH, "w").write(str(child))
time.sleep(60)
"""


def test_the_list_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert proofs.main(["list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [proof.name for proof in PROOFS]
    documented = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("proofs.py run --out ")[2].splitlines()[0]
    assert set(documented.split()[3:]) <= set(listed)


def has_ended(pid: int) -> bool:
    """Whether a process that was killed ends."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


def test_proofs_run_fail_stop_and_are_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def proof(name: str, code: str, seconds: int = 30, gpus: int = 1) -> Proof:
        return Proof(name, gpus, seconds, "rows.jsonl", ("-c", code, "{out}", "{limit}"), name)

    write = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); print('said')"
    monkeypatch.setattr(proofs.gpus, "count", lambda: 1)
    monkeypatch.setattr(
        proofs,
        "PROOFS",
        (
            proof("fine", write),
            proof("wrong", "raise SystemExit(3)"),
            proof("long", SLEEPER.replace("PATH", repr(str(tmp_path / "pid"))), 3),
            proof("too-long", write, 1000),
            proof("two", write, gpus=2),
        ),
    )
    assert proofs.main(["run", "--out", str(tmp_path), "--time-limit", "300"]) == 1
    results = json.loads(capsys.readouterr().out)
    assert results.pop("too-long").startswith("skipped")
    assert results == {"fine": "ok", "wrong": "failed (status 3)", "long": "stopped after 3 s"}
    assert (tmp_path / "rows.jsonl").read_text() == "10"
    assert "said" in (tmp_path / "proofs.log").read_text()
    assert has_ended(int((tmp_path / "pid").read_text()))
    for names, match in ((["two"], "needs 2"), (["none"], "unknown proof")):
        with pytest.raises(SystemExit):
            proofs.main(["run", "--out", str(tmp_path), *names])
        assert match in capsys.readouterr().err
