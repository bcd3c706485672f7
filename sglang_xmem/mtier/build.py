"""Compile libmtier.so and mtierd with the system's C++ compiler, once per version of the sources.

`python -m sglang_xmem.mtier.build DIRECTORY` builds both into DIRECTORY. On a machine without a compiler, set
SGLANG_XMEM_MTIER_DIR to such a directory, built elsewhere from the same sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from sglang_xmem.cache import CacheError, cache_dir, is_own, read_own

LIBRARY = "libmtier.so"
DAEMON = "mtierd"
#: The engine's library for frames of the page bank.
PAGES = "libpages.so"
NATIVE = Path(__file__).with_name("native")
PREBUILT_VARIABLE = "SGLANG_XMEM_MTIER_DIR"
#: Next to both: the digests of their sources and of each library.
STAMP = "mtier.digests"

_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
#: For tests: allows another library as the CUDA driver.
_TESTING = ("-DMTIER_TESTING",)
Sanitizer = Literal["address", "thread"]
_SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer")
_SANITIZERS: dict[Sanitizer, tuple[str, ...]] = {
    "address": (*_SANITIZE, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": (*_SANITIZE, "-fsanitize=thread"),
}
#: Products, with their source and further flags.
_TARGETS = (
    (LIBRARY, "libmtier.cpp", ("-shared", "-fPIC", "-fvisibility=hidden")),
    (DAEMON, "mtierd.cpp", ()),
    (PAGES, "pages_client.cpp", ("-shared", "-fPIC", "-fvisibility=hidden")),
)


class BuildError(RuntimeError):
    """The library and the service cannot be compiled; the message is one sentence."""


def built(
    *, testing: bool = False, sanitize: Sanitizer | None = None, announce: Callable[[str], None] = lambda words: None
) -> Path:
    """Return a directory with LIBRARY, DAEMON and PAGES: SGLANG_XMEM_MTIER_DIR or the cache; compile if needed.

    Args:
        testing: variants for tests; always compiled here.
        sanitize: as `testing`, with AddressSanitizer and UndefinedBehaviorSanitizer, or with ThreadSanitizer.
        announce: called with a sentence before a compilation, which takes 30 s.

    Raises:
        BuildError: there is no compiler, compilation fails, the cache is not writable or others can write there, or the
            variable's directory was not built from these sources.
    """
    prebuilt = os.environ.get(PREBUILT_VARIABLE)
    more = (*(_TESTING if testing or sanitize else ()), *(_SANITIZERS[sanitize] if sanitize else ()))
    if prebuilt and not more:
        return _checked(Path(prebuilt))
    compiler = _compiler()
    made_of = (_sources(), compiler, _version(compiler), _FLAGS, more)
    try:
        directory = cache_dir() / f"mtier-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}"
    except CacheError as error:
        raise BuildError(f"mtierd cannot be cached: {error}.") from None
    if _is_whole(directory):
        return directory
    announce(f"Compiling {DAEMON} and {LIBRARY} into {directory}; this takes about 30 s and happens once.")
    try:
        scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix="mtier-build-"))
        try:
            _compile(compiler, scratch, more)
            _write_stamp(scratch)
            _put(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise BuildError(
            f"mtierd cannot be kept in {directory.parent} ({error.strerror}); name a directory that can be written in "
            "SGLANG_XMEM_CACHE_DIR."
        ) from None
    return directory


def build_into(directory: Path) -> None:
    """Build LIBRARY, DAEMON, PAGES and STAMP into `directory`; each appears atomically.

    Raises:
        BuildError: see `built`; or `directory` is not writable.
    """
    source = built()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, DAEMON, PAGES, STAMP):
            with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name}-", delete=False) as file:
                file.write((source / name).read_bytes())
            os.chmod(file.name, 0o755)
            os.replace(file.name, directory / name)
    except OSError as error:
        raise BuildError(f"{directory} is not writable ({error.strerror}). Give another directory.") from None


def _put(scratch: Path, directory: Path) -> None:
    """Move a finished build into place: replace a damaged one, but not one that another process has just made."""
    try:
        scratch.rename(directory)
    except OSError:
        if _is_whole(directory):
            return
        broken = Path(tempfile.mkdtemp(dir=directory.parent, prefix="mtier-broken-"))
        try:
            directory.rename(broken / "was")
            scratch.rename(directory)
        finally:
            shutil.rmtree(broken, ignore_errors=True)


def _sources() -> str:
    """Digest the sources."""
    digest = hashlib.sha256()
    for source in sorted(NATIVE.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _stamp(directory: Path) -> str | None:
    """Return STAMP of a complete build in `directory`; None if a file is missing or others can write to it."""
    contents = [read_own(directory / name) for name in (LIBRARY, DAEMON, PAGES)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents if content is not None]
    return " ".join([_sources(), *digests]) if len(digests) == len(contents) else None


def _write_stamp(directory: Path) -> None:
    for name in (LIBRARY, DAEMON, PAGES):
        (directory / name).chmod(0o755)  # the umask may allow more
    (directory / STAMP).write_text(_stamp(directory) or "")
    (directory / STAMP).chmod(0o644)


def _is_whole(directory: Path) -> bool:
    stamp = read_own(directory / STAMP)
    return is_own(directory) and stamp is not None and stamp.decode(errors="replace") == _stamp(directory)


def _checked(directory: Path) -> Path:
    """Return `directory` if `build_into` has built it from these sources.

    Raises:
        BuildError: it has not.
    """
    if _is_whole(directory):
        return directory
    raise BuildError(
        f"{PREBUILT_VARIABLE} is {str(directory)!r}, which has no {LIBRARY} and {DAEMON} of this release, or others "
        "can write there; run python -m sglang_xmem.mtier.build DIRECTORY where there is a compiler, or unset it."
    )


def _compiler() -> str:
    """Return the path of the C++ compiler: $CXX, or the first of the usual names."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    looked = f"CXX is {chosen!r}, which is not a program" if chosen else "no C++ compiler is installed"
    raise BuildError(f"mtierd is compiled on first use, but {looked}; run apt-get install g++, or set CXX to one.")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _compile(compiler: str, directory: Path, more: Sequence[str]) -> None:
    def make(target: str, source: str, flags: tuple[str, ...]) -> None:
        command = [compiler, *_FLAGS, *flags, *more]
        # dlopen is libdl's before glibc 2.34.
        command += [str(NATIVE / source), "-o", str(directory / target), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            said = lines[0].strip() if lines else f"status {done.returncode}"
            raise BuildError(f"{compiler} cannot compile {source}: {said}; set CXX to a C++17 compiler.")

    with ThreadPoolExecutor(len(_TARGETS)) as threads:
        list(threads.map(lambda target: make(*target), _TARGETS))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_xmem.mtier.build", description=__doc__)
    parser.add_argument("directory", type=Path, help=f"directory for {LIBRARY} and {DAEMON}")
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
