#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, types, prose and all tests, the quick ones first: scripts/test.sh [pytest arguments]
# With arguments, such as a test file, only pytest runs, once.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_cpu_engine_without_gpu
prepare_python "$REPOSITORY/.venv-test" "[dev]"
cd "$REPOSITORY"
if (($#)); then
    exec "$PYTHON" -m pytest "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" scripts/lint_prose.py
# One run, so that there is one summary. tests/conftest.py sorts: unit tests, contracts, services, engines, GPUs.
# Without a GPU two files run in parallel, each in the order of its folder; SGLANG_XMEM_TEST_WORKERS sets the number.
workers=()
count="${SGLANG_XMEM_TEST_WORKERS:-2}"
if ! has_gpu && ((count > 1)); then
    workers=(-n "$count" --dist loadfile --no-loadscope-reorder)
fi
"$PYTHON" -m pytest "${workers[@]}"
