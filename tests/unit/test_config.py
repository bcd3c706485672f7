"""The user's options: what is taken, and every refusal with its way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_xmem.config import parse_options
from sglang_xmem.errors import ConfigError


def test_defaults_have_every_tier() -> None:
    options = parse_options("auto", None)
    assert set(options.tiers) == {"mtier", "peer", "dram"}
    assert options.copy.kernel == "auto"
    assert options.tiers["peer"].gpus is None


@pytest.mark.parametrize("as_dict", [True, False])
def test_json_text_and_dict_are_the_same(as_dict: bool) -> None:
    config = {
        "peer": {"gpus": [3, 1], "stripe_mib": 64},
        "dram": {"numa_node": 1, "relays": [2]},
        "copy": {"load": {"ctas": 16}},
    }
    options = parse_options("peer", config if as_dict else json.dumps(config))
    assert options.tiers["peer"].gpus == (3, 1)
    assert options.tiers["dram"].numa_node == 1
    assert options.tiers["dram"].relays == (2,)
    assert options.copy.load == {"ctas": 16}


def test_changes_to_copies_may_be_a_few_of_their_settings() -> None:
    changes = {"rings": 2, "stages": 2, "stage_bytes": 32768}
    assert parse_options("auto", {"copy": {"load": changes, "store": {"stages": 2}}}).copy.load == changes


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "xmem.json"
    path.write_text('{"dram": {"numa_node": 0}}')
    assert parse_options("dram", f"@{path}").tiers["dram"].numa_node == 0


@pytest.mark.parametrize(
    ("tier", "config", "words"),
    [
        ("bogus", None, ["--hicache-xmem-tier", "'bogus'", "auto", "peer", "dram"]),
        ("auto", "{", ["--hicache-xmem-config", "not JSON"]),
        ("auto", "[1]", ["--hicache-xmem-config", "JSON object", "[1]"]),
        ("auto", "@/does/not/exist.json", ["--hicache-xmem-config", "/does/not/exist.json", "No such file"]),
        ("auto", '{"peers": {}}', ["unknown key 'peers'", "known keys: mtier, peer, dram, copy"]),
        ("auto", '{"peer": {"gpu": 1}}', ["unknown key 'gpu' in 'peer'", "known keys: gpus, stripe_mib"]),
        ("auto", '{"mtier": {"bank": 1}}', ["unknown key 'bank' in 'mtier'", "known keys: banks"]),
        ("auto", '{"peer": {"gpus": "1"}}', ["'peer' is wrong", "gpus"]),
        ("auto", '{"peer": 1}', ["'peer' must be a JSON object"]),
        ("auto", '{"copy": {"kernel": "fast"}}', ["'copy' is wrong", "fast"]),
        ("auto", '{"copy": {"load": {"ctas": -1}}}', ["copy.load", "-1"]),
        ("auto", '{"copy": {"load": {"stages": 1}}}', ["copy.load", "pending_stores=1 is out of range"]),
        ("auto", '{"copy": {"store": {"blocks": 3}}}', ["copy.store", "blocks", "known keys: variant, ctas"]),
    ],
)
def test_refusals_name_option_value_and_way_out(tier: str, config: str | None, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(tier, config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
