#!/usr/bin/env python3
"""Write patches/VERSION.patch from an unpacked wheel of SGLang: make_patches.py FOLDER [FOLDER ...].

For users who build SGLang from source and do not want run-time patching: the patch adds `sglang/srt/tier_seam.py` and
one decorator per function that this package hooks. If SGLang has the seam, the package registers with it and patches
nothing.

FOLDER contains `sglang/` and `sglang-VERSION.dist-info/`, as in an unzipped wheel.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
from pathlib import Path

from sglang_xmem.engines.sglang import versions
from sglang_xmem.engines.sglang.hooks import SEAM, Hook

SEAM_SOURCE = '''"""Functions that a memory tier for HiCache may wrap, without patching this package."""

import functools

#: Dotted name of a function -> (kind, handler): "after" (result, *args) or "around" (original, *args).
_handlers = {}


def provide(target, kind, handler):
    """Make `handler` wrap the function named `target`, which must be a seam."""
    if target not in _seams:
        raise LookupError(f"{target} is not a seam of this SGLang")
    _handlers[target] = (kind, handler)


_seams = set()


def seam(target):
    """Mark a function that a tier may wrap."""
    _seams.add(target)

    def mark(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            found = _handlers.get(target)
            if found is None:
                return function(*args, **kwargs)
            kind, handler = found
            if kind == "around":
                return handler(function, *args, **kwargs)
            result = function(*args, **kwargs)
            changed = handler(result, *args, **kwargs)
            return result if changed is None else changed

        return call

    return mark
'''


def make_patch(folder: Path) -> tuple[str, str]:
    """Return the version of an unpacked wheel, and its patch."""
    (info,) = folder.glob("sglang-*.dist-info")
    version = info.name.removeprefix("sglang-").removesuffix(".dist-info")
    table = versions.load(version)
    hooks = table.all_hooks
    by_file: dict[Path, list[Hook]] = {}
    for hook in hooks:
        by_file.setdefault(_file_of(folder, hook.target), []).append(hook)
    seam_path = "/".join(SEAM.split(".")) + ".py"
    parts = [_diff("", SEAM_SOURCE, seam_path)]
    for path in sorted(by_file):
        before = path.read_text(encoding="utf-8")
        parts.append(_diff(before, _with_seams(before, by_file[path]), str(path.relative_to(folder))))
    return version, "".join(parts)


def _file_of(folder: Path, target: str) -> Path:
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = folder.joinpath(*parts[:end]).with_suffix(".py")
        if path.exists():
            return path
    raise SystemExit(f"error: no source of {target} in {folder}")


def _with_seams(source: str, hooks: list[Hook]) -> str:
    tree = ast.parse(source)
    insertions: list[tuple[int, str]] = []
    for hook in hooks:
        names = hook.target.split(".")
        node: ast.AST | None = None
        for start in range(1, len(names)):  # the path inside of the file: Class.function or function
            node = _find(tree, names[start:])
            if node is not None:
                break
        if not isinstance(node, ast.FunctionDef):
            raise SystemExit(f"error: {hook.target} is not a function in its file")
        # Below classmethod, since a hook wraps the function and not the descriptor.
        above = [d for d in node.decorator_list if isinstance(d, ast.Name) and d.id in ("classmethod", "staticmethod")]
        line = above[-1].lineno + 1 if above else min([node.lineno, *(d.lineno for d in node.decorator_list)])
        insertions.append((line, f'{" " * node.col_offset}@seam("{hook.target}")\n'))
    insertions.append((_first_import(tree), f"from {SEAM} import seam\n"))
    lines = source.splitlines(keepends=True)
    for line, text in sorted(insertions, reverse=True):
        lines.insert(line - 1, text)
    return "".join(lines)


def _find(tree: ast.Module, names: list[str]) -> ast.AST | None:
    nodes: list[ast.stmt] = tree.body
    found: ast.AST | None = None
    for name in names:
        found = next((n for n in nodes if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name), None)
        if found is None:
            return None
        nodes = getattr(found, "body", [])
    return found


def _first_import(tree: ast.Module) -> int:
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", None) != "__future__":
            return node.lineno
    raise SystemExit("error: a file without imports")


def _diff(before: str, after: str, path: str) -> str:
    old = "/dev/null" if not before else f"a/{path}"
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), old, f"b/{path}", n=3
    )
    return "".join(lines)


def main() -> None:
    """Write a patch per folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[1] / "patches")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        version, patch = make_patch(folder)
        path = arguments.output / f"sglang-{version}.patch"
        path.write_text(patch, encoding="utf-8")
        print(f"{path}: {len(re.findall('^[+]', patch, re.M))} lines added")


if __name__ == "__main__":
    main()
