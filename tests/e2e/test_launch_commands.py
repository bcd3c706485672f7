"""Published launch commands with the flag added: through SGLang's parser and this package's planning."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_xmem.errors import ConfigError
from sglang_xmem.tiers import dram

pytestmark = pytest.mark.cpu_engine

COMMANDS = Path(__file__).parents[1] / "data" / "launch_commands.txt"


class Command(NamedTuple):
    """A published command.

    Attributes:
        words: what is in the refusal; empty where it is accepted.
    """

    text: str
    words: str

    @property
    def arguments(self) -> list[str]:
        """Behind the program's name."""
        arguments = shlex.split(self.text)
        start = arguments.index("serve" if arguments[0] == "sglang" else "sglang.launch_server") + 1
        return arguments[start:]


def commands() -> list[Command]:
    """All of the file."""
    found, words = [], None
    for line in COMMANDS.read_text().splitlines():
        if line.startswith("> "):
            outcome, _, words = line.removeprefix("> ").partition(": ")
            assert outcome == ("refused" if words else "accepted"), line
        elif line and not line.startswith("#"):
            assert words is not None, f"nothing is expected of {line}"
            found.append(Command(line, words))
            words = None
    return found


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """SGLang's, with this package's options."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    made = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(made)
    return made


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPUs are all near one node with much memory."""
    monkeypatch.setattr(dram, "_nodes_for", lambda wanted, gpu: (0,))
    monkeypatch.setattr(dram, "_refused_nodes", lambda settings, nodes: set())
    monkeypatch.setattr(dram, "_capacity_bytes", lambda nodes, bound, hugepage: 1 << 42)
    monkeypatch.setattr("sglang_xmem.engines.sglang.launcher.launcher_host_budget", lambda n_ranks: lambda n: 1 << 42)


def record_of(parser: argparse.ArgumentParser, command: Command) -> Any:
    """SGLang's record of a command with the flag, as far as SGLang resolves it without a GPU and a model."""
    from sglang.srt.arg_groups.hicache_hook import handle_hicache_ratio_default
    from sglang.srt.arg_groups.parallel_hook import handle_deprecated_dp_attention
    from sglang.srt.server_args import ServerArgs

    more = ["--device", "cuda", "--hicache-use-xmem", "--hicache-xmem-tier", "dram"]
    needs = "--disaggregation-decode-retraction-backup" not in command.arguments
    record = ServerArgs.from_cli_args(
        parser.parse_args([*command.arguments, *(["--enable-hierarchical-cache"] if needs else []), *more])
    )
    for handler in (handle_deprecated_dp_attention, handle_hicache_ratio_default):
        handler(record)
    return record


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.text[:100])
def test_a_published_command(command: Command, parser: argparse.ArgumentParser, gpus: None) -> None:
    """Planned for the ranks that it starts here, or refused in one sentence of the user's own words."""
    from sglang_xmem.engines.sglang import flags, launcher

    record = record_of(parser, command)
    if command.words:
        with pytest.raises(ConfigError) as caught:
            launcher.plan_for(record, flags.attached(record))
        message = str(caught.value)
        assert command.words in message
        assert "\n" not in message
        return
    plan = launcher.plan_for(record, flags.attached(record))
    assert [candidate.tier for candidate in plan.candidates] == ["dram"]
    given = vars(parser.parse_args(command.arguments))
    replicas = 1 if given["enable_dp_attention"] else given["dp_size"]
    ranks = replicas * given["tp_size"] * given["pp_size"] // given["nnodes"]
    assert plan.ranks.gpus == tuple(range(ranks))


def test_there_are_enough_commands() -> None:
    """Of the kinds of deployments too."""
    texts = [command.text for command in commands()]
    assert len(set(texts)) == len(texts) >= 30
    for word in ("enable-dp-attention", "attn-dp-size", "pp-size", "ep", "disaggregation-mode decode", "EAGLE3"):
        assert any(word in text for text in texts), word
