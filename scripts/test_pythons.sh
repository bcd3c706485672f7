#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What runs without torch, under every Python that is supported and found here: scripts/test_pythons.sh [VERSION...]
# Compiles all files, installs the package without SGLang, runs its command and the tests that need no torch.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if (($#)); then versions=("$@"); else versions=(3.10 3.11 3.12 3.13); fi
use_cpu_engine_without_gpu
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$REPOSITORY"
files=(tests/unit/test_{config,errors,machine,torch_free}.py tests/scripts/test_{gpu_runs,lint_prose}.py)

for version in "${versions[@]}"; do
    # pyenv puts shims on PATH, also of versions that they do not run.
    python="python$version"
    if [[ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]]; then
        python="$(compgen -G "$HOME/.pyenv/versions/$version.*/bin/python" | head -n 1 || true)"
    fi
    if [[ -z "$python" ]]; then
        echo "python $version: skipped, not found"
        continue
    fi
    "$python" -m venv "$work/$version"
    PYTHON="$work/$version/bin/python"
    # Elsewhere, so that nothing is built into the checkout.
    git ls-files -z | PYTHONPYCACHEPREFIX="$work/cache" "$PYTHON" -c '
import pathlib, sys
for name in sys.stdin.read().split("\0"):
    path = pathlib.Path(name)
    if name.endswith(".py") and path.exists():
        compile(path.read_bytes(), name, "exec", dont_inherit=True)
'
    pip_install . pytest
    "$work/$version/bin/sglang-xmem" --version
    "$PYTHON" -m pytest -q -p no:cacheprovider "${files[@]}" 2>&1 | tail -n 3
    echo "python $version: ok"
done
