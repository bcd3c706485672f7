#!/usr/bin/env bash
# Show a HiCache hit from the tier: scripts/quickstart.sh [MODEL_PATH] [options of quickstart.py]
# The last line on stdout is one JSON object. Without a model path, a small random model is made.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_cpu_engine_without_gpu
prepare_python "$REPOSITORY/.venv" ""
# exec: Ctrl-C and TERM reach the Python process, which stops the server.
exec "$PYTHON" "$REPOSITORY/scripts/quickstart.py" "$@"
