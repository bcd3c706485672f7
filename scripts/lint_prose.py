#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts words that say less than others: lint_prose.py [--update] [--list FILE...]

A ratchet: `scripts/prose_counts.json` has how many of them each file may have. A file with more fails; one with fewer
lowers its count at the next --update, which never raises one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNTS = Path(__file__).with_name("prose_counts.json")
SUFFIXES = {".py", ".md", ".cu", ".h", ".cpp", ".sh", ".service"}
#: Word for word, what to write instead.
WORDS = {
    r"pass(?:es|ed)? (?:\w+ )?over": "skip, skipped",
    r"way out": "fix, remedy",
    r"told|tells?": "reported, reports, says",
    r"dealt|in turn": "assigned round-robin",
    r"rests|resting|asleep|awake": "idle clocks",
    r"room": "free capacity, space",
    r"seats?": "rank plan",
    r"besides?": "concurrently with, next to",
    r"stands": "is",
    r"in place of": "instead of",
    r"taken": "in use, used",
    r"cannot be had": "unavailable",
    r"is no (?:\w+ )?(?:number|list|file|object|JSON|GPU|trace|name|size|address|tier|setting|count|valid)s?": (
        "is not a"
    ),
    r"(?:ms|us|bytes|counters?|events?|launch(?:es)?|units?) an? (?:layer|rank|page|token)": "per layer",
}
PATTERN = re.compile("|".join(rf"(?P<w{n}>\b(?:{words})\b)" for n, words in enumerate(WORDS)), re.IGNORECASE)


def found_in(text: str) -> list[tuple[int, str, str]]:
    """Line, words and what to write instead, of each finding."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in PATTERN.finditer(line):
            index = next(n for n in range(len(WORDS)) if match[f"w{n}"])
            found.append((number, match[0], list(WORDS.values())[index]))
    return found


def files() -> list[Path]:
    """What git tracks, but for this script, its test and results."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    own = {"scripts/lint_prose.py", "tests/scripts/test_lint_prose.py"}
    paths = [path for path in listing.stdout.split("\0") if path and path not in own]
    return [ROOT / path for path in paths if Path(path).suffix in SUFFIXES and (ROOT / path).is_file()]


def worse(counts: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """A line for each file that has more than it may."""
    return [
        f"{path}: {count} findings, {allowed.get(path, 0)} allowed; see scripts/lint_prose.py --list {path}"
        for path, count in counts.items()
        if count > allowed.get(path, 0)
    ]


def lowered(counts: dict[str, int], allowed: dict[str, int]) -> dict[str, int]:
    """What files may have from now on: as many as before at most, and none where there is none."""
    least = {path: min(count, allowed.get(path, 0)) for path, count in counts.items()}
    return {path: count for path, count in sorted(least.items()) if count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="lower the counts of files that have improved")
    parser.add_argument("--start", action="store_true", help="write the counts as they are; for a new word of the list")
    parser.add_argument("--list", nargs="+", metavar="FILE", help="all findings in files")
    arguments = parser.parse_args()
    if arguments.list:
        for name in arguments.list:
            for number, words, instead in found_in(Path(name).read_text(encoding="utf-8")):
                print(f"{name}:{number}: {words!r}: write {instead}")
        return 0
    counts = {str(path.relative_to(ROOT)): len(found_in(path.read_text(encoding="utf-8"))) for path in files()}
    allowed = counts if arguments.start else json.loads(COUNTS.read_text())
    if arguments.update or arguments.start:
        COUNTS.write_text(json.dumps(lowered(counts, allowed), indent=1) + "\n")
    problems = worse(counts, allowed)
    for line in problems:
        print(line, file=sys.stderr)
    print(f"prose: {sum(counts.values())} findings in {len(counts)} files", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
