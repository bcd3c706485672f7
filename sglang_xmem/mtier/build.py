"""Compiles libmtier.so, mtierd and libpages.so with the system's C++ compiler, once for each version of the sources.

`python -m sglang_xmem.mtier.build DIRECTORY` puts them into a directory of the user's choice. On a machine without a
compiler SGLANG_XMEM_MTIER_DIR names such a directory, made elsewhere from the same sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_xmem.copies.nvrtc import cache_dir

LIBRARY = "libmtier.so"
DAEMON = "mtierd"
#: What an engine does with frames of the page bank.
PAGES = "libpages.so"
NATIVE = Path(__file__).with_name("native")
PREBUILT_VARIABLE = "SGLANG_XMEM_MTIER_DIR"
#: Lies beside both in a directory of the user's: the digest of the sources that they were made of.
STAMP = "mtier.sources"

_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_SANITIZE = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
#: What is made of which source, with which further flags.
_TARGETS = (
    (LIBRARY, "libmtier.cpp", ("-shared", "-fPIC", "-fvisibility=hidden")),
    (DAEMON, "mtierd.cpp", ()),
    (PAGES, "pages_client.cpp", ("-shared", "-fPIC", "-fvisibility=hidden")),
)


class BuildError(RuntimeError):
    """The library and the service could not be compiled; the message is one sentence."""


def built(*, sanitize: bool = False) -> Path:
    """Directory with LIBRARY, DAEMON and PAGES: SGLANG_XMEM_MTIER_DIR, or compiled now if the cache has none.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests; always compiled here.

    Raises:
        BuildError: there is no compiler, it refuses the sources, the cache cannot be written, or what the variable
            names is not made of these sources.
    """
    prebuilt = os.environ.get(PREBUILT_VARIABLE)
    if prebuilt and not sanitize:
        return _checked(Path(prebuilt))
    compiler = _compiler()
    made_of = (_sources(), compiler, _version(compiler), _FLAGS, sanitize and _SANITIZE)
    directory = cache_dir() / f"mtier-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}"
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix="mtier-build-"))
        try:
            _compile(compiler, scratch, sanitize)
            try:
                scratch.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was first, with the same result
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise BuildError(
            f"mtierd cannot be kept in {directory.parent} ({error.strerror}); name a directory that can be written in "
            "SGLANG_XMEM_CACHE_DIR."
        ) from None
    return directory


def build_into(directory: Path) -> None:
    """Put LIBRARY, DAEMON, PAGES and STAMP into `directory`, each in one step as other processes see it.

    Raises:
        BuildError: as `built`, or `directory` cannot be written.
    """
    source = built()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        contents = {name: (source / name).read_bytes() for name in (LIBRARY, DAEMON, PAGES)}
        for name, content in {**contents, STAMP: _sources().encode()}.items():
            with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name}-", delete=False) as file:
                file.write(content)
            os.chmod(file.name, 0o755)
            os.replace(file.name, directory / name)
    except OSError as error:
        raise BuildError(f"{directory} cannot be written ({error.strerror}); name another directory.") from None


def _sources() -> str:
    """Digest of the sources."""
    digest = hashlib.sha256()
    for source in sorted(NATIVE.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _checked(directory: Path) -> Path:
    """`directory`, as `build_into` made it.

    Raises:
        BuildError: it did not, or from other sources.
    """
    try:
        complete = all((directory / name).is_file() for name in (LIBRARY, DAEMON, PAGES))
        if complete and (directory / STAMP).read_text() == _sources():
            return directory
    except OSError:
        pass
    raise BuildError(
        f"{PREBUILT_VARIABLE} is {str(directory)!r}, which has no {LIBRARY} and {DAEMON} of this release; run "
        "python -m sglang_xmem.mtier.build DIRECTORY where there is a compiler, or unset it."
    )


def _compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first of the usual names."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    looked = f"CXX is {chosen!r}, which is no program" if chosen else "no C++ compiler is installed"
    raise BuildError(f"mtierd is compiled on first use and {looked}; run apt-get install g++, or name one in CXX.")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(compiler: str, directory: Path, sanitize: bool) -> None:
    def make(target: str, source: str, flags: tuple[str, ...]) -> None:
        command = [compiler, *_FLAGS, *flags, *(_SANITIZE if sanitize else ())]
        # dlopen is libdl's before glibc 2.34.
        command += [str(NATIVE / source), "-o", str(directory / target), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            said = lines[0].strip() if lines else f"status {done.returncode}"
            raise BuildError(f"{compiler} cannot compile {source}: {said}; name a C++17 compiler in CXX.")

    with ThreadPoolExecutor(len(_TARGETS)) as threads:
        list(threads.map(lambda target: make(*target), _TARGETS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_xmem.mtier.build", description=__doc__)
    parser.add_argument("directory", type=Path, help=f"where {LIBRARY} and {DAEMON} go")
    args = parser.parse_args(argv)
    try:
        build_into(args.directory)
    except BuildError as error:
        print(f"sglang_xmem: {error}", file=sys.stderr)
        return 1
    print(args.directory / LIBRARY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
