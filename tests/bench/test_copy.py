"""`sglang-xmem bench copy`: on the CPU as it is, and what it does on a GPU over a pretended one with exact clocks."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_xmem import cli, gpus
from sglang_xmem.bench import copy, copy_jobs, copy_measure, copy_memory
from sglang_xmem.config import Options, parse_options
from sglang_xmem.copies import PageCopier
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import Locality, default_tuning
from sglang_xmem.errors import CopyError, TierUnavailable
from sglang_xmem.tiers import Region
from sglang_xmem.tiers.peer import PeerTier

Rows = list[dict[str, Any]]
RunCopy = Callable[..., tuple[int, Rows]]

no_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")


@pytest.fixture
def run_copy(tmp_path: Path) -> RunCopy:
    """Run `sglang-xmem bench copy`: exit status and the rows of its output file."""

    def run(*arguments: str) -> tuple[int, Rows]:
        output = tmp_path / "copy.jsonl"
        status = cli.main(["bench", "copy", *arguments, "--output", str(output)])
        return status, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []

    return run


@no_gpu
def test_host_copies_without_a_gpu(run_copy: RunCopy, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, rows = run_copy("--quick")
    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith("No GPU on this machine: host copies")
    assert "Page copies, cpu" in out
    assert {(row["path"], row["device"], row["verified"], row["target"]) for row in rows} == {
        (path, "cpu", True, None) for path in ("host_load", "host_store")
    }
    for row in rows:
        assert "runs_on" not in row
        assert {"bench", "run", "page_bytes", "pages", "ctas", "gbps", "contiguous_gbps", "ratio"} <= set(row)
        assert row["ratio"] == pytest.approx(row["gbps"] / row["contiguous_gbps"], rel=0.3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "copy.jsonl",
        "copy.runs.jsonl",
        "copy.csv",
        "copy.png",
        "copy.svg",
    }
    status, again = run_copy("--quick", "--resume", "--no-plots")
    assert (status, again) == (0, rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--paths", "peer"), "--paths peer: choose from peer_load"),
        (("--paths", ","), "--paths is empty"),
        (("--cases", "6"), "choose from 0 to 5"),
        (("--cases", "one"), "not a list of numbers"),
        (("--ctas", "-1"), "not a list of numbers"),
        (("--relays", "one"), "--relays one is not a list of numbers"),
        (("--repetitions", "0"), "give at least 1"),
        (("--memory", "cxl"), "choose from asleep, tier, context"),
        (("--copies-on", "host"), "choose from rank, peer"),
        (("--copies-on", "peer", "--memory", "tier,asleep"), "leave --memory out"),
        (("--tunings", "{}"), "not a JSON list"),
        (("--tunings", "[{"), "not a JSON list"),
        (("--tunings", '[{"blocks": 1}]'), "known keys: variant, ctas"),
        (("--tunings", '[{"threads": 33}]'), "out of range"),
        (("--tune", "--tunings", "[{}]"), "leave --tunings out"),
        (("--tune", "--ctas", "0"), "says nothing to --tune"),
        pytest.param(("--tune",), "--tune needs a GPU", marks=no_gpu),
        pytest.param(("--paths", "peer_load"), "nothing to measure without a GPU", marks=no_gpu),
    ],
)
def test_refused(
    run_copy: RunCopy, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert run_copy(*arguments) == (2, [])
    err = capsys.readouterr().err.strip()
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert err.endswith(".")


class Stream:
    """What a stream has done so far, in ms."""

    def __init__(self, clock: float) -> None:
        self.clock = clock

    def record(self, stream: Stream) -> None: ...


class FakeGpu(copy_measure.Cpu):
    """Streams that run at once on clocks of their own; a copy is done when it is enqueued, and takes what it would."""

    is_gpu = True
    name = "fake GPU"
    link_gbps = 400.0
    #: The peer as far as it copies for this GPU, and whether it turns out that it cannot.
    copying_gpu: int | None = 1
    refuses_peer = False
    engine_forgets = False

    def __init__(self) -> None:
        self.relays: set[tuple[int, ...]] = set()
        self.streams = [Stream(0.0)]
        self.current = self.streams[0]

    def stream(self, priority: int = 0) -> Any:
        self.streams.append(Stream(self.streams[0].clock))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def mark(self) -> Any:
        return self.current.clock

    def wait(self, mark: Any) -> None:
        self.current.clock = max(self.current.clock, mark)

    def ms(self, start: Any, end: Any) -> float:
        return float(end - start)

    def events(self, count: int) -> list[Any]:
        return [Stream(0.0) for _ in range(count)]

    def hold(self, ms: float) -> None:
        self.current.clock += ms

    def synchronize(self) -> None:
        now = max(stream.clock for stream in self.streams)
        for stream in self.streams:
            stream.clock = now

    def memcpy(self, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        super().memcpy(target, source, nbytes)
        self.hold(nbytes / self.link_gbps / 1e6)

    def copying_pages(self, targets: list[int], sources: list[int], nbytes: int) -> Callable[[], None]:
        if self.engine_forgets:
            targets, sources = targets[1:], sources[1:]
        copy = super().copying_pages(targets, sources, nbytes)

        def call() -> None:
            copy()
            self.hold(len(targets) * nbytes / 0.5 / self.link_gbps / 1e6)

        return call

    def room(self) -> int:
        return 2_000_000


class FakeCopier(TorchPageCopier):
    """Each thread block moves 40 GB/s, up to 97.5 % of the link, a peer's up to 98.5 %; `broken` gives it a fault."""

    name = "cuda"
    machine: FakeGpu
    broken = ""
    runs_on: int | None = None

    def settings(self, name: str, load: dict[str, Any], store: dict[str, Any], runs_on: int | None) -> None:
        self.runs_on = runs_on
        locality: Locality = "device" if runs_on is None else "copier"
        if name == "cuda":
            self.load_tuning = dataclasses.replace(default_tuning("load", locality, self.page_bytes), **load)
            self.store_tuning = dataclasses.replace(default_tuning("store", locality, self.page_bytes), **store)

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        ctas = self.load_tuning.ctas if hasattr(self, "load_tuning") else 32
        most = 390.0 if self.runs_on is None else 394.0
        self.machine.hold(len(planes) * tier_rows.numel() * self.page_bytes / min(40.0 * ctas, most) / 1e6)
        if self.broken == "in order" and _follow(tier_rows):
            return
        if self.broken == "raises" and not load:
            raise RuntimeError("an illegal\nmemory access")
        if self.broken == "direction":
            load = not load
        if self.broken == "page":
            tier_rows, device_rows = tier_rows[1:], device_rows[1:]
        if self.broken == "plane":
            planes = planes[:-1]
        super()._copy(tier_rows, device_rows, planes, load=load)


class FakeStaged:
    """Loads by the copy engine through a ring; `forgets` leaves out a page."""

    forgets = False

    ring_bytes = 7 << 20

    def __init__(self, direct: FakeCopier) -> None:
        self.direct, self.staged_loads = direct, 0

    def make_signals(self, num_parts: int) -> Any:
        return num_parts

    def load_signalling(
        self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, parts: int, on_cpu: torch.Tensor
    ) -> None:
        assert torch.equal(tier_rows, on_cpu)
        assert len(planes) == 2 * parts
        self.staged_loads += 1
        first = 1 if self.forgets else 0
        TorchPageCopier._copy(self.direct, tier_rows[first:], device_rows[first:], planes, load=True)
        self.direct.machine.hold(len(planes) * tier_rows.numel() * self.direct.page_bytes / 398 / 1e6)


def _follow(rows: torch.Tensor) -> bool:
    return bool((rows.diff() == rows[1] - rows[0]).all())


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Have the benchmark find a GPU and a peer."""
    machine = FakeGpu()

    def make(name: str, tier: Sequence[Any], device: Sequence[Any], page_size: int, **how: Any) -> PageCopier:
        copier = FakeCopier(tier, device, page_size)
        machine.relays.add(how["relays"])
        runs_on = how.get("runs_on")
        if runs_on is not None and machine.refuses_peer:
            raise CopyError("GPU 1 cannot reach memory that cuda:0 has mapped for itself.")
        copier.settings(name, how["load"], how["store"], runs_on)
        return copier

    def allocate(
        tier: str, memory: str, gpu: int | None, peer: int | None, nbytes: int, relays: tuple[int, ...]
    ) -> Region:
        assert gpu == 0
        assert peer == 1 or (tier, memory) == ("host", "tier")
        copying = machine.copying_gpu if (tier, memory) == ("peer", "tier") else None
        relaying = relays if (tier, memory) == ("host", "relayed") else ()
        return Region(0, nbytes, "fake", lambda: None, bytearray(nbytes), copying_gpu=copying, relays=relaying)

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        beside = any(stream.clock > machine.current.clock + 1e-9 for stream in machine.streams)
        machine.hold(0.0206 if beside else 0.02)

    monkeypatch.setattr(FakeCopier, "machine", machine, raising=False)
    monkeypatch.setattr(copy_measure, "make_copier", make)
    monkeypatch.setattr(copy_measure, "staged", FakeStaged)
    monkeypatch.setattr(copy_memory, "allocate", allocate)
    monkeypatch.setattr(copy, "find_machine", lambda gpu: machine)
    monkeypatch.setattr(copy, "find_peer", lambda gpu, peer: 1)
    monkeypatch.setattr(gpus, "memory_bytes", lambda gpu: (1 << 40, 0))
    monkeypatch.setattr(gpus, "sm_clock_mhz", lambda gpu: 345 if gpu == 1 else None)
    monkeypatch.setattr(torch, "matmul", product)
    for name, value in (("MATMUL_SIDE", 32), ("MATMUL_CALLS", 4), ("ENQUEUE_REPETITIONS", 1)):
        monkeypatch.setattr(copy_measure, name, value)
    monkeypatch.setattr(copy_jobs, "QUICK_BYTES", 1e6)
    return machine


def test_gpu_run(run_copy: RunCopy, fake_gpu: FakeGpu, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, rows = run_copy("--repetitions", "2")
    assert status == 0
    assert all(row["verified"] and row["complete"] and row["device"] == "fake GPU" for row in rows)
    found = {(row["path"], row["case"], row["tuning"], row["memory"]): row for row in rows}
    assert len(found) == len(rows)
    main = copy_jobs.CASES[0].label
    rank = found["peer_load", main, "rank", "tier"]
    assert (rank["gbps"], rank["contiguous_gbps"], rank["ratio"]) == (320.0, 400.0, 0.8)
    assert (rank["ctas"], rank["target"], rank["reached"]) == (8, None, None)
    for number, size in enumerate(copy_jobs.CASES):
        for path, ctas in (("peer_load", 132), ("peer_store", 132)):
            row = found[path, size.label, "shipped", "tier"]
            assert (row["runs_on"], row["ctas"]) == ("peer", ctas)
            assert row["ratio"] == pytest.approx(0.985, abs=0.001)
            assert row["target"] == copy_jobs.TARGETS[number]
            assert row["reached"] is True
    # The peer runs what the tier would have it run, and nothing else.
    assert {row["tuning"] for row in rows if row["runs_on"] == "peer"} == {"shipped", "at most 32 blocks"}
    assert {row["path"] for row in rows if row["tuning"] == "shipped" and row["runs_on"] == "rank"} == {
        "host_load",
        "host_store",
    }
    ordered = [row for row in rows if row["tuning"] == "in order"]
    assert [(row["path"], row["case"], row["target"]) for row in ordered] == [
        (path, main, None) for path in ("peer_load", "peer_store", "host_load", "host_store")
    ]
    for row in ordered:
        assert row["settings"] == found[row["path"], main, "link", "tier"]["settings"]
    targets = {
        ("peer_load", main, "link"): 0.97,
        ("peer_store", main, "link"): 0.97,
        ("peer_load", main, "rank, at most 32 blocks"): 0.94,
        ("peer_store", "16 pages", "link"): 0.97,
        ("peer_load", "page size 1", "link"): 0.85,
        ("peer_store", "fp8 pages of 64 tokens", "link"): 0.94,
        ("peer_load", "MLA rows of 656 B, pages of 64", "link"): 0.94,
        ("host_load", main, "link"): 0.98,
        ("peer_both_load", main, "link"): 0.90,
        ("peer_both_store", main, "link"): 0.90,
    }
    for (path, case, tuning), target in targets.items():
        row = found[path, case, tuning, "tier"]
        assert row["ratio"] == pytest.approx(0.975, abs=0.001)
        assert row["target"] == target
        assert row["reached"] is (target <= 0.975)
    assert {memory for path, _, _, memory in found if path == "peer_load"} == {"tier", "asleep", "context"}
    assert [row["memory"] for row in rows[:2]] == ["asleep"] * 2, "before anything wakes the peer"
    assert all(row.get("peer_sm_mhz") == (345 if row["path"].startswith("peer") else None) for row in rows)
    for path in ("peer_load", "peer_store", "host_load", "host_store"):
        engine = found[path, main, "a batch of pages", "tier"]
        assert (engine["ratio"], engine["target"], engine["enqueue_us_per_page"] > 0) == (0.5, None, True)
    for run in copy_jobs.RUNS_OF_PAGES:
        staged = found["host_load", main, f"staged, runs of {run} pages", "tier"]
        assert (staged["ratio"], staged["target"], staged["reached"], staged["run_pages"]) == (0.995, 0.98, True, run)
        assert staged["enqueue_us_per_layer"] > 0
    assert ("peer_store", "page size 1", "triton", "tier") in found
    # 8 blocks do not load at 90 % of the link, 10 do.
    matmul = found["peer_matmul", main, "rank", "tier"]
    assert (matmul["ctas"], matmul["ratio"], matmul["gbps_beside"]) == (10, 0.975, 390.0)
    assert (matmul["matmul_ms"], matmul["matmul_beside_ms"], matmul["slowdown"]) == (0.02, 0.0206, 0.03)
    assert matmul["reached"]
    assert [row["tuning"] for row in rows if row["path"] == "peer_matmul"] == ["shipped", "rank", "register"]
    matmul = found["peer_matmul", main, "shipped", "tier"]
    assert (matmul["runs_on"], matmul["ctas"], matmul["ratio"]) == ("peer", 132, 0.985)
    for name in ("load", "store"):
        both = found[f"peer_both_{name}", main, "shipped", "tier"]
        assert (both["runs_on"], both["target"], both["reached"]) == ("peer", 0.90, True)
        both = found[f"peer_both_{name}", main, "rank", "tier"]
        assert (both["runs_on"], both["target"], both["ratio"]) == ("rank", None, 0.8)
    for tuning in ("shipped", "rank"):
        enqueue = found["peer_enqueue", main, tuning, "tier"]
        assert enqueue["layers"] == 48
        assert enqueue["us"] > 0
        assert enqueue["target"] == 300
    out = capsys.readouterr().out
    assert "Page copies, fake GPU" in out
    assert "<= 300 us" in out
    assert "+3.0%" in out
    before = (tmp_path / "copy.svg").read_text()
    assert "peer_both_load: bf16 pages of 64 tokens, link" in before
    assert "peer_both_load: bf16 pages of 64 tokens, shipped, by the peer" in before
    assert "shipped, by the peer" in out
    assert "rank, by the peer" not in out
    assert cli.main(["bench", "report", str(tmp_path / "copy.jsonl")]) == 0
    assert capsys.readouterr().out == out
    assert (tmp_path / "copy.svg").read_text() == before


def documented() -> list[str]:
    """The commands of docs/benchmarks.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    return re.findall(r"^sglang-xmem bench copy(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", documented())
def test_documented_commands_run(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(fake_gpu, "room", lambda: 400_000)
    status, rows = run_copy(*shlex.split(command), "--quick", "--no-plots")
    assert status == 0
    assert rows
    assert all(row["complete"] for row in rows)


def test_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "results" / "copy.jsonl"
    arguments = ["--run", "20261121-020027-9b7196", "--output", str(tmp_path / "x")]
    assert cli.main(["bench", "report", str(path), *arguments]) == 0
    assert "51.4" in capsys.readouterr().out
    assert (tmp_path / "x.svg").exists()


def test_given_settings(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    arguments = ("--quick", "--no-plots", "--paths", "peer_load,peer_matmul", "--cases", "0")
    status, rows = run_copy(*arguments, "--tunings", '[{}, {"variant": "register"}]', "--ctas", "4,32")
    assert status == 0
    assert {row["tuning"] for row in rows} == {"given"}
    assert [(row["path"], row["changes"].get("variant"), row["ctas"]) for row in rows] == [
        (path, variant, ctas)
        for path in ("peer_load", "peer_matmul")
        for variant in (None, "register")
        for ctas in (4, 32)
    ]
    # A load below 90 % of the link does not count, however little it takes of the matrix product.
    assert [row["ratio"] for row in rows[-2:]] == [0.4, 0.975]
    assert {row["runs_on"] for row in rows} == {"rank"}
    status, rows = run_copy(*arguments, "--tunings", "[{}]", "--ctas", "4,32", "--copies-on", "peer")
    assert [(row["path"], row["ctas"], row["ratio"], row["runs_on"]) for row in rows[8:]] == [
        (path, ctas, ratio, "peer") for path in ("peer_load", "peer_matmul") for ctas, ratio in ((4, 0.4), (32, 0.985))
    ]


def test_given_settings_have_targets(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    arguments = ("--no-plots", "--paths", "peer_load,host_load", "--cases", "0", "--ctas", "32,64")
    assert [row["target"] for row in run_copy(*arguments)[1]] == [0.94, 0.97, 0.98, 0.98]
    # Blocks of a peer are nobody else's, so few of them have to reach no less.
    rows = run_copy(*arguments, "--copies-on", "peer")[1][4:]
    assert [row["target"] for row in rows] == [0.97, 0.97, 0.98, 0.98]
    assert [row["runs_on"] for row in rows] == ["peer", "peer", "rank", "rank"]


def jobs_of(copies_on: Any, memories: tuple[str, ...] | None = None) -> list[copy_jobs.Job]:
    return copy_jobs.gpu_jobs(copy_jobs.PATHS, None, memories, quick=False, copies_on=copies_on)


def test_which_gpu_copies() -> None:
    """All jobs of a run have keys of their own, and --copies-on leaves out those of the other GPU."""
    for jobs in (jobs_of(None), jobs_of("rank"), jobs_of("peer"), jobs_of(None, ("asleep", "tier", "context"))):
        assert len({job.key for job in jobs}) == len(jobs)
    over_peer = {copies_on: [job for job in jobs_of(copies_on) if job.tier == "peer"] for copies_on in (None, "rank")}
    by_peer = [job for job in jobs_of("peer") if job.tier == "peer"]
    assert {job.by for job in over_peer["rank"]} == {"rank"}
    assert {job.by for job in by_peer} == {"peer"}
    assert over_peer["rank"] == [job for job in over_peer[None] if job.by == "rank"]
    assert by_peer == [dataclasses.replace(job, by="peer") for job in over_peer[None] if job.by == "tier"]
    assert {job.path for job in by_peer} == {path for path in copy_jobs.PATHS if path.startswith("peer")}
    hosts = [[job for job in jobs_of(copies_on) if job.tier == "host"] for copies_on in (None, "rank", "peer")]
    assert hosts[0] == hosts[1] == hosts[2]
    assert {job.by for job in hosts[0]} == {"rank"}
    assert {job.by for job in jobs_of(None, ("asleep", "context"))} == {"rank"}, (
        "the tier's choice is over its own memory"
    )


def test_keys_tell_who_copies() -> None:
    job = jobs_of(None)[0]
    choices: tuple[copy_jobs.By, ...] = ("tier", "rank", "peer")
    assert len({dataclasses.replace(job, by=by).key for by in choices}) == 3


def test_a_peer_in_use_leaves_the_copies_to_the_rank(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    fake_gpu.copying_gpu = None
    arguments = ("--quick", "--no-plots", "--cases", "0", "--paths", "peer_load")
    status, rows = run_copy(*arguments)
    assert status == 0
    shipped = next(row for row in rows if row["tuning"] == "shipped")
    assert (shipped["runs_on"], shipped["ctas"], shipped["ratio"]) == ("rank", 8, 0.8)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        ("GPU 1 is in use by process 7", "GPU 1 is in use by process 7, and only an idle peer copies"),
        (None, "GPU 1 has no peer access to GPU 0"),
    ],
)
@pytest.mark.parametrize("what", [(), ("--tune",), ("--ctas", "8")])
def test_a_peer_that_cannot_copy_is_waived(
    run_copy: RunCopy,
    fake_gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    use: str | None,
    reason: str,
    what: tuple[str, ...],
) -> None:
    fake_gpu.copying_gpu = None
    monkeypatch.setattr(gpus, "foreign_use", lambda gpu: use)
    arguments = ("--quick", "--no-plots", "--cases", "0", "--copies-on", "peer", "--paths", "peer_load,host_load")
    status, rows = run_copy(*arguments, *what)
    assert status == 0
    assert [row["waived"] for row in rows if row["path"] == "peer_load"] == [reason]
    assert all(row["verified"] for row in rows if row["path"] == "host_load" and row["tuning"] != "candidate")
    assert any(row["path"] == "host_load" for row in rows)


def test_a_copier_that_cannot_run_on_the_peer(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    """The tier falls back to the rank's GPU. Who asks for the peer is told."""
    fake_gpu.refuses_peer = True
    arguments = ("--quick", "--no-plots", "--cases", "0", "--paths", "peer_load")
    status, rows = run_copy(*arguments)
    assert status == 0
    assert {row["runs_on"] for row in rows} == {"rank"}
    status, more = run_copy(*arguments, "--copies-on", "peer")
    assert status == 1
    assert ["mapped for itself" in row["error"] for row in more[len(rows) :]] == [True, True]


def test_memory_of_a_peer_that_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tier has it for copies by the rank, and nothing on the peer."""
    seen: list[Any] = []

    def allocate(self: PeerTier, nbytes: int) -> Region:
        with ExitStack() as undo:
            self._wake(self.seat.gpus, undo)
        seen.append((self.settings.copy_on, self.seat.gpus, self.gpu, nbytes))
        return Region(0, nbytes, "fake", lambda: None)

    monkeypatch.setattr(PeerTier, "allocate", allocate)
    woken: list[int] = []
    monkeypatch.setattr(gpus, "hold_context", lambda gpu, undo: woken.append(gpu))
    copy_memory.allocate("peer", "asleep", 0, 3, 1 << 20)
    assert (seen, woken) == ([("rank", (3,), 0, 1 << 20)], [])
    monkeypatch.setattr(copy_memory._Asleep, "_wake", PeerTier._wake)
    copy_memory.allocate("peer", "asleep", 0, 3, 1 << 20)
    assert woken == [3], "otherwise the tier wakes it"


def test_memory_is_mapped_for_whoever_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_plan(options: Options, *arguments: Any) -> Any:
        assert options.tiers["peer"].gpus == (3,)
        raise TierUnavailable(options.tiers["peer"].copy_on)

    monkeypatch.setattr("sglang_xmem.plan.make_plan", make_plan)
    with pytest.raises(TierUnavailable, match="^auto$"):
        copy_memory.allocate("peer", "tier", 0, 3, 1 << 20)


@pytest.mark.parametrize("in_order", [False, True])
def test_pages_of_a_scene(in_order: bool) -> None:
    """Half of them to load and the other half to store, on both sides; scattered unless they are to be in order."""
    case = copy_jobs.CASES[copy_jobs.FEW].limited(4e6)
    tier, device = (torch.empty(copy_measure.Scene.nbytes(case), dtype=torch.uint8) for _ in range(2))
    scene = copy_measure.Scene(copy_measure.Cpu(), tier, device, case, "host", in_order=in_order)
    for loaded, stored in zip(scene.to_load, scene.to_store, strict=True):
        step = case.page_bytes // case.row_bytes
        assert sorted(torch.cat((loaded, stored)).tolist()) == list(range(0, 2 * case.pages * step, step))
        assert (_follow(loaded), _follow(stored)) == (in_order, in_order)
    assert torch.equal(*scene.to_load) is in_order


def test_wrong_bytes_of_pages_in_order_are_found(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCopier, "broken", "in order")
    paths = "peer_load,peer_store,host_load,host_store"
    status, rows = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", paths)
    assert status == 1
    assert {row["path"] for row in rows if not row["verified"]} == set(paths.split(","))
    assert {row["tuning"] for row in rows if not row["verified"]} == {"in order"}


@pytest.mark.parametrize("run_pages", [1, 3, 8, 1000])
def test_runs_of_pages_of_a_scene(run_pages: int) -> None:
    """In the tier alone."""
    case = dataclasses.replace(copy_jobs.CASES[copy_jobs.FEW], pages=30, planes=2, page_bytes=64, row_bytes=4)
    tier, device = (torch.empty(copy_measure.Scene.nbytes(case), dtype=torch.uint8) for _ in range(2))
    scene = copy_measure.Scene(copy_measure.Cpu(), tier, device, case, "host", run_pages=run_pages)
    assert sorted(scene.tier_pages.tolist()) == sorted(scene.device_pages.tolist()) == list(range(60))
    breaks = int((scene.tier_pages.diff() != 1).sum())
    assert breaks == -(-60 // run_pages) - 1 or run_pages == 1
    assert int((scene.device_pages.diff() != 1).sum()) > 40


def test_wrong_bytes_of_staged_loads_are_found(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStaged, "forgets", True)
    status, rows = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", "host_load")
    assert status == 1
    wrong = {row["tuning"] for row in rows if not row["verified"]}
    assert wrong == {f"staged, runs of {run} pages" for run in copy_jobs.RUNS_OF_PAGES}


def test_a_load_that_is_not_staged_is_no_measurement_of_staging(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStaged, "staged_loads", property(lambda self: 0, lambda self, value: None), raising=False)
    status, rows = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", "host_load")
    assert status == 1
    assert sum("runs too short to be staged" in row.get("error", "") for row in rows) == len(copy_jobs.RUNS_OF_PAGES)


@pytest.mark.parametrize("broken", ["direction", "page", "plane"])
def test_wrong_bytes_are_found(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(FakeCopier, "broken", broken)
    paths = "peer_load,peer_store,peer_both,host_load"
    status, rows = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", paths)
    assert status == 1
    assert {row["path"] for row in rows} == {
        "peer_load",
        "peer_store",
        "peer_both_load",
        "peer_both_store",
        "host_load",
    }
    assert all(row["kernel"].startswith("copy engine") for row in rows if row["verified"])


def test_wrong_bytes_of_the_copy_engine_are_found(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    fake_gpu.engine_forgets = True
    status, rows = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", "peer_load,host_store")
    assert status == 1
    wrong = [(row["path"], row["kernel"]) for row in rows if not row["verified"]]
    assert wrong == [("peer_load", "copy engine"), ("host_store", "copy engine")]
    fake_gpu.engine_forgets = False
    again = run_copy("--quick", "--no-plots", "--cases", "0", "--paths", "peer_load,host_store", "--resume")
    assert again == (1, rows)


def test_one_failure_leaves_the_others(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeCopier, "broken", "raises")
    arguments = ("--quick", "--no-plots", "--cases", "0,1", "--paths", "peer_load,peer_store")
    status, rows = run_copy(*arguments)
    assert status == 1
    assert {row["path"] for row in rows if "error" in row} == {"peer_store"}
    assert all(row["error"] == "RuntimeError: an illegal memory access" for row in rows if "error" in row)
    assert all(row["verified"] for row in rows if row["path"] == "peer_load")
    assert "ERROR: RuntimeError" in capsys.readouterr().out
    monkeypatch.setattr(FakeCopier, "broken", "")
    status, more = run_copy(*arguments, "--resume")
    assert status == 0
    assert [row["path"] for row in more[len(rows) :]] == ["peer_store"] * sum("error" in row for row in rows)
    assert len({row["run"] for row in more}) == 1
    assert "ERROR" not in capsys.readouterr().out  # the table has the later rows alone


def test_memory_that_cannot_be_had_is_waived(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(*arguments: Any) -> Region:
        raise TierUnavailable("GPU 0 has no peer access to GPU 1")

    monkeypatch.setattr(copy_memory, "allocate", allocate)
    status, rows = run_copy("--quick", "--paths", "peer_load,peer_both")
    assert status == 0
    assert [(row["path"], row["memory"]) for row in rows] == [
        ("peer_load", "asleep"),
        ("peer_load", "tier"),
        ("peer_both", "tier"),
        ("peer_load", "context"),
    ]
    assert "WAIVED: GPU 0 has no peer access to GPU 1" in capsys.readouterr().out


def test_one_gpu_has_no_peer(run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "find_peer", lambda gpu, peer: None)
    status, rows = run_copy("--quick", "--no-plots", "--paths", "peer_load,host_load", "--cases", "0")
    assert status == 0
    there = {row["memory"] for row in rows if row["path"] == "host_load" and "gbps" in row}
    assert there == {"tier"}
    waived = {(row["path"], row["memory"]) for row in rows if "waived" in row}
    assert waived == {("peer_load", memory) for memory in ("asleep", "tier", "context")} | {("host_load", "relayed")}
    reasons = {row["waived"] for row in rows if "waived" in row}
    assert reasons == {"this machine has one GPU, and a peer or relay is another one"}


def test_host_copies_are_relayed_by_the_peer(run_copy: RunCopy, fake_gpu: FakeGpu) -> None:
    status, rows = run_copy("--quick", "--no-plots", "--paths", "host_load,host_store")
    assert status == 0
    relayed = [row for row in rows if row["memory"] == "relayed"]
    assert [(row["path"], row["tuning"], row["target"]) for row in relayed] == [
        ("host_load", "shipped", None),
        ("host_store", "shipped", None),
    ]
    assert all(row["verified"] for row in relayed)
    assert fake_gpu.relays == {(), (1,)}
    assert {tuple(row["relays"]) for row in relayed} == {(1,)}
    assert not any("relays" in row for row in rows if row["memory"] == "tier")
    _, rows = run_copy("--quick", "--no-plots", "--paths", "host_load", "--relays", "3,2")
    assert [row["relays"] for row in rows if "relays" in row] == [[1], [1], [3, 2]]
    fake_gpu.relays.clear()
    run_copy("--quick", "--no-plots", "--paths", "host_load", "--ctas", "4")
    assert fake_gpu.relays == {()}, "given settings are for one link"


def test_tune(run_copy: RunCopy, fake_gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tune", "--cases", "0,1", "--paths", "peer_load,peer_store", "--repetitions", "1", "--no-plots")
    status, rows = run_copy(*arguments)
    assert status == 0
    best = [row for row in rows if row["tuning"] == "best"]
    assert [(row["path"], row["case"]) for row in best] == [
        (path, case.label) for path in ("peer_load", "peer_store") for case in copy_jobs.CASES[:2]
    ]
    # From 10 blocks on all are equally fast; of those tried 16 are the fewest.
    assert {row["ctas"] for row in best} == {16}
    assert all(row["verified"] for row in best)
    candidates = [row for row in rows if row["tuning"] == "candidate"]
    assert len(candidates) == 4 * len(copy_jobs.TUNE_KERNELS) * len(copy_jobs.TUNE_CTAS["peer"])
    assert {row["runs_on"] for row in rows} == {"rank"}
    out = capsys.readouterr().out
    config = json.loads(out.split("16 pages: --hicache-xmem-config '")[1].split("'")[0])
    assert set(config["copy"]) == {"load", "store"}
    assert config["copy"]["load"]["ctas"] == 16
    found = parse_options("peer", config)
    assert found.copy.load == config["copy"]["load"]
    # By default the tier would run settings of one GPU on the other.
    assert found.tiers["peer"].copy_on == "rank"


def test_tune_copies_by_the_peer(run_copy: RunCopy, fake_gpu: FakeGpu, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tune", "--cases", "1", "--paths", "peer_load,host_load", "--repetitions", "1", "--no-plots")
    status, rows = run_copy(*arguments, "--copies-on", "peer")
    assert status == 0
    tried = {
        (row["path"], row["runs_on"], row["ctas"], row["changes"]["variant"])
        for row in rows
        if row["tuning"] == "candidate"
    }
    assert tried == {
        *(("peer_load", "peer", ctas, variant) for ctas in (16, 32, 64, 132) for variant in ("bulk", "register")),
        *(("host_load", "rank", ctas, variant) for ctas in (2, 4, 8, 16) for variant in ("bulk", "register")),
    }
    best = [row for row in rows if row["tuning"] == "best"]
    assert [(row["path"], row["runs_on"], row["ctas"]) for row in best] == [
        ("peer_load", "peer", 16),
        ("host_load", "rank", 16),
    ]
    out = capsys.readouterr().out
    config = json.loads(out.split("peer, 16 pages: --hicache-xmem-config '")[1].split("'")[0])
    assert parse_options("peer", config).tiers["peer"].copy_on == "peer"
    assert json.loads(out.split("dram, 16 pages: --hicache-xmem-config '")[1].split("'")[0]).keys() == {"copy"}


def test_settings_found_before_rows_said_who_copies() -> None:
    old = {
        "tuning": "best",
        "verified": True,
        "path": "peer_load",
        "memory": "tier",
        "case": "x",
        "changes": {"ctas": 8},
    }
    new = {**old, "runs_on": "peer", "case": "y"}
    assert copy_jobs.tuned_configs([old, new]) == [
        ("peer, x", {"peer": {"copy_on": "rank"}, "copy": {"load": {"ctas": 8}}}),
        ("peer, y", {"peer": {"copy_on": "peer"}, "copy": {"load": {"ctas": 8}}}),
    ]


def test_tune_passes_over_settings_that_copy_wrong(
    run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCopier, "broken", "page")
    status, rows = run_copy("--tune", "--quick", "--ctas", "16", "--cases", "0", "--paths", "peer_load", "--no-plots")
    assert status == 1
    assert [row["verified"] for row in rows if row["tuning"] == "best"] == [False, False]


def test_at_once_counts_what_overlaps() -> None:
    machine = FakeGpu()

    def side(ms: float, calls: int) -> list[Callable[[], None]]:
        return [lambda: machine.hold(ms)] * calls

    fast, slow = copy_measure.at_once(machine, [side(1.0, 10), side(2.0, 10)])
    assert fast == pytest.approx([1.0] * 10)
    assert slow == pytest.approx([2.0] * 5)  # the other five ran alone
    with pytest.raises(copy_measure.MeasurementFailed, match="same time"):
        copy_measure.at_once(machine, [side(1.0, 1), side(9.0, 2)])


def test_best_settings_take_few_blocks() -> None:
    rows = [{"gbps": gbps, "ctas": ctas} for gbps, ctas in ((340.0, 132), (339.0, 32), (335.0, 16), (330.0, 8))]
    assert [row["ctas"] for row in copy_jobs.by_speed(rows)] == [16, 32, 132, 8]


def test_cases_are_cut_to_what_fits() -> None:
    case = copy_jobs.CASES[0]
    assert case.limited(1e12) == case
    assert (case.limited(1.6e9).planes, case.limited(1.6e9).pages) == (24, 1000)
    assert (case.limited(4e6).planes, case.limited(4e6).pages) == (2, 30)
    kept = case.limited(128e6, keep_planes=True)
    assert (kept.planes, kept.pages) == (96, 20)
