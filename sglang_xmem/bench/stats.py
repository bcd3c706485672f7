"""Numbers of the reports: percentiles, spread, rates. Times in ms, rates in GB/s with GB = 1e9 bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks (Hyndman and Fan's type 7, numpy's default).

    Args:
        values: at least one, in any order.
        percent: 0 to 100.
    """
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    # This form never leaves [low, high], which the symmetric one does by a rounding.
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
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


def summary(values: Sequence[float], percents: Sequence[int] = PERCENTILES) -> dict[str, Any]:
    """p50 and further percentiles, min, max, and the interval of the median; all None without values."""
    names = [f"p{percent}" for percent in percents]
    if not values:
        return {**dict.fromkeys([*names, "min", "max"]), "p50_interval": None}
    return {
        **{name: round(percentile(values, percent), 3) for name, percent in zip(names, percents, strict=True)},
        "min": round(min(values), 3),
        "max": round(max(values), 3),
        "p50_interval": [round(edge, 3) for edge in median_interval(values)],
    }


def gbps(nbytes: float, ms: float) -> float:
    """GB/s of so many bytes in so many milliseconds."""
    return nbytes / ms / 1e6


def transfer_rates(nbytes: float, ms: float, link_gbps: float | None) -> dict[str, float]:
    """What a hit's bytes by its TTFT amount to, for its row: `gbps`, and the share of a known link's rate."""
    rate = gbps(nbytes, ms)
    found = {"gbps": round(rate, 3)}
    return {**found, "link_gbps": link_gbps, "link_share": round(rate / link_gbps, 4)} if link_gbps else found


def transfer_hidden(tier_ms: float, hbm_ms: float, nbytes: float, link_gbps: float) -> float:
    """Share of a transfer that hid behind compute, 0 to 1.

    An HBM hit does the same computation without the transfer. So what the tier's hit takes longer is what did not
    hide: 1 - (tier - hbm) / (bytes / link). An estimate: other costs of a load count as transfer that did not hide.
    """
    transfer_ms = nbytes / link_gbps / 1e6
    return min(1.0, max(0.0, 1 - (tier_ms - hbm_ms) / transfer_ms))


def apart(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two intervals have nothing in common."""
    return a[1] < b[0] or b[1] < a[0]


def differs(a: tuple[float, float], b: tuple[float, float], change: float) -> bool:
    """Whether a change is larger than the spread: intervals apart, and the change wider than both of them."""
    return abs(change) > max(a[1] - a[0], b[1] - b[0]) and apart(a, b)
