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


def floor_ms(cpu_ms: float, forward_ms: float, load_ms: float, layers: int) -> float:
    """Least time to first token of a hit whose bytes come over a link, in ms.

    A load and a forward pass that go layer by layer are a pipeline of two stages: the slower one in full, and one layer
    of the faster one.

    Args:
        cpu_ms: what is done on the CPU before and after.
        forward_ms: the forward pass of a hit in HBM.
        load_ms: a contiguous copy of as many bytes over the same link.
    """
    return cpu_ms + max(forward_ms, load_ms) + min(forward_ms, load_ms) / layers


def apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals have nothing in common."""
    return a[1] < b[0] or b[1] < a[0]


def differs(a: Interval, b: Interval, change: float) -> bool:
    """Whether a change is larger than the spread: intervals apart, and the change wider than both of them."""
    return abs(change) > max(a[1] - a[0], b[1] - b[0]) and apart(a, b)
