"""HiCache's L3 in Mooncake's real store over a tier: a hit of one engine comes from what another one computed.

The store's master runs here and talks TCP on the loopback interface. It is that of `mooncake-transfer-engine-non-cuda`,
which needs Debian's libibverbs1, librdmacm1, libnuma1, liburing2 and libcurl4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from scripts.sglang_server import HOST
from tests.e2e import harness
from tests.e2e.kinds import KINDS

pytestmark = pytest.mark.cpu_engine

MIB = 1 << 20


def free_port() -> int:
    """An unused port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def master(tmp_path: Path) -> Iterator[dict[str, object]]:
    """A running master, and a client with space for pages: yields the backend's settings for an engine."""
    found = importlib.util.find_spec("mooncake")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("mooncake-transfer-engine-non-cuda is not installed")
    loads = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True, check=False)
    if loads.returncode:
        pytest.skip(f"Mooncake does not load here: {loads.stderr.strip().splitlines()[-1]}")
    program = str(Path(found.submodule_search_locations[0]) / "mooncake_master")
    rpc, metadata, metrics = free_port(), free_port(), free_port()
    settings: dict[str, object] = {
        "local_hostname": HOST,
        "metadata_server": f"http://{HOST}:{metadata}/metadata",
        "master_server_address": f"{HOST}:{rpc}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": 0,
    }
    command = [program, f"--port={rpc}", "--enable_http_metadata_server=true", f"--metrics_port={metrics}"]
    with (tmp_path / "master.log").open("wb") as log, contextlib.ExitStack() as ended:
        for start in (
            [*command, f"--http_metadata_server_port={metadata}"],
            # The engines bring no memory of their own, so a page outlives the one that stored it.
            [sys.executable, "-c", CLIENT, json.dumps(settings)],
        ):
            process = subprocess.Popen(start, stdout=log, stderr=log)
            ended.callback(process.wait, 30)
            ended.callback(process.send_signal, signal.SIGKILL)
            await_port(metadata)
        yield settings


#: A process that gives the store memory.
CLIENT = f"""
import json, sys, time
from mooncake.store import MooncakeDistributedStore
settings = json.loads(sys.argv[1])
store = MooncakeDistributedStore()
status = store.setup(
    settings["local_hostname"], settings["metadata_server"], {64 * MIB}, {16 * MIB}, "tcp", "",
    settings["master_server_address"],
)
print("client:", status, flush=True)
time.sleep(3600)
"""


def await_port(port: int, timeout_s: float = 30) -> None:
    """Wait until the port is open."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        assert time.monotonic() < deadline, f"port {port} is not open"
        time.sleep(0.1)


def test_a_hit_comes_from_another_engine(
    master: dict[str, object],
    model_of: Callable[[Sequence[str]], str],
    tmp_path: Path,
) -> None:
    """Two pools in one frame, each page stored and loaded by its addresses."""
    kind = KINDS["dsa"]
    model = model_of(kind.model)
    options = {
        **harness.XMEM_DRAM,
        "hicache_storage_backend": "mooncake",
        "hicache_storage_backend_extra_config": json.dumps(master),
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    spec = kind.spec(model, options, {})
    first = harness.run(spec_with(spec, [("ask", "cold", "A"), ("ask", "device_hit", "A"), ("sleep", 5)]))
    second = harness.run(spec_with(spec, [("ask", "from_storage", "A")]))
    hit, expected = second.answers["from_storage"], first.answers["device_hit"]
    assert sum(first.answers["cold"].cached.values()) == 0
    assert hit.cached.get("device", 0) == 0
    assert hit.cached["storage"] == kind.hit
    assert (hit.output_ids, hit.logprobs) == (expected.output_ids, expected.logprobs)
    assert second.survivors == []


def spec_with(spec: harness.Spec, steps: list[harness.Step]) -> harness.Spec:
    """A run of other steps."""
    return dataclasses.replace(spec, steps=steps)
