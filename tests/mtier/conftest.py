"""The compiled library and service, once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from service import MIB, Daemon

from sglang_xmem.mtier.build import built

StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="session")
def build() -> Path:
    return built()


@pytest.fixture
def start_daemon(build: Path, tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts daemons on the test's own socket; they are gone afterwards."""
    started: list[Daemon] = []

    def start(*arguments: str, binaries: Path = build, uid: int | None = None) -> Daemon:
        daemon = Daemon(binaries, tmp_path / "mtierd.sock", arguments or ("--bank", f"host:{64 * MIB}"), uid)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.stop(9)
