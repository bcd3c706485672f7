"""The page bank on real GPUs: pages that one process publishes in a GPU's memory and another one adopts, also after the
service was killed; and how long a slab of host memory takes to pin that the service has made present.

SGLANG_XMEM_GPU_RESULTS names a folder that receives what is measured, as JSON. Takes two minutes and one GPU; with two
the bank is on the second one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.mtier.build import built
from tests import REPOSITORY
from tests.mtier.service import MIB, AskedProcess, Daemon, wait_until

pytestmark = pytest.mark.gpu

FRAME = 6 * MIB
ENGINE = """
import hashlib, json, sys, time
from contextlib import ExitStack
import numpy as np
from sglang_xmem import gpus
from sglang_xmem.bank import BankSession
from sglang_xmem.mtier.client import GPU, HOST
from sglang_xmem.tiers import hostmem
FRAME = {frame}
undo = ExitStack()
d = gpus.driver()
gpus.checked(d.cuCtxPushCurrent(gpus.hold_context(0, undo)), "a context")
def key(number): return number.to_bytes(32, "big")
def page(number): return np.random.default_rng(number).integers(0, 256, FRAME, dtype=np.uint8)
def join(kind, frames):
    global session
    session = BankSession(b"m" * 32, FRAME, frames, kind=kind)
def store(numbers):
    addresses = session.claim(len(numbers))
    for number, address in zip(numbers, addresses):
        gpus.checked(d.cuMemcpyHtoD(int(address), page(number).ctypes.data, FRAME), "writing")
    gpus.checked(d.cuCtxSynchronize(), "waiting")
    return session.publish([key(number) for number in numbers], addresses)
def adopt(numbers):
    found = session.adopt([key(number) for number in numbers])
    there = np.empty(FRAME, np.uint8)
    equal = []
    for number, address in zip(numbers, found):
        gpus.checked(d.cuMemcpyDtoH(there.ctypes.data, int(address), FRAME), "reading")
        equal.append(bool((there == page(number)).all()))
    return equal
def pin_seconds():
    begun = time.monotonic()
    with ExitStack() as pinned:
        hostmem.pin(session.slab.address, session.slab.nbytes, 0, pinned)
        return time.monotonic() - begun
for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""


class Engine(AskedProcess):
    """A process with a session of its own."""

    def __init__(self, daemon: Daemon) -> None:
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "MTIER_SOCKET": str(daemon.socket_path), "PYTHONPATH": path}
        super().__init__(["-c", ENGINE.format(frame=FRAME)], environment)


def record(name: str, row: dict[str, Any]) -> None:
    folder = os.environ.get("SGLANG_XMEM_GPU_RESULTS")
    if folder:
        Path(folder, f"{name}.json").write_text(json.dumps(row) + "\n")


@pytest.fixture
def bank_gpu() -> int:
    import torch

    return min(1, torch.cuda.device_count() - 1)


@pytest.fixture
def daemon(request: pytest.FixtureRequest, tmp_path: Path, bank_gpu: int) -> Iterator[Daemon]:
    bank = request.param.format(gpu=bank_gpu)
    with Daemon(built(), tmp_path / "mtierd.sock", ["--bank", bank]) as daemon:
        yield daemon


@pytest.mark.parametrize("daemon", [f"gpu:{{gpu}}:{4 << 30}"], indirect=True)
def test_pages_in_a_gpu_outlast_engine_and_service(daemon: Daemon, bank_gpu: int) -> None:
    numbers = list(range(40))
    with Engine(daemon) as one, Engine(daemon) as two:
        one.ask("join(GPU, 60)")
        assert one.ask(f"store({numbers})") == [0] * 40
        two.ask("join(GPU, 60)")
        assert two.ask(f"adopt({numbers})") == [True] * 40
        assert two.ask("adopt([99])") == []
        one.process.kill()
        one.process.wait(60)
        begun = time.monotonic()
        daemon.restart()
        restart_s = time.monotonic() - begun
        wait_until(lambda: two.ask("session.find([key(0)])") == 1, 60)
        with Engine(daemon) as three:
            three.ask("join(GPU, 60)")
            assert three.ask(f"adopt({numbers})") == [True] * 40
            # The negative control: other bytes would be noticed.
            assert three.ask("adopt([1]) and (page(1) != page(2)).any().item()") is True
            assert three.ask("store([41])") == [0]
        assert two.ask("adopt([41, 5])") == [True, True]
    # With no engine there the bytes are the keeper's.
    daemon.restart()
    with Engine(daemon) as four:
        four.ask("join(GPU, 60)")
        assert four.ask(f"adopt({numbers})") == [True] * 40
    row = {"case": "after_service_restart", "bank": "gpu", "bank_gpu": bank_gpu, "pages": 40, "page_bytes": FRAME}
    record("bank_gpu", {"bench": "bank", **row, "restart_s": round(restart_s, 3), "bytes_equal": True})


@pytest.mark.parametrize("daemon", [f"host:{8 << 30}"], indirect=True)
def test_host_memory_that_is_present_pins_fast(daemon: Daemon) -> None:
    begun = time.monotonic()
    wait_until(lambda: daemon.status()["ahead"][0]["ended"], 300)
    present_s = time.monotonic() - begun
    (ahead,) = daemon.status()["ahead"]
    assert ahead["present"] == ahead["bytes"], ahead["why"]
    with Engine(daemon) as one, Engine(daemon) as two:
        one.ask("join(HOST, 60)")
        seconds = one.ask("pin_seconds()")
        two.ask("join(HOST, 60)")
        assert one.ask("store([1, 2])") == [0, 0]
        assert two.ask("adopt([1, 2])") == [True, True]
    row = {"case": "start_up", "bank": "host", "bytes": ahead["bytes"], "present_s": round(present_s, 3)}
    record("bank_host", {"bench": "bank", **row, "pin_s": round(seconds, 3)})
