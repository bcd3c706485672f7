"""Real SGLang servers on GPUs, with a model whose outputs depend on the KV: what comes from a tier is what was stored.

The benchmarks' dummy weights cannot show this: their outputs are the same with the load left out.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import REPOSITORY
from tests.e2e.harness import (
    EVICT_AND_ASK_AGAIN,
    GPU_OPTIONS,
    PROMPT_TOKENS,
    STORAGE_DIRECTORY,
    Answer,
    Result,
    Spec,
    Step,
    run,
)

pytestmark = pytest.mark.gpu

HERE = Path(__file__).resolve().parent
PAGE = 16
WHOLE = (PROMPT_TOKENS - 1) // PAGE * PAGE
TIERS: dict[str, dict[str, Any]] = {
    "dram": {"hicache_xmem_tier": "dram"},
    "dram_relayed": {"hicache_xmem_tier": "dram", "hicache_xmem_config": '{"dram": {"relays": [1]}}'},
    "peer": {"hicache_xmem_tier": "peer", "hicache_xmem_config": '{"peer": {"gpus": [1], "copy_on": "rank"}}'},
    "peer_copies": {
        "hicache_xmem_tier": "peer",
        "hicache_xmem_config": '{"peer": {"gpus": [1], "copy_on": "peer"}}',
    },
}
#: Tensor parallelism 2, each rank with a peer of its own that copies. All-reduces without NVLink's multicast, which not
#: every machine has.
TIERS["peer_tp"] = {
    "hicache_xmem_tier": "peer",
    "hicache_xmem_config": '{"peer": {"copy_on": "peer"}}',
    "tp_size": 2,
    "disable_custom_all_reduce": True,
    "enforce_disable_flashinfer_allreduce_fusion": True,
}
GPUS = {"dram": 1, "dram_relayed": 2, "peer": 2, "peer_copies": 2, "peer_tp": 4}
TIER_NAMES = [pytest.param(name, marks=pytest.mark.gpus(count)) for name, count in GPUS.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep and wide enough for a load to take a while; not so sharp that rounding decides."""
    directory = tmp_path_factory.mktemp("model") / "qwen3"
    script = REPOSITORY / "scripts" / "make_tiny_model.py"
    size = ["--layers", "16", "--hidden-size", "1024", "--heads", "16", "--kv-heads", "8", "--head-dim", "128"]
    subprocess.run([sys.executable, str(script), str(directory), *size, "--sharpness", "2"], check=True)
    return directory


def serve(model: Path, tier: str, steps: Sequence[Step] = EVICT_AND_ASK_AGAIN, **more: Any) -> Result:
    """Take a server of a tier through `steps`; `more` are its environment's variables in upper case, else options."""
    environment = {name: value for name, value in more.items() if name.isupper()}
    options = {name: value for name, value in more.items() if not name.isupper()}
    options = {**GPU_OPTIONS, "hicache_use_xmem": True, **TIERS[tier], **options}
    return run(Spec("launch_server", str(model), options, steps, environment, start_timeout_s=400))


def same_bits(found: Answer, hit: Answer, again: Answer) -> None:
    """A hit's log probabilities are those of a device hit, where the engine repeats those; else a warning says so."""
    if hit.logprobs == again.logprobs:
        assert found.logprobs == hit.logprobs
    else:
        warnings.warn("this engine does not repeat itself to the last bit, so bits were not compared", stacklevel=2)


def check(result: Result) -> None:
    """The tier hit came from the tier, and gave what hits in the GPU's own pool gave.

    Not what the uncached request gave: that computes in another shape, and rounds differently.
    """
    answers = result.answers
    hit, again, tier = answers["device_hit"], answers["device_hit_again"], answers["tier_hit"]
    assert hit.cached == {"device": WHOLE, "host": 0}
    assert tier.cached == {"device": 0, "host": WHOLE}
    assert tier.output_ids == hit.output_ids
    same_bits(tier, hit, again)
    assert answers["changed"].output_ids != hit.output_ids  # else outputs would say nothing of the KV


@pytest.mark.parametrize("tier", TIER_NAMES)
def test_a_tier_hit_gives_what_a_device_hit_gives(model: Path, tier: str) -> None:
    result = serve(model, tier)
    assert result.tier == tier.partition("_")[0]
    check(result)
    assert result.survivors == []


@pytest.mark.parametrize("tier", TIER_NAMES)
def test_pages_come_back_from_storage_through_the_tier(model: Path, tier: str, tmp_path: Path) -> None:
    """Those that another server stored in files."""
    storage = {
        "hicache_storage_backend": "file",
        # Else the prompt may be computed before its pages have been read.
        "hicache_storage_prefetch_policy": "wait_complete",
        STORAGE_DIRECTORY: str(tmp_path),
    }
    serve(model, tier, [("ask", "cold", "A"), ("await_files", str(tmp_path), PROMPT_TOKENS // 16)], **storage)
    answers = serve(model, tier, [("ask", name, "A") for name in ("stored", "device_hit", "again")], **storage).answers
    stored, hit, again = (answers[name] for name in ("stored", "device_hit", "again"))
    assert stored.cached.get("device", 0) == 0
    assert stored.cached.get("host", 0) + stored.cached.get("storage", 0) == WHOLE
    assert hit.cached["device"] == WHOLE
    assert stored.output_ids == hit.output_ids
    same_bits(stored, hit, again)


def test_a_load_that_is_left_out_is_noticed(model: Path) -> None:
    """Negative control: the very check used here has to fail."""
    steps = [*EVICT_AND_ASK_AGAIN[:-2], ("leave_out", "kv"), *EVICT_AND_ASK_AGAIN[-2:]]
    result = serve(model, "dram", steps)
    assert result.answers["tier_hit"].cached == {"device": 0, "host": WHOLE}
    with pytest.raises(AssertionError):
        check(result)
