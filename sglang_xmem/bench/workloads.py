"""What the benchmarks ask: prompts that are the same in every process, agents' conversations and recorded traces.

A prompt is a list of parts. A part is either drawn from a seed, so that equal seeds give equal tokens everywhere, or
given as tokens (what a model answered).
"""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_xmem.errors import ConfigError

#: The lowest ids of most vocabularies are special tokens.
FIRST_TOKEN = 3
#: Tokens of one hash id in Mooncake's traces (kvcache-ai/Mooncake, FAST25-release/traces).
TRACE_BLOCK_TOKENS = 512
#: Of a trace's timestamp, in ms: a hundred years.
MOST_MS = 3.2e12


@dataclass(frozen=True)
class Drawn:
    """`count` tokens drawn from `seed`; a smaller count gives a prefix of a larger one's."""

    seed: str
    count: int

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Given:
    """These tokens."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompt:
    """Parts in order; equal leading parts are a common prefix."""

    parts: tuple[Drawn | Given, ...]

    @staticmethod
    def drawn(seed: str, count: int) -> Prompt:
        """A prompt of one drawn part."""
        return Prompt((Drawn(seed, count),))

    def then(self, *parts: Drawn | Given) -> Prompt:
        """This prompt with more behind it; empty parts are left out."""
        return Prompt((*self.parts, *(part for part in parts if len(part))))

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Materializer:
    """Turns prompts into token ids and keeps the drawn parts that were used last.

    Args:
        vocab: ids are below this.
        kept_tokens: how many tokens of drawn parts are kept.
    """

    def __init__(self, vocab: int, kept_tokens: int = 4_000_000) -> None:
        self._ids = range(FIRST_TOKEN, vocab)
        self._kept_tokens = kept_tokens
        self._kept: OrderedDict[Drawn, list[int]] = OrderedDict()
        self._size = 0

    def __call__(self, prompt: Prompt) -> list[int]:
        ids: list[int] = []
        for part in prompt.parts:
            ids += self._draw(part) if isinstance(part, Drawn) else part.ids
        return ids

    def _draw(self, part: Drawn) -> list[int]:
        found = self._kept.get(part)
        if found is None:
            found = random.Random(part.seed).choices(self._ids, k=part.count)
            self._kept[part] = found
            self._size += part.count
            while self._size > self._kept_tokens and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[0].count
        self._kept.move_to_end(part)
        return found


# ---- agents ----


@dataclass(frozen=True)
class Agents:
    """Agents that work on contexts of their own behind one system prompt.

    Attributes:
        agents: how many, all at work at once.
        turns: requests of each, one after another.
        system_tokens: prompt that all share.
        context_tokens: what an agent brings along in its first turn (files, documents).
        turn_tokens: what each further turn adds to the answer before it.
        output_tokens: length of each answer.
        think_s: mean seconds between an answer and the next turn; each is drawn from 0.5 to 1.5 times this.
        seed: equal seeds give equal agents.
        page: tokens.
        share: (k, n) for every n-th of them from number k on, where several engines share them.
    """

    agents: int
    turns: int
    system_tokens: int
    context_tokens: int
    turn_tokens: int
    output_tokens: int
    think_s: float
    seed: int
    page: int
    share: tuple[int, int] = (0, 1)

    @property
    def mine(self) -> range:
        """Numbers of this engine's agents."""
        return range(self.share[0], self.agents, self.share[1])

    def first(self, agent: int) -> Prompt:
        """An agent's first prompt."""
        system = Drawn(f"{self.seed} system", self.system_tokens)
        return Prompt(()).then(system, Drawn(f"{self.seed} context {agent}", self.context_tokens))

    def following(self, prompt: Prompt, answer: Sequence[int], agent: int, turn: int) -> Prompt:
        """The prompt of `turn` (from 1), with the one before and its answer as prefix."""
        return prompt.then(Given(tuple(answer)), Drawn(f"{self.seed} turn {turn} {agent}", self.turn_tokens))

    def think(self, agent: int, turn: int) -> float:
        """Seconds before `turn`."""
        return self.think_s * random.Random(f"{self.seed} think {turn} {agent}").uniform(0.5, 1.5)

    def prompt_tokens(self, turn: int) -> int:
        """Length of the prompt of `turn`, from 0."""
        return self.system_tokens + self.context_tokens + turn * (self.output_tokens + self.turn_tokens)

    @property
    def final_tokens(self) -> int:
        """An agent's context after its last answer."""
        return self.prompt_tokens(self.turns - 1) + self.output_tokens

    @property
    def total_tokens(self) -> int:
        """KV cache of this engine's agents' final contexts, the system prompt once."""
        return self.system_tokens + len(self.mine) * (self.final_tokens - self.system_tokens)


# ---- traces ----


@dataclass(frozen=True)
class TraceRequest:
    """One line of a trace: when it came (s from the trace's start), what it asked, how much was answered."""

    arrival_s: float
    prompt: Prompt
    output_tokens: int


def read_trace(
    path: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_output: int | None = None,
    block_tokens: int = TRACE_BLOCK_TOKENS,
    share: float = 1.0,
) -> list[TraceRequest]:
    """Read a trace in Mooncake's format: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids`.

    Each id is a block of tokens, equal ids for equal ones; ids become tokens drawn from the id.

    Args:
        path: JSON Lines file.
        seed: with another, the same ids become other tokens.
        limit: the first so many requests.
        max_tokens: longer prompts are cut at their end, so that shared prefixes stay.
        max_output: longer answers are cut.
        block_tokens: tokens of one id.
        share: of conversations, above 0 to 1; which ones follows from the seed. A trace of many GPUs' requests sees its
            blocks again on time scales that one GPU's cache does not reach; some of its conversations keep theirs.

    Raises:
        ConfigError: the file is missing, or a line is not of that format.
    """
    entries = list(_entries(path, limit if share >= 1 else None, block_tokens))
    if share < 1:
        entries = _of_some_conversations(entries, share, seed)[:limit]
    if not entries:
        part, fix = ("", "Name another file") if share >= 1 else (f" in a share of {share:g}", "Give more (--share)")
        raise ConfigError(f"The trace {path} has no requests{part}. {fix}.")
    first = min(entry.arrival_ms for entry in entries)
    requests = []
    for entry in entries:
        length = min(entry.length, max_tokens or entry.length)
        output = min(max(entry.output, 1), max_output or max(entry.output, 1))
        prompt = Prompt(tuple(_blocks(entry.ids, length, block_tokens, seed)))
        requests.append(TraceRequest((entry.arrival_ms - first) / 1e3, prompt, output))
    return sorted(requests, key=lambda request: request.arrival_s)


@dataclass(frozen=True)
class _Entry:
    """A line of a trace: when (ms), tokens of the prompt and of the answer, and the prompt's blocks."""

    arrival_ms: float
    length: int
    output: int
    ids: list[int]


def _entries(path: Path, limit: int | None, block_tokens: int) -> Iterator[_Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"The trace {path} cannot be read: {error.strerror}. Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The trace {path} is not UTF-8 text. Name another file.") from None
    for number, line in enumerate([line for line in lines if line.strip()][:limit], 1):
        entry = _entry(line)
        if entry is None:
            raise ConfigError(
                f"Line {number} of {path} is not a request of a Mooncake trace. Give JSON objects with timestamp (ms), "
                "input_length and output_length (whole numbers of tokens) and hash_ids (a list of whole numbers)."
            )
        if len(entry.ids) != -(-entry.length // block_tokens):
            blocks = f"{-(-entry.length // block_tokens)} blocks of {block_tokens}"
            raise ConfigError(
                f"Line {number} of {path} has {len(entry.ids)} hash_ids for a prompt of {entry.length} tokens, which "
                f"is {blocks}. Give the trace's own size of blocks (--block-tokens)."
            )
        yield entry


def _entry(line: str) -> _Entry | None:
    """A line's request, None where it is not one."""
    try:
        found = json.loads(line)
        at, length, output, ids = (found[k] for k in ("timestamp", "input_length", "output_length", "hash_ids"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    numbers = [length, output, *ids] if isinstance(ids, list) else [None]
    if not all(type(value) is int for value in numbers) or type(at) not in (int, float):
        return None
    # Python's integers have no limit, and its comparison of one with a float no error.
    if not 0 <= at <= MOST_MS or math.isnan(at) or not 1 <= length <= 1 << 27 or not 0 <= output <= 1 << 27:
        return None
    return _Entry(float(at), length, output, ids)


def _of_some_conversations(entries: Sequence[_Entry], share: float, seed: int) -> list[_Entry]:
    """All requests of about `share` of the conversations.

    A conversation is what has the same block behind those that all requests begin with, such as a system prompt.
    """
    common = 0
    for column in zip(*(entry.ids for entry in entries), strict=False):
        if len(set(column)) > 1:
            break
        common += 1
    kept = []
    for number, entry in enumerate(entries):
        name = f"block {entry.ids[common]}" if len(entry.ids) > common else f"request {number}"
        if random.Random(f"{seed} conversation {name}").random() < share:
            kept.append(entry)
    return kept


def _blocks(ids: list[int], length: int, block_tokens: int, seed: int) -> Iterator[Drawn]:
    for index in range(-(-length // block_tokens)):
        yield Drawn(f"{seed} block {ids[index]}", min(block_tokens, length - index * block_tokens))


def reusable_tokens(requests: Sequence[TraceRequest]) -> int:
    """Prompt tokens that a cache without limits would hold already, by whole blocks seen before as a prefix."""
    seen: set[Any] = set()
    reusable = 0
    for request in requests:
        prefix, unbroken = 0, True
        for part in request.prompt.parts:
            prefix = hash((prefix, part))
            unbroken = unbroken and prefix in seen
            reusable += len(part) if unbroken else 0
            seen.add(prefix)
    return reusable


def distinct_tokens(requests: Sequence[TraceRequest]) -> int:
    """Tokens of KV cache that the whole trace fills in a cache without limits, answers included."""
    return sum(len(request.prompt) + request.output_tokens for request in requests) - reusable_tokens(requests)
