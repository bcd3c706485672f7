# SPDX-License-Identifier: Apache-2.0
"""The prose linter: what it finds, and that its counts only fall."""

from __future__ import annotations

import pytest

from scripts.lint_prose import found_in, lowered, worse


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("peer is passed over, beside the others", ["passed over", "beside"]),
        ("PASSES IT OVER in place of it", ["PASSES IT OVER", "in place of"]),
        ("3 is no valid number", ["is no valid number"]),
        ("it is no longer there, and bathrooms are tell-tale", ["tell"]),
        ("two events a layer", ["events a layer"]),
        ("the events of a layer; a second; a layer", []),
        ("skipped, next to the others, instead of it", []),
    ],
)
def test_findings(text: str, findings: list[str]) -> None:
    assert [words for _, words, _ in found_in(text)] == findings
    assert all(instead for *_, instead in found_in(text))


def test_counts_only_fall() -> None:
    allowed = {"a": 3, "gone": 4, "b": 1}
    assert worse({"a": 3, "b": 1}, allowed) == []
    assert len(worse({"a": 4, "new": 1}, allowed)) == 2
    assert lowered({"a": 2, "b": 5, "new": 1, "c": 0}, allowed) == {"a": 2, "b": 1}
