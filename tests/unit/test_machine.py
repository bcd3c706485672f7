"""Facts of memory, from trees of files like the kernel's, and from this machine's own."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sglang_xmem import machine

MIB = 1 << 20
GIB = 1 << 30
NODES = "sys/devices/system/node"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def meminfo(node: int, **kib: int) -> dict[str, str]:
    names = {"Active": "Active(file)", "Inactive": "Inactive(file)"}
    lines = [f"Node {node} {names.get(name, name)}:  {value} kB" for name, value in kib.items()]
    return {f"{NODES}/node{node}/meminfo": "\n".join(lines) + "\n"}


# ---- nodes ----


def test_nodes_are_those_with_memory_that_the_cpuset_allows(tmp_path: Path) -> None:
    for node, total in ((0, 1000), (2, 0), (10, 3000)):
        write(tmp_path, meminfo(node, MemTotal=total))
    write(tmp_path, {f"{NODES}/{name}": "" for name in ("has_cpu", "nodes", "node_x")})
    assert machine.memory_nodes(tmp_path) == (0, 10)
    write(tmp_path, {"proc/self/status": "Name:\tx\nMems_allowed_list:\t0-5,8\n"})
    assert machine.memory_nodes(tmp_path) == (0,)
    assert machine.allowed_nodes(tmp_path) == {0, 1, 2, 3, 4, 5, 8}
    assert machine.memory_nodes(tmp_path / "none such") == ()
    assert machine.node_field(3, "MemFree", tmp_path) == 0


def test_nodes_without_cpus_are_cxl_unless_they_are_a_gpus(tmp_path: Path) -> None:
    for node, cpus in ((0, "0-3,8"), (1, "4-7\n"), (2, "\n"), (3, "")):
        write(tmp_path, {**meminfo(node, MemTotal=1000), f"{NODES}/node{node}/cpulist": cpus})
    write(tmp_path, {"proc/driver/nvidia/gpus/0009:01:00.0/numa_status": "Node:          3\nStatus: online\n"})
    assert machine.cxl_nodes(tmp_path) == (2,)
    assert machine.cpu_nodes(tmp_path) == (0, 1)
    assert machine.node_cpus(0, tmp_path) == {0, 1, 2, 3, 8}


def test_available_memory_of_a_node_counts_active_page_cache(tmp_path: Path) -> None:
    """60 GB free, 330 GB of active and 40 of inactive page cache hold a pool of 200 GB."""
    gb = 10**6  # in units of 1,000 bytes, near enough
    write(
        tmp_path, meminfo(0, MemTotal=500 * gb, MemFree=60 * gb, Active=330 * gb, Inactive=40 * gb, SReclaimable=2 * gb)
    )
    assert machine.node_available_bytes(0, tmp_path) == 432 * gb * 1024
    zones = "Node 0, zone DMA\n  pages free 1\n        low      1000\nNode 0, zone Normal\n        low      2000\n"
    write(tmp_path, {"proc/zoneinfo": zones + "Node 10, zone Normal\n        low      7777\n"})
    low = 3000 * mmap.PAGESIZE
    assert machine.node_available_bytes(0, tmp_path) == 432 * gb * 1024 - 3 * low
    # A node that has less than its watermark has nothing; half of a little cache is the most that is kept of it.
    write(tmp_path, meminfo(10, MemFree=10))
    assert machine.node_available_bytes(10, tmp_path) == 0


def test_the_reserve_is_shared_by_nodes_and_small_on_small_ones(tmp_path: Path) -> None:
    for node, gib in ((0, 400), (1, 400), (2, 8)):
        write(tmp_path, {**meminfo(node, MemTotal=gib << 20), f"{NODES}/node{node}/cpulist": str(node) * (node < 2)})
    assert [machine.node_reserve_bytes(node, tmp_path) / GIB for node in (0, 1, 2)] == [5, 5, 1]


# ---- binding ----


def test_binding_is_the_kernels_answer() -> None:
    nodes = machine.memory_nodes()
    if not nodes or os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("this kernel says nothing of its nodes")
    assert machine.bind_refusal(nodes[:1]) is None
    assert machine.bind_refusal((1000,)) == os.strerror(errno.EINVAL)


#: Answers EPERM to mbind, as Docker's default profile does without CAP_SYS_NICE.
SECCOMP = """
import ctypes, platform, struct
def deny(*numbers):
    libc = ctypes.CDLL(None, use_errno=True)
    program = [(0x20, 0, 0, 0)]  # load the number
    for number in numbers:
        program += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050001)]  # if it is this one: errno 1
    program.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(Filter(len(program), ctypes.addressof(code)))) == 0, ctypes.get_errno()
MBIND = {"x86_64": 237, "aarch64": 235}[platform.machine()]
deny(MBIND)
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_container_that_may_not_bind_is_told_apart() -> None:
    script = SECCOMP + "from sglang_xmem import machine\nprint(machine.bind_refusal((0,)))"
    assert run(script) == os.strerror(errno.EPERM)


# ---- hugepages ----


def test_free_hugepages_are_less_the_promised(tmp_path: Path) -> None:
    whole = "sys/kernel/mm/hugepages/hugepages-2048kB"
    write(tmp_path, {f"{whole}/free_hugepages": "100\n", f"{whole}/resv_hugepages": "30\n"})
    for node, free in ((0, 90), (1, 10)):
        write(tmp_path, {f"{NODES}/node{node}/hugepages/hugepages-2048kB/free_hugepages": f"{free}\n"})
    assert machine.free_hugepage_bytes(2 * MIB, root=tmp_path) == 70 * 2 * MIB
    assert machine.free_hugepage_bytes(2 * MIB, (0,), tmp_path) == 70 * 2 * MIB
    assert machine.free_hugepage_bytes(2 * MIB, (1,), tmp_path) == 10 * 2 * MIB
    assert machine.free_hugepage_bytes(GIB, root=tmp_path) == 0


# ---- cgroups ----

V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,relatime shared:1 - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def test_every_level_of_v2_limits(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    write(tmp_path, {"proc/self/cgroup": "0::/pods/one\n", "proc/self/mountinfo": V2_MOUNT.format(root="/")})
    assert machine.cgroup_headroom_bytes(tmp_path) is None
    stat = "anon 5\nactive_file 100\ninactive_file 50\n"
    own = {"memory.max": "max", "memory.high": "max", "memory.current": "500", "memory.stat": stat}
    write(tmp_path, {f"{base}/pods/one/{name}": text for name, text in own.items()})
    assert machine.cgroup_headroom_bytes(tmp_path) is None
    above = {"memory.max": "1000\n", "memory.current": "700", "memory.stat": stat}
    write(tmp_path, {f"{base}/pods/{name}": text for name, text in above.items()})
    assert machine.cgroup_headroom_bytes(tmp_path) == 1000 - (700 - 150)
    write(tmp_path, {f"{base}/pods/one/memory.high": "400"})
    assert machine.cgroup_headroom_bytes(tmp_path) == 400 - (500 - 150)
    write(tmp_path, {f"{base}/pods/one/memory.max": "100"})
    assert machine.cgroup_headroom_bytes(tmp_path) == 0
    assert machine.host_available_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("membership", "top", "directory"),
    [
        ("/docker/abc", "/", "sys/fs/cgroup/memory/docker/abc"),
        ("/docker/abc", "/docker/abc", "sys/fs/cgroup/memory"),  # the container's own mount
        ("/", "/docker/abc", "sys/fs/cgroup/memory"),  # a cgroup namespace
    ],
)
def test_v1_limits_as_seen_from_inside_and_outside(tmp_path: Path, membership: str, top: str, directory: str) -> None:
    write(tmp_path, {"proc/self/cgroup": f"4:cpu,memory:{membership}\n0::/\n"})
    write(tmp_path, {"proc/self/mountinfo": V1_MOUNT.format(root=top)})
    files = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600"}
    write(tmp_path, {f"{directory}/{name}": text for name, text in files.items()})
    write(tmp_path, {f"{directory}/memory.stat": "active_file 1\ntotal_active_file 100\ntotal_inactive_file 0\n"})
    assert machine.cgroup_headroom_bytes(tmp_path) == 500
    write(tmp_path, {f"{directory}/memory.limit_in_bytes": "9223372036854771712"})
    assert machine.cgroup_headroom_bytes(tmp_path) is None


def test_a_kernel_without_cgroups_limits_nothing(tmp_path: Path) -> None:
    assert machine.cgroup_headroom_bytes(tmp_path) is None
    assert 0 < machine.host_available_bytes(tmp_path) <= psutil.virtual_memory().total


@pytest.fixture
def limited() -> Iterator[Callable[[str], str]]:
    """Runs a program in a child of this process's own cgroup, with a limit of a GiB, where the machine lets a test make
    one; gives what it printed."""
    parents = [directory for directory, version in machine._memory_cgroups(machine.ROOT) if version == 1]
    if not parents or not os.access(parents[0], os.W_OK):
        pytest.skip("no cgroup (v1) can be made here")
    child = parents[0] / f"xmem-test-{os.getpid()}"
    try:
        child.mkdir()
    except OSError:
        pytest.skip("no cgroup can be made here")

    def run_limited(program: str) -> str:
        return run(
            f"import os\nopen({str(child / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            f"{textwrap.dedent(program)}\n"
            f"open({str(parents[0] / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        )

    try:
        (child / "memory.limit_in_bytes").write_text(str(GIB))
        yield run_limited
    finally:
        child.rmdir()


def test_this_processes_limit_is_seen(limited: Callable[[str], str]) -> None:
    said = limited("from sglang_xmem import machine\nprint(machine.host_available_bytes())")
    assert 0.5 * GIB < int(said) <= GIB


def test_memory_beyond_the_limit_is_an_error_with_both_numbers(limited: Callable[[str], str]) -> None:
    """And not SIGKILL: the kernel kills a process that exceeds its cgroup's limit."""
    said = limited("""
        from sglang_xmem.errors import Unavailable
        from sglang_xmem.tiers.base import Ranks
        from sglang_xmem.tiers.dram import DramSettings, DramTier
        settings = DramSettings()
        (plan,) = DramTier.plan_ranks(settings, Ranks(gpus=(None,)))
        tier = DramTier(settings, plan, None)
        tier.allocate(100 << 20).release()
        try:
            tier.allocate(2 << 30)
        except Unavailable as error:
            print(error.reason)
    """)
    assert re.match(r"2\.15 GB are needed, but (0\.\d\d|1\.0\d) GB of host memory are free", said), said


# ---- devices ----


def test_facts_of_a_dax_device(tmp_path: Path) -> None:
    directory = tmp_path / "sys/dev/char/250:3"
    write(tmp_path, {"sys/dev/char/250:3/size": "68719476736\n", "sys/dev/char/250:3/align": "2097152\n"})
    number = os.makedev(250, 3)
    assert machine.dax_device(number, tmp_path) is None, "nothing says that it is a dax"
    (directory / "subsystem").symlink_to("../../../bus/dax")
    assert machine.dax_device(number, tmp_path) == machine.DaxDevice(64 * GIB, 2 * MIB, None)
    write(tmp_path, {"sys/dev/char/250:3/target_node": "2\n"})
    assert machine.dax_device(number, tmp_path) == machine.DaxDevice(64 * GIB, 2 * MIB, 2)
    (directory / "align").unlink()
    assert machine.dax_device(number, tmp_path) is None
    write(tmp_path, {"sys/dev/char/250:3/dax_region/align": "0x40000000\n"})
    assert machine.dax_device(number, tmp_path) == machine.DaxDevice(64 * GIB, GIB, 2)
    assert machine.dax_device(os.makedev(1, 5), tmp_path) is None
    assert machine.dax_device(os.stat("/dev/zero").st_rdev) is None


def test_a_dax_device_that_is_system_memory(tmp_path: Path) -> None:
    write(tmp_path, {"sys/bus/dax/devices/dax1.0/target_node": "3\n"})
    assert machine.dax_as_system_ram("dax1.0", tmp_path) is None
    (tmp_path / "sys/bus/dax/devices/dax1.0/driver").symlink_to("../../drivers/kmem")
    assert machine.dax_as_system_ram("dax1.0", tmp_path) == 3
    assert machine.dax_as_system_ram("dax2.0", tmp_path) is None


def test_bound_memory_can_be_touched() -> None:
    nodes = machine.memory_nodes()
    if not nodes:
        pytest.skip("this kernel says nothing of its nodes")
    with mmap.mmap(-1, 4 * MIB) as memory:
        view = (ctypes.c_uint8 * (4 * MIB)).from_buffer(memory)
        if machine.bind(ctypes.addressof(view), 4 * MIB, nodes) is None:
            ctypes.memset(ctypes.addressof(view), 7, 4 * MIB)
            assert view[4 * MIB - 1] == 7
        del view
