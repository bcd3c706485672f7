"""docs/operations.md says what the sources say. Its commands run in tests/e2e/test_operations.py."""

from __future__ import annotations

import re

import pytest

from sglang_xmem import metrics, sums
from tests import REPOSITORY

TEXT = (REPOSITORY / "docs" / "operations.md").read_text()
VARIABLE = re.compile(r"\b(?:SGLANG_XMEM|MTIER)_[A-Z_]*[A-Z]\b")
SUFFIXES = (".py", ".sh", ".h", ".cpp")


def first_cells(heading: str) -> list[str]:
    """First cells of the tables under a heading, without their own heads."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    return [cell for cell in cells if set(cell) - set("-:")]


def variables_in_sources() -> set[str]:
    """Environment variables that the package and its scripts read; macros of C++ are none."""
    found: set[str] = set()
    macros: set[str] = set()
    for folder in ("sglang_xmem", "scripts", "kernels"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in SUFFIXES and "build" not in path.parts:
                text = path.read_text()
                found |= set(VARIABLE.findall(text))
                macros |= set(re.findall(r"(?:#define |#ifdef |-D)(\w+)", text))
    return found - macros


def test_all_variables_are_documented() -> None:
    documented = {name for cell in first_cells("Environment variables") for name in VARIABLE.findall(cell)}
    assert documented == variables_in_sources()
    assert "SGLANG_XMEM_DEADLINE_S" in documented


def test_all_metrics_are_documented() -> None:
    section = TEXT.split("| metric | meaning |")[1].split("\n\n")[0]
    documented = {
        metrics.PREFIX + name for name in re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", section, re.M)))
    }
    ours = {name for name in metrics.series() if not re.search(r"_(bucket|sum|count)$", name)}
    histograms = {metrics.PREFIX + histogram.name for histogram in metrics.HISTOGRAMS}
    assert documented == ours | histograms


def test_all_pages_name_the_same_part_of_pages_that_is_compared() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {number for page in pages for number in re.findall(r"\bone (?:page )?in (\d+)\b", page.read_text())}
    assert named == {str(sums.EVERY["sample"])}


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (REPOSITORY / "docs" / target).exists(), target


def test_yaml_parses() -> None:
    yaml = pytest.importorskip("yaml")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert yaml.safe_load(block)["securityContext"]["capabilities"]["add"] == ["SYS_NICE"]
