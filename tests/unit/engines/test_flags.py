"""The flag on a machine without a GPU: SGLang would end by a traceback, later or sooner."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from sglang_xmem.engines.sglang import flags
from sglang_xmem.errors import ConfigError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(flags.CPU_ENGINE, raising=False)


def parse(device: str | None, on: bool = True) -> Any:
    args = argparse.Namespace(
        hicache_use_xmem=on, hicache_xmem_tier=None, hicache_xmem_config=None, device=device, port=1
    )
    return flags.from_cli_args(lambda cls, args: argparse.Namespace(port=args.port), None, args)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_machine_without_a_gpu_is_one_sentence(device: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(device)
    assert end.value.code == 78
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no usable GPU" in said
    assert "SGLANG_USE_CPU_ENGINE=1" in said
    with pytest.raises(ConfigError, match="SGLANG_USE_CPU_ENGINE=1"):
        flags.ServerArgsFactory(argparse.Namespace)(hicache_use_xmem=True, device=device)


def test_where_there_is_something_to_compute_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("cpu").port == 1
    assert parse(None, on=False).port == 1
    assert flags.ServerArgsFactory(argparse.Namespace)(hicache_use_xmem=False).__dict__ == {}
    monkeypatch.setenv(flags.CPU_ENGINE, "1")
    assert parse(None).port == 1
    monkeypatch.delenv(flags.CPU_ENGINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse(None).port == 1
