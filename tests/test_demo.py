"""What the page of `prune demo` does: uploads, answers, tables; the page itself only where gradio is installed.

`tests/integration/run_demo.sh` walks through the page in a browser.
"""

from __future__ import annotations

import logging
import threading
from fractions import Fraction
from html.parser import HTMLParser
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from PIL import Image

from prune.apply import apply_pruner, get_handle
from prune.evals import demo_command
from prune.evals.command import By
from prune.evals.demo_compare import (
    MAX_EDGE,
    MAX_PIXELS,
    UNPRUNED,
    Batch,
    Column,
    Demo,
    Result,
    amount,
    batch_html,
    comparison_html,
    open_upload,
)
from prune.evals.scenes import Scenes
from prune.loading import UserError

QUARTER = Fraction(1, 4)
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (extra demo)")


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(device="cpu")


# ------------------------------------------------------------------------------------------------------------ uploads
def _noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((300, 200), 90).convert(mode)


def _bytes(tmp_path, name: str, picture: Image.Image, **options) -> bytes:
    picture.save(tmp_path / name, **options)
    return (tmp_path / name).read_bytes()


BAD = {
    "notes.txt": (lambda _: b"this is a text\n", "not a picture in a known format; give one of PNG, JPEG"),
    "text.png": (lambda _: b"this is a text\n", "not a picture in a known format"),
    "noise.jpg": (lambda _: bytes(range(256)) * 40, "not a picture in a known format"),
    "empty.png": (lambda _: b"", "is empty"),
    "head.png": (lambda _: b"\x89PNG\r\n\x1a\n", "cannot be read|not a picture"),
    "page.svg": (lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture in a known format"),
    "print.eps": (lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
    "paper.pdf": (lambda _: b"%PDF-1.4\n%%EOF", "not a picture in a known format"),
    "half.png": (lambda tmp: _bytes(tmp, "a.png", _noise())[:9000], "is broken and cannot be read"),
    "half.jpg": (lambda tmp: _bytes(tmp, "a.jpg", _noise())[:2000], "is broken and cannot be read"),
    "half.webp": (lambda tmp: _bytes(tmp, "a.webp", _noise())[:2000], "webp (is broken|is not a picture)"),
    "half.gif": (lambda tmp: _bytes(tmp, "a.gif", _noise())[:9000], "is broken and cannot be read"),
    "huge.png": (lambda tmp: _bytes(tmp, "a.png", Image.new("1", (10_000, 10_000))), "100 megapixels; .* at most 50"),
    "bomb.png": (lambda tmp: _bytes(tmp, "a.png", Image.new("1", (13_500, 13_500))), "far too many pixels"),
    "line.png": (lambda tmp: _bytes(tmp, "a.png", Image.new("L", (2, 41))), "2 x 41 pixels; crop it to at most 20 : 1"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_gets_a_message_that_names_it(name, tmp_path):
    make, says = BAD[name]
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=says) as caught:
        open_upload(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(name) and str(tmp_path) not in message and "\n" not in message


def test_size_is_checked_before_anything_is_decoded(tmp_path):
    whole = _bytes(tmp_path, "a.png", Image.new("1", (8000, 8000)))
    (tmp_path / "header.png").write_bytes(whole[:60])  # its pixels are not there
    with pytest.raises(UserError, match="64 megapixels"):
        open_upload(tmp_path / "header.png")


GREEN = Image.new("RGB", (60, 40), (0, 128, 0))
ODD = {
    "print.jpg": (GREEN.convert("CMYK"), {"quality": 100}, (0, 128, 0)),
    "sixteen.png": (Image.new("I;16", (60, 40), 128 * 256), {}, (128, 128, 128)),
    "alpha.png": (Image.new("RGBA", (60, 40), (0, 128, 0, 0)), {}, (255, 255, 255)),
    "grey-alpha.png": (Image.new("LA", (60, 40), (0, 127)), {}, (128, 128, 128)),
    "palette.gif": (GREEN.quantize(4), {}, (0, 128, 0)),
    "two-tone.png": (Image.new("1", (60, 40), 1), {}, (255, 255, 255)),
    "scan.tiff": (GREEN, {}, (0, 128, 0)),
    "photo.webp": (GREEN, {"lossless": True}, (0, 128, 0)),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_works_and_keeps_its_colour(name, tmp_path):
    picture, options, colour = ODD[name]
    picture.save(tmp_path / name, **options)
    opened, note = open_upload(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (60, 40) and note == ""
    assert max(abs(a - b) for a, b in zip(opened.getpixel((30, 20)), colour)) <= 3


@pytest.mark.parametrize(("name", "noted"), [("film.gif", True), ("film.png", True), ("phone.mpo", False)])
def test_of_several_frames_the_first_is_taken_and_said_so(name, noted, tmp_path):
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    picture, note = open_upload(tmp_path / name)  # an MPO's further frames are a preview and a depth map
    red, green, blue = picture.getpixel((30, 20))
    assert red > 250 and green < 5 and blue < 5
    assert ("first one is used" in note) == noted


def test_a_large_picture_is_kept_small_and_a_turned_one_upright(tmp_path):
    picture = Image.new("L", (5000, 2500))
    assert picture.width * picture.height < MAX_PIXELS
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_upload(tmp_path / "turned.jpg")[0].size == (MAX_EDGE // 2, MAX_EDGE)


# ------------------------------------------------------------------------------------------------------------ answers
def ask(demo: Demo, *methods: str, number: int = 1, share=QUARTER, by: By = By.average) -> list[Result]:
    example = demo.examples[number]
    return list(demo.compare(example.picture, example.question, methods, share, by))


def test_answers_are_those_of_the_model_itself(demo):
    item = Scenes()[1]
    results = ask(demo, "visionzip", "random")
    assert [one.label for one in results] == [UNPRUNED, "visionzip", "random"]
    assert get_handle(demo.subject.model) is None
    expected = [demo.subject.answer([item], 3).texts[0]]
    for name in ("visionzip", "random"):
        with apply_pruner(demo.subject.model, name, average=36) as handle:
            expected.append(demo.subject.answer([item], 3).texts[0])
            assert handle.last.average_tokens == [36.0]
    assert [one.answer for one in results] == expected
    assert expected[0] == item.answer == demo.examples[1].answer


def test_costs_are_counted_and_pictures_drawn(demo):
    full, a, b = ask(demo, "visionzip", "random")
    assert full.drawing is None and full.cost["kept_tokens"] == full.cost["visual_tokens"] == 144
    for one in (a, b):
        assert one.cost["kept_tokens"] == 36 and one.drawing.width > 500
        assert one.cost["prefill_flops"] < one.cost["prefill_flops_full"] == full.cost["prefill_flops"]
        assert one.cost["kv_bytes"] < full.cost["kv_bytes"] == one.cost["kv_bytes_full"]
        assert 0 < one.first <= one.total
    assert a.drawing.tobytes() != b.drawing.tobytes()


@pytest.mark.parametrize(
    ("by", "measure"),
    [
        (By.average, lambda cost: cost["average_tokens"] / cost["visual_tokens"]),
        (By.keep, lambda cost: cost["kept_tokens"] / cost["visual_tokens"]),
    ],
)
def test_the_budget_is_of_what_was_chosen(demo, by, measure):
    _, one = ask(demo, "fastv", share=Fraction(1, 2), by=by)  # acts after the first of five layers
    assert measure(one.cost) == pytest.approx(0.5, abs=1 / 144)
    assert one.cost["average_tokens"] != one.cost["kept_tokens"]


def test_a_method_out_of_reach_says_so_and_the_others_answer(demo):
    full, a, b = ask(demo, "fastv", "random", share=Fraction(1, 20))
    assert "out of reach" in a.trouble and a.answer == "" and a.cost is None and a.drawing is None
    assert full.answer and b.answer and not b.trouble
    assert get_handle(demo.subject.model) is None


def test_a_method_that_breaks_is_reported_and_logged(demo, monkeypatch, caplog):
    monkeypatch.setattr("prune.reducers.random.Random.score", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        _, a, b = ask(demo, "random", "divprune")
    assert a.trouble.startswith("failed: division by zero (ZeroDivisionError") and "Traceback" not in a.trouble
    assert "random failed" in caplog.text and b.answer
    assert get_handle(demo.subject.model) is None


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("", "ask something"),
        (" \n ", "ask something"),
        (None, "ask something"),
        ("x" * 1001, "1001 characters"),
        ("What <image> is it?", "'<image>'"),
        ("</s>", "'</s>'"),
    ],
)
def test_a_question_that_cannot_be_asked(demo, question, says):
    with pytest.raises(UserError, match=says):
        next(demo.compare(demo.examples[0].picture, question, ["random"], QUARTER, By.keep))


def test_without_a_picture_nothing_is_asked(demo):
    with pytest.raises(UserError, match="pick an example or upload"):
        next(demo.compare(None, "Is there a 5?", ["random"], QUARTER, By.keep))


def test_words_the_model_does_not_know(demo):
    assert demo.unknown_words("What colour is the Cat? A cat!") == ["Cat", "cat"]
    assert demo.unknown_words("Which digit is topmost?") == []


def test_two_visitors_do_not_disturb_each_other(demo):
    """A model carries one pruner at a time, and answers come in between each other's."""
    wanted = {name: [one.answer for one in ask(demo, name, "uniform")] for name in ("visionzip", "tome")}
    found: dict[str, list] = {}

    def visit(name):
        found[name] = [(one.answer, one.trouble) for one in ask(demo, name, "uniform")]

    threads = [threading.Thread(target=visit, args=[name]) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {name: [(answer, "") for answer in answers] for name, answers in wanted.items()}


def test_a_batch_is_scored_as_prune_eval_scores_it(demo):
    done = []
    batch = demo.batch(15, ["visionzip", "fastv"], Fraction(1, 9), By.average, done.append)
    full, a, b = batch.columns
    assert [item.question for item in batch.items] == [item.question for item in Scenes()[:15]]
    assert (
        full.answers == demo.subject.answer(batch.items[:10], 3).texts + demo.subject.answer(batch.items[10:], 3).texts
    )
    assert full.right == [text == item.answer for text, item in zip(full.answers, batch.items)]
    assert sum(full.right) >= 13 and len(a.right) == 15 and a.answers != full.answers
    assert "out of reach" in b.trouble and b.answers == b.right == []
    assert done == sorted(done) and done[-1] <= 1


# ------------------------------------------------------------------------------------------------------------- models
def test_a_model_that_refuses_methods_says_why_and_begins_with_photographs():
    other = Demo("demo:qwen2.5-vl", device="cpu", max_new_tokens=2)
    assert {"fastervlm", "visionzip"} <= set(other.refused) and not set(other.refused) & set(other.offered)
    assert "no CLS token" in other.refused["fastervlm"]
    assert len(set(other.first_choice)) == 2 and set(other.first_choice) <= set(other.offered)
    assert other.examples[0].picture.size == (640, 427) and other.examples[0].answer == ""
    assert len(other.examples) == 14 and other.examples[2].answer
    (full, one) = ask(other, "divprune", number=0)
    assert full.cost["new_tokens"] <= 2 and one.drawing.width > one.drawing.height


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["dart", "random", "tome", "uniform"], ("random", "uniform")),
        (["dart", "fastv"], ("dart", "fastv")),
        (["dart", "random"], ("random", "dart")),
        (["dart"], ("dart", "dart")),
    ],
)
def test_the_page_begins_with_methods_the_model_runs(offered, chosen):
    assert Demo.first_choice.fget(SimpleNamespace(offered=offered)) == chosen


def test_a_model_that_runs_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("prune.evals.demo_compare.applicable", lambda *_: ([], {"dart": "it has no layers"}))
    with pytest.raises(UserError, match="scenes-llava runs none of the methods: it has no layers"):
        Demo(device="cpu")


# ------------------------------------------------------------------------------------------------------------- tables
class Cells(HTMLParser):
    """Rows of texts; a tag that is not a table's is an error, so that nothing gets in un-escaped."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        assert tag in "div table thead tbody tr th td b small p".split(), tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


COST = {
    "visual_tokens": 144,
    "kept_tokens": 36,
    "average_tokens": 48.25,
    "prefill_flops": 250_000_000,
    "prefill_flops_full": 1_000_000_000,
    "kv_bytes": 512 * 1024,
    "kv_bytes_full": 2**20,
}


def test_the_table_of_a_comparison():
    results = [
        Result(UNPRUNED, "<script>x</script>", COST, 1.25, 2.5),
        Result("fastv", trouble="<i>out</i> of reach"),
        Result("random", "", COST, 1.0, 2.0),
    ]
    rows = Cells(comparison_html(results, right="<b>")).rows
    assert rows[0] == ["", UNPRUNED, "fastv", "random"]
    assert rows[1] == ["Answer", "<script>x</script>", "<i>out</i> of reach", "(nothing)"]
    assert rows[2] == ["Tokens after the last cut", "36 of 144 25%", "36 of 144 25%"]
    assert rows[3][1] == "48.2 34%" and rows[4][1] == "250 MFLOPs 25%" and rows[5][1] == "512 KiB 50%"
    assert rows[6][1:] == ["1.2 ms", "1.0 ms"] and rows[7][2].startswith("2.0 ms")
    assert "Right answer: <b>&lt;b&gt;</b>" in comparison_html(results, right="<b>")
    assert "Right answer" not in comparison_html(results)


def test_the_table_while_answers_come_in_or_none_came():
    assert Cells(comparison_html([Result(UNPRUNED, "7", COST)])).rows[0] == ["", UNPRUNED]
    assert Cells(comparison_html([Result(UNPRUNED, trouble="out of memory")])).rows == [
        ["", UNPRUNED],
        ["Answer", "out of memory"],
    ]


def test_the_table_of_a_batch():
    items = [SimpleNamespace(question="1 < 2?", answer="yes"), SimpleNamespace(question="A 5?", answer="no")]
    columns = [Column(UNPRUNED, ["yes", "<b>"], [True, False]), Column("fastv", [], [], "out of reach")]
    rows = Cells(batch_html(Batch(items, columns))).rows
    assert rows == [
        ["question", "right answer", UNPRUNED, "fastv"],
        ["right", "1 of 2", "out of reach"],
        ["1 < 2?", "yes", "✓ yes", ""],
        ["A 5?", "no", "✗ <b>", ""],
    ]


def test_amounts():
    texts = [amount(0), amount(999), amount(1000), amount(999_900), amount(12_345_678), amount(3e18)]
    assert texts == ["0 ", "999 ", "1 k", "1000 k", "12.3 M", "3000 P"]
    assert [amount(1023, 1024), amount(1024, 1024), amount(3 * 2**30, 1024)] == ["1023 ", "1 Ki", "3 Gi"]


# -------------------------------------------------------------------------------------------------- command and page
def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs the package gradio: pip install "prune-vlm\[demo\]"'):
        demo_command.demo()


def test_a_wrong_model_name_is_found_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(demo_command, "find_spec", lambda name: name)
    monkeypatch.setattr("prune.evals.demo_compare.Demo", None)
    with pytest.raises(UserError, match="Did you mean 'scenes-llava'"):
        demo_command.demo("scenes-lava")


@needs_gradio
def test_the_page_is_local_and_private(demo):
    import gradio as gr

    from prune.evals.demo_page import build, launch

    page = build(demo)
    assert page.analytics_enabled is False
    dropdowns = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown)]
    assert [[name for name, _ in one.choices] for one in dropdowns] == [demo.offered] * 2
    assert [one.value for one in dropdowns] == list(demo.first_choice)
    served = launch(demo)
    try:
        assert served.local_url.startswith("http://127.0.0.1:") and served.share_url is None
        assert served.share is False and served.run_history is False
        with pytest.raises(OSError):  # the port is taken now
            launch(demo, port=served.server_port)
    finally:
        served.close()
