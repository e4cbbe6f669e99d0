"""Tasks load what was written, say where bad input is, and scorers accept right answers and nothing else."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prune import PruneError
from prune.evals.scenes import Scenes
from prune.evals.tasks import SCORERS, TaskError, list_tasks, load_task


def write(path, *rows, encoding="utf-8"):
    """One line per row; a row that is no string becomes JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def row(**changes):
    return dict(image="red.png", question="What colour?", answer="red") | changes


@pytest.fixture
def folder(tmp_path):
    """Two pictures and no questions yet."""
    place = tmp_path / "mine"
    place.mkdir()
    Image.new("RGB", (6, 4), "red").save(place / "red.png")
    Image.new("RGBA", (5, 5), (0, 0, 0, 0)).save(place / "clear.png")
    return place


def pixel(image):
    return image.mode, image.getpixel((0, 0))


# --------------------------------------------------------------------------------------------------------- scorers
@pytest.mark.parametrize(
    "scorer, said, answer, score",
    [
        ("exact", " Red.", "red", 1),
        ("exact", "the red", "Red", 1),
        ("exact", "red", "a red", 1),
        ("exact", "**Red**\n", "red", 1),
        ("exact", "“red”", "red", 1),
        ("exact", "Two", "2", 1),
        ("exact", "2", "two", 1),
        ("exact", "red,  green", "Red green", 1),
        ("exact", "cafe\u0301", "caf\u00e9", 1),  # composed differently
        ("exact", "2", ["two", "a pair"], 1),
        ("exact", "pair", ["two", "a pair"], 1),
        ("exact", "A", "a", 1),
        ("exact", "it's", "it's", 1),
        ("exact", "red car", "red", 0),
        ("exact", "reddish", "red", 0),
        ("exact", "", "red", 0),
        ("exact", "the", "red", 0),
        ("exact", "", "A", 0),  # an article alone is an answer
        ("exact", "...", "?", 0),
        ("exact", "vitamin", "vitamin A", 0),
        ("exact", "5", "-5", 0),
        ("exact", "5", ".5", 0),
        ("exact", "5", "5%", 0),
        ("exact", "its", "it's", 0),
        ("exact", "m2", "m\u00b2", 0),
        ("exact", "12", ["1", "2"], 0),
        ("exact", "r", "red", 0),
        ("contains", "It is RED, I think.", "red", 1),
        ("contains", "red", "red", 1),
        ("contains", "I see the red car there", "a red car", 1),
        ("contains", "a dog", ["cat", "dog"], 1),
        ("contains", "plan (B)", "b", 1),
        ("contains", "reddish", "red", 0),
        ("contains", "infrared", "red", 0),
        ("contains", "3.5", "5", 0),
        ("contains", "15", "5", 0),
        ("contains", "red old car", "red car", 0),
        ("contains", "car red", "red car", 0),
        ("contains", "the left one", "1", 0),
        ("contains", "", "red", 0),
        ("contains", "green", ["?", "red"], 0),
        ("contains", "", "?", 0),
        ("choice", "(B)", "B", 1),
        ("choice", "B.", "B", 1),
        ("choice", "Answer: B", "B", 1),
        ("choice", "b", "B", 1),
        ("choice", "B", "(b)", 1),
        ("choice", "**B**", "B", 1),
        ("choice", "B because it is red", "B", 1),
        ("choice", "I think B", "B", 1),
        ("choice", "It's a cat: B", "B", 1),
        ("choice", "A T-shirt, e.g. (C)", "C", 1),
        ("choice", "A", "A", 1),
        ("choice", "a", "A", 1),
        ("choice", "A. cat", "A", 1),
        ("choice", "(A) cat", "A", 1),
        ("choice", "A: cat", "A", 1),
        ("choice", "A\ncat", "A", 1),
        ("choice", "A is right, B is wrong", "A", 1),
        ("choice", "A is right, B is wrong", "B", 0),
        ("choice", "The answer is A since it is red", "A", 1),
        ("choice", "I", "I", 1),
        ("choice", "A cat", "A", 0),  # an article
        ("choice", "A cat", "B", 0),
        ("choice", "It is a cat", "A", 0),
        ("choice", "I see nothing", "I", 0),
        ("choice", "B or C", "C", 0),
        ("choice", "Bicycle", "B", 0),
        ("choice", "B2", "B", 0),
        ("choice", "B/C", "B", 0),
        ("choice", "it's", "S", 0),
        ("choice", "", "B", 0),
        ("choice", "2", "B", 0),
        ("vqa", "Red", ["red"] * 10, 1),
        ("vqa", "red", ["red"] * 3 + ["blue"] * 7, 1),
        ("vqa", "red", ["red", "Red."] + ["blue"] * 8, 2 / 3),
        ("vqa", "two", ["2"] + ["3"] * 9, 1 / 3),
        ("vqa", "green", ["red"] * 3 + ["blue"] * 7, 0),
        ("vqa", "", ["red"] * 10, 0),
    ],
)
def test_scorers(scorer, said, answer, score):
    assert SCORERS[scorer](said, SimpleNamespace(answer=answer)) == score


# --------------------------------------------------------------------------------------------------------- built in
def test_scenes_are_the_test_items_with_their_own_defaults():
    assert list_tasks() == ["scenes", "scenes-hard", "digits"]
    for name in ("scenes", "scenes-hard"):
        task, items = load_task(name), Scenes(name, "test")
        assert len(task.items) == len(items) == 1000 and task.name == name and task.max_new_tokens == 3
        assert task.items[7].question == items[7].question and task.items[-1].things == items[999].things
        assert [item.kind for item in task.items[2:5]] == [item.kind for item in items[2:5]]
        assert task.scorer(items[7].answer, task.items[7]) == 1


def test_limit_cuts_scenes_to_a_prefix():
    task = load_task("scenes", limit=3, split="train", seed=5)
    assert [item.things for item in task.items] == [item.things for item in Scenes("scenes", "train", 3, 5)]
    assert len(task.items) == 3 and len(task.items[1:9]) == 2
    with pytest.raises(IndexError):
        task.items[3]
    assert len(load_task("scenes", limit=5000).items) == 1000


# --------------------------------------------------------------------------------------------------------- folders
def test_a_folder_yields_what_is_written_in_it(folder):
    lines = [
        row(kind="colour"),
        "",
        row(
            images=["clear.png", str(folder / "red.png")], answer=["2", "two"], question="Wie viele? \u2028 \U0001f600"
        ),
        row(image="../mine/red.png", kind=None),
        row(kind=""),
    ]
    del lines[2]["image"]
    write(folder / "test.jsonl", *lines, encoding="utf-8-sig")  # with a byte order mark
    task = load_task(f"folder:{folder}")
    first, second, third, fourth = task.items
    assert (first.question, first.answer, first.kind) == ("What colour?", "red", "colour")
    assert (second.question, second.answer, second.kind) == ("Wie viele? \u2028 \U0001f600", ("2", "two"), "")
    assert [image.size for image in first.images] == [(6, 4)]
    assert [pixel(image) for image in second.images] == [("RGB", (255, 255, 255)), ("RGB", (255, 0, 0))]
    assert pixel(third.images[0]) == ("RGB", (255, 0, 0)) and third.kind == fourth.kind == ""
    assert task.scorer("Two.", second) == 1 and task.scorer("three", second) == 0
    assert task.name == f"folder:{folder}" and task.max_new_tokens == 16


def test_windows_line_ends(folder):
    (folder / "test.jsonl").write_bytes((json.dumps(row()) + "\r\n\r\n" + json.dumps(row(answer="2"))).encode())
    assert [item.answer for item in load_task(f"folder:{folder}").items] == ["red", "2"]


def test_spellings_of_one_folder_are_one_task(folder, monkeypatch):
    write(folder / "val.jsonl", row())
    write(folder / "._val.jsonl", "what macOS leaves")
    assert load_task(str(folder)).options["split"] == "val"
    write(folder / "test.jsonl", row(answer="blue"))
    by_split = load_task(f"folder:{folder}", split="val")
    assert [item.answer for item in by_split.items] == ["red"]
    monkeypatch.chdir(folder.parent)
    assert load_task("mine", split="val").name == load_task("folder:./mine", split="val").name == by_split.name
    by_file = load_task("mine/val.jsonl")
    assert by_file.digest == by_split.digest and by_file.options == by_split.options
    assert load_task("mine", split="test").digest != by_split.digest


def test_pictures_are_opened_when_asked_for(folder):
    write(folder / "test.jsonl", row(), row(image="broken.png"), row(image="gone.png"))
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:45])
    Image.new("L", (2, 2)).save(folder / "gone.png")
    task = load_task(str(folder))
    (folder / "gone.png").unlink()
    first = task.items[0]
    assert first.images[0].size == (6, 4) and first.images is first.images  # decoded once
    assert task.items[0].images is not first.images  # the task holds no pixels
    assert task.digest and task.items[1].question == "What colour?"
    for index, name in ((1, "broken.png"), (2, "gone.png")):
        with pytest.raises(TaskError, match=rf"test\.jsonl, line {index + 1}: .*{name}"):
            task.items[index].images  # noqa: B018


def test_options_load_the_same_items_again(folder):
    write(folder / "test.jsonl", *[row(answer=str(i)) for i in range(4)])
    for name, asked in (
        ("scenes", dict(limit=8, seed=3, scorer="contains", max_new_tokens=5)),
        (str(folder), dict(limit=2, scorer="contains")),
        (str(folder), {}),
    ):
        task = load_task(name, **asked)
        again = load_task(task.name, **json.loads(json.dumps(task.options)))
        assert asked.items() <= again.options.items() and again.options == task.options
        assert (again.name, again.digest, again.scorer) == (task.name, task.digest, SCORERS[task.options["scorer"]])
        assert again.max_new_tokens == task.max_new_tokens
    assert load_task(str(folder), limit=4).options == load_task(str(folder)).options  # it cuts nothing


def test_digest_tells_data_apart(folder):
    def digest(*rows):
        write(folder / "test.jsonl", *rows)
        return load_task(str(folder)).digest

    base = digest(row(), row(question="How many?", answer="2"))
    assert base == digest(row(), row(question="How many?", answer=["2"]))
    others = [
        digest(row()),
        digest(row(image="clear.png"), row(question="How many?", answer="2")),
        digest(row(question="How many?", answer="2"), row()),
        digest(row(), row(question="How many?", answer="3")),
        digest(row(), row(question="How many??", answer="2")),
        digest(row(), row(question="How many?", answer="2", kind="count")),
        digest(row(), row(question="How many?", answer=["2", "two"])),
    ]
    assert len({base, *others}) == 8 and len(base) == 12


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "name, options, said",
    [
        ("sences", {}, "no task.*'sences'; did you mean scenes.*scenes, scenes-hard.*folder:PATH.*hf:NAME"),
        ("", {}, "no task"),
        ("zzz/yyy", {}, "'zzz/yyy'; Built in"),
        ("no/such.jsonl", {}, "folder or .jsonl file 'no/such.jsonl'"),
        ("folder:/no/such", {}, "no folder or file /no/such"),
        ("folder:", {}, "folder: needs a path"),
        ("hf:", {}, "hf: needs a dataset"),
        ("hf:org/name:", {}, "hf: needs a dataset"),
        ("scenes", dict(limit=0), "limit must be a whole number, at least 1, got 0"),
        ("scenes", dict(limit=-3), "at least 1, got -3"),
        ("scenes", dict(limit=2.5), "got 2.5"),
        ("scenes", dict(limit=True), "got True"),
        ("scenes", dict(seed=-1), "seed must be"),
        ("scenes", dict(max_new_tokens=0), "max_new_tokens must be"),
        ("scenes", dict(split="val"), "no split 'val'; there are test, train"),
        ("scenes", dict(scorer="bleu"), "no scorer 'bleu'; there are exact, contains, choice, vqa"),
        ("scenes", dict(scorer="vqa"), "scenes: the scorer 'vqa' wants"),
        ("scenes", dict(columns=dict(image="img")), "for hf: tasks only"),
        (
            "hf:org/name",
            dict(columns=dict(picture="img")),
            "unknown 'picture'; known are image, question, answer, kind",
        ),
    ],
)
def test_what_cannot_be_loaded(name, options, said):
    with pytest.raises(TaskError, match=said):
        load_task(name, **options)
    assert issubclass(TaskError, PruneError)


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"image": "red.png",', "not JSON"),
        ("red.png, what, red", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (["red.png"], "JSON object in {}, got list"),
        ("null", "got NoneType"),
        (dict(question="q", answer="a"), '"image" or "images"'),
        (row(images=["red.png"]), "not both"),
        (dict(image="red.png", answer="a"), "'question' is missing"),
        (dict(image="red.png", question="q"), "'answer' is missing"),
        (row(question=3), r"'question' must be text, got int \(3\)"),
        (row(question=" "), "'question' is empty"),
        (row(answer=3), "'answer' must be text or a list of texts, got int"),
        (row(answer=None), "'answer' must be text"),
        (row(answer=""), "'answer' is empty"),
        (row(answer=[]), "'answer' is an empty list"),
        (row(answer=["red", 4]), r"'answer' must be text, got int \(4\)"),
        (row(kind=4), "'kind' must be text"),
        (row(image=4), "'image' must be a path, got 4"),
        (row(image=""), "'image' must be a path"),
        (row(image=None), "'image' must be a path"),
        (dict(images=[], question="q", answer="a"), "'images' must be a list of at least one path"),
        (dict(images="red.png", question="q", answer="a"), "'images' must be a list"),
        (dict(images=["red.png", 4], question="q", answer="a"), "'images' must be a list"),
        (row(image="blue.png"), r"no image .*mine.blue\.png; paths are relative to .*mine"),
        (row(image="china.jpg"), r"no image .*china\.jpg"),  # built into `open_image`
        (row(image="nul\0.png"), "no image"),
        (dict(images=["red.png", "blue.png"], question="q", answer="a"), r"blue\.png"),
    ],
)
def test_bad_lines_are_named(folder, line, said):
    write(folder / "test.jsonl", row(), "", line, row())
    with pytest.raises(TaskError, match=rf"(?s)mine.test\.jsonl, line 3: .*{said}") as caught:
        load_task(f"folder:{folder}", limit=1)  # the whole file is checked
    assert len(str(caught.value)) < 400 and (caught.value.__context__ is None or caught.value.__suppress_context__)


def test_other_encodings_are_refused(folder):
    write(folder / "test.jsonl", row(), row(answer="grün"), encoding="latin-1")
    with pytest.raises(TaskError, match=r"line 2: not UTF-8.*save the file as UTF-8"):
        load_task(str(folder))
    write(folder / "test.jsonl", row(), encoding="utf-16")
    with pytest.raises(TaskError, match=r"line 1: not UTF-8"):
        load_task(str(folder))


def test_which_file_must_be_clear(folder):
    with pytest.raises(TaskError, match=r"no \.jsonl file; write one JSON object per line"):
        load_task(str(folder))
    (folder / "test.jsonl").write_text("\n \n")
    with pytest.raises(TaskError, match="has no items"):
        load_task(str(folder))
    write(folder / "val.jsonl", row())
    with pytest.raises(TaskError, match="several .*by split: test, val"):
        load_task(str(folder))
    with pytest.raises(TaskError, match="no split 'train'; there are test, val"):
        load_task(str(folder), split="train")
    with pytest.raises(TaskError, match="no split 'test'; there are val"):
        load_task(str(folder / "val.jsonl"), split="test")


@pytest.mark.parametrize(
    "scorer, answer, good",
    [
        ("choice", "red", "B"),
        ("choice", ["A", "red"], ["A", "(b)"]),
        ("choice", "3", "c."),
        ("vqa", "red", ["red"] * 3),
        ("vqa", ["red"] * 2, ["red", "blue", "green"]),
    ],
)
def test_answers_that_no_reply_could_match_are_refused(folder, scorer, answer, good):
    write(folder / "test.jsonl", row(answer=good), row(answer=answer))
    with pytest.raises(TaskError, match=f"line 2: the scorer '{scorer}' wants"):
        load_task(str(folder), scorer=scorer)
    write(folder / "test.jsonl", row(answer=good))
    assert load_task(str(folder), scorer=scorer).scorer is SCORERS[scorer]


# -------------------------------------------------------------------------------------------------------- datasets
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`datasets` with its cache in the test's folder and no way to the network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield datasets
    if not bars:
        datasets.enable_progress_bars()


def test_an_image_folder_of_datasets(folder, hub):
    (folder / "test").mkdir()
    for name in ("red.png", "clear.png"):
        (folder / name).rename(folder / "test" / name)
    names = ["red.png", "clear.png", "red.png"]
    rows = [dict(file_name=name, query=f"q{i}", answer=["a", str(i)], kind="k") for i, name in enumerate(names)]
    write(folder / "test" / "metadata.jsonl", *rows)
    task = load_task(f"hf:{folder}", columns=dict(question="query"))
    assert [(item.question, item.answer, item.kind) for item in task.items] == [
        (f"q{i}", ("a", str(i)), "k") for i in range(3)
    ]
    assert [pixel(item.images[0]) for item in task.items[:2]] == [("RGB", (255, 0, 0)), ("RGB", (255, 255, 255))]
    assert task.name == f"hf:{folder}" and task.options["split"] == "test"
    short = load_task(f"hf:{folder}:default", columns=dict(question="query"), limit=2)
    assert len(short.items) == 2 and short.options["limit"] == 2 and short.name == f"hf:{folder}:default"
    assert load_task(short.name, **json.loads(json.dumps(short.options))).digest == short.digest
    assert load_task(f"hf:{folder}", columns=dict(question="query"), split="test[1:]").items[0].question == "q1"

    for options, said in (
        (dict(split="val"), "no split 'val'; there are test"),
        (dict(split="test[x]"), "cannot load the dataset .*x"),
        ({}, r"no column 'question'; it has image, query, answer, kind: give columns=\{'question': ...\}"),
        (dict(columns=dict(question="query", kind="sort")), "no column 'sort'"),
        (dict(columns=dict(question="answer")), "row 0: 'answer' must be text, got list"),
        (dict(columns=dict(question="query", image="kind")), "row 0.*no image k"),
        (dict(columns=dict(question="query"), scorer="vqa"), "row 0: the scorer 'vqa' wants"),
    ):
        with pytest.raises(TaskError, match=said) as caught:
            load_task(f"hf:{folder}", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match=r"cannot load the dataset .*'none' not found"):
        load_task(f"hf:{folder}:none")


def test_every_kind_of_image_column(folder, hub, monkeypatch):
    png = (folder / "clear.png").read_bytes()
    grey = Image.fromarray(np.full((4, 6), 40_000, np.uint16))  # 16 bits
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (6, 4)).save(turned := io.BytesIO(), "jpeg", exif=exif)
    turned = dict(bytes=turned.getvalue(), path=None)
    columns = dict(
        pil=[grey, turned, None],
        many=[[grey, grey], [grey], []],
        path=[str(folder / "red.png"), str(folder / "no.png"), "china.jpg"],
        raw=[dict(bytes=png, path=None), turned, dict(bytes=png[:45], path=None)],
        number=[1, 2, 3],
    )
    texts = dict(question=["q"] * 3, answer=["a"] * 3)
    features = hub.Features(
        pil=hub.Image(),
        many=hub.Sequence(hub.Image()),
        path=hub.Value("string"),
        raw=dict(bytes=hub.Value("binary"), path=hub.Value("string")),
        number=hub.Value("int64"),
        **{key: hub.Value("string") for key in texts},
    )
    data = hub.Dataset.from_dict(columns | texts, features=features)
    monkeypatch.setattr(hub, "load_dataset", lambda *args, **options: data)

    def images(column, index):
        return load_task("hf:org/name", columns=dict(image=column)).items[index].images

    assert pixel(images("pil", 0)[0]) == ("RGB", (156, 156, 156))  # not cut off at 255
    assert images("pil", 1)[0].size == images("raw", 1)[0].size == (4, 6)  # upright, turned once
    assert [image.size for image in images("many", 0)] == [(6, 4)] * 2
    assert pixel(images("path", 0)[0]) == ("RGB", (255, 0, 0))
    assert pixel(images("raw", 0)[0]) == ("RGB", (255, 255, 255))
    for column, index, said in (
        ("pil", 2, "row 2: 'pil' has no picture"),
        ("many", 2, "row 2: 'many' has no picture"),
        ("path", 1, r"row 1, 'path': there is no image .*no\.png"),
        ("path", 2, "no image china.jpg"),
        ("raw", 2, "row 2, 'raw': "),
        ("number", 0, "row 0, 'number': a picture must be"),
    ):
        with pytest.raises(TaskError, match=said):
            images(column, index)
    with pytest.raises(TaskError, match="row 0, 'number'"):
        load_task("hf:org/name", columns=dict(image="number"))  # before anything is run
    with pytest.raises(TaskError, match="'number' must be text or a list of texts, got int"):
        load_task("hf:org/name", columns=dict(answer="number", image="path"))
    task = load_task("hf:org/name", columns=dict(image="raw", kind="answer"))  # one column, two uses
    assert task.items[0].kind == task.items[0].answer == "a"
    data = data.select([2])
    with pytest.raises(TaskError, match="row 0, 'raw': "):
        load_task("hf:org/name", columns=dict(image="raw"))
    data = data.select([])
    with pytest.raises(TaskError, match="hf:org/name has no items"):
        load_task("hf:org/name", columns=dict(image="raw"))


def test_a_dataset_out_of_reach_is_one_line(folder, hub, monkeypatch):
    with pytest.raises(TaskError, match="cannot load the dataset org/name: .*; check its name") as caught:
        load_task("hf:org/name")
    assert "\n" not in str(caught.value)
    write(folder / "test.jsonl", '{"a": 1}', '{"a": "x", bad}')
    with pytest.raises(TaskError, match="cannot load the dataset") as caught:
        load_task(f"hf:{folder}")
    assert "\n" not in str(caught.value)

    def fail(*args, **options):
        raise RuntimeError("while generating") from OSError("\ndisk full\nfree some")

    monkeypatch.setattr(hub, "load_dataset", fail)
    with pytest.raises(TaskError, match="cannot load the dataset org/name: disk full; check"):
        load_task("hf:org/name")


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r'pip install "prune-vlm\[datasets\]"'):
        load_task("hf:org/name")
