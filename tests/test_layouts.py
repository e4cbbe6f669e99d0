"""Grid coordinates of every visual token, against what the models themselves do with their features."""

import pytest
import tiny
import torch
from tiny import Image, Sample, Video, collate

from prune import apply_pruner
from prune.adapters.layouts import grids


def layouts(family, samples, generate=False):
    model = tiny.shared(family)
    inputs = collate(samples)
    with apply_pruner(model, "random", ratio=0.5) as handle, torch.no_grad():
        if generate:
            model.generate(**inputs, max_new_tokens=1, suppress_tokens=tiny.SPECIAL)
        else:
            model(**inputs)
        return handle.last.images


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("size", [(20, 30), (30, 14), (16, 16), (60, 62), (16, 44), (47, 16)])
def test_anyres_places_are_where_the_model_packs_them(family, size, generate):
    """The model's own packing, run on (row, column) of every high-resolution patch, must agree."""
    model = tiny.pristine(family).model
    tiles, n = tiny._anyres(family, size, True)
    high = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(1, 16, 2)
    features = high.repeat(tiles, 1, 1)
    shape = tiny.hf.models.llava_next.modeling_llava_next.get_anyres_image_grid_shape(
        size, model.config.image_grid_pinpoints, tiny.TILE
    )
    for tile in range(1, tiles):  # patches of tile (i, j) start at row 4 i, column 4 j of the whole
        features[tile] += torch.tensor([4.0 * ((tile - 1) // shape[1]), 4.0 * ((tile - 1) % shape[1])])
    options = {} if family == "llava_onevision" else {"vision_feature_select_strategy": "full"}
    packed, _ = model.pack_image_features(
        [features], torch.tensor([size]), image_newline=torch.full((2,), -1.0), **options
    )
    (image,) = layouts(family, [Sample(family, [2, Image(size), 3])], generate)
    places = image.layout.coordinates
    assert len(places) == n == len(packed[0])
    newline = packed[0][:, 0] == -1
    assert torch.equal(places[:, 0] < 0, newline)
    high_res = places[:, 0] == 1
    if high_res.any():
        expected = packed[0][high_res]
        if (60, 62) == size and family == "llava_onevision":  # shrunk bilinearly: order and extent remain
            rows, columns = image.layout.tiles[1][1:]
            assert torch.equal(places[high_res][:, 2], torch.arange(rows).repeat_interleave(columns))
        else:
            assert torch.equal(places[high_res][:, 2:].float(), expected - expected.amin(0))  # un-padding shifts


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_native_resolution_follows_the_grid(family, generate):
    samples = [Sample(family, [2, Image(0), 3, Image(1), 2]), Sample(family, [4, Image(2), 2], 1)]
    found = [image.layout for image in layouts(family, samples, generate)]
    shapes = [(t, h // 2, w // 2) for t, h, w in tiny.IMAGES[family]]
    assert [layout.tiles for layout in found] == [(shape,) for shape in shapes]


@pytest.mark.parametrize("family", tiny.VIDEO_FAMILIES)
def test_videos_have_frames(family):
    (video,) = layouts(family, [Sample(family, [2, Video(), 3])])
    frames = video.layout.tiles[0][0]
    assert video.layout.modality == "video" and frames == tiny.FRAMES
    assert video.places[:, 1].unique().tolist() == list(range(frames))


def test_internvl_counts_tiles_of_one_image():
    single, double = layouts("internvl", [Sample("internvl", [2, Image(0), 3, Image(1), 2])])
    assert [single.tokens, double.tokens] == [16, 32]
    assert double.places[:, 0].tolist() == [0] * 16 + [1] * 16


def test_beams_get_their_own_images():
    """generate repeats the features of a sample's images as a group; the grids must follow."""
    model = tiny.shared("qwen2_5_vl")
    samples = [Sample("qwen2_5_vl", [2, Image(0), 1, Image(1), 3]), Sample("qwen2_5_vl", [5, Image(2), 4], 1)]
    with apply_pruner(model, "uniform", ratio=0.5) as handle, torch.no_grad():
        model.generate(**collate(samples), num_beams=2, max_new_tokens=2, suppress_tokens=tiny.SPECIAL)
        tiles = [image.layout.tiles[0] for image in handle.last.images]
    a, b, c = ((t, h // 2, w // 2) for t, h, w in tiny.IMAGES["qwen2_5_vl"])
    assert tiles == [a, b, a, b, c, c]


def test_grids_order_and_separators():
    layout = grids(((1, 1, 2), (1, 2, 2)), ("row",))
    expected = [(0, 0, 0, 0), (0, 0, 0, 1)]
    expected += [(1, 0, 0, 0), (1, 0, 0, 1), (-1,) * 4, (1, 0, 1, 0), (1, 0, 1, 1), (-1,) * 4]
    assert [tuple(place) for place in layout.coordinates.tolist()] == expected
