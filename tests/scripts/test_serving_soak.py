"""The soak of a server notices what it is there for; servers are stand-ins here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from scripts.bench import serving_soak as soak
from scripts.sglang_server import Answer, Server

PROMPTS = soak.prompts(0)
EXPECTED = [[index, index + 1, index + 2] for index in range(len(PROMPTS))]


class FakeServer:
    port = 1  # nobody listens, so what hangs up has nothing to hang up on

    def __init__(self, spoil: str = "") -> None:
        self.spoil = spoil

    def generate(self, input_ids: Sequence[int], count: int) -> Answer:
        if self.spoil == "fail":
            raise RuntimeError("/generate answered 500")
        index = PROMPTS.index(list(input_ids))
        right = EXPECTED[index][:count]
        wrong = self.spoil == "last token" and index == 5
        return Answer([*right[:-1], 99] if wrong else right, [], {"host": 16}, 1.0)


def load(server: FakeServer) -> Any:
    return soak.Load(cast(Server, server), PROMPTS, EXPECTED, seed=0)


def test_prompts_share_prefixes_and_differ_behind_them() -> None:
    assert len({tuple(prompt) for prompt in PROMPTS}) == len(PROMPTS) == soak.FAMILIES * soak.MEMBERS
    assert len({tuple(prompt[: soak.PREFIX_TOKENS]) for prompt in PROMPTS}) == soak.FAMILIES
    assert soak.prompts(0) == PROMPTS != soak.prompts(1)


@pytest.mark.parametrize(("spoil", "key"), [("", None), ("last token", "wrong"), ("fail", "failed")])
def test_every_answer_is_compared(spoil: str, key: str | None) -> None:
    made = load(FakeServer(spoil))
    for index in range(len(PROMPTS)):
        made._ask(index, 2)
    problems = len(PROMPTS) if spoil == "fail" else 1 if key else 0
    assert made.counts["wrong"] == (problems if key == "wrong" else 0)
    assert made.counts["failed"] == (problems if key == "failed" else 0)
    assert len(made.problems) == problems
    assert made.counts["answers"] == len(PROMPTS) - made.counts["failed"]


def test_clients_do_everything_and_end() -> None:
    made = load(FakeServer())
    made.run(clients=4, seconds=1.0)
    assert all(made.counts[deed] for deed in soak.DEEDS)
    assert made.counts["from_host"] == 16 * made.counts["answers"]
