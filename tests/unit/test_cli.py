"""The command `sglang-xmem`: at once, without torch, and all documented commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

import sglang_xmem
from sglang_xmem import cli
from tests import REPOSITORY

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "sglang", "xmem"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from sglang_xmem import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "statuses", "words"),
    [
        (["--help"], (0,), "doctor"),
        (["--version"], (0,), sglang_xmem.__version__),
        (["mtierd", "--help"], (0,), "--bank"),
        (["bench", "--help"], (0,), "multiturn"),
        (["top", "--once", "--url", "http://127.0.0.1:1"], (2,), "No server responds"),
        (["bench", "ttft", "--help"], (0,), "qwen3-30b-a3b"),
        (["doctor", "--no-bandwidth"], (0, 1), "Tiers for a pool"),
        (["doctor", "--tp-size", "0"], (2,), "--tp-size is 0"),
        (["bench", "ttft", "--backends", "nvme"], (2,), "argument --backends: nvme: choose from"),
        (["nonsense"], (2,), "invalid choice: 'nonsense'"),
    ],
)
def test_torch_is_not_needed(arguments: list[str], statuses: tuple[int, ...], words: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode in statuses, done.stderr[-2000:]
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_no_benchmark() -> None:
    code = "import sys\nfrom sglang_xmem import cli\ncli.parser()\nprint(len(sys.modules), sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    for name in ("torch", "numpy", "rich", "sglang_xmem.bench", "sglang_xmem.doctor", "sglang_xmem.tiers"):
        assert f"'{name}'" not in done.stdout


@pytest.mark.parametrize("command", [*cli.COMMANDS, *(f"bench {name}" for name in cli.BENCHMARKS), "bench", ""])
def test_an_unknown_option_shows_the_usage_of_its_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # A benchmark that wants a file has one, and `bench` alone wants a benchmark.
    behind = {"bench report": ["f"], "bench compare": ["f", "g"], "bench trace": ["f"], "bench": ["ttft"]}
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--bogus", *behind.get(command, ["doctor"] if not command else [])])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert " ".join(usage.split()).startswith(f"usage: {' '.join(['sglang-xmem', *command.split()])} [")
    assert error == f"{' '.join(['sglang-xmem', *command.split()])}: error: unrecognized arguments: --bogus"


def documented_commands() -> list[str]:
    """Every command of ours in the documentation's code blocks."""
    commands = []
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [line for line in lines if line.startswith("sglang-xmem ")]
    return commands


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command: str) -> None:
    assert callable(cli.parser().parse_args(shlex.split(command, comments=True)[1:]).run)


def test_options_have_help_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.BENCHMARKS:
        arguments = cli.parser()
        with pytest.raises(SystemExit):
            arguments.parse_args(["bench", name, "--help"])
        text = capsys.readouterr().out
        options = re.split(r"^  (?=-)", text[text.index("options:") :], flags=re.MULTILINE)[1:]
        for option in options:
            words = re.sub(r"^(--?[\w-]+)(,? ?[^ ]+)*?  +|\s+", " ", " ".join(option.split("  ", 1)[1:]))
            assert re.search(r"[a-z]{3}", words), f"{name}: no help for {option!r}"
        assert "sglang_xmem[bench]" not in text, "the name is not registered, so anyone could publish under it"
