"""The parts of the lmms-eval integration that need no lmms-eval; `tests/integration/run_lmms.sh` runs the real one."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset

from prune import Budget, apply_pruner
from prune.errors import BudgetError, ConfigError
from prune.evals.lmms import TASKS, manifests, models
from prune.evals.lmms.models import place, take_options
from prune.evals.lmms.observed import Observed, Stop
from prune.evals.subject import Subject
from prune.evals.tasks import load_task

FOLDER = TASKS / "prune_scenes"


# ---------------------------------------------------------------------------------------------------- model_args
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {}),
        ({"pruner_layer": 3, "pruner_positions": "compact"}, {"layer": 3, "positions": "compact"}),
        ({"pruner_layer": "none", "pruner_newlines": "True"}, {"layer": None, "newlines": True}),
    ],
)
def test_options_by_name_are_taken_out(given, expected):
    arguments = {"pretrained": "x", **given}
    assert take_options(arguments, None) == expected
    assert arguments == {"pretrained": "x"}


@pytest.mark.parametrize("options", [{"layer": 3}, '{"layer": 3}'])
def test_options_as_json_join_those_by_name(options):
    assert take_options({"pruner_seed": 1}, options) == {"layer": 3, "seed": 1}


@pytest.mark.parametrize("options, match", [("{layer: 3}", "JSON"), ("[3]", "object"), ("3", "object"), (3, "object")])
def test_options_that_are_no_json_object(options, match):
    with pytest.raises(ConfigError, match=match):
        take_options({}, options)


def test_an_option_given_twice():
    with pytest.raises(ConfigError, match="layer"):
        take_options({"pruner_layer": 2}, {"layer": 3})


def signature(device_map: str | None) -> dict:
    parameters = {"device": SimpleNamespace(default="cuda")}
    return parameters if device_map is None else parameters | {"device_map": SimpleNamespace(default=device_map)}


@pytest.mark.parametrize(
    "arguments, default, expected",
    [
        ({}, "", {"device_map": "cuda"}),
        ({"device": "cuda:1"}, "", {"device_map": "cuda:1"}),
        ({"device": "cpu"}, "auto", {"device_map": "cpu"}),
        ({"device": "cuda:1"}, "auto", {}),  # lmms-eval's own default stays
        ({"device": "cpu", "device_map": "auto"}, "", {}),
        ({"device": "cpu"}, None, {}),
    ],
)
def test_place(monkeypatch, arguments, default, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert place(arguments, signature(default)) == expected
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place(arguments, signature(default)) == {}


def test_place_without_a_gpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert place({}, signature("auto")) == place({}, signature("")) == {"device": "cpu", "device_map": "cpu"}
    assert place({}, signature(None)) == {"device": "cpu"}
    assert place({"device": "cuda:1"}, signature("auto")) == place({"device_map": "auto"}, signature("")) == {}
    assert place({}, {}) == {}


# --------------------------------------------------------------------------------------------- the model classes
@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("scenes-llava", device="cpu")


@pytest.fixture
def fake(monkeypatch, subject):
    """A model id `fake_pruned` over a class as lmms-eval writes them, and what went to its efficiency metrics."""

    class Fake:
        def __init__(self, pretrained: str = "", device: str = "cuda", **kwargs):
            self._model, self.pretrained, self.cleaned = subject.model, pretrained, False

        @property
        def model(self):
            return self._model

        def generate_until(self, requests):
            said = []
            for item in requests:
                try:
                    inputs = subject.inputs([item])
                    tokens = self.model.generate(**inputs, max_new_tokens=3, do_sample=False)
                    said.append(subject.processor.decode(tokens[0, inputs["input_ids"].shape[1] :]))
                except Exception:
                    said.append("")
            return said

        generate_until_multi_round = generate_until

        def clean(self):
            self.cleaned = True

    module, metrics, logged = ModuleType("fake_lmms"), ModuleType("gen_metrics"), []
    module.Fake = Fake
    metrics.log_metrics = lambda **numbers: logged.append(numbers)
    monkeypatch.setitem(sys.modules, "fake_lmms", module)
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models", ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.model_utils", ModuleType("lmms_eval.models.model_utils"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.model_utils.gen_metrics", metrics)
    monkeypatch.setitem(models.BASES, "fake_pruned", "fake_lmms.Fake")
    yield SimpleNamespace(make=models.fake_pruned, base=Fake, logged=logged)
    vars(models).pop("fake_pruned", None)


@pytest.fixture(scope="module")
def items():
    return load_task("scenes", limit=6).items


@pytest.mark.parametrize("call", ["generate_until", "generate_until_multi_round"])
def test_prunes_and_logs(fake, subject, items, call):
    lm = fake.make(pretrained="x", pruner="divprune", ratio=0.889)
    getattr(lm, call)(items)
    (logged,) = fake.logged
    assert logged.keys() == {"total_elapsed_time", "total_gen_tokens", "avg_speed", "additional_metrics"}
    assert logged["total_elapsed_time"] == logged["total_gen_tokens"] == logged["avg_speed"] == 0
    assert logged["additional_metrics"]["kept_tokens"] == 16
    lm.clean()
    assert lm.cleaned and lm.model is subject.model


def test_the_id_alone_is_the_unpruned_model(fake, items):
    expected = fake.base().generate_until(items)
    lm = fake.make(pretrained="x")
    assert lm.generate_until(items) == expected and all(expected)
    assert fake.logged[0]["additional_metrics"]["average_tokens"] == 144
    lm.clean()


def test_is_one_class_with_the_options_of_its_base(fake):
    assert fake.make is models.fake_pruned and issubclass(fake.make, fake.base)
    with pytest.raises(AttributeError, match="llava"):
        _ = models.llava
    for arguments, match in [
        (dict(ratoi=0.5), "ratoi"),
        (dict(keep=16), "pruner="),
        (dict(pruner_layer=2), "pruner="),
        (dict(pruner_options={"layer": 2}), "pruner="),
    ]:
        with pytest.raises(ConfigError, match=match):
            fake.make(**arguments)


def test_an_error_of_the_pruner_ends_the_run(fake, items):
    """lmms-eval's loops answer "" after any `Exception`; an accuracy of such answers would be wrong."""
    lm = fake.make(pruner="fastv", average=4, pruner_layer=4)
    with pytest.raises(BudgetError, match="out of reach"):
        lm.generate_until(items)
    assert not fake.logged
    lm.clean()


def test_manifests(monkeypatch):
    registry = ModuleType("registry_v2")
    registry.ModelManifest = lambda name, chat_class_path: (name, chat_class_path)
    for name, module in (("lmms_eval", None), ("lmms_eval.models", None), ("lmms_eval.models.registry_v2", registry)):
        monkeypatch.setitem(sys.modules, name, module or ModuleType(name))
    assert dict(manifests()) == {name: f"prune.evals.lmms.models.{name}" for name in models.BASES}
    assert set(models.BASES) == {
        "llava_hf_pruned",
        "qwen2_5_vl_pruned",
        "qwen3_vl_pruned",
        "internvl_hf_pruned",
        "huggingface_pruned",
    }


# ------------------------------------------------------------------------------------------------ what is measured
def test_metrics_are_those_of_a_row(subject, items):
    with apply_pruner(subject.model, "fastv", ratio=0.8, layer=1) as handle:
        observed = Observed(subject.model, handle)
        costs = []
        for item in items:
            answers = subject.answer([item], 3)
            costs.append(subject.cost(handle, answers))
            new = observed.generate(**answers.inputs, max_new_tokens=3)[:, answers.inputs["input_ids"].shape[1] :]
            assert subject.processor.batch_decode(new, skip_special_tokens=True) == answers.texts
        found = observed.metrics()
        assert observed.metrics() == {}
    assert found.pop("ttft_ms") > 0
    assert found == {name: pytest.approx(np.mean([cost[name] for cost in costs])) for name in found}
    assert found.keys() >= {"average_tokens", "prefill_flops", "prefill_flops_full", "kv_bytes", "kv_bytes_full"}


def test_means_are_over_samples_not_calls(subject, items):
    with apply_pruner(subject.model, "divprune", keep=16) as handle:
        observed = Observed(subject.model, handle)
        observed.generate(**subject.inputs(items[:3]), max_new_tokens=1)
        handle.budget = Budget(keep=64)
        observed.generate(**subject.inputs(items[:1]), max_new_tokens=1)
        assert observed.metrics()["kept_tokens"] == (3 * 16 + 64) / 4


def test_a_prompt_without_images_is_timed_and_not_priced(subject, items):
    text = subject.processor(text="USER: How many digits are there? ASSISTANT:", return_tensors="pt")
    with apply_pruner(subject.model, "divprune", keep=16) as handle:
        observed = Observed(subject.model, handle)
        observed.generate(**subject.inputs(items[:1]), max_new_tokens=1)
        observed.metrics()
        observed.generate(**text, max_new_tokens=1)
        assert observed.metrics().keys() == {"ttft_ms"}


def test_what_has_no_formula_is_left_out_with_a_warning(subject, items, caplog):
    with apply_pruner(subject.model, "divprune", keep=16) as handle:
        observed = Observed(subject.model, handle)
        for _ in range(2):
            observed.generate(**subject.inputs(items[:2]), max_new_tokens=2, num_beams=2)
        found = observed.metrics()
    assert found["kept_tokens"] == 16 and "prefill_flops" not in found
    assert len(caplog.records) == 1 and "FLOPs" in caplog.text


def test_everything_else_is_the_models_own(subject, items):
    with apply_pruner(subject.model, "divprune", keep=16) as handle:
        observed = Observed(subject.model, handle)
        inputs = subject.inputs(items[:1])
        assert observed.dtype == subject.model.dtype and observed.config is subject.model.config
        with torch.inference_mode():
            assert torch.equal(observed(**inputs).logits, subject.model(**inputs).logits)
    with apply_pruner(subject.model, "fastv", average=4, layer=4) as handle:
        with pytest.raises(Stop) as stopped:
            Observed(subject.model, handle).generate(**inputs)
    assert isinstance(stopped.value.__cause__, BudgetError) and not isinstance(stopped.value, Exception)


# -------------------------------------------------------------------------------------------------------- the task
@pytest.fixture(scope="module")
def utils():
    """As lmms-eval loads it: by its path."""
    spec = importlib.util.spec_from_file_location("utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as its text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("name", ["scenes", "scenes-hard"])
def test_documents_are_the_items_of_the_task(utils, name):
    task = load_task(name, limit=16)
    about = dict(scenes=name, split="test", seed=0, size=16)
    documents = utils.documents(Dataset.from_list([about]))
    assert len(documents) == 16
    for document, item in zip(documents, task.items):
        assert (document["question"], document["answer"], document["kind"]) == (item.question, item.answer, item.kind)
        (mine,), (theirs,) = utils.pictures(document), item.images
        assert mine.mode == "RGB" and np.array_equal(np.asarray(mine), np.asarray(theirs))
        for said in (item.answer, item.answer.upper() + ".", "seventy", ""):
            assert utils.score(document, [said]) == {"accuracy": task.scorer(said, item)}


@pytest.mark.parametrize("name", ["scenes", "scenes-hard"])
def test_yaml(utils, name, tmp_path):
    file = FOLDER / f"prune_{name.replace('-', '_')}.yaml"
    config = yaml.load(file.read_text(), Loader)
    included = config.pop("include", None)
    config = (yaml.load((FOLDER / included).read_text(), Loader) if included else {}) | config
    task = load_task(name)
    assert config["task"] == file.stem
    assert config["generation_kwargs"] == dict(max_new_tokens=task.max_new_tokens, temperature=0, do_sample=False)
    data = str(FOLDER / config["dataset_kwargs"]["data_files"][config["test_split"]])
    (about,) = load_dataset("json", data_files={"test": data}, split="test", cache_dir=str(tmp_path))
    assert about == dict(scenes=name, split="test", seed=0, size=len(task.items))
    for called in (config[key] for key in ("process_docs", "doc_to_visual", "process_results")):
        module, function = called.split(".")
        assert module == "utils" and callable(getattr(utils, function))
    assert {config["doc_to_text"], config["doc_to_target"]} == {"question", "answer"}
