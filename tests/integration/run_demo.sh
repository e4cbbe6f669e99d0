#!/usr/bin/env bash
# `prune demo` in headless Chromium, from a fresh clone: own virtual environment, CPU only, no hub. Needs a Chromium
# (`apt-get install chromium`; CHROMIUM is its path). The argument is the folder for screenshots, default demo-shots.
# PRUNE_DEMO_VENV keeps the environment (made if it is not there); without it a temporary one is made and removed.
set -euo pipefail
shots=$(realpath -m "${1:-demo-shots}")
cd "$(dirname "$0")/../.."

venv=${PRUNE_DEMO_VENV:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
if [ ! -e "$venv/bin/playwright" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -e ".[demo]" pytest playwright
fi
echo "environment: $(du -sh "$venv" | cut -f1), $SECONDS s"
"$venv/bin/python" -m pytest -o addopts= -o filterwarnings= -p no:cacheprovider --import-mode=importlib -q tests/test_demo.py
"$venv/bin/python" tests/integration/demo_browser.py "$shots"
echo "done: $SECONDS s"
