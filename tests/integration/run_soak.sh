#!/usr/bin/env bash
# 2,000 calls of `generate` with pruners that come, change and go, from a fresh clone: own virtual environment, CPU
# only, no hub. PRUNE_SOAK_VENV keeps the environment (made if it is not there); without it a temporary one is made and
# removed. The argument is the number of calls.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${PRUNE_SOAK_VENV:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 OMP_NUM_THREADS=1
if [ ! -e "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -e ".[dev]" psutil
fi
echo "environment: $(du -sh "$venv" | cut -f1), $SECONDS s"
"$venv/bin/python" -P tests/integration/soak.py "${1:-2000}"
echo "done: $SECONDS s"
