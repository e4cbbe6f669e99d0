#!/usr/bin/env bash
# The lmms-eval integration against the real lmms-eval, from a fresh clone: own virtual environment, CPU only, no hub.
# PRUNE_LMMS_VENV keeps the environment (made if it is not there); without it a temporary one is made and removed.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${PRUNE_LMMS_VENV:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 HF_HUB_OFFLINE=1
if [ ! -e "$venv/bin/lmms-eval" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -e ".[lmms]" pytest
fi
export PATH="$venv/bin:$PATH"
echo "environment: $(du -sh "$venv" | cut -f1), $SECONDS s"
python -m pytest -o addopts= -o filterwarnings= -p no:cacheprovider --import-mode=importlib -v -s --confcutdir=tests/integration \
    tests/integration/lmms_models.py tests/integration/lmms_scenes.py "$@"
echo "done: $SECONDS s"
