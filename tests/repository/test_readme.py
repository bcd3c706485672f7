"""What README.md says of the package is what the package is."""

from __future__ import annotations

import re

from sglang_xmem.engines.sglang import geometry, launcher, versions
from sglang_xmem.tiers import tier_classes
from tests import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def row(name: str) -> str:
    """The row of the support matrix, or of the tiers."""
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", README, re.MULTILINE)
    assert found is not None, name
    return found.group(1)


def test_versions() -> None:
    assert re.findall(r"\d+\.\d+\.\d+", row("SGLang")) == sorted(versions.known())


def test_storage_backends() -> None:
    assert set(re.findall(r"`(\w+)`", row("storage (L3)"))) == set(launcher.BACKENDS)


def test_tiers() -> None:
    for name in tier_classes():
        row(f"`{name}`")


def test_every_pool_class_is_named_or_refused() -> None:
    words = {
        "MHATokenToKVPoolHost": "MHA/GQA",
        "AsymmetricMHATokenToKVPoolHost": "asymmetric K and V",
        "MHATokenToKVPoolMXFP8Host": "MXFP8",
        "MHATokenToKOnlyPoolHost": "MiniMax sparse",
        "MLATokenToKVPoolHost": "MLA",
        "DSAIndexerPoolHost": "DSA indexer",
        "MambaPoolHost": "Mamba",
        "DeepSeekV4PagedHostPool": "DeepSeek-V4",
        "DeepSeekV4StateHostPool": "DeepSeek-V4",
        "MiniMaxM3Nvfp4IndexKPoolHost": "NVFP4",
        "MiniMaxM3Nvfp4MainKVPoolHost": "NVFP4",
        "LogicalHostPool": "DeepSeek-V4",  # its anchor, which holds no bytes
        "UnifiedPageEnvelopeHostPool": "unified memory",
        "PageInterleaveHostPool": "sharding",
    }
    assert words.keys() == geometry.DESCRIBERS.keys(), "say in README.md what became of the pool class"
    text = row("KV pools") + row("refused")
    assert not [word for word in words.values() if word not in text]


def test_messages_are_in_the_sources() -> None:
    """Dots are values."""
    messages = re.findall(r"^\| `([^`]+)` \| ", README[README.index("## When something is wrong") :], re.MULTILINE)
    assert len(messages) >= 2
    paths = (REPOSITORY / "sglang_xmem").rglob("*.py")
    sources = re.sub(r"\{[^}]*\}", "...", "".join(path.read_text(encoding="utf-8") for path in paths))
    assert not [message for message in messages if message not in sources]


def test_it_is_short() -> None:
    assert len(README.split()) <= 900
