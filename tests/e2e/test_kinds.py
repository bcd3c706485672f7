"""HiCache with every kind of pools that SGLang's CPU engine can run: hits in the tier, and controls of each pool.

An engine a kind goes through all steps once. That a hit in the tier equals one in the device pool to the last bit says
something because the controls differ: with a pool's load left out, the same prompt gives another output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from tests.e2e import harness
from tests.e2e.harness import Result, run
from tests.e2e.kinds import KINDS, Kind, loads_of

pytestmark = pytest.mark.cpu_engine


class Way(NamedTuple):
    """A way to run HiCache."""

    options: Mapping[str, Any]
    environment: Mapping[str, str] = {}


ENGINES: Mapping[str, Way] = {
    "stock": Way({}),
    # Every page is compared, and none may be found wrong.
    "dram": Way({**harness.XMEM_DRAM, "hicache_xmem_config": {"integrity": "full"}}),
    # Querying whether a load has ended makes the lazy copier end it, so nothing watches or compares.
    "dram lazy": Way(
        {**harness.XMEM_DRAM, "hicache_xmem_config": {"integrity": "off"}},
        {harness.LAZY: "1", "SGLANG_XMEM_DEADLINE_S": "0"},
    ),
}


class Outcome(NamedTuple):
    """What a kind's engine gave."""

    kind: Kind
    engine: str
    result: Result


@pytest.fixture(scope="session")
def outcome_of(model_of: Callable[[Sequence[str]], str]) -> Callable[[str, str], Outcome]:
    """Runs an engine of a kind; once a session for each."""
    outcomes: dict[tuple[str, str], Outcome] = {}

    def outcome(engine: str, name: str) -> Outcome:
        if (engine, name) not in outcomes:
            kind = KINDS[name]
            result = run(kind.spec(model_of(kind.model), *ENGINES[engine]))
            outcomes[engine, name] = Outcome(kind, engine, result)
        return outcomes[engine, name]

    return outcome


@pytest.fixture(scope="module", params=[(engine, kind) for engine in ENGINES for kind in KINDS], ids="-".join)
def outcome(request: pytest.FixtureRequest, outcome_of: Callable[[str, str], Outcome]) -> Outcome:
    """Each engine with each kind."""
    return outcome_of(*request.param)


def check_tier_hit(kind: Kind, answers: Mapping[str, harness.Answer], name: str = "tier_hit") -> None:
    """The answer came from the tier alone, and is what a hit in the device pool gave."""
    expected = answers["device_hit"]
    assert answers["cold"].cached.get("device", 0) + answers["cold"].cached.get("host", 0) == 0
    assert expected.cached == {"device": kind.hit, "host": 0}
    assert answers["device_hit_again"].output_ids == expected.output_ids
    assert answers["device_hit_again"].logprobs == expected.logprobs
    assert answers[name].cached == {"device": 0, "host": kind.hit}
    assert answers[name].output_ids == expected.output_ids
    # The same computation on the same bytes: equal to the last bit.
    assert answers[name].logprobs == expected.logprobs
    # As many drafts were right; also says that their pool holds what it held.
    assert answers[name].verifications == expected.verifications


def test_tier_hit_equals_device_hit(outcome: Outcome) -> None:
    check_tier_hit(outcome.kind, outcome.result.answers)
    if not outcome.kind.extend:
        assert outcome.result.answers["device_hit"].output_ids == outcome.result.answers["cold"].output_ids
    assert outcome.result.survivors == []
    assert outcome.result.statuses == [0]
    assert outcome.result.tier == (None if outcome.engine == "stock" else "dram")
    assert "came back from the tier with wrong bytes" not in outcome.result.log
    assert "are damaged" not in outcome.result.log


def test_loads_move_every_pool_to_the_byte(outcome: Outcome) -> None:
    """SGLang asks for the pools that this kind is here for, and the device pools hold what they held."""
    kind = outcome.kind
    hit, *controls = loads_of(outcome.result.loads, kind)
    assert len(controls) == len(kind.loads)
    if harness.LAZY in ENGINES[outcome.engine].environment:
        return  # nothing is there yet when the load has been asked for
    assert hit.wrong == dict.fromkeys(kind.loads, 0)
    for left_out, load in zip(kind.loads, controls, strict=True):
        assert {pool for pool, wrong in load.wrong.items() if wrong} == {left_out}


def test_changed_prefix_changes_the_output(outcome: Outcome) -> None:
    """Otherwise equal outputs would say nothing about what was loaded."""
    answers = outcome.result.answers
    assert answers["changed"].output_ids != answers["tier_hit"].output_ids
    assert answers["changed"].cached.get("host", 0) + answers["changed"].cached.get("device", 0) == 0


def test_every_pool_left_out_is_noticed(outcome: Outcome) -> None:
    """Negative control: the very check used above fails for a hit whose load lacks a pool."""
    answers = outcome.result.answers
    for pool in outcome.kind.loads:
        name = f"without {pool}"
        assert answers[name].cached == {"device": 0, "host": outcome.kind.hit}
        if pool in outcome.kind.drafts:
            # Drafts are verified, so the output is right; it takes more rounds where drafts would have been right.
            assert answers[name].output_ids == answers["device_hit"].output_ids
            if not outcome.kind.drafts_right:
                continue
            assert answers[name].verifications > answers["device_hit"].verifications
        else:
            assert answers[name].output_ids != answers["device_hit"].output_ids
        with pytest.raises(AssertionError):
            check_tier_hit(outcome.kind, answers, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "stock"])
def test_outputs_are_those_of_stock(engine: str, kind: str, outcome_of: Callable[[str, str], Outcome]) -> None:
    """Not only equal among themselves."""
    ours, stock = (outcome_of(name, kind).result.answers for name in (engine, "stock"))
    for name in ("cold", "device_hit", "tier_hit", "changed"):
        assert (ours[name].output_ids, ours[name].logprobs) == (stock[name].output_ids, stock[name].logprobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [name for name, way in ENGINES.items() if harness.LAZY in way.environment])
def test_every_part_of_a_lazy_load_is_waited_for(
    engine: str, kind: str, outcome_of: Callable[[str, str], Outcome]
) -> None:
    """Copies that wait for a reader all find one, and (the other tests) come in time for it."""
    outcome = outcome_of(engine, kind)
    lazy = outcome.result.lazy_loads
    pools = len(outcome.kind.loads)
    # The hit's load, and one per control; a control that leaves out the only pool loads nothing.
    assert len(lazy) >= 1 + (pools if pools > 1 else 0)
    assert [waited for waited, _ in lazy] == [parts for _, parts in lazy]
