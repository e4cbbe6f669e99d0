"""Index-preserving pruning: scorers, dilation, counts, weights files, and the shipped classifier against its card."""

import csv
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import grey_dilation
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune import ConfigError, Geometry, InputError, VisualTokens, get_method
from prune.config import PrunerConfig
from prune.evals import train_text_patches as training
from prune.evals.text_pages import SIDE, Pages
from prune.evals.train_text_patches import blocks, make_batch, measure, normalise
from prune.learned_scorer import SHIPPED, LearnedScorer, patch_images, shipped
from prune.reducers.index_preserving import contrast, dilated

EDGE = 28
GRID = SIDE // EDGE


class Given(nn.Module):
    """Scores a patch by its first pixel: tests say what the scores are."""

    def forward(self, patches):
        return patches[:, 0, 0, 0]


def grid(rows: int, columns: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    zero = torch.zeros_like(row)
    return torch.stack([zero, zero, row, column], -1).flatten(0, 1)


def batch(*images: tuple[torch.Tensor, torch.Tensor]) -> VisualTokens:
    """Tokens of images (pixels [n, L], coordinates [n, 4]), padded with what must not matter."""
    width = max(len(pixels) for pixels, _ in images)
    pixels = torch.full((len(images), width, images[0][0].shape[1]), torch.nan)
    places = torch.zeros(len(images), width, 4, dtype=torch.long)  # padding lies on top of the first token
    mask = torch.zeros(len(images), width, dtype=torch.bool)
    for row, (values, coordinates) in enumerate(images):
        n = len(values)
        pixels[row, :n], places[row, :n], mask[row, :n] = values, coordinates, True
    return VisualTokens(torch.zeros(len(images), width, 2), mask, places, tower={"pixels": pixels})


def scored(*images) -> VisualTokens:
    """Images given by scores [rows, columns]; patches are a single pixel."""
    images = [torch.as_tensor(scores, dtype=torch.float32) for scores in images]
    return batch(*((scores.reshape(-1, 1).repeat(1, 3), grid(*scores.shape)) for scores in images))


def kept(tokens: VisualTokens, keep, **options) -> list[list[int]]:
    reduction = get_method("index_preserving", **options).reduce(tokens, keep)
    return [index[valid].tolist() for index, valid in zip(reduction.keep, reduction.valid)]


def document(page) -> VisualTokens:
    """A page as the tokens of a model with 28-pixel patches and CLIP's normalisation."""
    patches, _ = blocks(page, EDGE)
    return batch((normalise(patches, 0).flatten(1), grid(GRID, GRID)))


# ------------------------------------------------------------------------------------------------------ dilation
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (5, 4), (9, 13)])
def test_dilation_is_a_three_by_three_maximum(rows, columns):
    score = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    found = dilated(score.view(1, -1), grid(rows, columns)[None], torch.ones(1, rows * columns, dtype=torch.bool))
    wanted = grey_dilation(score.numpy(), size=(3, 3), mode="constant", cval=-np.inf)
    assert np.array_equal(found.view(rows, columns).numpy(), wanted)


def test_dilation_of_ragged_shuffled_grids_with_holes_frames_and_tokens_without_a_place():
    generator = torch.Generator().manual_seed(1)
    score, places = torch.randn(3, 60, generator=generator), torch.full((3, 60, 4), -1)
    mask = torch.rand(3, 60, generator=generator) < 0.9
    for image, (tiles, frames, rows, columns) in enumerate([(2, 2, 4, 4), (1, 3, 2, 11), (3, 1, 1, 9)]):
        every = torch.cartesian_prod(*map(torch.arange, (tiles, frames, rows, columns)))
        some = torch.randperm(len(every), generator=generator)[:50]
        places[image, : len(some)] = every[some]
    score = score.masked_fill(~mask, -torch.inf)
    wanted = score.clone()
    for image in range(3):
        for i in range(60):
            for j in range(60):
                a, b = places[image, i], places[image, j]
                near = (a[:2] == b[:2]).all() and (a[2:] - b[2:]).abs().max() <= 1 and a.min() >= 0 and b.min() >= 0
                if mask[image, i] and mask[image, j] and near:
                    wanted[image, i] = max(wanted[image, i], score[image, j])
    assert torch.equal(dilated(score, places, mask), wanted)
    assert (wanted > score).any()


# -------------------------------------------------------------------------------------------------------- counts
def test_what_is_above_zero_is_kept_with_its_neighbours():
    scores = -torch.ones(5, 6)
    scores[1, 1] = scores[4, 5] = 2.0
    wanted = [0, 1, 2, 6, 7, 8, 12, 13, 14, 22, 23, 28, 29]
    assert kept(scored(scores), [30], scorer=Given()) == [wanted]
    assert kept(scored(scores), [30], scorer=Given(), dilate=False) == [[7, 29]]


def test_zero_is_background():
    assert kept(scored([[0.0, 1.0, -1.0]]), [3], scorer=Given(), dilate=False) == [[1]]


def test_the_budget_bounds_what_is_kept_the_highest_win_and_ties_the_lowest_index():
    tokens = scored([[3.0, 1.0, 2.0, 1.0, -1.0]])
    options = dict(scorer=Given(), dilate=False)
    best = [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert [kept(tokens, [n], **options)[0] for n in (1, 2, 3, 4, 5)] == [*best, best[-1]]
    assert [kept(tokens, [n], adaptive=False, **options)[0] for n in (1, 2, 3, 4, 5)] == [*best, [0, 1, 2, 3, 4]]


def test_an_image_without_text_is_kept_up_to_the_budget():
    nothing, something = -torch.ones(2, 3), torch.tensor([[-1.0, 5.0]])
    nothing[1, 1] = -0.5
    tokens = scored(nothing, something)
    assert kept(tokens, [6, 2], scorer=Given(), dilate=False) == [[0, 1, 2, 3, 4, 5], [1]]
    assert kept(tokens, [2, 1], scorer=Given(), dilate=False) == [[0, 4], [1]]


@pytest.mark.parametrize("scorer", ["text", "contrast"])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dilate", [True, False])
def test_images_of_a_batch_do_not_influence_each_other(scorer, adaptive, dilate):
    generator = torch.Generator().manual_seed(2)
    images = []
    for rows, columns in ((4, 5), (7, 3), (2, 2)):
        pixels = torch.randn(rows * columns, 3 * 16, generator=generator)
        pixels *= 2 * torch.rand(rows * columns, 1, generator=generator) ** 4  # some are nearly flat
        images.append((pixels, grid(rows, columns)))
    options = dict(scorer=scorer, adaptive=adaptive, dilate=dilate)
    together = kept(batch(*images), [12, 15, 3], **options)
    assert together == [kept(batch(image), [n], **options)[0] for image, n in zip(images, (12, 15, 3))]
    assert any(map(len, together)) if adaptive else [*map(len, together)] == [12, 15, 3]


def test_patches_that_are_no_numbers_are_never_text_but_stay_with_their_neighbours():
    tokens = scored([[-1.0, torch.nan, 1.0, torch.nan, -1.0, torch.nan]])
    assert kept(tokens, [6], scorer=Given(), dilate=False) == [[2]]
    assert kept(tokens, [6], scorer=Given()) == [[1, 2, 3]]


def test_a_flat_patch_is_found_by_dilation_too():
    pixels = torch.zeros(3, 3 * 16)
    pixels[0] = torch.arange(48)
    tokens = batch((pixels, grid(1, 3)))
    assert kept(tokens, [3], scorer="contrast") == [[0, 1]]
    assert kept(batch((torch.ones(3, 48), grid(1, 3))), [3], scorer="contrast") == [[0, 1, 2]]  # a blank image


def test_contrast_is_the_deviation_over_a_quarter_of_the_images():
    pixels = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pixels = (pixels * torch.arange(1, 7)[:, None, None, None]).float()
    grey = np.tensordot(pixels.numpy().astype(np.float64), (0.299, 0.587, 0.114), axes=(1, 0))
    wanted = np.log(grey.std((1, 2)) / (0.25 * grey.std()))
    for other in (pixels, 3 * pixels + 1):
        found = contrast(other, torch.ones(1, 6, dtype=torch.bool))[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    padded = torch.cat([pixels[:5] + 9, torch.full_like(pixels[:1], torch.nan), pixels])
    found = contrast(padded, torch.tensor([[True] * 5 + [False], [True] * 6]))
    alone = contrast(pixels[:5], torch.ones(1, 5, dtype=torch.bool))[0].numpy()
    np.testing.assert_allclose(found[0, :5].numpy(), alone, atol=1e-4)
    np.testing.assert_allclose(found[1].numpy(), wanted, atol=1e-5)


def test_the_site_is_before_the_first_block_and_selection_has_its_price():
    method = get_method("index_preserving")
    assert (str(*method.sites()), method.place, method.adaptive, method.positions) == (
        "block:0",
        "input",
        True,
        "original",
    )
    hidden = shipped().settings["hidden"]
    assert method.selection_flops(Geometry(100), 10) == 100 * 2 * (28 * 28 * hidden + hidden)
    assert get_method("index_preserving", scorer="contrast").selection_flops(Geometry(100), 10) == 0


@pytest.mark.parametrize("scorer", ["text", "contrast"])
def test_selection_costs_what_torch_counts(scorer):
    method, tokens = get_method("index_preserving", scorer=scorer), document(Pages("test", 1)[0])
    with FlopCounterMode(display=False) as counter:
        method.reduce(tokens, [100])
    assert counter.get_total_flops() == method.selection_flops(Geometry(GRID**2), 100)


# -------------------------------------------------------------------------------------------------- pixel layouts
def test_a_group_of_qwens_processor_becomes_the_picture_it_was_cut_from():
    from transformers import Qwen2VLImageProcessor

    picture = np.random.default_rng(0).integers(0, 256, (112, 84, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessor(do_resize=False)
    rows = torch.as_tensor(np.asarray(processor(picture, return_tensors="np")["pixel_values"]))
    found = patch_images(rows.unflatten(0, (-1, 4)).flatten(1))  # four patches are a token
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    whole = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    wanted = [whole[:, y : y + 28, x : x + 28] for y in range(0, 112, 28) for x in range(0, 84, 28)]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=0)


def test_two_frames_are_averaged():
    frames = torch.randn(5, 4, 3, 2, 6, 6, generator=torch.Generator().manual_seed(4))
    mean = frames.mean(3, keepdim=True).expand_as(frames)
    torch.testing.assert_close(patch_images(frames.flatten(1)), patch_images(mean.flatten(1)))


def test_a_plain_patch_is_channel_by_channel_and_a_grey_one_has_three_equal_channels():
    patches = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(patch_images(patches.flatten(1)), patches)
    assert torch.equal(patch_images(patches[:, 1].flatten(1)), patches[:, 1:2].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("length", [0, 3 * 8 + 2, 3 * 7, 3 * 2])
def test_pixels_of_unknown_layout_are_refused(length):
    with pytest.raises(InputError, match="neither one patch, RGB or grey, nor 2 x 2"):
        patch_images(torch.zeros(2, length))


def test_without_a_grid_dilation_is_refused_and_says_what_to_do():
    tokens = replace(scored([[1.0, -1.0]]), coordinates=None)
    with pytest.raises(InputError, match="dilate=False"):
        kept(tokens, [1], scorer=Given())
    assert kept(tokens, [1], scorer=Given(), dilate=False) == [[0]]


# ---------------------------------------------------------------------------------------------------- scorer slot
@pytest.mark.parametrize("options", [{"scorer": 3}, {"scorer": ""}, {"dilate": 1}, {"adaptive": None}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        get_method("index_preserving", **options)


def test_the_callers_module_is_left_alone():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.LazyLinear(1))
    module(torch.zeros(1, 3))
    method = get_method("index_preserving", scorer=module, dilate=False)
    with torch.no_grad():
        module[2].weight.zero_().sub_(1)  # the method has a copy
    score = method.logits(scored([[1.0, 2.0]]))
    assert module.training and module[2].weight.requires_grad
    assert (score.diff() != 0).all() and not torch.equal(score, -3 * torch.tensor([[1.0, 2.0]]))


def test_a_folder_of_weights_is_a_scorer(tmp_path):
    torch.manual_seed(0)
    mine = LearnedScorer(size=8, channels=3, hidden=5)
    mine.save_pretrained(tmp_path)
    method = get_method("index_preserving", scorer=str(tmp_path), adaptive=False, dilate=False)
    tokens = batch((torch.randn(6, 3 * 64), grid(2, 3)))
    patches = tokens.tower["pixels"][0].view(6, 3, 8, 8)
    wanted = mine.half().float()(patches)
    torch.testing.assert_close(method.logits(tokens)[0], wanted)
    config = PrunerConfig.of(method)
    assert config.build().scorer == str(tmp_path) and config.options["scorer"] == str(tmp_path)
    with pytest.raises(ConfigError, match="not JSON"):
        PrunerConfig.of(get_method("index_preserving", scorer=mine))


def test_the_learned_scorer_is_layer_norm_linear_gelu_linear():
    torch.manual_seed(0)
    scorer = LearnedScorer(size=4, channels=3, hidden=6, eps=1e-2)
    nn.init.normal_(scorer.norm.weight), nn.init.normal_(scorer.norm.bias)
    x = torch.randn(7, 3, 4, 4)
    flat = x.flatten(1)
    normed = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-2).sqrt()
    hidden = (normed * scorer.norm.weight.flatten() + scorer.norm.bias.flatten()) @ scorer.project.weight.T
    hidden = hidden + scorer.project.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(scorer(x), hidden @ scorer.head.weight[0] + scorer.head.bias[0])


def spoil(folder, what):
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = json.loads(config.read_text())
    tensors = {name: value.clone() for name, value in load_file(weights).items()}  # the file is about to change
    match what:
        case "no config":
            config.unlink()
        case "no json":
            config.write_text("{")
        case "a list":
            config.write_text("[]")
        case "architecture":
            config.write_text(json.dumps(settings | {"architecture": "mlp"}))
        case "key":
            config.write_text(json.dumps(settings | {"depth": 2}))
        case "size":
            config.write_text(json.dumps(settings | {"size": 2.5}))
        case "huge":
            config.write_text(json.dumps(settings | {"size": 10**6}))
        case "shape":
            config.write_text(json.dumps(settings | {"hidden": 4}))
        case "no weights":
            weights.unlink()
        case "pickle":
            weights.write_bytes(pickle.dumps(Bomb(folder / "boom")))
        case "torch":
            torch.save(tensors, weights)
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "missing":
            save_file({name: value for name, value in tensors.items() if name != "head.bias"}, weights)
        case "extra":
            save_file(tensors | {"other": torch.zeros(1)}, weights)
        case "nan":
            save_file(tensors | {"head.bias": torch.full((1,), torch.nan)}, weights)
        case "integers":
            save_file(tensors | {"head.bias": torch.ones(1, dtype=torch.int64)}, weights)
    return config if what in ("no config", "no json", "a list", "architecture", "key", "size", "huge") else weights


class Bomb:
    """Un-pickling it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    "what",
    ["no config", "no json", "a list", "architecture", "key", "size", "huge", "shape", "no weights", "pickle", "torch"]
    + ["cut", "missing", "extra", "nan", "integers"],
)
def test_a_broken_folder_is_refused_by_the_name_of_its_file(tmp_path, what):
    LearnedScorer(size=6, hidden=3).save_pretrained(tmp_path)
    file = spoil(tmp_path, what)
    with pytest.raises(ConfigError) as caught:
        get_method("index_preserving", scorer=str(tmp_path))
    assert str(file) in str(caught.value)
    assert not (tmp_path / "boom").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        get_method("index_preserving", scorer=str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------ text pages
def test_pages_depend_on_split_seed_and_number_alone():
    first, again = Pages("test", 5)[3], Pages("test", 9)[3]
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.ink, again.ink)
    assert not np.array_equal(first.pixels, Pages("test", 5, seed=1)[3].pixels)
    assert not np.array_equal(first.pixels, Pages("train", 5)[3].pixels)


def test_a_block_is_text_if_ink_covers_half_a_percent_of_it():
    page = replace(Pages("test", 1)[0], ink=np.zeros((SIDE, SIDE), dtype=bool))
    page.ink[:2, :2] = True  # 4 of 784 pixels
    page.ink[28, 28:31] = True  # 3
    labels = page.labels()
    assert labels[0, 0] and labels.sum() == 1
    patches, text = blocks(page, EDGE)
    assert np.array_equal(text.view(GRID, GRID).numpy(), labels)
    pixels = torch.from_numpy(page.pixels.copy()).permute(2, 0, 1) / 255
    assert torch.equal(patches[GRID + 2], pixels[:, 28:56, 56:84])
    shifted, _ = blocks(page, 14, top=3, left=5)
    assert torch.equal(shifted[0], pixels[:, 3:17, 5:19]) and len(shifted) == 31 * 31


def test_training_batches_are_a_function_of_their_numbers():
    pixels, text = make_batch(0, 2, 2)
    again, labels = make_batch(0, 3, 1)
    assert torch.equal(pixels[-len(again) :], again) and torch.equal(text[-len(labels) :], labels)
    assert pixels.shape[1:] == (3, EDGE, EDGE) and 0 < text.mean() < 1


def test_an_interrupted_training_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    def run(name, resume=False):
        sizes = dict(steps=4, pages=1, rate=1e-3, hidden=3, eps=1e-3, seed=0, fonts=False, threads=0, test_pages=1)
        training.train(**sizes, out=tmp_path / name, state=tmp_path / f"{name}.pt", resume=resume)
        log = (tmp_path / name / "training.csv").read_text().splitlines()
        return load_file(tmp_path / name / "model.safetensors"), [line.split(",")[0] for line in log]

    def interrupted(seed, first, *rest):
        if first == 2:
            raise KeyboardInterrupt
        return make_batch(seed, first, *rest)

    monkeypatch.setattr(training, "LOG_EVERY", 1)
    whole, log = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "make_batch", interrupted)
        run("parts")
    parts, log_of_parts = run("parts", resume=True)
    assert log == log_of_parts == ["step", "1", "2", "3", "4"]
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_measure_counts_right():
    pages = Pages("test", 6)
    truth = [page.labels().ravel() for page in pages]
    every = measure(lambda patches: torch.ones(len(patches)), pages, (EDGE,))[0]
    share = 100 * np.concatenate(truth).mean()
    assert every["blocks"] == 6 * GRID**2 and every["recall"] == every["kept"] == 100 and every["balanced"] == 50
    for key in ("text", "accuracy", "precision"):
        assert every[key] == pytest.approx(share, abs=0.01)


# ------------------------------------------------------------------------------------------- the shipped classifier
def card() -> dict[tuple[int, str], dict[str, str]]:
    with open(SHIPPED / "accuracy.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(int(row["edge"]), row["kind"]): row for row in rows}


def test_the_shipped_weights_are_small_and_half_precision():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 300_000
    assert {value.dtype for value in load_file(SHIPPED / "model.safetensors").values()} == {torch.float16}


def test_the_shipped_classifier_is_as_good_as_its_card_says_on_fresh_pages():
    found = [row for row in measure(shipped(), Pages("test", 40, seed=7)) if row["kind"] == "all"]
    assert len(found) == 3
    for row in found:
        said = card()[row["edge"], "all"]
        for key in ("accuracy", "balanced"):
            assert row[key] >= float(said[key]), (row["edge"], key)
        assert row["recall"] >= float(said["recall"]) - 1


def test_the_card_names_the_numbers_of_the_table():
    text = (SHIPPED / "README.md").read_text()
    for edge in (28, 16, 14):
        for key in ("accuracy", "balanced", "precision", "recall"):
            assert card()[edge, "all"][key] in text


@pytest.mark.parametrize("which", [1, 2])
def test_normalisation_hardly_matters(which):
    page = Pages("test", 12)[4]
    patches, _ = blocks(page, EDGE)
    one, other = (shipped()(normalise(patches, n)) > 0 for n in (0, which))
    assert (one == other).float().mean() >= 0.97


def test_text_of_a_page_is_found_and_the_margins_are_dropped():
    pages = [page for page in Pages("test", 30, seed=3) if page.kind == "text"]
    hit = shown = wrong = blank = 0
    for page in pages:
        text, tokens = page.labels().ravel(), document(page)
        found = np.zeros(len(text), dtype=bool)
        found[kept(tokens, [len(text)])[0]] = True
        around = grey_dilation(text.reshape(GRID, GRID), size=(3, 3)).ravel()
        hit, shown = hit + (found & text).sum(), shown + text.sum()
        wrong, blank = wrong + (found & ~around).sum(), blank + (~around).sum()
    assert len(pages) > 10
    assert hit / shown > 0.99
    assert wrong / blank < 0.2
