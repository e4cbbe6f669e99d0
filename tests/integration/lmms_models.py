"""Every model id under the real lmms-eval, on small checkpoints: as lmms-eval's own class at ratio 0, pruned at 0.5.

Run by `run_lmms.sh`; all of it on a CPU.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lmms_checkpoints
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

from prune.errors import BudgetError, ConfigError, UnknownMethodError
from prune.evals.lmms import TASKS, models
from prune.evals.scenes_model import CHECKPOINT
from prune.evals.subject import Subject
from prune.evals.tasks import load_task

torch.set_num_threads(1)
ITEMS = 6


@pytest.fixture(scope="module")
def manager():
    return TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Model id -> `model_args` without those of a pruner."""
    place = tmp_path_factory.mktemp("checkpoints")
    folders = {
        "qwen2_5_vl_pruned": lmms_checkpoints.save(lmms_checkpoints.qwen2_5_vl, place / "qwen2_5_vl"),
        "qwen3_vl_pruned": lmms_checkpoints.save(lmms_checkpoints.qwen3_vl, place / "qwen3_vl"),
        "internvl_hf_pruned": lmms_checkpoints.save(lmms_checkpoints.internvl, place / "internvl"),
        "llava_hf_pruned": str(CHECKPOINT),
        "huggingface_pruned": CHECKPOINT.name,
    }
    small = ",min_pixels=3136,max_pixels=50176"
    more = {"qwen2_5_vl_pruned": small, "qwen3_vl_pruned": small, "llava_hf_pruned": ",dtype=float32"}
    return {name: f"pretrained={folder}{more.get(name, '')}" for name, folder in folders.items()}


def run(manager, model: str, arguments: str, task: str = "prune_scenes", batch_size: int = 1) -> dict:
    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=manager,
        device="cpu",
        batch_size=batch_size,
        limit=ITEMS,
        bootstrap_iters=0,
    )


def said(results: dict) -> list:
    samples = sorted(results["samples"]["prune_scenes"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def unpruned(manager, name: str, arguments: str) -> list:
    """What lmms-eval's own class says; its `huggingface` fails on every vision-language model, so Subject speaks."""
    if name == "huggingface_pruned":
        subject = Subject(CHECKPOINT.name, device="cpu")
        return [subject.answer([item], 3).texts[0] for item in load_task("scenes", limit=ITEMS).items]
    return said(run(manager, name.removesuffix("_pruned"), f"{arguments},device_map=cpu"))


@pytest.mark.parametrize("name", models.BASES)
def test_as_lmms_eval_at_ratio_0_and_half_the_tokens_at_one_half(manager, checkpoints, name):
    arguments = checkpoints[name]
    alone = unpruned(manager, name, arguments)
    bare = run(manager, name, arguments)
    zero = run(manager, name, f"{arguments},pruner=divprune,ratio=0")
    half = run(manager, name, f"{arguments},pruner=divprune,ratio=0.5")
    assert alone == said(bare) == said(zero) and any(alone)
    for results in (bare, zero):
        found = results["throughput"]
        assert found["avg_kept_tokens"] == found["avg_average_tokens"] == found["avg_visual_tokens"] > 1
        assert found["avg_prefill_flops"] == found["avg_prefill_flops_full"] > 0
        assert found["avg_kv_bytes"] == found["avg_kv_bytes_full"] > 0
    found, whole = half["throughput"], bare["throughput"]
    assert found["avg_visual_tokens"] == whole["avg_visual_tokens"]
    assert found["avg_kept_tokens"] == round(whole["avg_visual_tokens"] / 2)
    assert found["avg_prefill_flops"] < found["avg_prefill_flops_full"] == whole["avg_prefill_flops"]
    assert found["avg_kv_bytes"] < found["avg_kv_bytes_full"] == whole["avg_kv_bytes"]
    assert found["avg_ttft_ms"] > 0


def test_options_reach_the_method(manager, checkpoints):
    arguments = f"{checkpoints['llava_hf_pruned']},pruner=fastv,keep=16"
    expected = {1: (144 + 4 * 16) / 5, 3: (3 * 144 + 2 * 16) / 5}
    for layer, spelt in ((1, "pruner_layer=1"), (3, "pruner_options=" + json.dumps({"layer": 3}))):
        found = run(manager, "llava_hf_pruned", f"{arguments},{spelt}")["throughput"]
        assert found["avg_average_tokens"] == expected[layer]


def test_batches_say_what_single_requests_do(manager, checkpoints):
    arguments = f"{checkpoints['huggingface_pruned']},pruner=divprune,keep=16"
    one, four = (run(manager, "huggingface_pruned", arguments, batch_size=size) for size in (1, 4))
    assert said(one) == said(four)
    for name in ("avg_kept_tokens", "avg_prefill_flops", "avg_kv_bytes"):
        assert one["throughput"][name] == pytest.approx(four["throughput"][name])


def test_hard_scenes(manager, checkpoints):
    results = run(manager, "llava_hf_pruned", checkpoints["llava_hf_pruned"], "prune_scenes_hard")
    assert {sample["doc"]["scenes"] for sample in results["samples"]["prune_scenes_hard"]} == {"scenes-hard"}


@pytest.mark.parametrize(
    "more, error, match",
    [
        ("ratoi=0.5", ConfigError, "ratoi"),
        ("ratio=0.5", ConfigError, "pruner="),
        ("pruner=divprun,ratio=0.5", UnknownMethodError, "divprune"),
        ("pruner=divprune", BudgetError, "exactly one"),
        ("pruner=divprune,ratio=1.5", BudgetError, "ratio"),
        ("pruner=divprune,ratio=0.5,pruner_colour=1", ConfigError, "colour"),
        ("pruner=fastv,average=4,pruner_layer=4", BudgetError, "out of reach"),  # known at the first prefill only
    ],
)
@pytest.mark.parametrize("name", ["llava_hf_pruned", "internvl_hf_pruned"])  # both make "" of any exception
def test_bad_arguments_end_the_run(manager, checkpoints, name, more, error, match):
    with pytest.raises(error, match=match):
        run(manager, name, f"{checkpoints[name]},{more}")


def test_clean_leaves_a_bare_model(manager, checkpoints):
    arguments = checkpoints["llava_hf_pruned"] + ",pruner=divprune,ratio=0.5"
    lm = MODEL_REGISTRY_V2.get_model_class("llava_hf_pruned").create_from_arg_string(arguments, {"device": "cpu"})
    model = lm._model
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    assert hooks() > 0
    lm.clean()
    assert hooks() == 0 and not hasattr(lm, "_model")


def test_chat_requests_have_six_arguments(manager):
    """What `generate_until` is given is lmms-eval's business alone; this says when it changes."""
    task = manager.load_task_or_group(["prune_scenes"], task_type="chat")["prune_scenes"]
    request = task.construct_requests(
        0, "", metadata={"task": "prune_scenes", "doc_id": 0, "repeats": 1, "split": "test"}
    )
    assert isinstance(request, Instance) and len(request.args) == 6
