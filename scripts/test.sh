#!/usr/bin/env bash
# Lint, types and all tests: scripts/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_cpu_engine_without_gpu
prepare_python "$REPOSITORY/.venv-test" "[dev]"
cd "$REPOSITORY"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
