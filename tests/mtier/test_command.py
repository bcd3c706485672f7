"""The command `sglang-xmem mtierd`: what it makes of its options, and each refusal's sentence."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from service import MIB, Daemon

from sglang_xmem import gpus
from sglang_xmem.errors import TierUnavailable
from sglang_xmem.mtier import build as builder
from sglang_xmem.mtier import daemon

GIB = 1 << 30


def arguments(*words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    daemon.add_arguments(parser)
    return daemon.service_arguments(parser.parse_args(words))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU n has n GiB free."""
    monkeypatch.setattr(gpus, "visible_gpus", lambda: range(4))
    monkeypatch.setattr(gpus, "memory_bytes", lambda gpu: (gpu * GIB, 0))


@pytest.mark.usefixtures("four_gpus")
def test_banks_of_hosts_and_gpus() -> None:
    words = arguments("--bank", "host:512MiB", "--bank", "gpu:3", "--bank", "gpu:2:0.5GB", "--quota", "1")
    assert words == [
        *("--bank", f"host:{512 * MIB}", "--bank", f"gpu:3:{2 * GIB}", "--bank", "gpu:2:500000000"),
        *("--quota", "1000000000", "--granularity", str(2 * MIB), "--share", "100", "--rest-after", "5000"),
    ]
    assert arguments("--rest-after", "0.25")[-2:] == ["--rest-after", "250"]
    with pytest.raises(ValueError, match=r"--rest-after is 4000; give 0 to 3600 seconds\.$"):
        arguments("--rest-after", "4000")
    assert arguments()[1].startswith("host:")
    assert arguments("--bank", "gpu:3:2GiB")[1] == f"gpu:3:{2 * GIB}"


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("banks", "words"),
    [
        (["gpu:4"], "--bank gpu:4: there is no GPU 4; this process sees 4"),
        (["gpu:1"], "--bank gpu:1: GPU 1 has 1.07 GB free, of which 1.07 GB stay so"),
        (["gpu:0:1GB"], "--bank gpu:0:1GB: GPU 0 has 0.00 GB free"),
        (["gpu:3:4GiB"], "give less, or free memory there"),
        (["gpu:3:2049MiB"], "GPU 3 has 3.22 GB free, of which 1.07 GB stay so for the service's CUDA context"),
        (["gpu:3:1MiB"], "--bank gpu:3:1MiB is smaller than the --granularity of 2 MiB; give more"),
        (["host:1MiB"], "--bank host:1MiB is smaller than the --granularity of 2 MiB; give more"),
        (["gpu:2", "gpu:2:1GB"], "--bank names GPU 2 twice; give one bank a GPU"),
        (["host:900TB"], "do not fit into this machine's"),
        *(([text], f"--bank is '{text}'; give") for text in ("gpu", "gpu:", "gpu:x", "gpu:1:", "gpu:1:2XB", "gpu:-1")),
        *(([text], f"--bank is '{text}'; give") for text in ("host:", "host", "host:0", "disk:4GB", "gpu:1:0", "gpu1")),
    ],
)
def test_refusals(banks: list[str], words: str) -> None:
    with pytest.raises(ValueError, match="--bank") as refusal:
        arguments(*(word for bank in banks for word in ("--bank", bank)))
    text = str(refusal.value)
    assert words in text
    assert text.endswith(".")
    assert "\n" not in text


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> range:
        raise TierUnavailable("this machine has no NVIDIA driver")

    monkeypatch.setattr(gpus, "visible_gpus", missing)
    with pytest.raises(ValueError, match="--bank gpu:0: this machine has no NVIDIA driver; give host:SIZE"):
        arguments("--bank", "gpu:0")


def test_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--bank", "tape:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("sglang_xmem: --bank is 'tape:9'; give ")


def test_a_directory_made_elsewhere(tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    builder.build_into(made)
    monkeypatch.setenv("SGLANG_XMEM_MTIER_DIR", str(made))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert builder.built() == made
    with Daemon(made, tmp_path / "mtierd.sock", ["--bank", f"host:{8 * MIB}"]) as service:
        assert service.available() == 8 * MIB
    (made / builder.STAMP).write_text("other sources")
    with pytest.raises(builder.BuildError, match="SGLANG_XMEM_MTIER_DIR is .* of this release; run python -m"):
        builder.built()
    os.unlink(made / builder.STAMP)
    with pytest.raises(builder.BuildError, match="or unset it"):
        builder.built()
