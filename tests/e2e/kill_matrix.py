"""The page bank's kill matrix: who is killed, in what an engine does; every answer compared with an uncached one.

A kill falls at a random time (of a seed) while the engine is about it: computing and storing a new prompt, loading one
from its tier, publishing what it has just answered, or adopting a prompt's pages from the bank.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.sglang_server import Answer, ServerFailed
from tests.e2e.bank_rig import Engine, Service, engine, until
from tests.e2e.fault_matrix import REFERENCE
from tests.e2e.harness import (
    BASE_OPTIONS,
    DEVICE_POOL_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    START_TIMEOUT_S,
    ForkedServer,
    prompt,
)

VICTIMS = ("service", "engine", "both")
PHASES = ("idle", "store", "load", "publish", "take")
#: An answer that takes longer hangs.
HUNG_S = 60.0


class Row(NamedTuple):
    """What kills of one kind did.

    Attributes:
        answers: that were compared.
        lost_requests: that got no answer; more than none where the engine lives is a fault.
        found_tokens: of the last question of each round, from the bank.
    """

    victim: str
    phase: str
    rounds: int
    answers: int
    wrong: int
    hung: int
    lost_requests: int
    found_tokens: int


class _Question(threading.Thread):
    def __init__(self, asked: Engine, name: str) -> None:
        super().__init__(daemon=True)
        self._engine, self._name = asked, name
        self.answer: Answer | None = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        begun = time.monotonic()
        with contextlib.suppress(ServerFailed, OSError, ValueError):
            self.answer = self._engine.ask(self._name)
        self.seconds = time.monotonic() - begun


class Matrix:
    """One engine and one service, which are killed and started again.

    Args:
        folder: for logs and the socket.
        rounds: of each cell.
        seed: of the times of kills.
    """

    def __init__(self, model: Path, folder: Path, rounds: int, seed: int = 0) -> None:
        self._model, self._folder, self._rounds = model, folder, rounds
        self._random = random.Random(seed)
        self._starts = 0
        self._stack = contextlib.ExitStack()

    def run(self, victims: Sequence[str] = VICTIMS, phases: Sequence[str] = PHASES) -> Iterator[Row]:
        """A row per cell, as soon as it is there."""
        names = [f"{v} {p} {n}" for v in victims for p in phases for n in range(self._rounds)]
        right = self._right(names)
        self._service = Service(self._folder)
        try:
            self._start()
            for victim in victims:
                for phase in phases:
                    yield self._cell(victim, phase, right)
        finally:
            self._stack.close()
            self._service.kill()

    def _right(self, names: Sequence[str]) -> dict[str, list[int]]:
        options = {**BASE_OPTIONS, **REFERENCE, "model_path": str(self._model)}
        with ForkedServer(options, self._folder / "reference.log", {}) as server:
            server.wait_ready(2 * START_TIMEOUT_S)
            return {name: server.generate(prompt(name), OUTPUT_TOKENS).output_ids for name in names}

    def _start(self) -> None:
        self._starts += 1
        log = self._folder / f"engine{self._starts}.log"
        self._engine = self._stack.enter_context(engine(self._model, self._service, log))

    def _cell(self, victim: str, phase: str, right: dict[str, list[int]]) -> Row:
        answers: list[tuple[str, Answer | None]] = []
        hung = found = 0
        for number in range(self._rounds):
            name = f"{victim} {phase} {number}"
            self._prepare(phase, name)
            question = None
            if phase != "idle":
                question = _Question(self._engine, name)
                if phase == "publish":
                    question.join(HUNG_S)
                # Answers take some tenths of a second: of a load or an adoption, the most part is at their beginning.
                time.sleep(self._random.uniform(0, 0.05 if phase == "publish" else 0.4))
            self._kill(victim)
            if question is not None:
                question.join(HUNG_S)
                hung += question.is_alive()
                answers.append((name, question.answer))
            self._recover(victim)
            for _ in range(2):
                last = _Question(self._engine, name)
                last.join(HUNG_S)
                hung += last.is_alive()
                answers.append((name, last.answer))
                until(self._engine.client.flush_cache)
            found += last.answer.cached.get("storage", 0) if last.answer else 0
        given = [(name, answer) for name, answer in answers if answer is not None]
        wrong = [(name, answer) for name, answer in given if answer.output_ids != right[name]]
        for name, answer in wrong:
            print(f"{name}: {answer.output_ids}, right is {right[name]}; cached: {answer.cached}", file=sys.stderr)
        return Row(victim, phase, self._rounds, len(given), len(wrong), hung, len(answers) - len(given), found)

    def _prepare(self, phase: str, name: str) -> None:
        if phase in ("load", "take"):
            before = self._service.pages()
            self._engine.ask(name)
            if phase == "take":
                until(lambda: self._service.pages() > before)
                until(self._engine.client.flush_cache)
            else:
                for number in range(DEVICE_POOL_TOKENS // PROMPT_TOKENS + 2):
                    self._engine.ask(f"flood {name} {number}")

    def _kill(self, victim: str) -> None:
        if victim != "engine":
            self._service.kill_serving() if victim == "service" else self._service.kill()
        if victim != "service":
            self._engine.kill()

    def _recover(self, victim: str) -> None:
        if victim == "both":
            self._service.start()
        if victim != "service":
            self._stack.close()  # the engine is gone; its log is looked at
            self._start()
        else:
            self._service.wait()
            time.sleep(1.5)  # a session tries again each second
