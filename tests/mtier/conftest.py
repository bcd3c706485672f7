"""The compiled library and service, once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.bank import BankSession
from sglang_xmem.mtier.build import built
from tests.mtier.service import MIB, Daemon, build_fake_cuda

StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="session")
def build() -> Path:
    return built(testing=True)


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CUDA driver over files in memory, see fake_cuda.cpp."""
    return build_fake_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def start_daemon(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartDaemon]:
    """Starts daemons on the test's own socket; they are gone afterwards, and the test's sessions with them.

    A session that stays would return its memory to the next test's service.
    """
    started: list[Daemon] = []
    sessions: list[BankSession] = []
    open_session = BankSession.__init__

    def opened(session: BankSession, *arguments: Any, **options: Any) -> None:
        open_session(session, *arguments, **options)
        sessions.append(session)

    monkeypatch.setattr(BankSession, "__init__", opened)

    def start(
        *arguments: str,
        binaries: Path = build,
        uid: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Daemon:
        arguments = arguments or ("--bank", f"host:{64 * MIB}")
        daemon = Daemon(binaries, tmp_path / "mtierd.sock", arguments, uid, environment)
        started.append(daemon)
        return daemon

    yield start
    for session in sessions:
        session.close()
    for daemon in started:
        daemon.stop(9)
    for daemon in started:
        assert daemon.may_end or "is restarted" not in daemon.log(), daemon.log()[-4000:]
