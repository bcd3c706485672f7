"""Prompts, agents and traces: the same everywhere, and what they say they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem.bench import workloads
from sglang_xmem.bench.workloads import Agents, Drawn, Given, Materializer, Prompt, read_trace
from sglang_xmem.errors import ConfigError

PARTS = st.lists(
    st.one_of(
        st.builds(Drawn, st.text(max_size=5), st.integers(1, 50)),
        st.builds(lambda ids: Given(tuple(ids)), st.lists(st.integers(0, 999), min_size=1, max_size=9)),
    ),
    max_size=6,
)


@given(PARTS)
def test_prompts_have_their_length(parts: list[Drawn | Given]) -> None:
    prompt = Prompt(tuple(parts))
    ids = Materializer(1000)(prompt)
    assert ids == Materializer(1000, kept_tokens=1)(prompt)
    assert len(ids) == len(prompt)


def test_tokens_are_the_same_in_another_process() -> None:
    code = (
        "from sglang_xmem.bench.workloads import *; print(Materializer(1024)(Prompt.drawn('0 prompt 256', 8)), end='')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    ids = Materializer(1024)(Prompt.drawn("0 prompt 256", 8))
    assert found == str(ids)
    assert min(ids) >= workloads.FIRST_TOKEN
    assert ids == Materializer(1024)(Prompt.drawn("0 prompt 256", 300))[:8]
    assert ids != Materializer(1024)(Prompt.drawn("1 prompt 256", 8))


def test_agents_share_and_grow() -> None:
    agents = Agents(3, 3, 32, 64, 16, 8, 1.0, seed=0, page=16)
    first = [Materializer(1000)(agents.first(agent)) for agent in range(3)]
    assert all(prompt[:32] == first[0][:32] for prompt in first)
    assert first[0][32:] != first[1][32:]
    second = agents.following(agents.first(0), list(range(8)), 0, 1)
    ids = Materializer(1000)(second)
    assert ids[: len(first[0])] == first[0]
    assert ids[len(first[0]) :][:8] == list(range(8))
    assert len(second) == agents.prompt_tokens(1)
    assert agents.final_tokens == 32 + 64 + 2 * (8 + 16) + 8
    assert 0.5 <= agents.think(0, 1) <= 1.5
    assert agents.think(0, 1) == agents.think(0, 1)


def trace(path: Path, *requests: tuple[int, int, int, list[int]]) -> Path:
    """A file in Mooncake's format."""
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, request, strict=True))) + "\n" for request in requests))
    return path


def test_trace_blocks(tmp_path: Path) -> None:
    path = trace(
        tmp_path / "t.jsonl",
        (5000, 1000, 7, [0, 1]),
        (5500, 1300, 9, [0, 1, 2]),
        (9000, 600, 0, [3, 1]),
        (9001, 512, 3, [0]),
    )
    requests = read_trace(path)
    ids = [Materializer(1000)(request.prompt) for request in requests]
    assert [request.arrival_s for request in requests] == pytest.approx([0, 0.5, 4.0, 4.001])
    assert [len(prompt) for prompt in ids] == [1000, 1300, 600, 512]
    assert ids[1][:1000] == ids[0]  # equal ids are equal content, also where the shorter one is cut
    assert ids[2][512:] == ids[0][512:600]
    assert ids[2][:512] != ids[0][:512]
    assert requests[2].output_tokens == 1
    assert read_trace(path, seed=1)[0].prompt != requests[0].prompt
    # Of the second request the first block was there; the second block was cut short before, so it is not whole.
    assert workloads.reusable_tokens(requests) == 512 + 512


def test_trace_cuts(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", (0, 1000, 70, [0, 1]), (1, 600, 7, [0, 2]))
    requests = read_trace(path, limit=1, max_tokens=520, max_output=4)
    assert [(len(r.prompt), r.output_tokens) for r in requests] == [(520, 4)]
    assert requests[0].prompt.parts[-1] == Drawn("0 block 1", 8)


def test_a_share_of_a_traces_conversations(tmp_path: Path) -> None:
    """Whole ones: all requests that go on from the same block behind the prefix that everybody has."""
    turns = [(10 * number, 1200 + number // 50, 1, [7, 8, 100 + number % 50]) for number in range(200)]
    path = trace(tmp_path / "t.jsonl", *turns)
    everything = read_trace(path)
    kept = read_trace(path, share=0.3)
    conversations = [{request.prompt.parts[2].seed for request in requests} for requests in (everything, kept)]  # type: ignore[union-attr]
    assert len(conversations[0]) == 50
    assert 5 <= len(conversations[1]) <= 25
    assert len(kept) == 4 * len(conversations[1]), "all turns of each"
    assert kept == read_trace(path, share=0.3)
    assert kept != read_trace(path, share=0.3, seed=1)
    assert len(read_trace(path, share=0.3, limit=7)) == 7
    assert kept[0].arrival_s == 0
    with pytest.raises(ConfigError, match=r"no requests in a share of 1e-09. Give more \(--share\)"):
        read_trace(path, share=1e-9)


def test_requests_of_the_common_prefix_alone_are_conversations_of_their_own(tmp_path: Path) -> None:
    path = trace(tmp_path / "t.jsonl", *((number, 512, 1, [0]) for number in range(100)))
    assert 20 <= len(read_trace(path, share=0.5)) <= 80


GOOD = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}


@pytest.mark.parametrize(
    "change",
    [
        {"timestamp": float("nan")},
        {"timestamp": -5},
        {"timestamp": 1e22},
        {"timestamp": 10**400},
        {"timestamp": True},
        {"timestamp": "0"},
        {"input_length": float("inf")},
        {"input_length": 512.7},
        {"input_length": 0},
        {"input_length": 10**9},
        {"output_length": -1},
        {"hash_ids": ["a"]},
        {"hash_ids": "abc"},
        {"hash_ids": None},
    ],
)
def test_lines_that_are_no_requests(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ConfigError, match=r"Line 1 of .*t\.jsonl is not a request of a Mooncake trace"):
        read_trace(path)


@pytest.mark.parametrize("text", ["", "{}", "not JSON", "[1]", '"x"', "[" * 10_000])
def test_files_that_are_no_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"t\.jsonl"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(("length", "ids"), [(40, [1, 2, 3]), (513, [1]), (64, [1, 2, 3, 4])])
def test_blocks_of_another_size_are_refused(tmp_path: Path, length: int, ids: list[int]) -> None:
    """A trace of blocks of 16 would be replayed with all of its prompts out of the first block or two."""
    path = trace(tmp_path / "t.jsonl", (0, length, 4, ids))
    with pytest.raises(ConfigError, match=r"blocks of 512\. Give the trace's own size of blocks \(--block-tokens\)"):
        read_trace(path)
    if length < 100:
        assert len(read_trace(path, block_tokens=16)[0].prompt) == length
