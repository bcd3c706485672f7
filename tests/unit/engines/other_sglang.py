"""Other SGLangs than the installed one, as folders for PYTHONPATH."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts import check_versions

PATCHES = check_versions.REPOSITORY / "patches"


def unpacked(version: str) -> Path:
    """A version's wheel, unpacked; skips the test where pip cannot have it."""
    try:
        return check_versions.fetch(version)
    except OSError as error:
        pytest.skip(str(error))


def patched(version: str, folder: Path) -> Path:
    """A version's wheel with the patch of `patches/`, under `folder`: only what is changed is copied."""
    patch = PATCHES / f"sglang-{version}.patch"
    shutil.copytree(unpacked(version), folder, copy_function=_link)
    for line in patch.read_text().splitlines():
        if line.startswith("--- a/"):  # patch(1) would follow the link
            path = folder / line.removeprefix("--- a/")
            target = path.resolve()
            path.unlink()
            shutil.copy(target, path)
    subprocess.run(["patch", "-p1", "--quiet", "--fuzz=0", "-i", str(patch)], cwd=folder, check=True)
    return folder


def _link(source: str, destination: str) -> None:
    Path(destination).symlink_to(source)
