"""Banks of GPU memory on real GPUs: X-Mem's SDK, tier mtier, copy rates, deaths, and what stays behind.

The SDK connects on import and never unloads its library, so its users run in separate processes.
SGLANG_XMEM_GPU_RESULTS names a folder that receives what is measured, as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import gpus
from sglang_xmem.bench import environment as machine
from sglang_xmem.mtier.build import built
from tests import REPOSITORY
from tests.mtier.service import MIB, Daemon, client_environment, wait_until

pytestmark = [
    pytest.mark.gpus(2),
    pytest.mark.skipif(importlib.util.find_spec("xmem") is None, reason="needs the package xmem-mtier"),
]

GIB = 1 << 30
#: What a GPU's used memory may differ by without anything being left there.
SLACK = 64 * MIB
#: Most that the service's context takes of a GPU, with the driver's page tables.
CONTEXT = 700 * 10**6

StartService = Callable[..., Daemon]


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    """Starts services with banks such as gpu:1:BYTES; they are gone afterwards."""
    with ExitStack() as stack:

        def start(*banks: str) -> Daemon:
            words = [word for bank in banks for word in ("--bank", bank)]
            words += ["--rest-after", "0"]  # the GPU is as it was as soon as the memory is back
            daemon = stack.enter_context(Daemon(built(), tmp_path / "mtierd.sock", words))
            assert daemon.process.poll() is None, daemon.log()
            return daemon

        yield start


def used(gpu: int) -> int:
    return gpus.memory_bytes(gpu)[1]


def is_named(daemon: Daemon, gpu: int) -> bool:
    """Whether NVML names the service on a GPU: it has a context there."""
    return daemon.serving in gpus.processes(gpu)


def run(script: str, daemon: Daemon, *arguments: str) -> str:
    """The last line that a script printed; X-Mem's SDK prints too."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **client_environment(built(), daemon.socket_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.strip().splitlines()[-1]


def record(name: str, **values: Any) -> None:
    """Print a result, and keep it where the environment says so."""
    result = {"bench": name, **values, **machine.describe(), "command": "pytest tests/gpu/test_mtier_gpu.py"}
    print(json.dumps(result))
    folder = os.environ.get("SGLANG_XMEM_GPU_RESULTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(result) + "\n")


# ---- the command ----


def test_the_command_serves_all_that_is_free(tmp_path: Path) -> None:
    free, before = gpus.memory_bytes(1)
    path = tmp_path / "mtierd.sock"
    command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--socket", str(path)]
    process = subprocess.Popen([*command, "--bank", "gpu:1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"MTIER_LIB_PATH={built() / 'libmtier.so'}\n"
        wait_until(lambda: path.exists() or process.poll() is not None, 30)
        done = subprocess.run([*command, "--status", "--json"], capture_output=True, text=True, timeout=60, check=True)
        bank = json.loads(done.stdout)["banks"][0]
        assert (bank["kind"], bank["gpu"]) == ("gpu", 1)
        assert abs(bank["total"] - (free - GIB)) < 2 * SLACK
        assert used(1) - before < 2 * SLACK, "neither a context nor memory is allocated"
    finally:
        process.terminate()
        assert process.wait(20) == 0
    wait_until(lambda: used(1) - before < SLACK, 10)


def test_the_command_refuses_what_a_gpu_has_not() -> None:
    count = len(gpus.visible_gpus())
    for bank, words in ((f"gpu:{count}", f"GPU {count} does not exist"), ("gpu:1:900GB", "GB free, of which 1.07 GB")):
        command = [sys.executable, "-m", "sglang_xmem.cli", "mtierd", "--bank", bank]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"sglang_xmem: --bank {bank}: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


# ---- X-Mem's SDK ----

SDK = """
import gc, time, torch, xmem
from xmem import mtier_sdk as sdk

MIB = 1 << 20
total = sdk.get_bank_status(0).total_memory

def same(a, b):
    return a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))

def noise(shape, dtype):
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda").view(dtype).view(shape)

# Before anything has made a CUDA context: the SDK makes one where the library says that there is none.
try:
    sdk.malloc(0, 1)
    raise AssertionError("no error")
except sdk.MTierEmptyCudaContextError as error:
    assert "no CUDA context" in str(error), error
handle = xmem.allocate((3, MIB), torch.float32, 0, "cuda:0")
assert xmem.memory_allocated(0) == 12 * MIB and handle.remote_addr % (2 * MIB) == 0
del handle
gc.collect()
assert xmem.memory_allocated(0) == 0

torch.manual_seed(1)
for shape in ((1,), (3, 5, 7), (1 << 20,), (257, 4099), (96, 1024, 1024)):
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        tensor = noise(shape, dtype)
        remote = xmem.offload(tensor, bank_id=0)
        kept = tensor.clone()
        tensor.zero_()
        assert same(remote.prefetch(reuse=True), kept)
        assert same(remote.prefetch(), kept)  # frees the memory right behind its copy
        remote = xmem.offload(kept, bank_id=0, non_blocking=True)
        assert same(remote.prefetch(non_blocking=True).wait(), kept)
        del remote
        gc.collect()
        # The SDK frees on a thread of its own, after it has handed the tensor out.
        deadline = time.monotonic() + 10
        while xmem.memory_allocated(0):
            assert time.monotonic() < deadline
            time.sleep(0.01)
# Many at once, back in another order.
tensors = [noise((1 << 20,), torch.uint8) for _ in range(64)]
remotes = [xmem.offload(tensor, bank_id=0, non_blocking=True) for tensor in tensors]
for index in torch.randperm(64).tolist():
    assert same(remotes[index].prefetch(), tensors[index])
# A second GPU gets access where its context is current.
with torch.cuda.device(1):
    local = noise((1 << 20,), torch.float32).to("cuda:1")
    assert same(xmem.offload(local, bank_id=0).prefetch(), local)
try:
    xmem.offload(noise((1,), torch.uint8), bank_id=7)
    raise AssertionError("no error")
except sdk.MTierInvalidArgumentError:
    pass
try:
    sdk.malloc(0, total + 1)
    raise AssertionError("no error")
except sdk.MTierOutOfMemoryError:
    pass
del remotes
gc.collect()
torch.cuda.synchronize()
assert sdk.get_bank_status(0).available_memory == total
print("done")
"""


def test_sdk_round_trips(start_service: StartService) -> None:
    daemon = start_service(f"gpu:1:{4 * GIB}")
    assert run(SDK, daemon) == "done"
    assert daemon.available() == 4 * GIB
    wait_until(lambda: not is_named(daemon, 1), 10)


# ---- tier mtier ----

POOLS = """
from sglang_xmem.bench.moves import CASES, Scene

for name in ("kv", "mla", "token"):
    scene = Scene("mtier", None, 0, CASES[name], 32, 0)
    assert sum(scene.wrong_pages(pages) for pages in (1, 7, 32)) == 0
    print(scene.arena.tier.name, scene.arena.copier.name, flush=True)
    scene.close()
"""


@pytest.mark.parametrize("n_banks", [1, 2])
def test_pool_round_trip(start_service: StartService, n_banks: int) -> None:
    """Every byte, through the CUDA copier's kernels; in one bank and striped."""
    daemon = start_service(*[f"gpu:1:{2 * GIB}"] * n_banks)
    assert run(POOLS, daemon) == "mtier cuda"
    assert all(daemon.available(bank) == 2 * GIB for bank in range(n_banks))


@pytest.mark.gpus(3)
def test_a_pool_striped_over_two_gpus(start_service: StartService) -> None:
    daemon = start_service(f"gpu:1:{2 * GIB}", f"gpu:2:{2 * GIB}")
    assert run(POOLS, daemon) == "mtier cuda"


HOST = """
from sglang_xmem.bench.moves import CASES, Scene
from sglang_xmem.errors import ConfigError

try:
    Scene("mtier", None, 0, CASES["small"], 8, 0)
except ConfigError as error:
    print(error)
"""


def test_a_host_bank_is_refused_on_a_gpu(start_service: StartService) -> None:
    daemon = start_service(f"host:{64 * MIB}")
    assert "bank 0 is host memory that GPUs cannot address" in run(HOST, daemon)
    assert daemon.available() == 64 * MIB


RATES = """
import json, statistics
import torch
from sglang_xmem.bench.moves import CASES, Scene

# A GPU without a context serves its memory more slowly. The service has one there while its memory is out; this one is
# for the other tier, whatever it does itself.
context = torch.empty(1, device="cuda:1")
configs = {"mtier": None, "peer": '{"peer": {"gpus": [1], "copy_on": "rank"}}'}
scenes = {name: Scene(name, config, 0, CASES["kv"], 512, 0) for name, config in configs.items()}
pages = {name: scene.some(512)[0] for name, scene in scenes.items()}
times = {(name, what): [] for name in scenes for what in ("load", "store")}
for repetition in range(13):
    for (name, what), measured in times.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        getattr(scenes[name], what)(pages[name])
        end.record()
        end.synchronize()
        if repetition >= 3:
            measured.append(start.elapsed_time(end))
moved = 512 * CASES["kv"].page_bytes
gbps = {f"{name} {what}": round(moved / statistics.median(ms) / 1e6, 1) for (name, what), ms in times.items()}
for scene in scenes.values():
    scene.close()
print(json.dumps(gbps))
"""


def test_copy_rate_is_that_of_tier_peer(start_service: StartService) -> None:
    """The same kernel on the same GPUs, alternately in one process: mapped memory is as fast for either allocator."""
    daemon = start_service(f"gpu:1:{12 * GIB}")
    gbps = json.loads(run(RATES, daemon))
    ratios = {what: round(gbps[f"mtier {what}"] / gbps[f"peer {what}"], 4) for what in ("load", "store")}
    record("mtier_copy", gbps=gbps, mtier_over_peer=ratios)
    assert min(ratios.values()) >= 0.98, gbps


# ---- deaths ----


class Client:
    """A process with memory in bank 0 for its GPU, filled with one byte.

    Args:
        gpu: where its context is.
    """

    SCRIPT = """
import sys, torch
from xmem import mtier_sdk as sdk
from sglang_xmem.arena import bytes_at
gpu, byte, nbytes = map(int, sys.argv[1:])
torch.cuda.set_device(gpu)
torch.cuda.synchronize()
for line in sys.stdin:
    if line == "take\\n":
        memory = bytes_at(sdk.malloc(0, nbytes), nbytes, torch.device("cuda", gpu))
        memory.fill_(byte)
        torch.cuda.synchronize()
        print("RESULT filled", flush=True)
    else:
        pieces = memory.split(1 << 30)
        print("RESULT", all(bool((piece == byte).all()) for piece in pieces), flush=True)
"""

    def __init__(self, daemon: Daemon, gpu: int, byte: int, nbytes: int) -> None:
        environment = {**os.environ, **client_environment(built(), daemon.socket_path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, str(gpu), str(byte), str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return line.removeprefix("RESULT ").strip()
        raise AssertionError(f"the client ended at {what!r} with status {self.process.wait(20)}")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(60)


def test_a_killed_client_s_memory_is_back(start_service: StartService) -> None:
    """At once in the bank, a moment later with the driver; another client's bytes stay as they are."""
    before = used(1)
    daemon = start_service(f"gpu:1:{8 * GIB}")
    assert used(1) - before < 2 * SLACK, "a bank that is not used has no context on the GPU"
    assert not is_named(daemon, 1)
    with Client(daemon, 0, 1, 3 * GIB) as one, Client(daemon, 0, 2, 3 * GIB) as two:
        assert one.ask("take") == two.ask("take") == "filled"
        assert 6 * GIB <= used(1) - before < 6 * GIB + CONTEXT, "the memory, and one context"
        assert is_named(daemon, 1), "the service keeps the GPU at full clocks"
        assert one.ask("check") == two.ask("check") == "True"
        held = used(1)
        one.process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        wait_until(lambda: daemon.available() == 5 * GIB, 1)
        account_s = time.monotonic() - start
        wait_until(lambda: held - used(1) >= 3 * GIB - SLACK, 30)
        memory_s = time.monotonic() - start
        assert two.ask("check") == "True"
        with Client(daemon, 0, 3, 5 * GIB) as three:
            assert three.ask("take") == "filled"
            assert two.ask("check") == three.ask("check") == "True"
    wait_until(lambda: daemon.available() == 8 * GIB, 1)
    wait_until(lambda: used(1) - before < 2 * SLACK, 30)
    wait_until(lambda: not is_named(daemon, 1), 10)
    record("mtier_killed_client", bank_available_s=round(account_s, 3), memory_free_s=round(memory_s, 3))


def test_memory_is_there_for_the_next_client_at_once(start_service: StartService) -> None:
    """More than half of a GPU's memory, right after its holder was killed: the library waits for the driver."""
    free = gpus.memory_bytes(1)[0]
    size = free * 6 // 10 // GIB * GIB
    daemon = start_service(f"gpu:1:{size}")
    with Client(daemon, 0, 1, size) as one, Client(daemon, 0, 2, size) as two:
        assert one.ask("take") == "filled"
        one.process.send_signal(signal.SIGKILL)
        wait_until(lambda: daemon.available() == size, 1)
        assert two.ask("take") == "filled"
        assert two.ask("check") == "True"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_after_the_service(start_service: StartService, how: signal.Signals) -> None:
    before = used(1)
    daemon = start_service(f"gpu:1:{4 * GIB}")
    with Client(daemon, 0, 5, 2 * GIB) as client:
        assert client.ask("take") == "filled"
        daemon.stop(how)
        assert client.ask("check") == "True"  # what is mapped stays readable
        assert used(1) - before >= 2 * GIB
    wait_until(lambda: used(1) - before < SLACK, 30)


# ---- engines ----


@pytest.mark.gpus(3)
def test_two_engines_share_a_third_gpu_s_bank_and_one_is_killed(start_service: StartService, tmp_path: Path) -> None:
    from tests.mtier.sharing import GPU_OPTIONS, share

    model = tmp_path / "model"
    script = REPOSITORY / "scripts" / "make_tiny_model.py"
    # As the quickstart's on a GPU: a head size that every attention backend has.
    size = ["--layers", "16", "--hidden-size", "1024", "--heads", "16", "--kv-heads", "8", "--head-dim", "128"]
    size += ["--sharpness", "2"]
    subprocess.run([sys.executable, str(script), str(model), *size], check=True)
    daemon = start_service(f"gpu:2:{8 * GIB}")
    environment = client_environment(built(), daemon.socket_path)
    options = ({**GPU_OPTIONS, "base_gpu_id": 0}, {**GPU_OPTIONS, "base_gpu_id": 1})
    result = share(daemon, str(model), options, environment, tmp_path, lambda: used(2), 600)
    record("mtier_sharing", engines="GPU 0 and GPU 1", bank="GPU 2", **result)
