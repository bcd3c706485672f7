# SPDX-License-Identifier: Apache-2.0
# Functions shared by the scripts here; to be sourced. Sets and reads PYTHON, the interpreter with everything in it.
# shellcheck shell=bash

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SGLANG_VERSION=0.5.23

say() { printf '%s\n' "$*" >&2; }

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# use_cpu_engine_without_gpu: lets SGLang choose its CPU engine on a machine that has nothing else.
use_cpu_engine_without_gpu() {
    if ! has_gpu; then
        export SGLANG_USE_CPU_ENGINE=1
    fi
}

# prepare_python DIRECTORY EXTRAS: sets PYTHON to SGLANG_XMEM_PYTHON, which is used as it is, or to the interpreter
# of a virtual environment in DIRECTORY, made and filled on the first call. EXTRAS is "" or "[dev]".
prepare_python() {
    local directory="$1" extras="$2"
    if [[ -n "${SGLANG_XMEM_PYTHON:-}" ]]; then
        PYTHON="$SGLANG_XMEM_PYTHON"
        check_plugins
        return
    fi
    PYTHON="$directory/bin/python"
    local stamp="$directory/.complete" wanted
    # Installing takes minutes, so it is skipped while nothing that decides what gets installed has changed.
    wanted="$(installation_key "$extras")"
    if [[ -x "$PYTHON" && -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    local base="${SGLANG_XMEM_BASE_PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { say "error: $base is older than Python 3.10; name another in SGLANG_XMEM_BASE_PYTHON"; exit 1; }
    say "Installing into $directory (once, some minutes) ..."
    "$base" -m venv "$directory"
    rm -f "$stamp"
    if has_gpu; then
        pip_install "sglang==$SGLANG_VERSION"
        pip_install -e "$REPOSITORY$extras"
    else
        pip_install -r "$REPOSITORY/scripts/requirements-cpu.txt"
        pip_install --no-deps -r "$REPOSITORY/scripts/requirements-cpu-nodeps.txt"
        pip_install --no-deps "$REPOSITORY/scripts/sglang_cpu"
        pip_install -e "$REPOSITORY$extras"
    fi
    printf '%s' "$wanted" >"$stamp"
}

pip_install() { "$PYTHON" -m pip install -qq --disable-pip-version-check "$@" >&2; }

installation_key() {
    {
        printf '%s\n' "$SGLANG_VERSION" "$1"
        if has_gpu; then printf 'gpu\n'; fi
        cat "$REPOSITORY/pyproject.toml" "$REPOSITORY"/scripts/requirements-cpu*.txt
        find "$REPOSITORY/scripts/sglang_cpu" -type f \( -name '*.py' -o -name '*.pth' -o -name '*.toml' \) \
            -not -path '*/build/*' -print0 | sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1
}

# An interpreter that the user names is not installed into; one without the plugins would silently run stock SGLang.
check_plugins() {
    local needed=(sglang_xmem)
    if ! has_gpu; then needed+=(sglang_cpu); fi
    "$PYTHON" - "${needed[@]}" <<'EOF' || exit 1
import sys
from importlib.metadata import entry_points

found = {point.name for point in entry_points(group="sglang.srt.plugins")}
missing = [name for name in sys.argv[1:] if name not in found]
if missing:
    sys.exit(f"error: {sys.executable} (SGLANG_XMEM_PYTHON) has no {' and no '.join(missing)}; install it there first")
EOF
}
