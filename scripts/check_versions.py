#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the tables of SGLang's versions with SGLang's sources: check_versions.py [SOURCE ...]

SOURCE is a wheel of SGLang, or a folder with an unpacked one; by default pip fetches the wheels of all versions with a
table. Reads syntax trees without importing SGLang, in seconds. Prints one line per finding. Exit status 1 if there are
findings.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.sglang_source import Sources  # noqa: E402
from sglang_xmem.engines.sglang import versions  # noqa: E402
from sglang_xmem.engines.sglang.versions import VersionTable  # noqa: E402

ADAPTER = REPOSITORY / "sglang_xmem" / "engines" / "sglang"
RESULTS = REPOSITORY / "docs" / "results" / "versions.jsonl"
#: Versions whose engines the tests run with a hit in the tier: the newest with every pool kind that runs on a CPU
#: (tests/e2e/kinds.py), the oldest with one kind (tests/e2e/test_other_sglang.py).
ENGINES_RUN = {"0.5.23": ("mha", "mla", "dsa", "swa", "asymmetric", "gdn", "draft", "mtp"), "0.5.21": ("mha",)}

#: Variables of the adapter's modules that are instances of SGLang's classes.
INSTANCES = {
    "geometry.py": ("pool",),
    "launcher.py": ("cfg", "self"),
    "lookups.py": ("req",),
    "pools.py": ("entry", "group", "pool"),
    "scheduler.py": ("self", "entry", "group", "memory", "parallel", "draft_plan", "ranks", "result"),
    "storage.py": ("pool",),
    "transfer.py": ("transfer", "t", "self", "event", "completion"),
}
#: Members of these variables that are not SGLang's: of this package, or of Python's types.
OURS = frozenset({"layers", "section", "slots", "arena", "narrow", "host_layer", "__self__"})


class Report(NamedTuple):
    """The look-ups in one version's sources.

    Attributes:
        targets: patched functions.
        members: all other names.
        findings: missing names and differences from the table, one line each.
    """

    version: str
    targets: int
    members: int
    findings: list[str]

    def row(self) -> dict[str, object]:
        """Make the row of docs/results/versions.jsonl."""
        return {
            "bench": "versions",
            "version": self.version,
            "targets_verified": self.targets,
            "members_verified": self.members,
            "findings": self.findings,
            "engines_run": list(ENGINES_RUN.get(self.version, ())),
        }


def check(root: Path) -> Report:
    """Compare the sources of one SGLang with its version's table.

    Raises:
        FileNotFoundError: `root` holds no SGLang.
        UnsupportedSGLang: its version has no table.
    """
    sources = Sources(root)
    table = versions.load(sources.version)
    hooks = table.all_hooks
    findings = []
    for hook in hooks:
        found = sources.find(hook.target)
        if found is None:
            findings.append(f"{hook.target} does not exist, needed to {hook.why}")
        elif found.parameters != hook.parameters:
            takes = "nothing" if found.parameters is None else f"({', '.join(found.parameters)})"
            findings.append(f"{hook.target} takes {takes} instead of ({', '.join(hook.parameters)}): {found.where}")
    names = {*table.members, *_imported(table), *_listed(table)}
    findings += [f"{name} does not exist" for name in sorted(names) if not _is_there(sources, name)]
    return Report(sources.version, len(hooks), len(names), findings)


def _is_there(sources: Sources, name: str) -> bool:
    if sources.find(name) is not None:
        return True
    owner, _, member = name.rpartition(".")
    members = sources.members(owner)
    # A name that `__getattr__` provides occurs in a string of its module.
    return member in members or ("__getattr__" in members and member in sources.words(owner.rpartition(".")[0]))


def _listed(table: VersionTable) -> Iterator[str]:
    for owner, members in table.reads.items():
        yield from (f"{owner}.{member}" for member in members.split())


# ----------------------------------------------------------------------------------------------- reads of the adapter


def _imported(table: VersionTable) -> set[str]:
    """Collect names that the adapter imports from SGLang, and members that it reads of modules and instances."""
    found = set()
    for path in sorted(ADAPTER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bound = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")
            for alias in node.names
        }
        found |= set(bound.values())
        for node in ast.walk(tree):
            # Members of classes are in the table.
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                found.add(f"{bound[node.value.id]}.{node.attr}")
    return found


def unlisted() -> list[str]:
    """List members of SGLang's instances that the adapter reads and no version's table lists."""
    listed = {name.rpartition(".")[2] for version in versions.known() for name in _listed(versions.load(version))}
    members = {name.rpartition(".")[2] for version in versions.known() for name in versions.load(version).members}
    findings = []
    for path in sorted(ADAPTER.glob("*.py")):
        for line, variable, member in _read(ast.parse(path.read_text(encoding="utf-8")), INSTANCES.get(path.name, ())):
            if member not in listed | members | OURS and not member.startswith("_sglang_xmem"):
                findings.append(f"{path.name}:{line} reads {variable}.{member}, which no table lists in its `reads`")
    return findings


def _read(tree: ast.Module, variables: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, variable, member) of reads of these variables; skips the adapter's own classes."""
    own = {
        id(inner)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and inner.id == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value, member = node.value, node.attr
        elif isinstance(node, ast.Call) and _named(node.func, "getattr", "hasattr") and len(node.args) > 1:
            value, constant = node.args[0], node.args[1]
            if not isinstance(constant, ast.Constant):
                continue
            member = str(constant.value)
        else:
            continue
        if isinstance(value, ast.Name) and value.id in variables and id(value) not in own:
            yield node.lineno, value.id, member


def _named(function: ast.expr, *names: str) -> bool:
    return isinstance(function, ast.Name) and function.id in names


# --------------------------------------------------------------------------------------------------------------- wheels


def cache_folder() -> Path:
    """Return the folder of unpacked wheels: SGLANG_XMEM_CACHE_DIR, else ~/.cache/sglang_xmem."""
    named = os.environ.get("SGLANG_XMEM_CACHE_DIR")
    return (Path(named) if named else Path.home() / ".cache" / "sglang_xmem") / "sglang_sources"


def fetch(version: str) -> Path:
    """Unpack the wheel of a version of SGLang, fetched by pip if missing; return a folder for PYTHONPATH.

    Raises:
        OSError: pip cannot fetch it.
    """
    folder = cache_folder() / version
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{version}.{os.getpid()}")
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(partial), f"sglang=={version}"], capture_output=True, text=True, check=False
    )
    wheels = list(partial.glob("*.whl"))
    if done.returncode or not wheels:
        partial.rmdir()
        raise OSError(f"pip cannot fetch sglang=={version}: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(partial)
    wheels[0].unlink()
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another process was faster
    return folder


def main() -> int:
    """Check the sources, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE")
    parser.add_argument("--output", type=Path, help=f"write rows to this file, such as {RESULTS.name}")
    arguments = parser.parse_args()
    roots = arguments.sources or [fetch(version) for version in versions.known()]
    reports = [check(root) for root in roots]
    for report in reports:
        for finding in report.findings:
            print(f"{report.version}: {finding}")
        print(f"{report.version}: {report.targets} targets and {report.members} members looked up", file=sys.stderr)
    unknown = unlisted()
    for finding in unknown:
        print(finding)
    if arguments.output is not None:
        rows = (json.dumps(report.row()) for report in reports)
        arguments.output.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return int(bool(unknown) or any(report.findings for report in reports))


if __name__ == "__main__":
    sys.exit(main())
