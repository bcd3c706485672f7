"""Statistics against known values and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_xmem.bench import stats

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=60)


@given(VALUES)
def test_percentiles_are_ordered(values: list[float]) -> None:
    found = stats.summary(values)
    line = [found[name] for name in ("min", "p50", "p90", "p95", "p99", "max")]
    assert line == sorted(line)
    low, high = found["p50_interval"]
    assert found["min"] <= low <= found["p50"] <= high <= found["max"]


def test_summary_of_nothing() -> None:
    assert stats.summary([])["p50"] is None
    assert stats.summary([])["p50_interval"] is None


@pytest.mark.parametrize(
    ("n", "ranks"),
    # Tables of the sign test's 95 % confidence interval of a median give these ranks.
    [(1, (1, 1)), (3, (1, 3)), (5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (50, (18, 33))],
)
def test_median_interval_ranks(n: int, ranks: tuple[int, int]) -> None:
    low, high = stats.median_interval([float(i) for i in range(1, n + 1)])
    assert abs(low - ranks[0]) <= 1
    assert abs(high - ranks[1]) <= 1
    if n <= 10:
        assert (low, high) == ranks
