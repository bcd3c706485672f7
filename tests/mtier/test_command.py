"""The command `sglang-xmem mtierd`: what it makes of its options, and each refusal's sentence."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_xmem import gpus, machine
from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.mtier import build as builder
from sglang_xmem.mtier import daemon
from tests.mtier.service import MIB, Daemon

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
    assert arguments("--bank", "host:64MiB", "--rest-after", "0.25")[-2:] == ["--rest-after", "250"]
    with pytest.raises(ValueError, match=r"--rest-after is 4000. Give 0 to 3600 seconds\.$"):
        arguments("--rest-after", "4000")
    assert arguments()[1].startswith("host:")
    assert arguments("--bank", "gpu:3:2GiB")[1] == f"gpu:3:{2 * GIB}"


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("banks", "words"),
    [
        (["gpu:4"], "--bank gpu:4: GPU 4 does not exist; this process sees 4"),
        (["gpu:1"], "--bank gpu:1: GPU 1 has 1.07 GB free, of which 1.07 GB are reserved"),
        (["gpu:0:1GB"], "--bank gpu:0:1GB: GPU 0 has 0.00 GB free"),
        (["gpu:3:4GiB"], "Give less, or free memory there"),
        (["gpu:3:2049MiB"], "GPU 3 has 3.22 GB free, of which 1.07 GB are reserved for the service's CUDA context"),
        (["gpu:3:1MiB"], "--bank gpu:3:1MiB is smaller than the --granularity of 2 MiB. Give more"),
        (["host:1MiB"], "--bank host:1MiB is smaller than the --granularity of 2 MiB. Give more"),
        (["gpu:2", "gpu:2:1GB"], "--bank names GPU 2 twice. Give one bank per GPU"),
        (["host:900TB"], "do not fit into this machine's"),
        *(([text], f"--bank is '{text}'. Give") for text in ("gpu", "gpu:", "gpu:x", "gpu:1:", "gpu:1:2XB", "gpu:-1")),
        *(([text], f"--bank is '{text}'. Give") for text in ("host:", "host", "host:0", "disk:4GB", "gpu:1:0", "gpu1")),
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
        raise Unavailable("this machine has no NVIDIA driver")

    monkeypatch.setattr(gpus, "visible_gpus", missing)
    with pytest.raises(ValueError, match="--bank gpu:0: this machine has no NVIDIA driver. Give host:SIZE"):
        arguments("--bank", "gpu:0")


def test_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--bank", "tape:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sglang-xmem: --bank is 'tape:9'. Give ")


def test_limits_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments("--bank", "host:64MiB", "--metrics", "9300", "--allow-reset")
    assert words[-3:] == ["--metrics", "9300", "--allow-reset"]
    assert "--lazy" not in words
    assert "--lazy" in arguments("--bank", "host:64MiB", "--lazy")
    assert "--lazy" in arguments()  # the size is only a default
    with pytest.raises(ConfigError, match=r"--metrics is 65536\. Give a port"):
        arguments("--metrics", "65536")
    # As a container of 1 GB with half of it used has it.
    monkeypatch.setattr(machine, "cgroup_headroom_bytes", lambda: 500_000_000)
    monkeypatch.setattr(machine, "host_available_bytes", lambda: 500_000_000)
    with pytest.raises(ConfigError, match=r"banks of 0.51 GB do not fit into the 0.50 GB that this container has left"):
        arguments("--bank", "host:0.51GB")
    assert arguments("--bank", "host:0.5GB")[1] == "host:500000000"
    assert arguments()[1] == "host:250000000"


def test_status_for_people() -> None:
    status = {
        "pid": 7,
        "quota": 0,
        "banks": [
            {"bank": 0, "kind": "host", "total": 64_000_000_000, "available": 62_900_000_000, "allocations": 2},
            {"bank": 1, "kind": "gpu", "gpu": 3, "pci": "0000:1B:00.0", "total": 9, "available": 9, "allocations": 0},
        ],
        "clients": [
            {"pid": 12, "process": "i5", "bytes": 10**8, "allocations": 1, "connected": False, "ended": True},
            {"pid": 0, "process": "i6", "bytes": 10**9, "allocations": 1, "connected": True, "ended": False},
        ],
    }
    assert daemon.status_text({**status, "open": [{"bank": 0, "bytes": 63_500_000_000}]}) == (
        "mtierd, process 7, quota per process: none\n\n"
        "bank  memory                   GB  used   free  for a new model  allocations\n"
        "   0  host                  64.00  1.10  62.90  63.50                      2\n"
        "   1  GPU 3 (0000:1B:00.0)   0.00  0.00   0.00  -                          0\n\n"
        "process                        GB  allocations  state\n"
        "i6 of another PID namespace  1.00            1  connected\n"
        "12                           0.10            1  ended, its memory is in use"
    )
    ahead = [{"bank": "0 host", "bytes": 4 * 10**9, "present": 10**9, "ended": True, "why": "no space"}]
    assert "0 host                     4.00     1.00  ended: no space" in daemon.status_text({**status, "ahead": ahead})
    assert daemon.status_text({**status, "clients": []}).endswith("\n\nno client holds memory")


def test_the_library_s_path_is_printed_once_it_can_be_used(build: Path, tmp_path: Path) -> None:
    command = [str(build / "mtierd"), "--bank", f"host:{8 * MIB}", "--library", "/there/libmtier.so", "--socket"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    with subprocess.Popen([*command, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "MTIER_LIB_PATH=/there/libmtier.so\n"
        assert (tmp_path / "s").exists()
        process.terminate()


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and a compiler that writes a few bytes; the folders that it was called for."""
    calls: list[Path] = []

    def compile_(compiler: str, directory: Path, more: object) -> None:
        calls.append(directory)
        for name, _, _ in builder._TARGETS:
            (directory / name).write_text("compiled")

    monkeypatch.setenv("SGLANG_XMEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(builder, "_compile", compile_)
    return calls


def test_what_is_damaged_is_compiled_again(quick_compiler: list[Path]) -> None:
    said: list[str] = []
    directory = builder.built(announce=said.append)
    assert builder.built(announce=said.append) == directory
    assert len(quick_compiler) == len(said) == 1
    assert "takes about 30 s" in said[0]
    program = directory / builder.DAEMON

    def cut() -> None:
        program.write_text("comp")

    def open_to_others() -> None:
        program.chmod(0o777)

    def lose_stamp() -> None:
        (directory / builder.STAMP).unlink()

    for damage in (program.unlink, cut, open_to_others, lose_stamp):
        damage()
        assert builder.built() == directory
        assert program.read_text() == "compiled"
    assert len(quick_compiler) == 5
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_what_another_user_put_there_is_not_run(quick_compiler: list[Path]) -> None:
    """Anyone can compute the name of the folder."""
    directory = builder.built()
    (directory / builder.DAEMON).write_text("planted")
    builder._write_stamp(directory)  # with the right digests
    os.chown(directory / builder.DAEMON, 65534, 65534)
    assert (builder.built() / builder.DAEMON).read_text() == "compiled"
    os.chown(directory.parent, 65534, 65534)
    with pytest.raises(
        builder.BuildError, match=r"^mtierd cannot be cached: others can write to .*SGLANG_XMEM_CACHE_DIR"
    ):
        builder.built()


def test_a_directory_made_elsewhere(tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    builder.build_into(made)
    monkeypatch.setenv("SGLANG_XMEM_MTIER_DIR", str(made))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert builder.built() == made
    with Daemon(made, tmp_path / "mtierd.sock", ["--bank", f"host:{8 * MIB}"]) as service:
        assert service.available() == 8 * MIB
    program = (made / builder.DAEMON).read_bytes()
    (made / builder.DAEMON).write_bytes(b"another")
    with pytest.raises(builder.BuildError, match="of this release"):
        builder.built()
    (made / builder.DAEMON).write_bytes(program)
    assert builder.built() == made
    (made / builder.STAMP).write_text("other sources")
    with pytest.raises(
        builder.BuildError,
        match="SGLANG_XMEM_MTIER_DIR is .* of this release, or others can write there; run python -m",
    ):
        builder.built()
    os.unlink(made / builder.STAMP)
    with pytest.raises(builder.BuildError, match="or unset it"):
        builder.built()
