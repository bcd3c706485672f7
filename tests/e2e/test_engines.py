"""SGLang with HiCache in tier dram, from each entry point, on the CPU engine.

Every test that claims a hit checks where it came from (`cached_tokens_details`) and what it gave. CPU runs prove
indexing and control flow, and never the order of asynchronous copies.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import harness
from tests.e2e.harness import (
    EVICT_AND_ASK_AGAIN,
    PROMPT_TOKENS,
    STOCK,
    STORAGE_DIRECTORY,
    XMEM_DRAM,
    Result,
    Spec,
    Step,
    run,
)

pytestmark = pytest.mark.cpu_engine

SWAP_KV_ON_LOAD = {"SGLANG_CPU_SWAP_KV_ON_LOAD": "1"}


def cacheable(page_size: int) -> int:
    """Tokens of the prompt that can be cached: whole pages, and at least one token is computed."""
    return (PROMPT_TOKENS - 1) // page_size * page_size


def check_tier_hit(answers: Mapping[str, harness.Answer], page_size: int = 16) -> None:
    """The third kind of request came from the host pool alone, and gave what the others gave."""
    expected = answers["cold"]
    whole = cacheable(page_size)
    assert sum(expected.cached.values()) == 0
    for name in ("device_hit", "device_hit_again"):
        assert answers[name].cached == {"device": whole, "host": 0}
        assert answers[name].output_ids == expected.output_ids
    assert answers["tier_hit"].cached == {"device": 0, "host": whole}
    assert answers["tier_hit"].output_ids == expected.output_ids
    # The same computation on the same bytes: equal to the last bit.
    assert answers["tier_hit"].logprobs == answers["device_hit"].logprobs
    # Otherwise equal outputs would say nothing about what was loaded.
    assert answers["changed"].output_ids != expected.output_ids


def check_ended(result: Result) -> None:
    """SGLang ended by itself, without an error, and left no process."""
    assert result.survivors == []
    assert all(status == 0 for status in result.statuses)


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Result:
    """Stock HiCache through sgl.Engine, without the flag."""
    return run(Spec("engine", str(tiny_model), STOCK))


@pytest.fixture(scope="module")
def restarted(tiny_model: Path) -> Result:
    """Tier dram through sgl.Engine, started three times in a row in one process."""
    return run(Spec("engine", str(tiny_model), XMEM_DRAM, starts=3))


def test_stock_hicache_without_the_flag(stock: Result) -> None:
    check_tier_hit(stock.answers)
    check_ended(stock)
    assert stock.tier is None


def test_damaged_load_is_noticed(tiny_model: Path) -> None:
    """Negative control: with K and V swapped on load the very check used here has to fail."""
    result = run(Spec("engine", str(tiny_model), STOCK, environment=SWAP_KV_ON_LOAD, forked=True))
    assert result.answers["tier_hit"].cached["host"] == cacheable(16)
    with pytest.raises(AssertionError):
        check_tier_hit(result.answers)


def test_engine_three_starts_in_a_row(restarted: Result, stock: Result) -> None:
    check_ended(restarted)
    assert restarted.tier == "dram"
    assert len(restarted.starts) == 3
    for answers in restarted.starts:
        check_tier_hit(answers)
        assert answers["tier_hit"].output_ids == stock.answers["tier_hit"].output_ids


FLUSH: tuple[Step, ...] = (
    ("flush",),
    ("ask", "after_flush", "A"),
    ("flood",),
    ("ask", "tier_hit_after_flush", "A"),
)


def test_launch_server_flush_and_sigterm(tiny_model: Path, stock: Result) -> None:
    steps = [*EVICT_AND_ASK_AGAIN, *FLUSH]
    result = run(Spec("launch_server", str(tiny_model), XMEM_DRAM, steps, stop="SIGTERM"))
    check_tier_hit(result.answers)
    assert result.tier == "dram"
    assert result.answers["tier_hit"].output_ids == stock.answers["tier_hit"].output_ids
    # flush_cache empties device pool and tier; both fill again.
    assert sum(result.answers["after_flush"].cached.values()) == 0
    assert result.answers["tier_hit_after_flush"].cached == {"device": 0, "host": cacheable(16)}
    assert result.answers["tier_hit_after_flush"].output_ids == result.answers["cold"].output_ids
    check_ended(result)


def test_sglang_serve_and_sigkill(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "xmem.json"
    path.write_text(json.dumps({"copy": {"kernel": "torch"}}))
    # Any layout and io backend is accepted: the tier has its own layout.
    options = {
        **XMEM_DRAM,
        "hicache_xmem_config": f"@{path}",
        "hicache_mem_layout": "page_first_direct",
        "hicache_io_backend": "direct",
    }
    result = run(Spec("serve", str(tiny_model), options, stop="SIGKILL"))
    check_tier_hit(result.answers)
    assert result.tier == "dram"
    # Nothing else was signalled: the schedulers have to notice by themselves.
    assert result.survivors == []
    assert result.statuses == [-9]


def test_no_flag_gives_stock_hicache_in_a_server(tiny_model: Path) -> None:
    """`--no-hicache-use-xmem` overrides earlier flags; io backend direct is stock's other copy."""
    options = {**STOCK, "hicache_io_backend": "direct", "hicache_use_xmem": False}
    result = run(Spec("launch_server", str(tiny_model), options))
    check_tier_hit(result.answers)
    check_ended(result)
    assert result.tier is None


@pytest.mark.parametrize(
    ("page_size", "options"),
    [
        pytest.param(
            1, {"hicache_write_policy": "write_back", "hicache_xmem_config": {"dram": {}}}, id="page 1, write_back"
        ),
        pytest.param(64, {"hicache_write_policy": "write_through_selective"}, id="page 64, write_through_selective"),
    ],
)
def test_page_sizes_and_policies(tiny_model: Path, page_size: int, options: dict[str, Any]) -> None:
    result = run(Spec("engine", str(tiny_model), {**XMEM_DRAM, "page_size": page_size, **options}, forked=True))
    check_tier_hit(result.answers, page_size)
    check_ended(result)
    assert result.tier == "dram"


def test_storage_backend_file_on_top_of_the_tier(tiny_model: Path, tmp_path: Path, restarted: Result) -> None:
    """A fresh process finds the pages that another one stored, and they come through the tier."""
    options = {
        **XMEM_DRAM,
        "hicache_storage_backend": "file",
        # Else the prompt may be computed before its pages have been read.
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    environment = {STORAGE_DIRECTORY: str(tmp_path)}
    store: list[Step] = [("ask", "cold", "A"), ("await_files", str(tmp_path), PROMPT_TOKENS // 16)]
    first = run(Spec("engine", str(tiny_model), options, store, environment, forked=True))
    second = run(Spec("engine", str(tiny_model), options, [("ask", "from_storage", "A")], environment, forked=True))
    hit = second.answers["from_storage"]
    assert hit.cached.get("device", 0) == 0
    assert hit.cached.get("host", 0) + hit.cached.get("storage", 0) == cacheable(16)
    assert hit.output_ids == first.answers["cold"].output_ids == restarted.answers["cold"].output_ids
    assert hit.logprobs == restarted.answers["device_hit"].logprobs
    check_ended(second)


def check_refusal(refusal: harness.Refusal, expected: list[str]) -> None:
    """One line says what is wrong, in the user's terms, without a traceback."""
    assert refusal.status > 0
    assert "Traceback" not in refusal.stderr
    said = [line for line in refusal.stderr.splitlines() if line.startswith("sglang_xmem: ")]
    assert len(said) == 1, refusal.stderr
    for part in expected:
        assert part in said[0]


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    # name: arguments, what the message has to say
    "without HiCache": ([], ["--hicache-use-xmem", "--enable-hierarchical-cache"]),
    "peer without a GPU": (["--hicache-xmem-tier", "peer"], ["--hicache-xmem-tier", "peer", "GPU"]),
    "bank without a service": (["--hicache-xmem-tier", "bank"], ["--hicache-xmem-tier", "bank", "sglang-xmem mtierd"]),
    "unknown tier": (["--hicache-xmem-tier", "floppy"], ["--hicache-xmem-tier", "floppy", "dram"]),
    "unknown key": (["--hicache-xmem-config", '{"drum": {}}'], ["--hicache-xmem-config", "drum", "dram"]),
    "bad JSON": (["--hicache-xmem-config", '{"dram": '], ["--hicache-xmem-config", "JSON"]),
    "no such file": (["--hicache-xmem-config", "@/no/such.json"], ["--hicache-xmem-config", "/no/such.json"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(tiny_model: Path, case: str) -> None:
    arguments, expected = REFUSED[case]
    without_hicache = {"enable_hierarchical_cache": None} if case == "without HiCache" else {}
    refusal = harness.start_refused(without_hicache, str(tiny_model), ["--hicache-use-xmem", *arguments])
    check_refusal(refusal, expected)


def test_mistake_in_a_configuration_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "xmem.json"
    path.write_text(json.dumps({"copy": {"kernel": "none such"}}))
    arguments = ["--hicache-use-xmem", "--hicache-xmem-config", f"@{path}"]
    check_refusal(harness.start_refused({}, str(tiny_model), arguments), ["--hicache-xmem-config", "copy", "kernel"])


def test_bad_input_is_refused_by_the_command_line_itself(tiny_model: Path) -> None:
    """The other refusals run in a forked process; this one is the command as a user gives it."""
    command = [*harness.serve_command(), str(tiny_model), "--device", "cpu", "--hicache-use-xmem"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    refusal = harness.Refusal(done.returncode, done.stdout, done.stderr)
    check_refusal(refusal, ["--hicache-use-xmem", "--enable-hierarchical-cache"])
