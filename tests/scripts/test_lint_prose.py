# SPDX-License-Identifier: Apache-2.0
"""The prose linter: what it finds, and where it looks."""

from __future__ import annotations

import pytest

from scripts.lint_prose import found_in


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("peer is passed over, beside the others", ["passed over", "beside"]),
        ("PASSES IT OVER in place of it", ["PASSES IT OVER", "in place of"]),
        ("3 is no valid number", ["is no valid number"]),
        ("there is no GPU, and it is no such file", []),
        ("it is no longer there, and bathrooms are tell-tale", ["tell"]),
        ("two events a layer", ["events a layer"]),
        ("the events of a layer; a second; a layer", []),
        ("a class a kind of memory, and a line\na reason", ["class a kind", "line a reason"]),
        ("Whoever asks hands it out for good", ["Whoever", "hands it out", "for good"]),
        ("skipped, next to the others, instead of it", []),
        ("what stands there; what stands in for it, and stands for it", ["stands"]),
        ("one line in place\n  of two", ["in place of"]),
        ("one line in place\n\nof two", []),
    ],
)
def test_findings(text: str, findings: list[str]) -> None:
    assert [words for _, words, _ in found_in(text)] == findings
    assert all(instead for *_, instead in found_in(text))


@pytest.mark.parametrize(
    ("suffix", "text", "lines"),
    [
        (".py", 'room = 1  # no room\n"""Some\nroom."""\n', [1, 3]),
        (".py", 'x = f"{room} of {room!r}"\ny = f"no room {x}"\n', [2]),
        (".py", 'raise ValueError(\n    "it is "\n    "no number"\n)\n', [2]),
        (".py", "# Two events\n# a layer.\n", [1]),
        (".cpp", "int room = '\"'; // no room\n", [1]),
        (".h", 'f("http://room"); /* a\n * room */ int room;\n', [1, 2]),
        (".md", "room\n", [1]),
    ],
)
def test_only_prose_of_code_counts(suffix: str, text: str, lines: list[int]) -> None:
    assert [line for line, *_ in found_in(text, suffix)] == lines
