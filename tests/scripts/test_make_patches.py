"""patches/: what `scripts/make_patches.py` makes, and a SGLang that has one is patched no further."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts import make_patches
from sglang_xmem.engines.sglang import versions
from tests.unit.engines.other_sglang import PATCHES, patched, unpacked
from tests.unit.engines.test_hooks import ALL_HOOKS, play, value_of


@pytest.mark.parametrize("version", versions.known())
def test_patches_are_up_to_date(version: str) -> None:
    made, patch = make_patches.make_patch(unpacked(version))
    assert made == version
    assert patch == (PATCHES / f"sglang-{version}.patch").read_text()


@pytest.mark.cpu_engine
@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
def test_a_patched_sglang_gets_no_hook(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """The same comparison that sees every hook in test_hooks sees none: all is in the sources already."""
    folder = patched(versions.known()[0], tmp_path / "patched")
    value = value_of(play(tmp_path_factory, "flag_on", sglang=str(folder))["flag_on"])
    assert value["in_launcher"] == []
    assert value["changed"] == []
    assert value["wrappers"] == {hook.target: 0 for hook in ALL_HOOKS}
