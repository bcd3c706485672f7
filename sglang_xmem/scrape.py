"""Reads a server's /metrics as data for `sglang-xmem top`. Imports only the standard library."""

from __future__ import annotations

import http.client
import math
import re
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sglang_xmem.errors import ConfigError
from sglang_xmem.metrics import DIRECTIONS, FAMILIES, LOOKUPS, PREFIX

_LINE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_RANK = ("dp_rank", "pp_rank", "tp_rank")


class Sample(NamedTuple):
    """A line of the text format."""

    name: str
    labels: Mapping[str, str]
    value: float


def fetch(url: str, timeout_s: float = 10) -> str:
    """Fetch the text of a server's /metrics.

    Args:
        url: address of the server, such as http://127.0.0.1:30000.

    Raises:
        ConfigError: no server responds, or it has no metrics.
    """
    address = url.rstrip("/") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as reply:
            text: str = reply.read().decode(errors="replace")
            return text
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise ConfigError(f"{url} has no metrics. Start SGLang with --enable-metrics.") from None
        raise ConfigError(f"{address} returned status {error.code}. Check --url.") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"No server responds at {url} ({reason}). Start SGLang, or set --url to it.") from None


def parse(text: str) -> list[Sample]:
    """Parse samples of Prometheus' text format; other lines are skipped."""
    samples = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.fullmatch(line.strip())
        if match is not None:
            samples.append(Sample(match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"])))
    return samples


def numbers(samples: Iterable[Sample], url: str) -> dict[str, Any]:
    """Summarize the metrics since the server's start.

    Returns: `tokens` of prompts by place of the hit, and a list of `ranks` with the numbers of each.

    Raises:
        ConfigError: the server serves without a tier.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    ranks: dict[tuple[str, ...], dict[str, Any]] = {}
    prompts = 0.0
    model = ""
    for name, labels, value in samples:
        if name == "sglang:prompt_tokens_total":
            prompts += value
        elif name == "sglang:cached_tokens_total":
            found["tokens"][labels.get("cache_source", "")] += int(value)
        elif name.startswith(PREFIX):
            model = labels.get("model_name", model)
            key = tuple(labels.get(label, "0") for label in _RANK)
            rank = ranks.setdefault(key, _empty_rank(dict(zip(_RANK, key, strict=True))))
            _add(rank, name.removeprefix(PREFIX), labels, value)
    if not ranks:
        raise ConfigError(f"{url} has no metrics of a tier. Start SGLang with --hicache-use-xmem.")
    hits = {source: found["tokens"][source] for source in ("device", "host", "storage")}
    computed = max(0, int(prompts) - sum(hits.values()))
    tokens = {"device": hits["device"], "tier": hits["host"], "storage": hits["storage"], "computed": computed}
    return {"url": url, "model": model, "tokens": tokens, "ranks": [ranks[key] for key in sorted(ranks)]}


def _empty_rank(rank: dict[str, str]) -> dict[str, Any]:
    return {
        "rank": {label: int(number) for label, number in rank.items()},
        "tier": "",
        "copier": "",
        "healthy": True,
        "capacity_bytes": 0,
        "used_bytes": 0,
        "pinned_bytes": 0,
        "copies": {
            direction: {"count": 0, "bytes": 0, "seconds": 0.0, "pages": 0, "buckets": {}} for direction in DIRECTIONS
        },
        **{family.key: {} for family in FAMILIES if family.label != "direction"},
    }


def _add(rank: dict[str, Any], name: str, labels: Mapping[str, str], value: float) -> None:
    copy = rank["copies"].get(labels.get("direction"))
    if name == "tier_healthy":
        rank["healthy"] = rank["healthy"] and bool(value)
        rank["tier"] = labels.get("tier", "")
    elif name == "tier_info":
        rank["copier"] = labels.get("copier", "")
    elif name in ("tier_capacity_bytes", "tier_used_bytes", "tier_pinned_bytes"):
        rank[name.removeprefix("tier_")] += int(value)
    elif copy is not None:
        if name == "copy_seconds_bucket":
            copy["buckets"][labels["le"]] = int(value)
        elif name == "copy_seconds_sum":
            copy["seconds"] = value
        elif name == "copy_bytes_sum":
            copy["bytes"] = int(value)
        elif name == "copy_bytes_count":
            copy["count"] = int(value)
        elif name == "copy_pages_total":
            copy["pages"] = int(value)
    for family in FAMILIES:
        if name == family.name and family.key in rank:
            rank[family.key][labels.get(family.label, "")] = int(value)


def since(now: Any, before: Any) -> Any:
    """Return `now` with its counters less those of `before`: the changes in an interval."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {
            key: value if key in _LEVELS else since(value, before.get(key, 0 if not isinstance(value, dict) else {}))
            for key, value in now.items()
        }
    if isinstance(now, list) and isinstance(before, list):
        return [since(a, b) for a, b in zip(now, before, strict=True)] if len(now) == len(before) else now
    if isinstance(now, (int, float)) and not isinstance(now, bool):
        return now - before
    return now


#: Keys that are not counters.
_LEVELS = ("rank", "capacity_bytes", "used_bytes", "pinned_bytes", "healthy")


def total(ranks: Sequence[dict[str, Any]], direction: str) -> dict[str, Any]:
    """Sum the copies of all ranks in one direction."""
    copies = [rank["copies"][direction] for rank in ranks]
    buckets: Counter[str] = Counter()
    for copy in copies:
        buckets.update(copy["buckets"])
    keys = ("count", "bytes", "seconds", "pages")
    return {**{key: sum(copy[key] for copy in copies) for key in keys}, "buckets": dict(buckets)}


def lookups(look: Mapping[str, Any]) -> dict[str, int]:
    """Return pages of prompts by place of the hit. Ranks of tensor and pipeline parallelism look up the same pages."""
    found = Counter(dict.fromkeys(LOOKUPS.known, 0))
    for rank in look["ranks"]:
        if not rank["rank"]["tp_rank"] and not rank["rank"]["pp_rank"]:
            found.update(rank[LOOKUPS.key])
    return dict(found)


def quantile(buckets: Mapping[str, int], q: float) -> float | None:
    """Return the `q` quantile of copy durations in seconds, interpolated as in Prometheus; None without copies.

    Args:
        buckets: copies up to each bound, keyed by the bound as text.
    """
    bounds = sorted((float(bound), count) for bound, count in buckets.items())
    if not bounds or not bounds[-1][1]:
        return None
    wanted = q * bounds[-1][1]
    lower, below = 0.0, 0
    for bound, count in bounds:
        if count >= wanted and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower
