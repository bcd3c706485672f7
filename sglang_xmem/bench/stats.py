"""Numbers of the reports: percentiles, spread, rates. Times in ms, rates in GB/s with GB = 1e9 bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)

Interval = tuple[float, float]


def median(values: Sequence[float]) -> float:
    """Of at least one value."""
    return float(np.median(values))


def median_interval(values: Sequence[float]) -> Interval:
    """Where the true median lies with about 95 %, from order statistics alone.

    Ranks n/2 -+ 0.98 sqrt(n), rounded outwards: the binomial distribution of how many samples fall below the median
    (David and Nagaraja, Order Statistics, 7.1), no resampling. Up to five samples this is their whole range.
    """
    ordered = sorted(values)
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)
    low = max(0, math.floor(n / 2 - reach))
    high = min(n - 1, math.ceil(n / 2 + reach) - 1)
    if n <= 5:
        low, high = 0, n - 1
    return ordered[low], ordered[high]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """p50 and further percentiles, min, max, and the interval of the median; all None without values."""
    names = [f"p{percent}" for percent in PERCENTILES]
    if not len(values):
        return {**dict.fromkeys([*names, "min", "max"]), "p50_interval": None}
    found = np.percentile(values, PERCENTILES)
    return {
        **{name: round(float(value), 3) for name, value in zip(names, found, strict=True)},
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "p50_interval": [round(edge, 3) for edge in median_interval(values)],
    }


def hit_ratio(hits: dict[str, int], prompt_tokens: int) -> dict[str, float]:
    """Share of prompt tokens by the cache that they came from, and their total."""
    whole = max(1, prompt_tokens)
    return {**{place: round(n / whole, 4) for place, n in hits.items()}, "total": round(sum(hits.values()) / whole, 4)}


def apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have nothing in common."""
    return a[1] < b[0] or b[1] < a[0]


def differs(a: Interval, b: Interval, change: float) -> bool:
    """Whether a change is larger than the spread: intervals apart, and the change wider than both of them."""
    return abs(change) > max(a[1] - a[0], b[1] - b[0]) and apart(a, b)
