"""What is installed: light entry modules, and a wheel that holds the kernels' sources and the entry points."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests import REPOSITORY

IMPORTED = """
import json, sys
before = set(sys.modules)
import {module}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""


@pytest.mark.parametrize("module", ["sglang_xmem", "sglang_xmem.plugin"])
def test_entry_modules_import_the_standard_library_alone(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(module=module)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["sglang_xmem"]


EACH_ALONE = """
import importlib, pathlib, sys
root = pathlib.Path({root!r})
failed = []
for path in sorted(root.joinpath("sglang_xmem").rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for known in [known for known in sys.modules if known.partition(".")[0] == "sglang_xmem"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except ImportError as error:
        # What SGLang or a GPU brings may be missing; a module of this package may not.
        if "sglang_xmem" in str(error):
            failed.append(f"{{name}}: {{error}}")
print(failed)
sys.exit(bool(failed))
"""


def test_each_module_can_be_the_first_that_is_imported() -> None:
    code = EACH_ALONE.format(root=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def tracked_files() -> list[str]:
    """Paths that git tracks in this checkout."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    done = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs a git checkout")
    return [path for path in done.stdout.split("\0") if path]


def pip(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks."""
    for tool in ("pip", "setuptools"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool}, which this environment does not have")
    copy = tmp_path_factory.mktemp("checkout")
    for path in tracked_files():
        source = REPOSITORY / path
        if not source.is_symlink() and not source.exists():
            continue  # deleted and not yet committed
        target = copy / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    assert (copy / "sglang_xmem" / "kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files that git tracks."""
    wheels = tmp_path_factory.mktemp("wheels")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), ".", cwd=checkout)
    (found,) = wheels.glob("*.whl")
    return found


def test_wheel_has_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entry_points = ConfigParser()
        entry_points.read_string(archive.read(f"{metadata}/entry_points.txt").decode())
        for path in tracked_files():
            # Kernels go under the package, and every module of it in.
            inside = path.replace("kernels/", "sglang_xmem/kernels/", 1) if path.startswith("kernels/") else path
            if inside.startswith("sglang_xmem/") and (REPOSITORY / path).is_file():
                assert inside in names
                assert archive.read(inside) == (REPOSITORY / path).read_bytes()
    assert any(name.startswith("sglang_xmem/kernels/") and name.endswith(".cu") for name in names)
    assert "sglang_xmem/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"sglang_xmem", metadata}, "nothing next to the package"
    assert dict(entry_points["sglang.srt.plugins"]) == {"sglang_xmem": "sglang_xmem.plugin:register"}
    assert dict(entry_points["console_scripts"]) == {"sglang-xmem": "sglang_xmem.cli:main"}


def test_source_distribution_has_everything(checkout: Path, tmp_path: Path) -> None:
    """It suffices to test, build and patch as in a checkout; it omits results of runs."""
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path for path in tracked_files() if (REPOSITORY / path).exists()}
    left_out = {path for path in expected if path.startswith("docs/results/")} | {".gitignore"}
    assert expected - left_out - names == {"sglang_xmem/kernels"} - names, "a file is missing; see MANIFEST.in"
    assert names & left_out == set()


READ_SOURCE = """
import importlib.metadata, json, sys
import sglang_xmem, sglang_xmem.kernels
source = sglang_xmem.kernels.source("page_copy.cu")
try:
    sglang_xmem.kernels.source("none such.cu")
    missing = None
except FileNotFoundError:
    missing = "FileNotFoundError"
(distribution,) = importlib.metadata.distributions(name="sglang_xmem", path=[sys.argv[1]])
register = [entry.load() for entry in distribution.entry_points if entry.group == "sglang.srt.plugins"]
print(json.dumps([sglang_xmem.__file__, source, missing, [function.__module__ for function in register]]))
"""


def test_installed_package_reads_its_kernels_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=elsewhere)
    done = subprocess.run(
        [sys.executable, "-c", READ_SOURCE, str(target)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, source, missing, register = json.loads(done.stdout)
    assert Path(file).is_relative_to(target)
    assert source == (REPOSITORY / "kernels" / "page_copy.cu").read_text(encoding="utf-8")
    assert missing == "FileNotFoundError"
    assert register == ["sglang_xmem.plugin"]
