"""The user's options: what is accepted, and every refusal with its fix."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_xmem import config as config_module
from sglang_xmem.config import check_copies, parse_options
from sglang_xmem.errors import ConfigError, FlagStyle


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (config_module.TIER_VARIABLE, config_module.CONFIG_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_defaults_have_every_tier() -> None:
    options = parse_options("auto", None)
    assert set(options.tiers) == {"mtier", "peer", "bank", "dram", "dax"}
    assert options.copy.kernel == "auto"
    assert options.tiers["peer"].gpus is None
    assert options == parse_options() == parse_options(None, "")


@pytest.mark.parametrize("as_dict", [True, False])
def test_json_text_and_dict_are_the_same(as_dict: bool) -> None:
    config = {
        "peer": {"gpus": [3, 1], "stripe_mib": 64},
        "dram": {"numa_node": 1, "relays": [2]},
        "dax": {"device": "/dev/dax9.0", "size_gib": 256},
        "copy": {"load": {"ctas": 16}},
    }
    options = parse_options("peer", config if as_dict else json.dumps(config))
    assert options.tiers["peer"].gpus == (3, 1)
    assert options.tiers["dram"].numa_node == 1
    assert options.tiers["dram"].relays == (2,)
    assert (options.tiers["dax"].offset_gib, options.tiers["dax"].size_gib) == (0, 256)
    assert options.copy.load == {"ctas": 16}


def test_changes_to_copies_may_be_a_few_of_their_settings() -> None:
    changes = {"rings": 2, "stages": 2, "stage_bytes": 32768}
    assert parse_options("auto", {"copy": {"load": changes, "store": {"stages": 2}}}).copy.load == changes


def test_integrity_has_three_levels() -> None:
    assert parse_options().integrity == "sample"
    assert [parse_options("auto", {"integrity": level}).integrity for level in ("off", "full")] == ["off", "full"]


def test_variables_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_XMEM_TIER", "dram")
    monkeypatch.setenv("SGLANG_XMEM_CONFIG", '{"dram": {"threads": 3}}')
    options = parse_options()
    assert (options.tier, options.tiers["dram"].threads) == ("dram", 3)
    given = parse_options("auto", {})
    assert (given.tier, given.tiers["dram"].threads) == ("auto", 0)
    monkeypatch.setenv("SGLANG_XMEM_TIER", "disk")
    with pytest.raises(ConfigError, match=r"^SGLANG_XMEM_TIER is 'disk'\. Give one of auto, "):
        parse_options()
    monkeypatch.setenv("SGLANG_XMEM_CONFIG", '{"dram": {"threads": "many"}}')
    with pytest.raises(ConfigError, match=r"^SGLANG_XMEM_CONFIG 'dram\.threads' is \"many\"\. Give a whole number\.$"):
        parse_options("auto")
    for name in ("SGLANG_XMEM_TIER", "SGLANG_XMEM_CONFIG"):
        monkeypatch.setenv(name, "")
    assert parse_options().tier == "auto"


def test_messages_name_the_engines_options() -> None:
    flags = FlagStyle("--size", "--tier", "--settings")
    with pytest.raises(ConfigError, match=r"^--tier is 'disk'\."):
        parse_options("disk", None, flags)
    with pytest.raises(ConfigError, match=r"^--settings 'peer' is 1\."):
        parse_options("auto", {"peer": 1}, flags)
    assert parse_options(flags=flags).flags == flags


# ---- files ----


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_file(tmp_path: Path, prefix: bytes) -> None:
    path = tmp_path / "xmem.json"
    path.write_bytes(prefix + b'{"dram": {"numa_node": 0}}')
    assert parse_options("dram", f"@{path}").tiers["dram"].numa_node == 0


def test_files_without_an_end_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b" " * ((1 << 20) + 1))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    start = time.monotonic()
    for name, words in (
        (str(tmp_path / "fifo"), "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("/dev/tty", "cannot be read|not a regular file"),
        (str(tmp_path), "cannot be read"),
        (str(tmp_path / "large"), "more than 1 MiB"),
        (str(tmp_path / "bytes"), "not UTF-8 text"),
        (str(tmp_path / "a\0b"), "zero byte"),
        ("", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            parse_options("auto", f"@{name}")
        assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 60
    (tmp_path / "large").write_bytes(b'{"dram": {}}'.ljust(1 << 20))
    parse_options("auto", f"@{tmp_path / 'large'}")


# ---- refusals ----

OPTION = "--hicache-xmem-config"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[1]", f"{OPTION} is [1]. Give a JSON object with one key per tier."),
        (
            '{"peers": {}}',
            f'{OPTION} has an unknown key "peers". Known keys: mtier, peer, bank, dram, dax, copy, integrity.',
        ),
        ({1: {}}, f"{OPTION} has an unknown key 1. Known keys: mtier, peer, bank, dram, dax, copy, integrity."),
        ('{"peer": 1}', f"{OPTION} 'peer' is 1. Give a JSON object."),
        ('{"peer": null}', f"{OPTION} 'peer' is null. Give a JSON object."),
        ('{"mtier": {"bank": 1}}', f"{OPTION} has an unknown key \"bank\" in 'mtier'. Known keys: banks."),
        ('{"peer": {"gpus": "1"}}', f"{OPTION} 'peer.gpus' is \"1\". Give a list or null."),
        ('{"peer": {"gpus": [1, "a"]}}', f"{OPTION} 'peer.gpus[1]' is \"a\". Give a whole number."),
        ('{"peer": {"gpus": [true]}}', f"{OPTION} 'peer.gpus[0]' is true. Give a whole number."),
        ('{"dram": {"threads": 1.5}}', f"{OPTION} 'dram.threads' is 1.5. Give a whole number."),
        ('{"dram": {"numa_required": 1}}', f"{OPTION} 'dram.numa_required' is 1. Give true or false."),
        ('{"dax": {"size_gib": "1"}}', f"{OPTION} 'dax.size_gib' is \"1\". Give a number or null."),
        ('{"peer": {"copy_on": "gpu"}}', f"{OPTION} 'peer.copy_on' is \"gpu\". Give auto, rank or peer."),
        ('{"copy": {"kernel": "fast"}}', f"{OPTION} 'copy.kernel' is \"fast\". Give auto, cuda, triton or torch."),
        ('{"copy": {"buffers": 1}}', f"{OPTION} has an unknown key \"buffers\" in 'copy'. "),
        (
            '{"copy": {"share_loads": true, "staging_mib": 64}}',
            f"{OPTION} 'copy.share_loads' is true and copy.staging_mib is 64. Leave one of them out.",
        ),
        (
            '{"copy": {"share_loads": true, "kernel": "triton"}}',
            f"{OPTION} 'copy.share_loads' is true and copy.kernel is triton. Leave one of them out.",
        ),
        ('{"copy": {"staging_mib": 31}}', f"{OPTION} 'copy.staging_mib' is 31. Give 32 to 16384, or 0 for none."),
        (
            '{"copy": {"staging_mib": 64, "kernel": "triton"}}',
            f"{OPTION} 'copy.staging_mib' is 64 and copy.kernel is triton. Leave it out.",
        ),
        ('{"copy": {"load": {"ctas": -1}}}', f"{OPTION} 'copy.load.ctas' is -1, which is out of range. "),
        ('{"copy": {"load": {"ctas": true}}}', f"{OPTION} 'copy.load.ctas' is true. Give a whole number."),
        ('{"copy": {"load": {"ctas": 1.5}}}', f"{OPTION} 'copy.load.ctas' is 1.5. Give a whole number."),
        ('{"copy": {"load": {"variant": "x"}}}', f"{OPTION} 'copy.load.variant' is \"x\". Give register or bulk."),
        (
            '{"copy": {"load": {"stages": 1}}}',
            f"{OPTION} 'copy.load' is {{\"stages\": 1}}: pending_stores=1 is out of ",
        ),
        ('{"copy": {"store": {"blocks": 3}}}', f"{OPTION} 'copy.store.blocks' is unknown. Known keys: variant, ctas"),
        ({"integrity": "some"}, f"{OPTION} 'integrity' is \"some\". Give sample, off or full."),
        ({"dram": {"threads": object}}, f"{OPTION} 'dram.threads' is <class 'object'>. Give a whole number."),
    ],
)
def test_refusals_name_setting_value_and_fix(config: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options("auto", config)
    message = str(caught.value)
    assert message.startswith(sentence)
    assert "\n" not in message
    assert "$" not in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"dax": {"size_gib": NaN}}',
        '{"dax": {"size_gib": -Infinity}}',
        '{"peer": {}, "peer": {"gpus": [1]}}',
        '{"peer": {"gpus": [1], "gpus": [2]}}',
        '{"a": ' + "1" * 5000 + "}",
        '{"a": ' * 100_000,
    ],
)
def test_what_is_no_json_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{OPTION} .* is not JSON \(.*\)\. Give an object like") as caught:
        parse_options("auto", text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("tier", ["bogus", "", 5, ["dram"], {"dram": {}}])
def test_an_unknown_tier_is_refused_with_those_there_are(tier: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^--hicache-xmem-tier is .*\. Give one of auto, mtier, peer, bank, dram, dax\.$"
    ):
        parse_options(tier)


# ---- settings of another kernel ----


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kernel": "torch", "load": {"variant": "bulk"}}, "'copy.load.variant' is \"bulk\" and copy.kernel is torch"),
        ({"kernel": "torch", "store": {"ctas": 3}}, "'copy.store.ctas' is 3 and copy.kernel is torch"),
        ({"kernel": "triton", "load": {"ctas": 3, "unroll": 4}}, "'copy.load.unroll' is 4 and copy.kernel is triton"),
    ],
)
def test_settings_of_another_kernel_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        parse_options("auto", {"copy": config})


def test_triton_takes_its_own_setting() -> None:
    options = parse_options("auto", {"copy": {"kernel": "triton", "load": {"ctas": 3}}})
    check_copies(options, on_gpu=True)


@pytest.mark.parametrize("settings", [{"dram": {"relays": [1]}}, {"peer": {"copy_on": "peer"}}])
def test_other_gpus_copy_with_cuda_alone(settings: dict[str, Any]) -> None:
    for kernel in ("triton", "torch"):
        with pytest.raises(ConfigError, match=rf"asks for copies by another GPU, and copy\.kernel is {kernel}"):
            parse_options("auto", {"copy": {"kernel": kernel}, **settings})
    for kernel in ("auto", "cuda"):
        parse_options("auto", {"copy": {"kernel": kernel}, **settings})
    # The other tier's setting is not used.
    unused = "peer" if "dram" in settings else "dram"
    parse_options(unused, {"copy": {"kernel": "triton"}, **settings})


@pytest.mark.parametrize(
    ("copy", "on_gpu", "words"),
    [
        ({"kernel": "cuda"}, False, "'copy.kernel' is cuda, but the engine runs on the CPU. Leave it out."),
        ({"kernel": "triton"}, False, "'copy.kernel' is triton, but the engine runs on the CPU. Leave it out."),
        ({"kernel": "torch"}, True, "'copy.kernel' is torch, but the engine runs on a GPU. Give cuda or triton."),
        ({"load": {"ctas": 3}}, False, "'copy.load.ctas' is 3 and the engine runs on the CPU. Leave it out."),
    ],
)
def test_a_kernel_that_the_device_cannot_have_is_refused(copy: dict[str, Any], on_gpu: bool, words: str) -> None:
    options = parse_options("auto", {"copy": copy})
    with pytest.raises(ConfigError) as caught:
        check_copies(options, on_gpu=on_gpu)
    assert str(caught.value) == f"{OPTION} {words}"
    check_copies(options, on_gpu=not on_gpu)
