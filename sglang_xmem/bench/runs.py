"""Runs engines one after another, and writes what each has measured, also where it crashed or was interrupted."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_xmem.bench import environment, report
from sglang_xmem.bench.engine import EngineGone, Limit, Row, Sample, Worker, messages
from sglang_xmem.bench.setup import Plan, limit
from sglang_xmem.cli import INTERRUPTED
from sglang_xmem.errors import ConfigError

#: What ended an engine that a user stopped.
INTERRUPT = "interrupted"
#: A run fails if a larger share of a row's samples has no proof of its hit.
MOST_UNPROVEN = 0.2


class Results:
    """Rows of one run, appended to a JSON Lines file; each says what made it.

    Args:
        bench: name of the benchmark.
        args: the command's, with `output`.
        program: that makes them.
        about: of every row.
    """

    def __init__(self, bench: str, args: argparse.Namespace, *, program: str = "sglang-xmem", **about: Any) -> None:
        self.path: Path = args.output
        self.run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self._made_by = environment.describe(program)
        names = self._made_by["gpus"]
        self.machine = environment.machine(names)
        self.head = {"bench": bench, "run": self.run, "machine": self.machine, "gpu": (names or ["CPU"])[0], **about}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            report.append_rows(self.path, [])
        except OSError as error:
            raise ConfigError(f"--output {self.path} cannot be written: {error.strerror}. Name another file.") from None

    def write(self, rows: Sequence[Row], **about: Any) -> list[Row]:
        """Append rows; returns them with what all have."""
        whole = [{**self.head, **row, **about, "made_by": self._made_by} for row in rows]
        report.append_rows(self.path, whole)
        return whole

    def finish(self) -> None:
        """The run's table on stdout."""
        rows = [row for row in report.read_rows(self.path) if row.get("run") == self.run]
        if rows:
            report.print_table(rows)
            again = f"sglang-xmem bench report {self.path} --plot NAME.png"
            print(f"Rows: {self.path}; again, and as a plot: {again}", file=sys.stderr)


def run(bench: str, args: argparse.Namespace, plans: Sequence[Plan], **about: Any) -> int:
    """Run engines one after another; returns the exit status.

    Args:
        args: of a command with `add_engine_arguments`.
        about: of every row.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # ends a run as an interrupt does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    results, status = Results(bench, args, **about), 0
    shapes = len({plan.setup.shape for plan in plans})
    for plan in plans:
        label = f"{plan.setup.shape} {plan.backend}" if shapes > 1 else plan.backend
        until = limit(args)
        try:
            problems = _measure(plan, results, until, label) if until.left_s else [f"not run: {until.name} is over"]
        except KeyboardInterrupt:
            problems = [INTERRUPT]
        for text in dict.fromkeys(problems):
            print(f"error: {label}: {text}", file=sys.stderr)
            status = 1
        if INTERRUPT in problems:
            status = INTERRUPTED
            break
    results.finish()
    return status


def _measure(plan: Plan, results: Results, until: Limit, label: str) -> list[str]:
    """Run the engines of a plan, and write rows of what they measured; returns what is wrong."""
    began, samples, problems, log = time.monotonic(), list[Sample](), list[str](), ""
    case = plan.engines[0][1]
    with tempfile.TemporaryDirectory(prefix="sglang_xmem_bench_") as folder, ExitStack() as running:
        workers = list[Worker]()
        bar = tqdm(total=case.steps * len(plan.engines), desc=f"{label}: starts", leave=False, disable=None)
        running.enter_context(bar)
        try:
            for number, (options, each) in enumerate(plan.engines):
                path = None if plan.setup.args.verbose else Path(folder) / f"{number}.log"
                worker = Worker(each, options, plan.setup.config["vocab_size"], path, plan.setup.environment)
                workers.append(running.enter_context(worker))
            for kind, value in messages(workers, until):
                if kind == "sample":
                    samples.append(value)
                elif kind == "step":
                    bar.set_description(f"{label}: {value}", refresh=False)
                    bar.update()
                else:
                    bar.write(f"{label}: serves after {time.monotonic() - began:.0f} s", file=sys.stderr)
                    bar.unpause()  # an engine's start is no part of the pace
        except EngineGone as error:
            problems, log = [str(error)], error.log
        except KeyboardInterrupt:
            problems = [INTERRUPT]
        if problems:
            for worker in workers:
                worker.grace_s = 0.0
        # On disk before the engine's processes are waited for.
        rows = results.write(
            case.rows(samples, plan.backend), **plan.setup.about, engine=plan.backend, complete=not problems
        )
        bar.write(f"{label}: {time.monotonic() - began:.0f} s, {len(rows)} rows", file=sys.stderr)
        for line in last_words(log):
            bar.write(f"  | {line}", file=sys.stderr)
    if not rows and not problems:
        problems = ["nothing was measured"]
    return [*problems, *(text for row in rows if (text := problem(row)))]


def problem(row: Row) -> str | None:
    """What is wrong with a row: other outputs, answers that are missing, or too few proofs of its hits."""
    at = " ".join(map(str, report.identity(row)))
    proven, unproven = row["samples"], row["samples_unproven"]
    if row.get("outputs_equal") is False:
        return f"{at}: the outputs differ from those of the engine's first hit in HBM"
    if proven + unproven < row.get("requests", 1):
        return f"{at}: {proven} of {row.get('requests', 1)} requests were answered"
    if not proven or unproven > MOST_UNPROVEN * (proven + unproven):
        return f"{at}: {unproven} of {proven + unproven} samples have no proof of their hit"
    return None


def last_words(log: str, count: int = 20) -> list[str]:
    """What sglang_xmem refused with, or else the end of an engine's log."""
    lines = log.splitlines()
    # SGLang logs its whole configuration in one line of many kilobytes.
    return [line for line in lines if line.startswith("sglang_xmem: ")] or [line[:300] for line in lines[-count:]]
