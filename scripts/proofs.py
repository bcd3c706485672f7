#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the measurements on GPUs that the documents quote: proofs.py list | run --out FOLDER [NAME...]

    python scripts/proofs.py list
    python scripts/proofs.py run --out results --time-limit 540 ttft-dram dma

`run` runs the named proofs, or all for which this machine has GPUs. It appends rows to files in FOLDER, named as the
files of docs/results to which the rows belong. `FOLDER/proofs.log` has the commands' output; the last printed line is a
summary in JSON. A proof that would exceed the time limit is skipped. A failed proof does not stop the others, and `run`
ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sglang_xmem import gpus  # noqa: E402

BENCH = ("-m", "sglang_xmem.cli", "bench")
SHAPES = "qwen3-30b-a3b,qwen3-8b,llama-3.1-8b,deepseek-v2-lite,qwen3-next-small"


class Proof(NamedTuple):
    """One measurement.

    Attributes:
        name: on the command line.
        gpus: number of required GPUs.
        seconds: maximum duration, after which it is stopped.
        rows: file of docs/results for its rows.
        command: Python's arguments. `{out}` is the file of rows, `{limit}` the seconds left for the command.
        about: its claim, for `list`.
    """

    name: str
    gpus: int
    seconds: int
    rows: str
    command: tuple[str, ...]
    about: str


def _bench(name: str, *arguments: str) -> tuple[str, ...]:
    return (*BENCH, name, *arguments, "--output", "{out}")


def _script(name: str, *arguments: str, output: str = "--output") -> tuple[str, ...]:
    return (f"scripts/bench/{name}.py", *arguments, output, "{out}")


def _tests(subjects: str, *arguments: str) -> tuple[str, ...]:
    record = ("scripts/gpu_runs.py", "record", *subjects.split(), "--output", "{out}")
    return (*record, "--", "python", "-m", "pytest", "-q", *arguments)


def _ttft(shapes: str, backends: str, *arguments: str) -> tuple[str, ...]:
    fixed = ("--attention-backend", "flashinfer", "--time-limit", "{limit}")
    return _bench("ttft", "--shapes", shapes, "--backends", backends, *arguments, *fixed)


_ENGINES = ("--xmem-config", '{"copy": {"staging_mib": 256}}')
_BILLION = ("--case", "small", "--page-copies", "1000000000", "--time-limit", "{limit}")

PROOFS: Sequence[Proof] = (
    Proof(
        "tests-kernels",
        1,
        240,
        "gpu_runs.jsonl",
        _tests(
            "copies", "tests/gpu/test_copies_gpu.py", "tests/gpu/test_cuda_contract.py", "tests/gpu/test_sums_gpu.py"
        ),
        "copies, counters and sums: bytes compared on a GPU",
    ),
    Proof(
        "tests-tiers",
        1,
        240,
        "gpu_runs.jsonl",
        _tests("tiers bank", "tests/gpu/test_tier_contract_gpu.py", "tests/gpu/test_bank_gpu.py"),
        "the tiers' contract and the page bank on a GPU",
    ),
    Proof(
        "dma",
        1,
        240,
        "dma_loads.jsonl",
        _script("dma_loads", "--seconds", "200", output="--out"),
        "loads from host memory by copy engines against the copy kernel, alone and during a forward pass",
    ),
    Proof(
        "ttft-dram",
        1,
        420,
        "ttft.jsonl",
        _ttft("qwen3-8b,deepseek-v2-lite", "dram,stock", "--sizes", "80K"),
        "tier dram against stock HiCache, a dense and an MLA shape",
    ),
    Proof(
        "ttft-dram-engines",
        1,
        420,
        "ttft.jsonl",
        _ttft("qwen3-8b,deepseek-v2-lite", "dram", "--sizes", "80K", *_ENGINES),
        "the same loads by copy engines",
    ),
    Proof("sums", 1, 60, "sums.jsonl", _script("sums"), "the cost of page checksums alone"),
    Proof(
        "integrity-dram",
        1,
        540,
        "integrity.jsonl",
        _script("integrity", "--time-limit", "{limit}", "--backends", "dram", "--shape", "qwen3-8b", "--sizes", "80K"),
        "TTFT of a hit in dram by level of integrity",
    ),
    Proof("enqueue", 1, 90, "enqueue.jsonl", _script("enqueue"), "the scheduler thread's share of a load"),
    Proof(
        "bank-hits",
        1,
        560,
        "bank.jsonl",
        _script("bank", "--cases", "own_hit,second_engine,after_restart,after_service_restart", "--limit", "{limit}"),
        "hits in the page bank: own, of a second engine, after restarts of the engine and of the service",
    ),
    Proof(
        "bank-start-up",
        1,
        400,
        "bank.jsonl",
        _script("bank", "--cases", "start_up", "--pool-gb", "60", "--limit", "{limit}"),
        "start-up with a pool of 60 GB in the bank against stock's",
    ),
    Proof(
        "pools-dram",
        1,
        500,
        "pools.jsonl",
        _script("pools", "--tiers", "dram"),
        "each kind of pool in dram: bits of a tier hit equal to an HBM hit's",
    ),
    Proof(
        "faults-dram",
        1,
        560,
        "faults.jsonl",
        _script("server_faults", "--tier", "dram", "--time-limit", "{limit}"),
        "servers killed and crowded while they serve from dram",
    ),
    Proof("soak-dram", 1, 400, "soak.jsonl", _bench("soak", "--tiers", "dram", *_BILLION), "10^9 verified copies"),
    Proof(
        "agentic-dram",
        1,
        590,
        "multiturn.jsonl",
        _bench("multiturn", "--preset", "agentic-174k", "--backends", "stock,dram", "--time-limit", "{limit}"),
        "ten contexts of 174K tokens in turns: stock against dram",
    ),
    Proof(
        "tests-two-gpus",
        2,
        400,
        "gpu_runs.jsonl",
        _tests("copies tiers", *(f"tests/gpu/test_{name}_gpu.py" for name in ("siblings", "copies", "tier_contract"))),
        "shared loads of two ranks, copies by a peer and relays, the tiers' contract: bytes compared",
    ),
    Proof(
        "ttft-peer",
        2,
        590,
        "ttft.jsonl",
        _ttft(SHAPES, "peer,hbm", "--sizes", "10K,80K"),
        "tier peer against HBM and its floor, all shapes",
    ),
    Proof(
        "ttft-relay",
        2,
        300,
        "ttft.jsonl",
        _ttft("qwen3-8b", "dram,stock", "--sizes", "80K", "--xmem-config", '{"dram": {"relays": [1]}}'),
        "tier dram with the second GPU as a relay against stock",
    ),
    Proof(
        "copies-peer",
        2,
        120,
        "copy_moves.jsonl",
        _script("copy_moves", output="--out"),
        "the copy kernel's rates by shape of a page, over NVLink and PCIe",
    ),
    Proof(
        "integrity-peer",
        2,
        540,
        "integrity.jsonl",
        _script("integrity", "--time-limit", "{limit}", "--backends", "peer", "--shape", "qwen3-8b", "--sizes", "80K"),
        "TTFT of a hit in peer by level of integrity",
    ),
    Proof(
        "pools-peer",
        2,
        500,
        "pools.jsonl",
        _script("pools", "--tiers", "peer"),
        "each kind of pool in peer: bits of a tier hit equal to an HBM hit's",
    ),
    Proof(
        "faults-peer",
        2,
        560,
        "faults.jsonl",
        _script("server_faults", "--tier", "peer", "--crowd-gpu", "1", "--time-limit", "{limit}"),
        "servers killed, and the peer's GPU filled by another process, while they serve from peer",
    ),
    Proof(
        "bank-tp2",
        2,
        400,
        "bank.jsonl",
        _script("bank", "--cases", "mla_tp2", "--limit", "{limit}"),
        "MLA under tensor parallelism: bytes that the bank keeps against two private pools",
    ),
    Proof("soak-peer", 2, 240, "soak.jsonl", _bench("soak", "--tiers", "peer", *_BILLION), "10^9 verified copies"),
    Proof(
        "agentic-peer",
        2,
        590,
        "multiturn.jsonl",
        _bench("multiturn", "--preset", "agentic-174k", "--backends", "stock,peer", "--time-limit", "{limit}"),
        "ten contexts of 174K tokens in turns: stock against peer",
    ),
)


def command_of(proof: Proof, out: Path, seconds: int) -> list[str]:
    """Return the arguments of a process that runs a proof for at most `seconds`, of which 20 are for its end."""
    values = {"{out}": str(out / proof.rows), "{limit}": str(max(1, seconds - 20)), "python": sys.executable}
    return [sys.executable, *(values.get(word, word) for word in proof.command)]


def run(proof: Proof, out: Path, seconds: int) -> str:
    """Run one proof, its output appended to `proofs.log`.

    Returns: "ok", "failed (status N)" or "stopped after N s".
    """
    command = command_of(proof, out, seconds)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(out / "proofs.log", "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        # Its servers and workers are in its session, and end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s"
        finally:
            _end(process)
    return "ok" if status == 0 else f"failed (status {status})"


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main(given: Sequence[str] | None = None) -> int:
    """List the proofs or run some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print each proof: name, GPUs, seconds, file of rows, what it shows")
    runs = commands.add_parser("run", help="run proofs and append their rows to files")
    runs.add_argument("names", nargs="*", metavar="NAME", help="default: all that this machine has GPUs for")
    runs.add_argument("--out", type=Path, required=True, help="folder of the files of rows")
    runs.add_argument("--time-limit", type=int, default=3600, help="seconds for all proofs; default 3600")
    arguments = parser.parse_args(given)
    if arguments.command == "list":
        for proof in PROOFS:
            print(f"{proof.name:18} {proof.gpus} GPU  {proof.seconds:4} s  {proof.rows:20} {proof.about}")
        return 0
    known = {proof.name: proof for proof in PROOFS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"unknown proof {unknown[0]!r}. Choose from {', '.join(known)}.")
    visible = gpus.count()
    chosen = [known[name] for name in arguments.names] or [proof for proof in PROOFS if proof.gpus <= visible]
    if lacking := [proof for proof in chosen if proof.gpus > visible]:
        parser.error(
            f"{lacking[0].name} needs {lacking[0].gpus} GPU(s), this process sees {visible}. Run it on another."
        )
    if not chosen:
        parser.error("no proof runs without a GPU. Run this on a machine that has one.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.time_limit
    results: dict[str, str] = {}
    for proof in chosen:
        left = int(end - time.monotonic())
        results[proof.name] = (
            run(proof, arguments.out, proof.seconds) if left >= proof.seconds else f"skipped ({left} s left)"
        )
        print(f"{proof.name}: {results[proof.name]}", file=sys.stderr, flush=True)
    print(json.dumps(results))
    return int(any(result.startswith(("failed", "stopped")) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
