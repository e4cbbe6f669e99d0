"""The built-in benchmark is fair and the built-in model is what its card says."""

from __future__ import annotations

import csv
import hashlib

import numpy as np
import pytest
import torch

from prune.evals import scenes
from prune.evals.scenes import LEVELS, Scenes

NAMES = tuple(LEVELS)


@pytest.fixture(scope="module", params=NAMES)
def level(request):
    return request.param, list(Scenes(request.param, size=240))


# ------------------------------------------------------------------------------------------------------ benchmark
def test_an_item_depends_on_split_seed_and_index_alone():
    few, many = Scenes(size=5), Scenes(size=1000)
    for index in (4, 0):  # in any order
        a, b = few[index], many[index]
        assert (a.question, a.answer, a.things) == (b.question, b.answer, b.things)
        assert a.images[0].tobytes() == b.images[0].tobytes()
    pictures = {
        Scenes(name, split, 1, seed)[0].images[0].tobytes()
        for name in NAMES
        for split in ("test", "train")
        for seed in (0, 1)
    }
    assert len(pictures) == 8


def test_the_items_are_the_same_on_every_machine(level):
    name, items = level
    text = "\n".join(f"{item.question} {item.answer} {item.things}" for item in items)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGEST[name]


DIGEST = {"scenes": "50f929bfa4b1b11b", "scenes-hard": "2a158486f34505d6"}


def test_splits_share_no_handwriting_and_no_photograph():
    train, test = (set(scenes.digit_indices(split)) for split in ("train", "test"))
    assert not train & test and len(train | test) == 1797 and len(test) == 360
    whole = [part.shape[1] for part in scenes._photographs("train")]
    rest = [part.shape[1] for part in scenes._photographs("test")]
    assert [a + b for a, b in zip(whole, rest)] == [640, 640]


def test_answers_are_balanced(level):
    name, items = level
    shares = scenes.majority(items)
    assert list(shares) == list(LEVELS[name].answers)
    for kind, share in shares.items():
        assert share <= 1 / len(LEVELS[name].answers[kind]) + 0.05, kind
    assert len({sum(item.kind == kind for item in items) for kind in shares}) == 1  # as many of each kind


def test_a_constant_answer_per_question_text_is_no_better_than_chance():
    """Blind guessing that reads the question: only colours and digits that are asked for could leak."""
    items = list(Scenes(size=1000))
    by_text: dict[str, list[str]] = {}
    for item in items[:500]:
        by_text.setdefault(item.question, []).append(item.answer)
    guess = {text: max(set(answers), key=answers.count) for text, answers in by_text.items()}
    assert np.mean([guess.get(item.question) == item.answer for item in items[500:]]) < 0.35


def test_items_are_well_formed(level):
    name, items = level
    for item in items:
        assert item.images[0].size == (scenes.SIDE, scenes.SIDE) and item.images[0].mode == "RGB"
        assert _derive(item, name) == item.answer, item
        labels = scenes.patch_labels(item.things)
        for index, thing in enumerate(item.things):  # whole, inside the picture, hidden by no other
            assert (labels == index).sum() == thing.size**2
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scenes.SIDE and 0 <= top < bottom <= scenes.SIDE
            assert right - left == thing.size * scenes.PATCH


def _derive(item, name: str) -> str:
    """The answer from the objects and the words of the question, written independently of the generator."""
    digits = [thing for thing in item.things if thing.is_digit]
    words = item.question.rstrip("?").split()
    if item.kind == "count":
        return str(len(digits))
    if item.kind == "presence":
        return "yes" if any(t.name == words[-1] and (len(words) == 4 or t.colour == words[3]) for t in digits) else "no"
    if item.kind == "colour-of":
        return one([thing.colour for thing in digits if thing.name == words[-1]])
    if item.kind == "digit-of":
        return one([thing.name for thing in digits if thing.colour == words[-1]])
    edge = {"leftmost": 0, "topmost": 1}[item.kind.split("-")[0]]
    ends = sorted(digits, key=lambda thing: thing.box[edge])
    assert ends[1].box[edge] - ends[0].box[edge] >= LEVELS[name].margin * scenes.PATCH  # a clear winner
    return ends[0].colour if item.kind.endswith("colour") else ends[0].name


def one(found: list[str]) -> str:
    assert len(found) == 1
    return found[0]


def test_objects_are_where_the_labels_say():
    """A coloured stroke on a darkened plate changes its patches; the digits of the test split are what is pasted."""
    item = Scenes(size=1)[0]
    pixels = np.asarray(item.images[0]).astype(int)
    thing = item.things[0]
    left, top, right, bottom = thing.box
    strongest = np.abs(pixels[top:bottom, left:right] - np.array(scenes.COLOURS[thing.colour])).sum(-1).min()
    assert strongest <= 3 * 20 + 30  # the jitter of colours, and a stroke a little short of opaque


def test_hard_scenes_are_harder():
    easy, hard = (list(Scenes(name, size=160)) for name in NAMES)

    def mean(items, count):
        return np.mean([count(item.things) for item in items])

    assert mean(hard, len) > 1.5 * mean(easy, len)
    assert max(t.size for item in hard for t in item.things) < min(t.size for item in easy for t in item.things)
    assert mean(hard, lambda things: any(not t.is_digit for t in things)) > 0.5
    assert all(t.is_digit for item in easy for t in item.things)
    assert {item.kind for item in hard} - {item.kind for item in easy} == {"leftmost-colour", "topmost-colour"}


def test_scenes_are_a_sequence_and_refuse_nonsense():
    items = Scenes(size=3)
    assert len(items) == 3 and len(list(items)) == 3 and items[-1].things == items[2].things and len(items[1:]) == 2
    with pytest.raises(IndexError):
        items[3]
    with pytest.raises(ValueError, match="scenes, scenes-hard"):
        Scenes("scene")
    with pytest.raises(ValueError, match="test, train"):
        Scenes(split="dev")
    with pytest.raises(ValueError, match="negative"):
        Scenes(size=-1)


# ------------------------------------------------------------------------------------------------------ checkpoint
@pytest.fixture(scope="module")
def built_in():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from prune.evals.scenes_model import CHECKPOINT

    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(CHECKPOINT), CHECKPOINT


def test_checkpoint_is_an_ordinary_small_folder(built_in):
    model, processor, folder = built_in
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    assert not list(folder.glob("*.py"))
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6


def test_processor_puts_the_question_behind_144_image_tokens(built_in):
    model, processor, _ = built_in
    item = Scenes(size=1)[0]
    chat = [{"role": "user", "content": [{"type": "text", "text": item.question}, {"type": "image"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=item.images, text=prompt, return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert (ids == model.config.image_token_id).sum() == 144 == (scenes.SIDE // scenes.PATCH) ** 2
    assert processor.tokenizer.decode(ids[-7:]) == "is the 3 ? assistant :".replace("is the", "colour is the")
    assert processor.tokenizer.unk_token_id not in ids
    pixels = inputs["pixel_values"]
    assert pixels.shape == (1, 3, scenes.SIDE, scenes.SIDE)  # neither resized nor cropped
    restored = pixels[0] * torch.tensor(processor.image_processor.image_std)[:, None, None]
    restored = (restored + torch.tensor(processor.image_processor.image_mean)[:, None, None]) * 255
    assert np.abs(restored.permute(1, 2, 0).numpy() - np.asarray(item.images[0])).max() < 0.6


def test_every_word_of_both_levels_is_in_the_vocabulary(built_in):
    tokenizer = built_in[1].tokenizer
    for name in NAMES:
        for item in Scenes(name, size=120):
            ids = tokenizer.encode(f"{item.question} {item.answer}")
            assert tokenizer.unk_token_id not in ids
            assert len(tokenizer.encode(item.answer)) == 1


def test_model_answers_held_out_questions(built_in):
    from prune.evals.scenes_model import answer

    model, processor, _ = built_in
    items = list(Scenes(size=102))
    right = [said == item.answer for said, item in zip(answer(model, processor, items), items)]
    assert np.mean(right) >= 0.8


def test_cls_attends_to_objects(built_in):
    from prune.evals.scenes_model import cls_coverage

    model, processor, _ = built_in
    attention = model.model.vision_tower.config._attn_implementation
    rows = cls_coverage(model, processor, list(Scenes(size=60)))
    assert [row["lift"] >= 2 for row in rows[-2:]] == [True, True]  # the layer LLaVA reads, and the last
    assert model.model.vision_tower.config._attn_implementation == attention


def test_card_and_csv_agree_on_the_floor(built_in):
    folder = built_in[2]
    rows = list(csv.DictReader((folder / "accuracy.csv").open()))
    easy = {row["kind"]: row for row in rows if row["scenes"] == "scenes"}
    assert set(easy) == {*LEVELS["scenes"].answers, "all"}
    assert float(easy["all"]["accuracy"]) >= 0.8
    for kind, row in easy.items():
        assert float(row["accuracy"]) >= float(row["majority"]) + 0.3, kind
        assert f"{100 * float(row['accuracy']):.1f}" in (folder / "README.md").read_text(), kind
    assert list(csv.DictReader((folder / "training.csv").open()))


# -------------------------------------------------------------------------------------------------------- training
def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """All three stages in six steps; a run that is interrupted and resumed ends with the weights of one that is not."""
    from safetensors.torch import load_file

    from prune.evals import train_scenes

    def run(name: str, **more) -> None:
        folder, state = tmp_path / name, tmp_path / f"{name}.pt"
        sizes = dict(steps=6, tower_images=4, few_images=4, batch_size=2, test_items=16)
        train_scenes.train(**sizes, out=folder, state=state, **more)

    make_batch, calls = train_scenes.make_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make_batch(*args)

    with torch.random.fork_rng(devices=[]):
        run("whole")
        monkeypatch.setattr(train_scenes, "make_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
        assert not (tmp_path / "broken").exists()
        run("broken", resume=True)
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert len(list(csv.DictReader((tmp_path / "broken" / "accuracy.csv").open()))) == 7 + 9
