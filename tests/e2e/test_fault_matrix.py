"""The kill matrix on the CPU engine: no answer is wrong, none hangs, and only damage on the way costs a request."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e import fault_matrix, harness
from tests.e2e.fault_matrix import SURVIVED, Row

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def matrix(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], harness.Result]:
    return fault_matrix.survived(str(tiny_model), 1, tmp_path_factory.mktemp("faults"))


def test_no_answer_is_wrong(matrix: tuple[list[Row], harness.Result]) -> None:
    rows, result = matrix
    # A tier that is still set aside for the fault before meets none; on a slow machine that may happen to one.
    assert sum(not row.met for row in rows) <= 1
    assert {row.fault for row in rows} == set(SURVIVED)
    assert [row for row in rows if row.wrong or row.hung] == []
    assert result.statuses == [0]
    assert result.survivors == []


def test_damage_on_the_way_alone_costs_a_request(matrix: tuple[list[Row], harness.Result]) -> None:
    rows, _ = matrix
    lost = {(row.fault, row.state): row.lost_requests for row in rows if row.lost_requests}
    met = {(row.fault, row.state) for row in rows if row.met}
    assert lost == {case: 1 for case in [("flip load", "tier hit")] if case in met}


def test_a_tier_is_set_aside_and_used_again(matrix: tuple[list[Row], harness.Result]) -> None:
    _, result = matrix
    for what in ("store", "load"):
        assert f"is set aside: a {what} was refused" in result.log
    # The load that was refused was made by plain copies.
    assert result.answers["refuse load 0 tier hit"].cached.get("host", 0) > 0
    assert result.log.count("is used again") >= 2
    # In the round behind the refusals, copies were late and the hit came from the tier.
    assert result.answers["delay 0 tier hit"].cached.get("host", 0) > 0


def test_a_copy_that_never_ends_ends_the_rank(tiny_model: Path, tmp_path: Path) -> None:
    row, log, _ = fault_matrix.hang(str(tiny_model), 3, tmp_path)
    assert row.hung == 0
    # The store of the last answer may still be in flight, and hit the fault before the load does.
    assert re.search("A (load|store) of tier dram did not end within 3 s", log)


def test_a_tier_without_memory_ends_the_start_in_a_sentence(tiny_model: Path) -> None:
    """The plan found it there; when the rank asks, it is gone."""
    refusal = harness.start_refused(harness.XMEM_DRAM, str(tiny_model), [], 600, {harness.ALLOCATIONS: "0"})
    assert refusal.status == 78
    said = [line for line in refusal.stderr.splitlines() if line.startswith("sglang_xmem: ")]
    assert said == [
        "sglang_xmem: --hicache-xmem-tier dram is unavailable: the memory is gone, as a test asked for.",
        "sglang_xmem: A rank exited during startup; see its error above.",
    ], refusal.stderr[-4000:]
    assert "Traceback" not in refusal.stderr
