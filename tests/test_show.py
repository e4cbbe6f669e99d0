"""The drawings: the right part of the photograph, the right patches dimmed, kept patches untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import CLIPImageProcessor, GotOcr2ImageProcessor, LlavaNextImageProcessor, Qwen2VLImageProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from prune.adapters.layouts import grids
from prune.errors import InputError
from prune.report import ImageReport
from prune.show import MARGIN, Panel, overlay, panels

PHOTO = Image.fromarray(load_sample_image("china.jpg"))
SIZES = [(640, 427), (427, 640), (640, 200), (150, 600), (700, 690), (1300, 300), (333, 611)]
CLIP = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
NEXT = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
QWEN = Qwen2VLImageProcessor()
INTERN = GotOcr2ImageProcessor(
    size={"height": 224, "width": 224}, crop_to_patches=True, min_patches=1, max_patches=12, do_normalize=True
)


def report_of(tiles, kept=None, separators=(), modality="image") -> ImageReport:
    layout = grids(tuple(tiles), separators, modality)
    kept = torch.arange(len(layout.coordinates))[::7] if kept is None else torch.as_tensor(kept)
    return ImageReport(0, 0, layout, layout.coordinates, {"projected": kept})


def pixels(normalised: torch.Tensor, processor) -> np.ndarray:
    """`[3, H, W]` as the model sees it -> `[H, W, 3]` in 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((normalised * std + mean) * 255).permute(1, 2, 0).numpy()


def joined(tiles: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    return np.concatenate([np.concatenate(tiles[r * columns : (r + 1) * columns], 1) for r in range(rows)], 0)


def check_shows(panel: Panel, seen: np.ndarray, patch: int):
    """The panel's picture is what the model saw, better than any shift of it by a third of a patch."""
    height, width = seen.shape[:2]
    assert (height, width) == tuple(patch * n for n in panel.alive.shape)
    drawn = np.asarray(panel.picture.resize((width, height), Image.Resampling.BICUBIC), np.float32)

    def error(dy, dx):
        return np.abs(np.roll(drawn, (dy, dx), (0, 1)) - seen)[patch:-patch, patch:-patch].mean()

    step = patch // 3
    shifted = min(error(dy, dx) for dy in (-step, 0, step) for dx in (-step, 0, step) if (dy, dx) != (0, 0))
    assert error(0, 0) < 12 and error(0, 0) < 0.6 * shifted


@pytest.mark.parametrize("size", SIZES)
def test_a_centre_crop_shows_the_crop(size):
    photo = PHOTO.resize(size)
    seen = pixels(CLIP(photo, return_tensors="pt")["pixel_values"][0], CLIP)
    (panel,) = panels(photo, report_of([(1, 24, 24)]), CLIP)
    check_shows(panel, seen, 14)


def test_without_a_processor_a_grid_of_other_proportions_is_a_centre_crop():
    (square,) = panels(PHOTO, report_of([(1, 24, 24)]))
    assert square.picture.size == (427, 427)
    (whole,) = panels(PHOTO, report_of([(1, 15, 23)]))
    assert whole.picture.size == PHOTO.size


@pytest.mark.parametrize("size", SIZES)
def test_anyres_shows_the_squeezed_image_and_the_unpadded_grid(size):
    photo = PHOTO.resize(size)
    tiles = [pixels(tile, NEXT) for tile in NEXT(photo, return_tensors="pt")["pixel_values"][0]]
    down, across = get_anyres_image_grid_shape(size[::-1], NEXT.image_grid_pinpoints, 336)
    canvas = joined(tiles[1:], down, across)
    tokens = torch.cartesian_prod(torch.arange(down * 24), torch.arange(across * 24)).T.view(2, down * 24, across * 24)
    left_over = unpad_image(tokens, size[::-1])  # the model's own un-padding, on token coordinates
    (top, left), (rows, columns) = left_over[:, 0, 0] * 14, left_over.shape[1:]
    whole, detail = panels(photo, report_of([(1, 24, 24), (1, rows, columns)], separators=("row",)), NEXT)
    check_shows(whole, tiles[0], 14)
    check_shows(detail, canvas[top : top + rows * 14, left : left + columns * 14], 14)


@pytest.mark.parametrize("size", SIZES)
def test_internvl_tiles_are_put_together(size):
    photo = PHOTO.resize(size)
    tiles = [pixels(tile, INTERN) for tile in INTERN(photo, return_tensors="pt")["pixel_values"]]
    whole, mosaic = panels(photo, report_of([(1, 8, 8)] * len(tiles)), INTERN)
    check_shows(whole, tiles[-1], 28)
    check_shows(mosaic, joined(tiles[:-1], *(n // 8 for n in mosaic.alive.shape)), 28)


def test_internvl_tokens_land_in_their_tile():
    kept = [64 * 1 + 8 * 2 + 3]  # tile 1 (of 3 x 2, row by row), row 2, column 3
    _, mosaic = panels(PHOTO, report_of([(1, 8, 8)] * 7, kept), INTERN)
    assert mosaic.alive.shape == (16, 24)
    assert mosaic.alive.nonzero().tolist() == [[2, 8 + 3]]


@pytest.mark.parametrize("size", SIZES)
def test_native_resolution_shows_the_whole_image(size):
    photo = PHOTO.resize(size)
    out = QWEN(photo, return_tensors="pt")
    _, rows, columns = (out["image_grid_thw"][0] // 2).tolist()
    patches = out["pixel_values"].view(rows, columns, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    seen = patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 28, columns * 28)
    (panel,) = panels(photo, report_of([(1, rows, columns)]), QWEN)
    check_shows(panel, pixels(seen, QWEN), 28)


def test_kept_patches_are_untouched_and_the_others_are_dimmed():
    photo = Image.new("RGB", (480, 480), (200, 120, 60))
    report = report_of([(1, 24, 24)], [0, 1, 25, 300, 575])
    (panel,) = panels(photo, report)
    drawn = np.asarray(panel.paint(480, 480)).astype(int)
    kept = np.kron(panel.alive.numpy(), np.ones((20, 20), bool))
    assert (drawn[kept] == (200, 120, 60)).all()
    assert (drawn[~kept] != (200, 120, 60)).any(-1).all()
    line = (drawn[..., 2] > 100) & ~kept
    assert 0 < line.sum() < 0.05 * line.size
    assert drawn[~kept & ~line].max() < 100


def test_keeping_everything_draws_the_photograph():
    (panel,) = panels(PHOTO, report_of([(1, 15, 23)], range(345)))
    assert panel.paint(*PHOTO.size).tobytes() == PHOTO.tobytes()


def test_overlay_has_the_panel_under_its_title():
    report = report_of([(1, 24, 24)], range(58))
    page = overlay(PHOTO, report, title="dart, ratio=0.9", processor=CLIP)
    assert page.mode == "RGB" and page.width == 672 + 2 * MARGIN
    panel = page.crop((MARGIN, page.height - MARGIN - 672, MARGIN + 672, page.height - MARGIN))
    assert panel.tobytes() == panels(PHOTO, report, CLIP)[0].paint(672, 672).tobytes()
    title = np.asarray(page.crop((0, 0, page.width, page.height - MARGIN - 672)))
    assert title.min() < 60 and (title[:, [0, -1]] == 255).all()  # there is a title, and it fits


def test_a_long_title_fits_a_narrow_image():
    page = overlay(PHOTO.resize((10, 1500)), report_of([(1, 53, 1)], [3]), title="a very long title " * 10)
    assert (np.asarray(page)[:50, -2:] == 255).all()


def test_a_video_has_one_panel_per_grid_frame():
    frames = [Image.new("RGB", (64, 48), (value, 0, 0)) for value in range(0, 240, 30)]
    report = report_of([(4, 3, 4)], [0, 12, 13, 47], modality="video")
    shown = panels(frames, report)
    assert [panel.name for panel in shown] == ["frame 1", "frame 2", "frame 3", "frame 4"]
    assert [int(panel.alive.sum()) for panel in shown] == [1, 2, 0, 1]
    assert [panel.picture.getpixel((0, 0))[0] for panel in shown] == [0, 60, 120, 180]
    assert overlay(frames, report).width > 400


def test_separators_are_counted_but_not_drawn():
    report = report_of([(1, 2, 2), (1, 2, 4)], range(14), separators=("row",))
    whole, detail = panels(PHOTO, report)
    assert whole.alive.all() and detail.alive.all()
    overlay(PHOTO, report)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_any_mode(mode):
    photo = PHOTO.convert("RGBA").convert("RGB").convert(mode) if mode == "CMYK" else PHOTO.convert(mode)
    assert overlay(photo, report_of([(1, 15, 23)])).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_thin_pictures(size):
    photo = PHOTO.resize(size)
    assert overlay(photo, report_of([(1, 24, 24)]), processor=CLIP).width > 600
    assert overlay(photo, report_of([(1, 24, 24), (1, 24, 30)]), processor=NEXT).width > 600


def test_errors_name_the_cause():
    with pytest.raises(InputError, match="PIL image"):
        overlay("china.jpg", report_of([(1, 2, 2)]))
    with pytest.raises(InputError, match="PIL image"):
        overlay([], report_of([(1, 2, 2)]))
    with pytest.raises(InputError, match="no known grid"):
        overlay(PHOTO, report_of([(1, 1, 345)]))
    with pytest.raises(InputError, match="no way is known"):
        overlay(PHOTO, report_of([(1, 2, 2), (1, 3, 3), (1, 4, 4)]))
