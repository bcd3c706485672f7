"""Real SGLang servers on GPUs, with a model whose outputs depend on the KV: what comes from a tier is what was stored.

The benchmarks' dummy weights cannot show this: their outputs are the same with the load left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from harness import GPU_OPTIONS, PROMPT_TOKENS, Result, Spec, run

pytestmark = pytest.mark.gpu

HERE = Path(__file__).resolve().parent
PAGE = 16
WHOLE = (PROMPT_TOKENS - 1) // PAGE * PAGE
TIERS = {
    "dram": {"hicache_xmem_tier": "dram"},
    "peer": {"hicache_xmem_tier": "peer", "hicache_xmem_config": '{"peer": {"gpus": [1], "copy_on": "rank"}}'},
    "peer_copies": {
        "hicache_xmem_tier": "peer",
        "hicache_xmem_config": '{"peer": {"gpus": [1], "copy_on": "peer"}}',
    },
}
TIER_NAMES = ["dram", *(pytest.param(name, marks=pytest.mark.gpus(2)) for name in ("peer", "peer_copies"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep and wide enough for a load to take a while; not so sharp that rounding decides."""
    directory = tmp_path_factory.mktemp("model") / "qwen3"
    script = HERE.parents[1] / "scripts" / "make_tiny_model.py"
    size = ["--layers", "16", "--hidden-size", "1024", "--heads", "16", "--kv-heads", "8", "--head-dim", "128"]
    subprocess.run([sys.executable, str(script), str(directory), *size, "--sharpness", "2"], check=True)
    return directory


def serve(model: Path, tier: str, **environment: str) -> Result:
    options: dict[str, Any] = {**GPU_OPTIONS, "hicache_use_xmem": True, **TIERS[tier]}
    return run(Spec("launch_server", str(model), options, environment=environment, start_timeout_s=400))


def check(result: Result) -> None:
    """The tier hit came from the tier, and gave what hits in the GPU's own pool gave.

    Not what the uncached request gave: that computes in another shape, and rounds differently.
    """
    answers = result.answers
    hit, again, tier = answers["device_hit"], answers["device_hit_again"], answers["tier_hit"]
    assert hit.cached == {"device": WHOLE, "host": 0}
    assert tier.cached == {"device": 0, "host": WHOLE}
    assert tier.output_ids == hit.output_ids
    if hit.logprobs == again.logprobs:  # the engine repeats itself to the last bit
        assert tier.logprobs == hit.logprobs
    assert answers["changed"].output_ids != hit.output_ids  # else outputs would say nothing of the KV


@pytest.mark.parametrize("tier", TIER_NAMES)
def test_a_tier_hit_gives_what_a_device_hit_gives(model: Path, tier: str) -> None:
    result = serve(model, tier)
    assert result.tier == tier.removesuffix("_copies")
    check(result)
    assert result.survivors == []


def test_a_load_that_is_left_out_is_noticed(model: Path) -> None:
    """Negative control: the very check used here has to fail."""
    path = os.pathsep.join(filter(None, [str(HERE / "without_loads"), os.environ.get("PYTHONPATH")]))
    result = serve(model, "dram", PYTHONPATH=path)
    assert result.answers["tier_hit"].cached == {"device": 0, "host": WHOLE}
    with pytest.raises(AssertionError):
        check(result)
