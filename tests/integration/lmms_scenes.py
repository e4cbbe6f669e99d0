"""The command `lmms-eval` on the built-in model gives what `prune eval` gives: every score, every token, every FLOP.

Run by `run_lmms.sh`; PRUNE_LMMS_ITEMS is the number of questions, 200 unless given.
"""

import json
import os
import subprocess
import sys

import pytest

from prune.evals.lmms import TASKS
from prune.evals.results import BASELINE
from prune.evals.scenes_model import CHECKPOINT

ITEMS = int(os.environ.get("PRUNE_LMMS_ITEMS", 200))
RATIO, SHARE = 0.889, "1/9"  # both leave 16 of 144 tokens
COSTS = ("visual_tokens", "kept_tokens", "average_tokens", "prefill_flops", "prefill_flops_full", "kv_bytes")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, dict]:
    """Method -> row of `prune eval`, one question at a time as lmms-eval asks LLaVA."""
    output = tmp_path_factory.mktemp("prune") / "results.jsonl"
    command = [sys.executable, "-P", "-m", "prune.evals", "--limit", str(ITEMS), "--batch-size", "1"]
    command += ["--by", "keep", "--budget", SHARE, "--method", "divprune", "--method", "fastv:layer=1"]
    command += ["--dtype", "float32", "--device", "cpu", "-o", str(output)]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    return {row["method"]["name"]: row for row in rows}


def lmms_eval(folder, arguments: str) -> tuple[dict, list[dict]]:
    """Results and samples, in order, of the command."""
    command = ["lmms-eval", "--model", "llava_hf_pruned", "--tasks", "prune_scenes", "--include_path", str(TASKS)]
    command += ["--model_args", f"pretrained={CHECKPOINT},dtype=float32{arguments}", "--device", "cpu"]
    command += ["--batch_size", "1", "--limit", str(ITEMS), "--log_samples", "--output_path", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")})
    (results,) = folder.glob("*/*_results.json")
    (samples,) = folder.glob("*/*_samples_prune_scenes.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), sorted(samples, key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize(
    "method, arguments",
    [
        (BASELINE, ",pruner=divprune,ratio=0"),
        ("divprune", f",pruner=divprune,ratio={RATIO}"),
        ("fastv", f",pruner=fastv,ratio={RATIO},pruner_layer=1"),
    ],
)
def test_equal(expected, tmp_path, method, arguments):
    results, samples = lmms_eval(tmp_path, arguments)
    row = expected[method]
    scores = [sample["accuracy"] for sample in samples]
    accuracy = results["results"]["prune_scenes"]["accuracy,none"]
    print(f"{method}: {len(scores)} items, lmms-eval {accuracy:.4f}, prune eval {row['result']['accuracy']:.4f}")
    assert len(scores) == ITEMS and scores == row["result"]["scores"]
    assert accuracy == pytest.approx(row["result"]["accuracy"], abs=1e-12)
    found = results["throughput"]
    assert {cost: found[f"avg_{cost}"] for cost in COSTS} == pytest.approx({c: row["cost"][c] for c in COSTS})
    assert found["avg_ttft_ms"] > 0
