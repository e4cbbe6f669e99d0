"""Vision transformers measured: fair data, an honest built-in model, true rows, and exact FLOPs."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import sweeps
import tiny_vit
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import failure, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from prune import apply_pruner
from prune.errors import ConfigError
from prune.evals import digits, train_digits, vit_subject
from prune.evals.digits import CHECKPOINT, Digits, load_digits_vit, to_pixels
from prune.evals.grid import Cell, Spec, parse_share
from prune.evals.results import read_rows
from prune.evals.tasks import TaskError, load_task
from prune.evals.vision import Vision, check_vision_name, load_vision, of_hugging_face, of_open_clip, of_timm
from prune.evals.vit_accounting import account, account_full
from prune.evals.vit_subject import ViTSubject, head_labels

UNPRUNED = Cell(Spec("none"))
HALF = parse_share("1/2")


# --------------------------------------------------------------------------------------------------------- digits
def test_a_picture_depends_on_split_seed_and_index_alone():
    test, train = Digits(), Digits("train")
    assert (len(test), len(train)) == (360, 1437)
    image, label = test[7]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and label == test.label(7)
    assert np.array_equal(image, Digits()[7][0])
    others = [Digits(seed=1)[7][0], test[8][0], train[7][0]]
    assert len({picture.tobytes() for picture in [image, *others]}) == 4
    with pytest.raises(IndexError):
        test[360]
    for wrong in ({"split": "dev"}, {"seed": -1}):
        with pytest.raises(ValueError):
            Digits(**wrong)


def test_test_digits_are_no_training_digits():
    (test, _), (train, _) = digits.drawings("test"), digits.drawings("train")
    seen = {drawing.tobytes() for drawing in train}
    assert len({drawing.tobytes() for drawing in test} & seen) <= 1  # two people drew one alike


def test_the_built_in_model_is_what_its_card_says():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 2**20
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["arguments"] == digits.ARCHITECTURE
    model = load_digits_vit()
    with torch.inference_mode():
        found = train_digits.accuracy(model, list(Digits()))
        with apply_pruner(model, "tome", flops=0.5):
            halved = train_digits.accuracy(model, list(Digits()))
    said = next(csv.DictReader((CHECKPOINT / "accuracy.csv").open()))
    assert found == pytest.approx(float(said["accuracy"]), abs=0.003) and found >= 0.97
    assert halved >= found - 0.02
    assert f"{100 * float(said['accuracy']):.1f}" in (CHECKPOINT / "README.md").read_text()


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Trains a tiny model on 60 digits, into the folder `name`; epochs are three steps."""
    small = {**digits.ARCHITECTURE, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2}
    images, labels = digits.drawings("train")
    for module in (digits, train_digits):
        monkeypatch.setattr(module, "ARCHITECTURE", small)
        monkeypatch.setattr(module, "drawings", lambda split: (images[:70], labels[:70]))
    monkeypatch.setattr(train_digits, "EVERY", 7)
    monkeypatch.setattr(train_digits, "measure", lambda model: [])

    def train(name, **changes):
        options = dict(epochs=3, batch_size=20, seed=1, rate=1e-2, decay=0.1, patch=8) | changes
        train_digits.train(out=tmp_path / name, state=tmp_path / f"{name}.pt", **options)

    return train


def test_an_interrupted_training_ends_with_the_same_weights(go, tmp_path, monkeypatch):
    go("whole")
    right, calls = train_digits.accuracy, []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(train_digits, "accuracy", breaks)
    with pytest.raises(KeyboardInterrupt):
        go("resumed")
    go("resumed", resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]
    logs = [list(csv.DictReader((tmp_path / name / "training.csv").open())) for name in ("whole", "resumed")]
    for log in logs:
        assert [row["epoch"] for row in log] == ["1", "2", "3"]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


def test_training_starts_from_weights_for_other_patches(go, tmp_path):
    go("start")
    for name, patch in (("same", 8), ("smaller", 4), ("larger", 16)):
        go(name, patch=patch, start=tmp_path / "start", epochs=1, rate=0.0)
    names = ("start", "same", "smaller", "larger")
    start, *others = (load_file(tmp_path / name / "model.safetensors") for name in names)
    resized = {"patch_embed.proj.weight", "pos_embed"}
    for other, patches in zip(others, (16, 64, 4)):
        assert all(torch.equal(other[name], value) for name, value in start.items() if name not in resized)
        assert other["pos_embed"].shape == (1, 1 + patches, 8)
        assert torch.equal(other["pos_embed"][:, 0], start["pos_embed"][:, 0])
    assert all(torch.equal(others[0][name], start[name]) for name in resized)
    # A larger filter says of an even patch what the smaller one said.
    even = torch.full((1, 3, digits.SIDE, digits.SIDE), 0.5)
    embedded = [load_digits_vit(tmp_path / name).patch_embed(even)[0, 0] for name in ("start", "larger")]
    assert torch.allclose(*embedded, atol=2e-3)


# --------------------------------------------------------------------------------------------------------- sweeps
@pytest.fixture
def few(monkeypatch):
    """Probes on 40 pictures."""
    monkeypatch.setattr(vit_subject, "PROBE_PICTURES", 40)


def classify(path, **changes):
    settings = dict(
        models=["digits-vit"],
        tasks=[load_task("digits", limit=14)],
        methods=[Spec("random"), Spec("tome")],
        by="flops",
        shares=[HALF],
        batch_size=5,
    )
    return sweeps.sweep(path, **{**settings, **changes})


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_subject, "PROBE_PICTURES", 40)
        path = tmp_path_factory.mktemp("digits") / "results.jsonl"
        classify(path).run()
    return path


def test_rows_say_what_plain_code_says(swept):
    from sklearn.neighbors import KNeighborsClassifier

    found = {row["method"]["name"]: row for row in read_rows(swept)}
    assert set(found) == {"none", "random", "tome"}
    model, pictures, train = load_digits_vit(), Digits(), Digits("train")
    pixels = to_pixels([pictures[i][0] for i in range(14)])
    known = to_pixels([train[i][0] for i in range(40)])
    labels = [pictures.label(i) for i in range(14)]
    for name, budget in (("none", {"ratio": 0.0}), ("tome", {"flops": 0.5})):
        row = found[name]
        with torch.inference_mode(), apply_pruner(model, "tome", **budget) as handle:
            said = model(pixels).argmax(-1).tolist()
            report = handle.last
            features = [model.forward_head(model.forward_features(x), pre_logits=True) for x in (known, pixels)]
        assert row["result"]["scores"] == [float(a == b) for a, b in zip(said, labels)]
        nearest = KNeighborsClassifier(5, metric="cosine").fit(features[0], [train.label(i) for i in range(40)])
        assert row["result"]["probes"]["knn"] == pytest.approx((nearest.predict(features[1]) == labels).mean())
        assert set(row["result"]["probes"]) == {"knn", "linear"}
        assert row["run"] == {"batch_size": 5, "decided_by": "head"}
        cost = row["cost"]
        assert cost["tokens_per_layer"] == report.tokens_per_layer[0] and cost["visual_tokens"] == 256
        assert cost["kept_tokens"] == len(report.images[0].kept)
        assert cost["prefill_flops"] == pytest.approx(sum(cost["flops"].values()))
        assert row["measured"]["prefill_ms"] > 0 and "decode_ms" not in row["measured"]
    share = found["tome"]["cost"]["prefill_flops"] / found["tome"]["cost"]["prefill_flops_full"]
    assert share == pytest.approx(0.5, abs=0.05)


def test_an_interrupted_sweep_ends_with_the_same_rows(swept, tmp_path, monkeypatch, few):
    answered, answer = [], ViTSubject.answer

    def interrupted(self, items, length):
        if self.task is None:  # the first batch, to warm up
            return answer(self, items, length)
        answered.append(len(items))
        if len(answered) == 5:  # in the second cell's second batch
            raise KeyboardInterrupt
        return answer(self, items, length)

    monkeypatch.setattr(ViTSubject, "answer", interrupted)
    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        classify(path).run()
    classify(path).run()
    assert len(answered) == 3 * 3 + 1  # what was finished is not run again
    assert sweeps.rows(path) == sweeps.rows(swept)


def test_methods_default_to_those_that_work_on_vision_transformers(tmp_path):
    said = []
    made = classify(tmp_path / "results.jsonl", methods=None, tell=said.append)
    names = {spec.name for spec in made._methods(ViTSubject("digits-vit", "cpu"))}
    assert {"random", "tome", "fastv", "divprune"} <= names and not {"cdpruner", "prumerge"} & names
    assert any("without cdpruner" in line for line in said)


def test_questions_and_classes_do_not_share_a_sweep(tmp_path):
    with pytest.raises(ConfigError, match="one by one"):
        classify(tmp_path / "r.jsonl", tasks=[load_task("digits", limit=2), load_task("scenes", limit=2)]).run()


def test_the_command_prints_probes_and_throughput(tmp_path, few):
    out = tmp_path / "results.jsonl"
    result = run("eval", "--task", "digits", "--limit", 8, "-m", "tome", "-b", "1/2", "-o", out)
    assert result.exit_code == 0, result.output
    for heading in ("kNN", "linear", "images/s", "un-pruned", "tome", "per picture"):
        assert heading in result.stdout
    for heading in ("KV", "decode"):
        assert heading not in result.stdout
    rows = read_rows(out)
    assert [row["model"]["name"] for row in rows] == ["digits-vit"] * 2 and rows[1]["budget"]["by"] == "flops"
    written = (tmp_path / "results-report" / "report.md").read_text()
    assert "| kNN % | linear % |" in written
    table = list(csv.DictReader((tmp_path / "results-report" / "report.csv").open()))
    assert {"probe_knn", "probe_linear", "flops_embedding"} <= set(table[0])


def test_the_command_says_what_is_wrong_first():
    assert "no vision transformer 'digits-vitt'" in failure("eval", "--task", "digits", "--model", "digits-vitt")
    assert "is for questions" in failure("eval", "--task", "digits", "--scorer", "vqa")
    assert "Did you mean timm:vit_tiny_patch16_224" in failure(
        "eval", "--task", "digits", "--model", "timm:vit_tiny_patch16_244"
    )


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for call in (load_digits_vit, lambda: load_vision("timm:x"), lambda: check_vision_name("open_clip:ViT-B-32")):
        with pytest.raises(ConfigError, match=r"pip install prune-vlm\[vit\]"):
            call()


# --------------------------------------------------------------------------------------------------- image folders
@pytest.fixture
def folder(tmp_path):
    """Three classes of 4, 3 and 2 pictures of one colour each."""
    rng = np.random.default_rng(0)
    for name, count, colour in (("red", 4, 0), ("green", 3, 1), ("blue", 2, 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            pixels[..., colour] += 190
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    (tmp_path / "data" / "notes.txt").write_text("no class")
    return tmp_path / "data"


def test_every_other_picture_is_a_test_picture_and_classes_take_turns(folder):
    task = load_task(f"imagefolder:{folder}")
    names = [item.files[0][0] for item in task.items]
    assert names == ["blue/0.png", "green/0.png", "red/0.png", "green/2.png", "red/2.png"]
    train = [item.files[0][0] for item in task.classes.train]
    assert train == ["blue/1.png", "green/1.png", "red/1.png", "red/3.png"]
    assert [item.answer for item in task.items] == ["blue", "green", "red", "green", "red"]
    assert task.classes.names == ("blue", "green", "red")
    assert [item.answer for item in load_task(f"imagefolder:{folder}", limit=3).items] == ["blue", "green", "red"]
    whole = load_task(f"imagefolder:{folder}", split="all")
    assert len(whole.items) == 9 and not whole.classes.train
    assert task.items[2].images[0].getpixel((0, 0))[0] >= 190
    again = load_task(task.name, **task.options)
    assert again.digest == task.digest
    Image.new("RGB", (9, 9)).save(folder / "red" / "3.png")  # a probe's picture
    assert load_task(task.name, **task.options).digest != task.digest


def test_a_bad_folder_is_refused_with_its_name(folder, tmp_path):
    (tmp_path / "none").mkdir()
    for name, message in (
        ("imagefolder:", "needs a path"),
        (f"imagefolder:{tmp_path}/gone", "there is no folder"),
        (f"imagefolder:{tmp_path}/none", "0 sub-folders"),
    ):
        with pytest.raises(TaskError, match=message):
            load_task(name)
    (folder / "blue" / "0.png").unlink()
    with pytest.raises(TaskError, match="blue has 1 images"):
        load_task(f"imagefolder:{folder}")
    assert len(load_task(f"imagefolder:{folder}", split="all").items) == 8
    with pytest.raises(TaskError, match="max_new_tokens is for questions"):
        load_task(f"imagefolder:{folder}", max_new_tokens=3)


def prepare(images):
    return to_pixels([image.resize((tiny_vit.SIDE, tiny_vit.SIDE)) for image in images])


def words(texts):
    """Letters as tokens, eight of them."""
    return torch.tensor([[ord(letter) % 29 for letter in f"{text[-8:]:8}"] for text in texts])


def answers(vision: Vision, task, cell=UNPRUNED):
    """(subject, what it says of all items of the task at once)."""
    subject = ViTSubject("mine", vision=vision)
    with subject.under(cell, task) as handle:
        said = subject.answer([task.items[i] for i in range(len(task.items))])
        cost = subject.cost(handle, said)
    return subject, said, cost


@pytest.mark.parametrize("name", ["open_clip-CLIP", "CLIPModel", "SiglipModel"])
def test_models_of_pictures_and_texts_are_asked_by_prompts(name, folder):
    task, model = load_task(f"imagefolder:{folder}", split="all"), tiny_vit.build(name)
    prompts = [f"a photo of a {label}" for label in ("blue", "green", "red")]
    if name == "open_clip-CLIP":
        vision = of_open_clip(model, lambda image: prepare([image])[0], words)
        encode = model.encode_text
    else:

        def processor(images, return_tensors):
            return {"pixel_values": prepare(images)}

        vision = of_hugging_face(model, processor, lambda texts, **_: {"input_ids": words(texts).tolist()})
        encode = lambda tokens: model.get_text_features(tokens).pooler_output  # noqa: E731
    subject, said, _ = answers(vision, task)
    assert subject.options(task) == {"decided_by": "zero-shot"} and not said.probes
    with torch.inference_mode():
        pictures = tiny_vit.run(name, model, prepare([item.images[0] for item in task.items]))
        texts = nn.functional.normalize(encode(words(prompts)), dim=-1)
    assert said.texts == [task.classes.names[at] for at in (pictures @ texts.T).argmax(-1)]
    # Random texts all lie on one side of random pictures; these lie between them.
    mean = nn.functional.normalize(pictures.mean(0), dim=0)
    prototypes = pictures[:3] - (pictures[:3] @ mean)[:, None] * mean
    vision.embed_texts = lambda texts: 7 * prototypes[[prompts.index(text) for text in texts]]
    expected = (pictures @ nn.functional.normalize(prototypes, dim=-1).T).argmax(-1)
    _, said, _ = answers(vision, task)
    assert said.texts == [task.classes.names[at] for at in expected] and len(set(said.texts)) > 1


def test_a_fitting_classifier_decides_and_else_the_neighbours(folder):
    task = load_task(f"imagefolder:{folder}")
    for classes, decides in ((3, "head"), (7, "knn"), (0, "knn")):
        torch.manual_seed(0)
        model = tiny_vit.timm.models.VisionTransformer(**{**tiny_vit.TIMM, "num_classes": classes}).eval()
        subject, said, _ = answers(of_timm(model, prepare), task)
        assert subject.options(task) == {"decided_by": decides}
        assert set(said.probes) == {"knn", "linear"} - {decides}
        if decides == "head":
            pixels = prepare([item.images[0] for item in task.items])
            assert said.texts == [task.classes.names[at] for at in model(pixels).argmax(-1)]
    whole = load_task(f"imagefolder:{folder}", split="all")
    with pytest.raises(ConfigError, match="no classifier of 3 classes"):
        answers(of_timm(model, prepare), whole)


def test_labels_of_a_classifier_win_over_the_order_of_folders():
    names = ("blue", "green", "red")
    assert head_labels(("Red", "blue", "GREEN"), names) == ["red", "blue", "green"]
    assert head_labels(("LABEL_0", "LABEL_1", "LABEL_2"), names) == names
    assert head_labels((), names) == names


def test_a_folder_of_hugging_face_is_swept_by_name(folder, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    labels = {0: "red", 1: "green", 2: "blue"}
    config = ViTConfig(**{**tiny_vit.HF, "num_labels": 3}, id2label=labels, label2id={v: k for k, v in labels.items()})
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessor(size={"height": 20, "width": 20})
    processor.save_pretrained(tmp_path / "model")
    task = load_task(f"imagefolder:{folder}")
    path = tmp_path / "results.jsonl"
    classify(path, models=[str(tmp_path / "model")], tasks=[task], methods=[Spec("tome")]).run()
    rows = read_rows(path)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    pixels = processor([item.images[0] for item in task.items], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        said = [labels[at] for at in model(pixels).logits.argmax(-1).tolist()]
    assert rows[0]["result"]["scores"] == [float(a == item.answer) for a, item in zip(said, task.items)]
    assert rows[0]["run"]["decided_by"] == "head" and rows[0]["model"]["revision"]
    assert rows[1]["cost"]["average_tokens"] < rows[0]["cost"]["average_tokens"] == tiny_vit.PATCHES


def test_towers_without_a_head_give_features(folder):
    task = load_task(f"imagefolder:{folder}")
    for name in ("ViTModel", "SiglipVisionModel", "Dinov2ForImageClassification"):
        vision = of_hugging_face(tiny_vit.build(name), lambda images, return_tensors: {"pixel_values": prepare(images)})
        _, said, cost = answers(vision, task, Cell(Spec("random"), "keep", HALF))
        assert set(said.texts) <= set(task.classes.names) and cost["kept_tokens"] == 5 * round(tiny_vit.PATCHES / 2)


# ------------------------------------------------------------------------------------------------------ accounting
@pytest.mark.parametrize("name", tiny_vit.VITS)
def test_flops_are_those_of_the_flop_counter(name):
    """To the last one: un-pruned, cut between blocks and inside them, with signals, and restored before pooling."""
    model, pixels = tiny_vit.shared(name), tiny_vit.images(2)
    for method, budget in (
        ("random", {"ratio": 0.0}),
        ("fastv", {"ratio": 0.6}),
        ("hiprune" if tiny_vit.VITS[name].cls else "divprune", {"ratio": 0.6}),
        ("tome", {"ratio": 0.6}),
        ("tome", {"ratio": 0.6, "restore": True}),
    ):
        with apply_pruner(model, method, **budget) as handle, FlopCounterMode(display=False) as counter:
            tiny_vit.run(name, model, pixels)
            accounts = account(model, handle.last)
        assert sum(one.total for one in accounts) == counter.get_total_flops(), (method, budget)
        full = account_full(model, handle.last)[0]
        assert full.tokens_per_layer == full.tokens_per_mlp == (tiny_vit.PATCHES,) * tiny_vit.DEPTH
        if budget["ratio"]:
            assert accounts[0].attention < full.attention and accounts[0].mlp < full.mlp
        else:
            assert accounts[0] == full
        if method == "tome":
            assert all(mlp < layer for layer, mlp in zip(accounts[0].tokens_per_layer, accounts[0].tokens_per_mlp))


def test_images_are_accounted_one_by_one():
    model, pixels = tiny_vit.shared("timm"), tiny_vit.images(3)
    with apply_pruner(model, tiny_vit.Loud(1), keep=20) as handle:
        model(pixels)
        many = account(model, handle.last)
        assert len({one.total for one in many}) > 1
        for row, expected in zip(pixels, many):
            with FlopCounterMode(display=False) as counter:
                model(row[None])
            assert account(model, handle.last) == [expected]
            assert expected.total == counter.get_total_flops()
        report = handle.last
    with pytest.raises(ConfigError, match="no pruner"):
        account(model, report)
    assert account_full(model, report)[0].total > many[0].total


def test_the_benchmark_prints_time_beside_flops():
    from prune.evals.bench import app

    arguments = ["vit", "--model", "vit_tiny_patch16_224", "--batch", "1", "--rounds", "1", "--threads", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = {row["case"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert rows["tome"]["keep"] == 196 - 13 * 12 == 40 and rows["un-hooked"]["flops_ratio"] == 1
    assert 1.5 < rows["tome"]["flops_ratio"] < 2 and rows["tome"]["speedup"] > 0
