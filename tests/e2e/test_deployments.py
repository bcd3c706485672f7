"""Engines of several ranks, each with a tier of its own: a hit loads what each rank stored, and gives a hit's bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import EVICT_AND_ASK_AGAIN, PROMPT_TOKENS, XMEM_DRAM, Spec, Step, run

pytestmark = pytest.mark.cpu_engine

PAGE = 16
WHOLE = (PROMPT_TOKENS - 1) // PAGE * PAGE
RANKS = 2
#: A core for each rank; without it SGLang wants a NUMA node for each.
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass(frozen=True)
class Deployment:
    """Two ranks.

    Attributes:
        options: keywords of sgl.Engine.
        replicas: requests are assigned round-robin, and each has a cache of its own.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1

    def steps(self) -> list[Step]:
        """Every step once per replica, its answers named after it."""
        return [
            (operation, f"{names[0]} {replica}", *names[1:]) if names else (operation,)
            for operation, *names in EVICT_AND_ASK_AGAIN
            for replica in range(self.replicas)
        ]


DEPLOYMENTS: Mapping[str, Deployment] = {
    "tp": Deployment({"tp_size": 2}),
    "pp": Deployment({"pp_size": 2}),
    "dp attention": Deployment({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, replicas=2),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_each_rank_loads_what_it_stored(name: str, tiny_model: Path) -> None:
    deployment = DEPLOYMENTS[name]
    spec = Spec(
        "launch_server",
        str(tiny_model),
        {**XMEM_DRAM, **deployment.options},
        deployment.steps(),
        CORES,
        start_timeout_s=240,
        forked=True,
    )
    result = run(spec)
    assert result.tier == "dram"
    answers = result.answers
    for replica in range(deployment.replicas):
        cold, hit, again, tier, changed = (
            answers[f"{step} {replica}"] for step in ("cold", "device_hit", "device_hit_again", "tier_hit", "changed")
        )
        assert hit.cached == again.cached == {"device": WHOLE, "host": 0}
        assert tier.cached == {"device": 0, "host": WHOLE}
        assert cold.output_ids == tier.output_ids != changed.output_ids
        assert tier.logprobs == hit.logprobs
    loads = [load for load in result.loads if load.moved.get("kv") == WHOLE]
    assert len(loads) == RANKS
    assert all(load.wrong == {"kv": 0} for load in loads)
    assert result.survivors == []
