"""Traces: what is read of them, and which lines and files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem.bench.trace import as_flags, read_trace, reusable_tokens
from sglang_xmem.errors import ConfigError

NAMES = ("timestamp", "input_length", "output_length", "hash_ids")


def trace(path: Path, *requests: tuple[int, int, int, list[int]]) -> Path:
    """A file in Mooncake's format."""
    path.write_text("".join(json.dumps(dict(zip(NAMES, request, strict=True))) + "\n" for request in requests))
    return path


def test_blocks_and_cuts(tmp_path: Path) -> None:
    lines = [(5000, 1000, 7, [0, 1]), (5500, 1300, 9, [0, 1, 2]), (9001, 600, 0, [3, 1]), (9000, 512, 3, [0])]
    path = trace(tmp_path / "t.jsonl", *lines)
    requests = read_trace(path)
    assert [request.timestamp for request in requests] == [0, 500, 4000, 4001]
    assert [request.blocks(512) for request in requests[:2]] == [[(0, 512), (1, 488)], [(0, 512), (1, 512), (2, 276)]]
    assert [request.output_length for request in requests] == [7, 9, 3, 1]
    # Of the second request the first block was there; the second block was cut short before, so it is not whole.
    assert reusable_tokens(requests, 512) == 512 + 512
    (cut,) = read_trace(path, limit=1, max_tokens=520, max_output=4)
    assert (cut.input_length, cut.blocks(512), cut.output_length) == (520, [(0, 512), (1, 8)], 4)


def test_a_share_of_the_conversations(tmp_path: Path) -> None:
    """Whole ones: all requests that go on from the same block behind the prefix that everybody has."""
    turns = [(10 * number, 1200 + number // 50, 1, [7, 8, 100 + number % 50]) for number in range(200)]
    path = trace(tmp_path / "t.jsonl", *turns)
    kept = read_trace(path, share=0.3)
    conversations = {request.hash_ids[2] for request in kept}
    assert 5 <= len(conversations) <= 25
    assert len(kept) == 4 * len(conversations), "all turns of each"
    assert kept == read_trace(path, share=0.3)
    assert kept != read_trace(path, share=0.3, seed=1)
    assert len(read_trace(path, share=0.3, limit=7)) == 7
    assert kept[0].timestamp == 0
    with pytest.raises(ConfigError, match=r"no requests in a share of 1e-09. Give more \(--share\)"):
        read_trace(path, share=1e-9)
    same = trace(tmp_path / "same.jsonl", *((number, 512, 1, [0]) for number in range(100)))
    assert 20 <= len(read_trace(same, share=0.5)) <= 80, "requests of the common prefix alone are one each"


GOOD: dict[str, Any] = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}
BAD: list[dict[str, Any]] = [
    *({"timestamp": value} for value in (float("nan"), -5, 1e22, 10**400, True, "0")),
    *({"input_length": value} for value in (float("inf"), 512.7, 0, 10**9)),
    *({"hash_ids": value} for value in (["a"], "abc", None)),
    {"output_length": -1},
]


LINES = [*(json.dumps({**GOOD, **bad}) for bad in BAD), "{}", "not JSON", "[1]", "[" * 10_000]
FILES = [(b"", "has no requests"), (b"\xff", "not UTF-8"), (None, "cannot be read")]
FILES += [(line.encode(), r"Line 1 of .*t\.jsonl is not a request of a Mooncake trace") for line in LINES]


@pytest.mark.parametrize(("content", "words"), FILES)
def test_files_that_are_no_traces(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_trace(path)


@pytest.mark.parametrize(("length", "ids"), [(40, [1, 2, 3]), (513, [1]), (64, [1, 2, 3, 4])])
def test_blocks_of_another_size_are_refused(tmp_path: Path, length: int, ids: list[int]) -> None:
    """A trace of blocks of 16 would be replayed with all of its prompts out of the first block or two."""
    path = trace(tmp_path / "t.jsonl", (0, length, 4, ids))
    with pytest.raises(ConfigError, match=r"blocks of 512\. Give the trace's own size of blocks \(--block-tokens\)"):
        read_trace(path)
    if length < 100:
        assert len(read_trace(path, block_tokens=16)) == 1


def test_flags_of_a_server() -> None:
    options = {"model_path": "/m", "enable_metrics": True, "skip_tokenizer_init": False, "x": None, "c": {"a": 1}}
    assert as_flags(options) == ["--model-path", "/m", "--enable-metrics", "--c", '{"a": 1}']
