"""The doctor on stand-ins of GPU machines, of sysfs and of SDKs that misbehave, and once on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda.bindings import driver as bindings

from sglang_xmem import cli, gpus, machine
from sglang_xmem.config import parse_options
from sglang_xmem.doctor import bandwidth, child, facts, screen, tiers
from sglang_xmem.doctor.child import Outcome
from sglang_xmem.engines.sglang import host_budget
from sglang_xmem.errors import ConfigError, Unavailable
from sglang_xmem.plan import make_plan
from sglang_xmem.tiers import Ranks
from sglang_xmem.tiers import mtier as mtier_tier
from tests import REPOSITORY
from tests.unit.tiers.test_peer import FAILURE, GRANULARITY, SUCCESS, FakeDriver

GB = 10**9
COPY_BYTES = GRANULARITY


class FakeCuda(FakeDriver):
    """Adds contexts, streams, events and copies: bytes really move, and take the time that the links' rates imply.

    Attributes:
        seen: GPUs on which a context was made or memory allocated.
        corrupt: copies arrive with their first byte wrong.
    """

    CU_MEMHOSTALLOC_PORTABLE = 1
    CUcontext = bindings.CUcontext

    def __init__(self, free: dict[int, int]) -> None:
        super().__init__(free)
        self.seen: set[int] = set()
        self.corrupt = False
        self.context: int | None = None  # the GPU whose context is current
        self.live: dict[int, Any] = {}
        self.objects: set[int] = set()
        self.backing: dict[int, Any] = {}
        self.clock_ms = 0.0

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, Any]:
        status, _ = super().cuDevicePrimaryCtxRetain(device)
        if status == SUCCESS:
            self.seen.add(device)
        return status, device + 1

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any]:
        self.context = int(context) - 1 if int(context) else None
        assert self.context is None or self.context in self.contexts
        return (SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Any]:
        assert self.context is not None
        return (SUCCESS,)

    def _object(self, name: str) -> tuple[Any, int]:
        assert self.context is not None
        if self._fails(name):
            return FAILURE, 0
        number = next(self._numbers)
        self.objects.add(number)
        return SUCCESS, number

    def cuStreamCreate(self, flags: int) -> tuple[Any, int]:
        return self._object("stream")

    def cuEventCreate(self, flags: int) -> tuple[Any, int]:
        return self._object("event")

    def _gone(self, number: int) -> tuple[Any]:
        self.objects.remove(number)
        return (SUCCESS,)

    cuStreamDestroy = cuEventDestroy = _gone

    def _memory(self, name: str, size: int) -> tuple[Any, int]:
        assert self.context is not None
        if self._fails(name):
            return FAILURE, 0
        memory = ctypes.create_string_buffer(size)
        self.live[ctypes.addressof(memory)] = memory
        return SUCCESS, ctypes.addressof(memory)

    def cuMemAlloc(self, size: int) -> tuple[Any, int]:
        return self._memory("alloc", size)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, int]:
        return self._memory("pin", size)

    def _free(self, address: int) -> tuple[Any]:
        del self.live[address]
        return (SUCCESS,)

    cuMemFree = cuMemFreeHost = _free

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[Any, Any]:
        self.seen.add(prop.location.id)
        return super().cuMemCreate(size, prop, flags)

    def _peer_of(self, address: int) -> int | None:
        return next((block.gpu for at, block in self.mapped.items() if at <= address < at + block.size), None)

    def _real(self, address: int) -> int:
        """Memory of this process behind an address of the driver's."""
        for base, size in self.ranges.items():
            if base <= address < base + size:
                assert self.readers[base][1] == self.context, "this GPU has no access there"
                backing = self.backing.setdefault(base, ctypes.create_string_buffer(size))
                return ctypes.addressof(backing) + address - base
        assert any(at <= address < at + len(memory) for at, memory in self.live.items()), "freed or never allocated"
        return address

    def cuMemcpyAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        assert stream in self.objects
        if self._fails("copy"):
            return (FAILURE,)
        ctypes.memmove(self._real(target), self._real(source), size)
        if self.corrupt:
            ctypes.memset(self._real(target), ctypes.string_at(self._real(target), 1)[0] ^ 1, 1)
        peer = self._peer_of(source)
        peer = self._peer_of(target) if peer is None else peer
        gbps = 50.0 if peer is None else 100.0 + 10 * self.context + peer if self.context is not None else 0
        self.clock_ms += size / gbps / 1e6
        return (SUCCESS,)

    def cuMemcpyHtoD(self, target: int, source: int, size: int) -> tuple[Any]:
        ctypes.memmove(self._real(target), source, size)
        return (SUCCESS,)

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[Any]:
        ctypes.memmove(target, self._real(source), size)
        return (SUCCESS,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any]:
        self.backing[-event] = self.clock_ms
        return (SUCCESS,)

    def cuEventSynchronize(self, event: int) -> tuple[Any]:
        return (SUCCESS,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        return SUCCESS, self.backing[-end] - self.backing[-start]


class GpuMachine:
    """`busy`: who uses a GPU; `apart`: pairs without peer access."""

    def __init__(self, count: int) -> None:
        self.start = dict.fromkeys(range(count), 100 * GB)
        self.cuda = FakeCuda(dict(self.start))
        self.busy: dict[int, str] = {}
        self.apart: set[tuple[int, int]] = set()
        self.available = 500 * GB

    def check_untouched(self) -> None:
        cuda = self.cuda
        assert (cuda.context, cuda.contexts, cuda.live, cuda.objects) == (None, [], {}, set())
        assert (cuda.ranges, cuda.mapped, cuda.handles, cuda.free) == ({}, {}, {}, self.start)


def in_process(task: str, arguments: dict[str, Any], limit_s: float, *, total: bool = False) -> Outcome:
    """`run_task` without the process: what is patched here holds in it."""
    module, function = child.TASKS[task]
    arguments = json.loads(json.dumps(arguments))
    return Outcome(list(getattr(importlib.import_module(module), function)(**arguments)), None)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    return make_machine(monkeypatch, 2)


def make_machine(monkeypatch: pytest.MonkeyPatch, count: int) -> GpuMachine:
    machine = GpuMachine(count)
    for name, value in {
        "driver": lambda: machine.cuda,
        "visible_gpus": lambda: range(count),
        "foreign_use": machine.busy.get,
        "can_access_peer": lambda gpu, peer: (gpu, peer) not in machine.apart,
        "memory_bytes": lambda gpu: (machine.cuda.free[gpu], 5),
        "name": lambda gpu: "NVIDIA H200",
        "total_bytes": lambda gpu: 150 * GB,
        "numa_node": lambda gpu: None,
        "processes": lambda gpu: {os.getpid(): 61 * GB, 2**22 + 1: None} if gpu in machine.busy else {},
        "driver_versions": lambda: ("580.65.06", "13.0"),
    }.items():
        monkeypatch.setattr(gpus, name, value)
    monkeypatch.setattr(bindings, "cuGetErrorString", lambda status: (SUCCESS, b"out of memory"))
    monkeypatch.setattr(bandwidth, "COPY_BYTES", COPY_BYTES)
    for module in (bandwidth, tiers):
        monkeypatch.setattr(module, "run_task", in_process)
    monkeypatch.setattr(tiers, "launcher_host_budget", lambda n: lambda nbytes: (machine.available - (10 << 30)) // n)
    monkeypatch.setattr(tiers, "fallback_host_budget", tiers.launcher_host_budget)
    for name in ("memory_nodes", "cpu_nodes"):
        monkeypatch.setattr(facts.machine, name, lambda *_: (0,))
    monkeypatch.setattr(facts.machine, "host_available_bytes", lambda *_: machine.available)
    return machine


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["doctor", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def rows() -> dict[tuple[int, int | None], dict[str, Any]]:
    return {(row["gpu"], row["peer"]): row for row in bandwidth.measure(time.monotonic() + 60)}


# ---- bandwidth ----


def test_every_link_is_measured_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make_machine(monkeypatch, 3)
    machine.apart = {(2, 0)}
    found = rows()
    assert set(found) == {(0, None), (0, 1), (0, 2), (1, None), (1, 0), (1, 2), (2, None), (2, 1)}
    assert found[(1, None)] == {"gpu": 1, "peer": None, "read_gbps": 50.0, "write_gbps": 50.0}
    assert found[(2, 1)] == {"gpu": 2, "peer": 1, "read_gbps": 121.0, "write_gbps": 121.0}
    machine.check_untouched()


def test_busy_gpus_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make_machine(monkeypatch, 3)
    machine.busy[1] = "GPU 1 is in use by process 7"
    found = rows()
    assert machine.cuda.seen == {0, 2}
    measured = {link for link, row in found.items() if "read_gbps" in row}
    assert measured == {(0, None), (0, 2), (2, None), (2, 0)}
    assert {row["not_measured"] for link, row in found.items() if link not in measured} == {machine.busy[1]}
    machine.check_untouched()


def test_nothing_is_begun_when_the_time_is_up(two: GpuMachine) -> None:
    found = list(bandwidth.measure(time.monotonic() - 1))
    assert len(found) == 4
    assert {row["not_measured"] for row in found} == {bandwidth.NO_TIME}
    assert two.cuda.calls == []


def test_a_link_that_spoils_bytes_gives_no_rate(two: GpuMachine) -> None:
    two.cuda.corrupt = True
    assert all("a copy changed bytes" in row["not_measured"] for row in rows().values())
    two.check_untouched()


def test_every_failing_call_is_a_reason_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_machine(monkeypatch, 2)
    rows()
    calls = len(gpus.driver().calls)
    for number in range(calls):
        machine = make_machine(monkeypatch, 2)
        machine.cuda.fail_at = number
        found = rows()
        assert len(found) == 4
        # A call of what follows may not come to pass: releases are counted with what acquires.
        for row in found.values():
            assert row.get("read_gbps") or "out of memory" in row["not_measured"]
        machine.check_untouched()


def test_memory_is_pinned_from_cpus_near_the_gpu(two: GpuMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/sys/devices/system/node/node0/cpulist").exists():
        pytest.skip("this kernel reports no NUMA node")
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(gpus, "numa_node", lambda gpu: 0)
    with bandwidth._cpus_near(0):
        assert os.sched_getaffinity(0) <= before
    assert os.sched_getaffinity(0) == before


# ---- the kernel's files ----


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_numa_nodes(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node"
    write_files(
        tmp_path,
        {
            f"{nodes}/node0/meminfo": "Node 0 MemTotal:  2000 kB\nNode 0 MemFree:  1000 kB\nNode 0 Other: 0\n",
            f"{nodes}/node0/hugepages/hugepages-1048576kB/nr_hugepages": "4\n",
            f"{nodes}/node0/hugepages/hugepages-1048576kB/free_hugepages": "3\n",
            f"{nodes}/node0/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
            f"{nodes}/node0/hugepages/hugepages-2048kB/free_hugepages": "0\n",
            f"{nodes}/node0/cpulist": "0-3\n",
            f"{nodes}/node2/meminfo": "Node 2 MemTotal:  4000 kB\nNode 2 MemFree:  3000 kB\n",
            f"{nodes}/node2/cpulist": "\n",
            f"{nodes}/node10/meminfo": "nonsense",
            f"{nodes}/online": "0,10\n",
        },
    )
    assert facts.numa_nodes(tmp_path) == [
        {
            "node": 0,
            "total_bytes": 2048000,
            "free_bytes": 1024000,
            "hugepages": [
                {"page_bytes": 2 << 20, "total": 0, "free": 0},
                {"page_bytes": 1 << 30, "total": 4, "free": 3},
            ],
            "cxl": False,
        },
        {"node": 2, "total_bytes": 4096000, "free_bytes": 3072000, "hugepages": [], "cxl": True},
        {"node": 10, "total_bytes": None, "free_bytes": None, "hugepages": [], "cxl": False},
    ]
    assert facts.numa_nodes(tmp_path / "none") == []


def test_devdax(tmp_path: Path) -> None:
    devices = "sys/bus/dax/devices"
    write_files(
        tmp_path,
        {
            f"{devices}/dax0.0/size": "274877906944\n",
            f"{devices}/dax0.0/target_node": "2\n",
            f"{devices}/dax1.0/size": "2097152\n",
            "dev/dax0.0": "",
            "dev/dax9.0": "",
            "dev/null": "",
        },
    )
    found = {device["device"]: device for device in facts.devdax(tmp_path)}
    assert list(found) == ["/dev/dax0.0", "/dev/dax1.0", "/dev/dax9.0"]
    assert found["/dev/dax0.0"] == {"device": "/dev/dax0.0", "size_bytes": 256 << 30, "target_node": 2, "reason": None}
    assert "no device node in /dev" in found["/dev/dax1.0"]["reason"]
    assert found["/dev/dax9.0"]["size_bytes"] is None
    assert facts.devdax(tmp_path / "none") == []


# ---- what is installed ----


def test_plugin_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(name="sglang_xmem")]
    monkeypatch.setattr(facts.importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    assert facts.plugin_problem("0.5.23") is None
    assert "not installed" in str(facts.plugin_problem(None))
    assert "SGLang 0.4 is installed" in str(facts.plugin_problem("0.4"))
    monkeypatch.setenv("SGLANG_PLUGINS", "other, sglang_xmem")
    assert facts.plugin_problem("0.5.23") is None
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "SGLANG_PLUGINS is 'other'" in str(facts.plugin_problem("0.5.23"))
    points.clear()
    assert "not installed as a plugin" in str(facts.plugin_problem("0.5.23"))


def test_processes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def refused(handle: Any) -> Any:
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=7, usedGpuMemory=None)],
        nvmlDeviceGetGraphicsRunningProcesses=refused,
    )
    monkeypatch.setattr(gpus, "nvml_library", lambda: nvml)
    monkeypatch.setattr(gpus, "nvml_handle", lambda gpu: gpu)
    assert gpus.processes(0) == {7: None}
    assert gpus.foreign_use(0) == "GPU 0 is in use by process 7"


def test_a_gpu_that_cannot_be_asked_is_a_line(two: GpuMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gpu: int) -> tuple[int, int]:
        raise RuntimeError("GPU is lost")

    monkeypatch.setattr(gpus, "memory_bytes", broken)
    found, reason = facts.gpu_list()
    assert reason is None
    assert [gpu["reason"] for gpu in found] == ["RuntimeError: GPU is lost"] * 2
    assert [gpu["name"] for gpu in found] == ["NVIDIA H200"] * 2


# ---- the verdict ----


class FakeSdk:
    """X-Mem's SDK with one bank."""

    class MTierError(Exception):
        pass

    def __init__(self, room: int) -> None:
        self.room = room

    def get_status(self) -> Any:
        return SimpleNamespace(num_banks=1)

    def get_bank_status(self, bank: int) -> Any:
        return SimpleNamespace(total_memory=self.room, available_memory=self.room)


@pytest.mark.parametrize(
    ("size_gb", "bank_gb", "chosen"),
    [(50, 60, "mtier"), (50, 40, "peer"), (90, None, "peer"), (200, None, "dram"), (600, 40, None)],
)
def test_verdict(
    two: GpuMachine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size_gb: int,
    bank_gb: int | None,
    chosen: str | None,
) -> None:
    if bank_gb is not None:
        monkeypatch.setattr(mtier_tier, "_sdk", lambda: FakeSdk(bank_gb * GB))
    status, found = doctor(capsys, "--hicache-size", str(size_gb), "--no-bandwidth")
    verdict = found["tiers"]
    assert status == (0 if chosen else 1)
    assert verdict["takes"] == chosen
    assert [line["tier"] for line in verdict["found"]] == ["mtier", "peer", "bank", "dram"]
    assert two.cuda.calls == [], "--no-bandwidth touches no GPU"

    def planned() -> Any:
        budget = tiers.launcher_host_budget(1)
        return make_plan(parse_options("auto", None), Ranks(gpus=(0,)), size_gb * GB, budget)

    if status == 1:
        with pytest.raises(ConfigError) as caught:
            planned()
        words = str(caught.value)
        assert all(line["reason"] in words for line in verdict["found"]), words
    else:
        plan = planned()
        assert plan.candidates[0].tier == chosen
        reasons = [(line["tier"], line["reason"]) for line in verdict["found"] if line["reason"] is not None]
        assert [(skipped.tier, skipped.words()) for skipped in plan.skipped] == reasons


def test_words_of_the_verdict(two: GpuMachine, capsys: pytest.CaptureFixture[str]) -> None:
    def last_line(*arguments: str) -> str:
        cli.main(["doctor", "--no-bandwidth", *arguments])
        return capsys.readouterr().out.splitlines()[-1].strip()

    assert last_line("--hicache-size", "200") == (
        "auto uses dram for --hicache-size 200: the only tier that can hold it, 489.26 GB free for each rank; skipped: "
        "mtier, peer, bank (reasons above)."
    )
    assert last_line().startswith("auto uses peer: the fastest tier that can hold it, 98.93 GB free for each rank;")
    assert last_line("--hicache-size", "999") == "auto finds no tier for --hicache-size 999: see the reasons above."
    peer = last_line("--hicache-size", "200", "--hicache-xmem-tier", "peer")
    assert peer.startswith("peer is unavailable for --hicache-size 200: ")
    assert last_line("--hicache-xmem-tier", "dram") == "dram can be used: 489.26 GB free for each rank."


def test_ranks_follow_the_servers_flags(two: GpuMachine, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = doctor(capsys, "--base-gpu-id", "1", "--no-bandwidth")
    assert found["tiers"]["gpus"] == [1]
    _, found = doctor(capsys, "--tp-size", "2", "--no-bandwidth")
    assert found["tiers"]["gpus"] == [0, 1]
    assert "need a peer each" in found["tiers"]["found"][1]["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base-gpu-id", "1", "--tp-size", "2"], "needs GPUs 1 to 2"),
        (["--tp-size", "0"], "--tp-size is 0"),
        (["--hicache-size", "-1"], "GB per rank; 0 = any size), got -1"),
        (["--hicache-size", "nan"], "GB per rank; 0 = any size), got nan"),
        (["--hicache-xmem-tier", "nvme"], "is 'nvme'. Give one of auto, mtier, peer, bank, dram, dax"),
        (["--hicache-xmem-config", "{"], "is not JSON"),
        (["--hicache-xmem-config", '{"peer": {"gpus": [5]}}'], "names GPU 5"),
    ],
)
def test_wrong_options_are_one_sentence(
    two: GpuMachine, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["doctor", "--no-bandwidth", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_host_budget_is_sglangs() -> None:
    base = pytest.importorskip("sglang.srt.mem_cache.pool_host.base")
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES == host_budget.HOST_RESERVE_BYTES
    from sglang.srt.mem_cache.host_memory import available_host_memory_bytes

    assert abs(host_budget._available_host_memory_bytes()() - available_host_memory_bytes()) < GB
    alone = host_budget._from_file()
    assert alone is not available_host_memory_bytes
    assert abs(alone() - available_host_memory_bytes()) < GB


def test_a_given_size_does_not_need_the_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang continues too; an error would also affect tiers that are not host memory."""
    module = pytest.importorskip("sglang.srt.mem_cache.host_memory")

    def unknown(*_: Any) -> int:
        raise RuntimeError("Cannot locate the process memory cgroup")

    monkeypatch.setattr(module, "_cgroup_memory_headroom", unknown)
    with pytest.raises(RuntimeError):
        module.available_host_memory_bytes()
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=(10 << 30) + 8 * GB))
    assert host_budget.launcher_host_budget(2)(GB) == 4 * GB


def test_fallback_budget_leaves_what_sglang_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within limits of cgroups, which `machine` knows without SGLang."""
    monkeypatch.setattr(machine, "host_available_bytes", lambda: (10 << 30) + 8 * GB)
    assert tiers.fallback_host_budget(2)(GB) == 4 * GB


# ---- child processes ----


def fake_sdk_that(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str) -> None:
    """A package `xmem` for child processes, whose SDK runs `body` as it is imported."""
    write_files(directory, {"xmem/__init__.py": "", "xmem/mtier_sdk.py": textwrap.dedent(body)})
    path = os.pathsep.join([str(directory), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.fixture
def cpu_machine() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("the children would find this machine's GPUs")


def test_an_sdk_that_hangs_is_a_line(cpu_machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sdk_that(monkeypatch, tmp_path, "import time\ntime.sleep(600)")
    monkeypatch.setattr(tiers, "LIMIT_S", 6.0)
    verdict, banks = tiers.verdict("auto", None, [None], 1)
    assert banks == {"banks": None, "reason": "it did not respond within 6 s"}
    assert verdict["stuck"] == ["mtier"]
    assert verdict["found"][0]["reason"] == "it did not respond within 6 s"
    assert "needs GPUs" in verdict["found"][1]["reason"]
    assert [line["tier"] for line in verdict["found"][2:]] == ["bank", "dram"]
    assert "A server queries mtier too" in str(screen.verdict(verdict))


def test_an_sdk_that_prints_and_crashes_is_a_line(
    cpu_machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
        import os, sys
        os.write(1, b"{}\\n")
        print("X-Mem!", file=sys.stderr, flush=True)
        os.abort()
    """
    fake_sdk_that(monkeypatch, tmp_path, body)
    verdict, banks = tiers.verdict("dram", None, [None], 1)
    assert banks["reason"] == "its process ended with SIGABRT: X-Mem!"
    assert (verdict["stuck"], [line["tier"] for line in verdict["found"]]) == ([], ["dram"])
    assert capfd.readouterr().out == ""


def test_an_error_of_another_kind_is_a_line_and_the_next_tier_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run_task(task: str, arguments: dict[str, Any], limit_s: float) -> Outcome:
        asked.append(arguments["steps"])
        lines: dict[str, dict[str, Any]] = {
            "banks": {"banks": []},
            "mtier": {"tier": "mtier", "room_bytes": 5, "reason": None},
            "bank": {"tier": "bank", "room_bytes": 5, "reason": None},
            "dram": {"tier": "dram", "room_bytes": 6, "reason": None},
        }
        answered: list[dict[str, Any]] = []
        for step in arguments["steps"]:
            if step == "peer":
                return Outcome(answered, "RuntimeError: no cgroup")
            answered.append(lines[step])
        return Outcome(answered, None)

    monkeypatch.setattr(tiers, "run_task", run_task)
    verdict, banks = tiers.verdict("auto", None, [None], 1)
    assert banks == {"banks": []}
    assert asked == [["banks", "mtier", "peer", "bank", "dram"], ["bank", "dram"]]
    assert [line["reason"] for line in verdict["found"]] == [None, "RuntimeError: no cgroup", None, None]
    assert (verdict["takes"], verdict["stuck"]) == ("mtier", ["peer"])


def test_a_slow_start_is_not_taken_for_a_tier_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A busy machine imports slowly; the limit is for what is asked."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(3)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    arguments = {"steps": ["peer", "dram"], "config": None, "engine": [None], "pool_bytes": None}
    outcome = child.run_task("tiers", arguments, 2.0)
    assert outcome.problem is None
    assert [line["tier"] for line in outcome.lines] == ["peer", "dram"]
    assert child.run_task("tiers", arguments, 2.0, total=True).problem == "it did not respond within 2 s"


def test_wrong_settings_are_told_by_the_child() -> None:
    arguments = {"steps": ["dram"], "config": '{"dram": {"threads": -1}}', "engine": [None], "pool_bytes": None}
    with pytest.raises(ConfigError, match=r"dram\.threads"):
        child.run_task("tiers", arguments, 30)


def test_a_measurement_that_is_stopped_keeps_what_it_has(two: GpuMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    done = [{"gpu": 0, "peer": None, "read_gbps": 55.0, "write_gbps": 54.0}]
    monkeypatch.setattr(bandwidth, "run_task", lambda *_, **__: Outcome(done, "it did not respond within 9.5 s"))
    arguments = cli.parser().parse_args(["doctor"])
    from sglang_xmem.doctor import examine

    found = examine(arguments)
    first, second = found["gpus"]["list"]
    assert (first["read_gbps"], first["not_measured"]) == (55.0, None)
    assert (second["read_gbps"], second["not_measured"]) == (None, "it did not respond within 9.5 s")


# ---- all of it ----


def paths(value: Any, prefix: str = "") -> set[str]:
    """Keys of a JSON value as docs/doctor.md writes them."""
    if isinstance(value, dict):
        return set().union(*(paths(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(inner, f"{prefix}[]") for inner in value))
    return {prefix}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GpuMachine:
    """Three GPUs, one of them busy, with devdax, hugepages and X-Mem."""
    machine = make_machine(monkeypatch, 3)
    machine.busy[1] = "GPU 1 is in use by process 7"
    machine.apart = {(2, 0)}
    monkeypatch.setattr(gpus, "numa_node", lambda gpu: 0)
    monkeypatch.setattr(mtier_tier, "_sdk", lambda: FakeSdk(40 * GB))
    write_files(
        tmp_path,
        {
            "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal: 2000 kB\nNode 0 MemFree: 1000 kB\n",
            "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages": "8\n",
            "sys/devices/system/node/node0/hugepages/hugepages-2048kB/free_hugepages": "6\n",
            "sys/bus/dax/devices/dax0.0/size": "64000000000\n",
        },
    )
    for name in ("numa_nodes", "devdax"):
        original = getattr(facts, name)
        monkeypatch.setattr(facts, name, lambda original=original: original(tmp_path))
    return machine


def test_json_has_the_documented_keys(full: GpuMachine, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = doctor(capsys, "--hicache-size", "90")
    assert status == 0
    text = (REPOSITORY / "docs" / "doctor.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]+) \|", text, flags=re.MULTILINE)
    documented = {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}
    names = {f"versions.{name}" for name in found["versions"]}
    assert names == {f"versions.{name}" for name in ("python", "sglang_xmem", *facts.PACKAGES)}
    leaves = paths(found)
    # A list may be empty in one element and full in another.
    leaves -= {leaf for leaf in leaves if any(other.startswith(f"{leaf}[]") for other in leaves)}
    assert leaves - names == documented - {"versions.NAME"}
    assert found["gpus"]["list"][0]["read_gbps"] == 50.0
    assert found["gpus"]["list"][1]["not_measured"] == full.busy[1]
    access = {(row["gpu"], row["peer"]): row for row in found["peers"]}
    assert access[(2, 0)]["access"] is False
    assert access[(2, 0)]["not_measured"] == "no peer access"
    assert access[(0, 2)]["read_gbps"] == 102.0
    assert found["numa_nodes"][0]["gpus"] == [0, 1, 2]
    full.check_untouched()


def test_screen(full: GpuMachine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--hicache-size", "90"]) == 0
    out = capsys.readouterr().out
    print(out)
    assert len(out.splitlines()) <= 45, "one screen"
    lines = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    assert lines["GPU 0"][2:] == ["-", "?", "102.0"]
    assert lines["GPU 2"][2:] == ["no", "?", "-"]
    for words in (
        "Peer access (GB/s at which the row's GPU reads the column's memory)\n",
        "NVIDIA driver 580.65.06 (CUDA 13.0)",
        "?: GPU 1 not measured: GPU 1 is in use by process 7",
        "6 of 8 x 2 MiB",
        "/dev/dax0.0 64.00 GB (no device node",
        "bank 0: 40.00 of 40.00",
        "auto uses peer for --hicache-size 90",
    ):
        assert words in out
    assert "61.00" in out  # GB of the process on GPU 1


def test_screen_of_a_machine_without_gpus(cpu_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fact once, decimal units alone, and tables of 80 columns in a pipe."""
    monkeypatch.setattr(facts.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["doctor"])
    text = out.getvalue()
    assert text.count("no NVIDIA driver") == 1
    assert "locked-memory limit 8.39 MB\n" in text
    assert "GiB" not in text.replace("10 GiB", "")
    assert "use --hicache-xmem-tier dram" not in text
    table = text[text.index("Tiers for") :].splitlines()[1:-1]
    assert max(map(len, table)) <= 80


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "sglang_xmem.cli", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


def documented_commands() -> list[str]:
    files = (REPOSITORY / "README.md", REPOSITORY / "docs" / "doctor.md")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return sorted(set(re.findall(r"^sglang-xmem (doctor .+)$", text, flags=re.MULTILINE)))


def test_documented_commands_run_here() -> None:
    commands = documented_commands()
    assert len(commands) >= 2
    for command in commands:
        done = run_command(*shlex.split(command), *(["--no-bandwidth"] if Path("/dev/nvidiactl").exists() else []))
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
        if "--json" in command:
            found = json.loads(done.stdout)
            assert found["tiers"]["pool_bytes"] == 60 * GB
            assert done.returncode == (1 if found["tiers"]["takes"] is None else 0)
        else:
            assert done.stdout.splitlines()[-1].startswith("auto ")
            assert "Traceback" not in done.stdout


def test_child_and_driver_errors_have_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise Unavailable("this machine has no NVIDIA driver")

    monkeypatch.setattr(gpus, "visible_gpus", missing)
    monkeypatch.setattr(gpus, "driver_versions", missing)
    assert facts.gpu_list() == ([], "this machine has no NVIDIA driver")
    assert facts.driver() == {"version": None, "cuda": None, "reason": "this machine has no NVIDIA driver"}
    assert tiers.engine_gpus(2, 0) == [None, None]
