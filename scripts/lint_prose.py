#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Find words that a reader must look up or read twice: lint_prose.py [FILE...]

Checks entire Markdown files and scripts, and comments, docstrings and strings of Python, C++ and CUDA, but not
identifiers. Finds phrases across line breaks too. Exit status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".cu", ".h", ".cpp", ".sh", ".service"}
#: Regular expressions, with a space for any white space, and replacements.
WORDS = {
    r"pass(?:es|ed|ing)? (?:\w+ )?over": "skip, skipped",
    r"way out": "fix, remedy",
    r"told|tells?": "reported, reports, says",
    r"dealt|in turn": "assigned round-robin, alternately, one by one",
    r"rests|resting|asleep|awake": "idle clocks",
    r"room": "free capacity, space",
    r"seats?": "rank plan",
    r"besides?": "concurrently with, next to",
    r"stands(?! in\b| for\b)": "is",
    r"in place of": "instead of",
    r"taken": "in use, used",
    r"cannot be had": "unavailable",
    r"(?<!there.)is no (?!such.)(?:\w+ )?"
    r"(?:number|list|file|object|JSON|GPU|trace|name|size|address|tier|setting|count|valid)s?": "is not a",
    r"(?:ms|us|bytes|counters?|events?|launch(?:es)?|units?) an? (?:layer|rank|page|token)": "per layer",
    r"(?:lines?|rows?|record|class|file|plan|suite|stream|thread) an? "
    r"(?:rank|layer|page|tier|kind|contract|reason|case|run|plane|frame|GPU|token|measurement|process|test|change)": (
        "per rank"
    ),
    r"whoever|somebody(?:'s)?|anybody(?:'s)?": "the caller, the process, a request",
    r"meanwhile": "concurrently, in the meantime",
    r"all the same": "anyway, still",
    r"outlasts?": "survives",
    r"likewise": "the same, too",
    r"anew": "again, re-",
    r"as ever": "unchanged",
    r"for good": "permanently",
    r"hand(?:s|ed|ing)? (?:it |them )?out": "grants, allocates",
    r"to be had": "available",
    r"takes? turns": "alternate, are serialized",
    r"under way": "in flight, in progress",
    r"knows? nothing of": "is independent of",
}
PATTERN = re.compile(
    "|".join(rf"(?P<w{n}>\b(?:{words})\b)" for n, words in enumerate(WORDS)).replace(" ", r"[ \t]*(?:\n[ \t]*|[ \t])"),
    re.IGNORECASE,
)

_STRINGS = {getattr(tokenize, name) for name in ("STRING", "FSTRING_MIDDLE") if hasattr(tokenize, name)}
#: A comment, a string or a character literal of C++, whichever starts first.
_CPP = re.compile(r"(?P<prose>//[^\n]*|/\*.*?\*/|\"(?:[^\"\\\n]|\\.)*\")|'(?:[^'\\\n]|\\.)+'", re.DOTALL)
#: The mark at the start of a comment line.
_MARKS = re.compile(r"^([ \t]*)(#:?|///?|\*)(?= )", re.MULTILINE)
#: Expressions in an f-string, which Python 3.10 and 3.11 include in the token.
_FIELDS = re.compile(r"\{[^{}]*\}")


def found_in(text: str, suffix: str = ".md") -> list[tuple[int, str, str]]:
    """Return (line, words, replacement) of each finding."""
    prose = _prose(text, suffix)
    found = []
    for match in PATTERN.finditer(prose):
        index = next(n for n in range(len(WORDS)) if match[f"w{n}"])
        line = prose.count("\n", 0, match.start()) + 1
        found.append((line, " ".join(match[0].split()), list(WORDS.values())[index]))
    return found


def _prose(text: str, suffix: str) -> str:
    """Replace everything but prose by spaces, so that line numbers do not change."""
    if suffix == ".py":
        text = _only(text, _python_spans(text))
    elif suffix in (".cpp", ".cu", ".h"):
        text = _only(text, (match.span() for match in _CPP.finditer(text) if match["prose"]))
    return _MARKS.sub(lambda match: " " * len(match[0]), text)


def _only(text: str, spans: Iterator[tuple[int, int]]) -> str:
    blank = list(re.sub(r"[^\n]", " ", text))
    for start, end in spans:
        # Drop quotes too, so that adjacent strings read as one.
        blank[start:end] = text[start:end].replace('"', " ")
    return "".join(blank)


def _python_spans(text: str) -> Iterator[tuple[int, int]]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        if token.type == tokenize.COMMENT:
            yield start, end
        elif token.type in _STRINGS:
            at = start
            if re.match(r"\w*[fF]", token.string):
                for field in _FIELDS.finditer(text, start, end):
                    yield at, field.start()
                    at = field.end()
            yield at, end


def files() -> list[Path]:
    """List the tracked files, without this script and its test."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    own = {"scripts/lint_prose.py", "tests/scripts/test_lint_prose.py"}
    paths = [path for path in listing.stdout.split("\0") if path and path not in own]
    return [ROOT / path for path in paths if Path(path).suffix in SUFFIXES and (ROOT / path).is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all tracked files")
    count = 0
    for path in parser.parse_args().files or files():
        for line, words, instead in found_in(path.read_text(encoding="utf-8"), path.suffix):
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{name}:{line}: {words!r}: write {instead}", file=sys.stderr)
            count += 1
    print(f"prose: {count} findings", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
