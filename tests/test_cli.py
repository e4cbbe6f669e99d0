"""The command line, and the demo models behind it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image
from typer.testing import CliRunner

import prune
from prune.cli import app
from prune.evals.demo import DEMOS, load_demo
from prune.show import MARGIN
from prune.tables import MODELS, VITS, families_of, families_words, methods_table

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((672, 672))  # the size of a LLaVA panel


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def good(*arguments) -> str:
    """stdout of a command that must succeed and, as nobody is looking, say nothing else."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    return result.stdout


def failure(*arguments, code=1) -> str:
    """stderr of a command that must fail: with a short message on stderr, and nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr and "\x1b" not in result.stderr
    if code == 1:
        assert result.stderr.startswith("prune: ") and len(result.stderr.splitlines()) <= 2
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def panel_of(path, size=(672, 672)) -> Image.Image:
    page = Image.open(path)
    return page.crop((MARGIN, page.height - MARGIN - size[1], MARGIN + size[0], page.height - MARGIN))


@pytest.fixture
def photo(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ---------------------------------------------------------------------------------------------------------- list


def test_list_json_equals_the_registry():
    rows = json.loads(good("list", "--json"))
    assert [row["name"] for row in rows] == prune.list_methods()
    for row in rows:
        expected = asdict(prune.method_info(row["name"])) | {"families": families_of(row["name"])}
        assert row == json.loads(json.dumps(expected, default=str))
        assert list(row["families"]) == [*MODELS, *VITS]


def test_list_prints_every_method_whole():
    table = good("list")
    assert "…" not in table
    for name in prune.list_methods():
        info = prune.method_info(name)
        (row,) = (line for line in table.splitlines() if line.split()[:1] == [name])
        for text in (
            info.title,
            info.arxiv,
            info.where,
            ", ".join(info.signals),
            families_words(name, MODELS),
            families_words(name, VITS),
        ):
            assert text in row


def test_a_narrow_terminal_gets_a_short_table_and_loses_nothing():
    infos = [prune.method_info(name) for name in prune.list_methods()]
    console = Console(width=80, record=True, file=StringIO())
    console.print(methods_table(infos, console.width))
    table = console.export_text()
    assert "…" not in table and "4 of 8" in table and "prune list --json" in table
    assert all(f" {name} " in table for name in prune.list_methods())


def test_a_method_of_another_package_is_not_probed(monkeypatch):
    monkeypatch.setattr("prune.tables._probed", dict)
    row = json.loads(good("list", "dart", "--json"))[0]
    assert row["families"] is None and "not probed" in good("list", "dart")


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        (["*prune*"], {"pattern": "*prune*"}),
        (["--where", "decoder"], {"where": "decoder"}),
        (["--needs-question"], {"needs_question": True}),
        (
            ["--no-needs-question", "--no-merges", "--no-adaptive"],
            dict(needs_question=False, merges=False, adaptive=False),
        ),
        (["--signals", ""], {"signals": set()}),
        (
            ["--signals", "keys, text_features,normed_features"],
            {"signals": {"keys", "text_features", "normed_features"}},
        ),
    ],
)
def test_list_filters_as_list_methods_does(arguments, filters):
    assert [row["name"] for row in json.loads(good("list", "--json", *arguments))] == prune.list_methods(**filters)


def test_list_without_a_match():
    assert good("list", "nothing*", "--json") == "[]\n"
    result = run("list", "nothing*")
    assert result.exit_code == 0 and result.stdout == "" and "no method fits" in result.stderr


def test_list_wrong_usage():
    assert "unknown signal nose" in failure("list", "--signals", "nose", code=2)
    failure("list", "--where", "nowhere", code=2)


# ----------------------------------------------------------------------------------------------------------- env


def test_env_names_versions_devices_and_attention():
    found = json.loads(good("env", "--json"))
    assert found["versions"]["prune"] == prune.__version__
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["devices"]["cpu"]
    assert found["attention"]["sdpa"] is True
    assert found["prune"]["methods"] == len(prune.list_methods())
    text = good("env")
    for name in ("transformers", "cpu", "flash_attention_2", "plug-ins"):
        assert name in text


# ---------------------------------------------------------------------------------------------------------- show


def test_show_without_arguments_draws_the_built_in_photograph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert good("show") == "china-dart.png\n"
    assert Image.open("china-dart.png").size == (672 + 2 * MARGIN, 672 + MARGIN + 56)


@pytest.mark.parametrize("method", ["dart", "divprune", "fastv", "random", "uniform"])
def test_kept_patches_are_the_photograph_and_the_dimmed_share_is_the_dropped_share(method, photo, tmp_path):
    out = tmp_path / "out.png"
    assert good("show", photo, "-m", method, "--keep", 100, "-o", out) == f"{out}\n"
    drawn, original = (np.asarray(image).astype(int) for image in (panel_of(out), PHOTO))
    same = (drawn == original).all(-1).reshape(24, 28, 24, 28)
    kept = same.all((1, 3))
    assert kept.sum() == 100  # whole patches, none of them touched
    assert same.mean() == pytest.approx(100 / 576, abs=0.005)  # and next to nothing of the others


@pytest.mark.parametrize(
    ("budget", "kept"), [((), 58), (("--ratio", "0.5"), 288), (("--keep", "7"), 7), (("--average", "64"), 64)]
)
def test_budgets(budget, kept, photo, tmp_path):
    good("show", photo, "-m", "divprune", *budget, "-o", tmp_path / "out.png")
    same = (np.asarray(panel_of(tmp_path / "out.png")) == np.asarray(PHOTO)).all(-1)
    assert same.reshape(24, 28, 24, 28).all((1, 3)).sum() == kept


def test_method_options_reach_the_method(photo, tmp_path):
    drawings = []
    for seed in (1, 1, 2):
        good("show", photo, "-m", "random", "--option", f"seed={seed}", "-o", tmp_path / "out.png")
        drawings.append((tmp_path / "out.png").read_bytes())
    assert drawings[0] == drawings[1] != drawings[2]


@pytest.mark.parametrize("model", [f"demo:{name}" for name in DEMOS])
def test_every_demo_model(model, photo, tmp_path):
    good("show", photo, "--model", model, "-o", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 600


def test_a_saved_checkpoint_is_loaded_the_ordinary_way(photo, tmp_path):
    model, processor = load_demo()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    good("show", photo, "--model", tmp_path / "model", "-o", tmp_path / "a.png")
    good("show", photo, "--model", "demo:llava", "-o", tmp_path / "b.png")
    assert panel_of(tmp_path / "a.png").tobytes() == panel_of(tmp_path / "b.png").tobytes()


def test_several_images(photo, tmp_path, monkeypatch):
    other = tmp_path / "other" / "photo.png"
    other.parent.mkdir()
    PHOTO.rotate(90).save(other)
    numbered = [tmp_path / "out-1.png", tmp_path / "out-2.png"]
    assert good("show", photo, other, "-o", tmp_path / "out.png") == "".join(f"{path}\n" for path in numbered)
    folder = [tmp_path / "new" / "photo-dart.png", tmp_path / "new" / "photo-dart-2.png"]
    assert good("show", photo, other, "-o", tmp_path / "new") == "".join(f"{path}\n" for path in folder)
    assert [path.read_bytes() for path in numbered] == [path.read_bytes() for path in folder]


def test_a_jpeg_is_written_where_asked(photo, tmp_path):
    good("show", photo, "-o", tmp_path / "out.jpg")
    assert Image.open(tmp_path / "out.jpg").format == "JPEG"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(mode, tmp_path):
    picture = (
        PHOTO.convert("L").convert("I").point(lambda v: v * 256).convert(mode)
        if mode == "I;16"
        else PHOTO.convert(mode)
    )
    name = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    picture.save(name)
    good("show", name, "--keep", 500, "-o", tmp_path / "out.png")
    expected = PHOTO.convert("L" if mode == "I;16" else mode).convert("RGB")
    same = np.abs(np.asarray(panel_of(tmp_path / "out.png")).astype(int) - np.asarray(expected)).max(-1) <= 2
    assert same.mean() == pytest.approx(500 / 576, abs=0.05)


def test_transparency_is_shown_on_white(tmp_path):
    picture = PHOTO.convert("RGBA")
    picture.putalpha(0)
    picture.save(tmp_path / "in.png")
    good("show", tmp_path / "in.png", "-m", "uniform", "--ratio", 0, "-o", tmp_path / "out.png")
    assert np.asarray(panel_of(tmp_path / "out.png")).min() == 255


def test_a_photograph_taken_sideways_is_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    PHOTO.save(tmp_path / "in.png", exif=exif)
    good("show", tmp_path / "in.png", "-m", "uniform", "--ratio", 0, "-o", tmp_path / "out.png")
    assert panel_of(tmp_path / "out.png").tobytes() == PHOTO.rotate(270).tobytes()


@pytest.mark.parametrize("model", [f"demo:{name}" for name in DEMOS])
def test_a_picture_of_one_pixel(model, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "in.png")
    good("show", tmp_path / "in.png", "--keep", 2, "--model", model, "-o", tmp_path / "out.png")


# ------------------------------------------------------------------------------------------------- show, failures


def test_an_unknown_method_is_answered_with_the_closest(photo, tmp_path):
    assert "Did you mean 'dart'" in failure("show", photo, "-m", "darts", "-o", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_an_unknown_option_is_answered_with_the_options(photo):
    assert "Its options are" in failure("show", photo, "-m", "fastv", "--option", "leyer=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0.5", "--keep", "3"], "exactly one"),
        (["--ratio", "1.5"], r"\[0, 1\)"),
        (["--keep", "many"], "--keep"),
        (["--option", "layer"], "KEY=VALUE"),
        (["-o", "out.docx"], r"cannot write '\.docx'"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage(arguments, message):
    assert re.search(message, failure("show", *arguments, code=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flops", "0.0001"], "out of reach"),
        (["--model", "demo:gpt"], "Built in are scenes-llava, demo:llava"),
        (["--model", "."], "cannot load the model"),
        (["--device", "toaster"], "device 'toaster'"),
        (["-m", "fastv", "--option", "layer=99"], "layer=99"),
    ],
)
def test_failures(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failure("show", *arguments)


def test_broken_images(photo, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "not a picture" in failure("show", text, "-o", tmp_path / "out.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:5000])
    assert "cannot read" in failure("show", photo, cut, "-o", tmp_path / "out.png")
    (tmp_path / "empty.png").touch()
    assert "not a picture" in failure("show", tmp_path / "empty.png")
    assert "built in are china.jpg" in failure("show", tmp_path / "missing.png")
    assert "is a folder" in failure("show", tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_a_picture_the_processor_refuses(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")
    assert "refuses" in failure("show", tmp_path / "line.png", "--model", "demo:qwen2.5-vl", "-o", tmp_path / "out.png")


def test_output_that_cannot_be_written(photo, tmp_path):
    assert "no folder" in failure("show", photo, "-o", tmp_path / "missing" / "out.png")
    assert "would be overwritten" in failure("show", photo, "-o", photo)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere; /proc takes no files even so
        locked = "/proc"
    assert str(locked) in failure("show", photo, "-o", f"{locked}/out.png")


def test_running_out_of_memory(photo, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("prune.cli.prefill", exhausted)
    assert "out of memory" in failure("show", photo, "-o", tmp_path / "out.png")


def test_the_installed_command_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", "from prune.cli import main; main()", "show", str(tmp_path / "missing.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("prune: there is no image") and len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------- demo


def test_demo_models_are_reproducible_and_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    first, second, other = load_demo(), load_demo(), load_demo(seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [model.state_dict() for model, _ in (first, second, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert not torch.equal(weights[0]["lm_head.weight"], weights[2]["lm_head.weight"])
    with pytest.raises(ValueError, match="there are llava"):
        load_demo("gpt")


def test_demo_features_follow_the_pixels():
    """Sky resembles sky more than it resembles the roof: what feature-based methods need to make sense."""
    model, processor = load_demo()
    photo = Image.fromarray(load_sample_image("china.jpg"))
    with torch.inference_mode():
        pixels = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
        features = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    features = torch.nn.functional.normalize(features, dim=-1).view(24, 24, -1)
    sky, roof = features[:6, 16:].flatten(0, 1), features[14:22, 4:12].flatten(0, 1)
    assert (sky @ sky.T).mean() > 0.9 and (sky @ roof.T).mean() < 0.6
