"""The command `sglang-xmem`: what it says on a machine without a GPU, and that documented commands parse."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from sglang_xmem import cli

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_roundtrip_is_waived_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "roundtrip"]) == 0
    assert capsys.readouterr().out.startswith("WAIVED: no GPU")


def test_unknown_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ttft", "--backends", "nvme"]) == 2
    assert "--backends nvme: choose from" in capsys.readouterr().err


def test_commands_of_the_readme_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^sglang-xmem (.+)$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        arguments = cli.parser().parse_args(shlex.split(command, comments=True))
        assert callable(arguments.run)
