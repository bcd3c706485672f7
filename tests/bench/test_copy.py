"""`sglang-xmem bench copy`: on the CPU as it is, and what it does on a GPU over a pretended one with exact clocks."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_xmem import cli, gpus
from sglang_xmem.bench import copy, copy_jobs, copy_measure, copy_memory
from sglang_xmem.copies import PageCopier
from sglang_xmem.copies.torch import TorchPageCopier
from sglang_xmem.copies.tuning import DEFAULT_TUNING
from sglang_xmem.errors import TierUnavailable
from sglang_xmem.tiers import Region

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
        (("--repetitions", "0"), "give at least 1"),
        (("--memory", "cxl"), "choose from tier, vmm, context"),
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

    def __init__(self) -> None:
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

    def room(self) -> int:
        return 2_000_000


class FakeCopier(TorchPageCopier):
    """Each thread block moves 40 GB/s, up to 97.5 % of the link; `broken` gives it a fault."""

    name = "cuda"
    machine: FakeGpu
    broken = ""

    def settings(self, name: str, load: dict[str, Any], store: dict[str, Any]) -> None:
        if name == "cuda":
            self.load_tuning = dataclasses.replace(DEFAULT_TUNING["load", "device"], **load)
            self.store_tuning = dataclasses.replace(DEFAULT_TUNING["store", "device"], **store)

    def _copy(self, tier_rows: torch.Tensor, device_rows: torch.Tensor, planes: range, *, load: bool) -> None:
        ctas = self.load_tuning.ctas if hasattr(self, "load_tuning") else 32
        self.machine.hold(len(planes) * tier_rows.numel() * self.page_bytes / min(40.0 * ctas, 390.0) / 1e6)
        if self.broken == "raises" and not load:
            raise RuntimeError("an illegal\nmemory access")
        if self.broken == "direction":
            load = not load
        if self.broken == "page":
            tier_rows, device_rows = tier_rows[1:], device_rows[1:]
        if self.broken == "plane":
            planes = planes[:-1]
        super()._copy(tier_rows, device_rows, planes, load=load)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Have the benchmark find a GPU and a peer."""
    machine = FakeGpu()

    def make(name: str, tier: Sequence[Any], device: Sequence[Any], page_size: int, **how: Any) -> PageCopier:
        copier = FakeCopier(tier, device, page_size)
        copier.settings(name, how["load"], how["store"])
        return copier

    def allocate(tier: str, memory: str, gpu: int | None, peer: int | None, nbytes: int) -> Region:
        assert (gpu, peer) == (0, 1)
        return Region(0, nbytes, "fake", lambda: None, bytearray(nbytes))

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        beside = any(stream.clock > machine.current.clock + 1e-9 for stream in machine.streams)
        machine.hold(0.0206 if beside else 0.02)

    monkeypatch.setattr(FakeCopier, "machine", machine, raising=False)
    monkeypatch.setattr(copy_measure, "make_copier", make)
    monkeypatch.setattr(copy_memory, "allocate", allocate)
    monkeypatch.setattr(copy, "find_machine", lambda gpu: machine)
    monkeypatch.setattr(copy, "find_peer", lambda gpu, peer: 1)
    monkeypatch.setattr(gpus, "memory_bytes", lambda gpu: (1 << 40, 0))
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
    shipped = found["peer_load", main, "shipped", "tier"]
    assert (shipped["gbps"], shipped["contiguous_gbps"], shipped["ratio"]) == (320.0, 400.0, 0.8)
    assert (shipped["ctas"], shipped["target"], shipped["reached"]) == (8, None, None)
    targets = {
        ("peer_load", main, "link"): 0.97,
        ("peer_store", main, "link"): 0.97,
        ("peer_load", main, "at most 32 blocks"): 0.94,
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
    assert {memory for path, _, _, memory in found if path == "peer_load"} == {"tier", "vmm", "context"}
    assert ("peer_store", "page size 1", "triton", "tier") in found
    # 8 blocks do not load at 90 % of the link, 10 do.
    matmul = found["peer_matmul", main, "shipped", "tier"]
    assert (matmul["ctas"], matmul["ratio"], matmul["gbps_beside"]) == (10, 0.975, 390.0)
    assert (matmul["matmul_ms"], matmul["matmul_beside_ms"], matmul["slowdown"]) == (0.02, 0.0206, 0.03)
    assert matmul["reached"]
    enqueue = found["peer_enqueue", main, "shipped", "tier"]
    assert enqueue["layers"] == 48
    assert enqueue["us"] > 0
    assert enqueue["target"] == 300
    out = capsys.readouterr().out
    assert "Page copies, fake GPU" in out
    assert "<= 300 us" in out
    assert "+3.0%" in out
    before = (tmp_path / "copy.svg").read_text()
    assert "peer_both_load: bf16 pages of 64 tokens, link" in before
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
    assert not any(row["verified"] for row in rows)


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
        ("peer_load", "tier"),
        ("peer_both", "tier"),
        ("peer_load", "vmm"),
        ("peer_load", "context"),
    ]
    assert "WAIVED: GPU 0 has no peer access to GPU 1" in capsys.readouterr().out


def test_one_gpu_has_no_peer(run_copy: RunCopy, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "find_peer", lambda gpu, peer: None)
    status, rows = run_copy("--quick", "--no-plots", "--paths", "peer_load")
    assert status == 0
    assert {row["waived"] for row in rows} == {"this machine has one GPU, and a peer is another one"}


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
    out = capsys.readouterr().out
    config = json.loads(out.split("16 pages: --hicache-xmem-config '")[1].split("'")[0])
    assert set(config["copy"]) == {"load", "store"}
    assert config["copy"]["load"]["ctas"] == 16
    from sglang_xmem.config import parse_options

    assert parse_options("peer", config).copy.load == config["copy"]["load"]


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
