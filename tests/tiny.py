"""Tiny random-weight models of every family, and inputs for them. Nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
import transformers as hf
from fingerprint import changed, fingerprint
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_next_video",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
)
VIDEO_FAMILIES = ("llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ATTENTION = ("sdpa", "eager")
LAYERS = 4
VOCABULARY = 128
PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 100, 101, 102, 103
SPECIAL = [IMAGE, VIDEO, VISION_START, VISION_END]  # to be suppressed in generation
TILE = 16  # pixels along one edge of a tile; 4 x 4 patches

# Three images per family, of different sizes where the family has such a thing: (height, width) in pixels for anyres,
# (frames, rows, columns) in patches for Qwen, the number of tiles for InternVL. OneVision shrinks the grid of (60, 62).
IMAGES = {
    "llava": (None, None, None),
    "llava_next": ((20, 30), (30, 14), (16, 16)),
    "llava_onevision": ((20, 30), (60, 62), (14, 30)),
    "llava_next_video": ((20, 30), (30, 14), (16, 16)),
    "qwen2_vl": ((1, 8, 8), (1, 4, 12), (1, 8, 4)),
    "qwen2_5_vl": ((1, 8, 8), (1, 4, 12), (1, 12, 6)),
    "qwen3_vl": ((1, 8, 8), (1, 4, 12), (1, 8, 4)),
    "internvl": (1, 2, 1),
}
FRAMES = 3
VIDEOS = {
    "llava_onevision": FRAMES,
    "llava_next_video": FRAMES,
    "qwen2_vl": (FRAMES, 4, 8),
    "qwen2_5_vl": (FRAMES, 4, 8),
    "qwen3_vl": (FRAMES, 4, 8),
}


# --------------------------------------------------------------------------------------------------------- models
def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A fresh model; equal arguments give equal weights."""
    config = _config(family)
    config._attn_implementation = attention
    model = _CLASSES[family](config)
    model.set_attn_implementation(attention)
    _fill(model, seed)
    model.generation_config.eos_token_id = None  # all sequences run to max_new_tokens
    model.generation_config.pad_token_id = PAD
    return model.eval().to(dtype)


_SHARED: dict[tuple[str, ...], tuple[nn.Module, dict]] = {}
_USED: set[tuple[str, ...]] = set()


def pristine(family: str, attention: str = "sdpa") -> nn.Module:
    """The shared model that is never pruned: the oracle's."""
    return _shared("pristine", family, attention)


def shared(family: str, attention: str = "sdpa") -> nn.Module:
    """The shared model tests attach to. conftest checks that every test leaves it as it was."""
    return _shared("pruned", family, attention)


def _shared(*key: str) -> nn.Module:
    if key not in _SHARED:
        model = build(*key[1:])
        inputs = collate([Sample(key[1], [3, Image(0), 3])])
        with torch.no_grad():  # transformers installs hooks of its own when outputs are first recorded, and leaves them
            model(**inputs, output_hidden_states=True)
        _SHARED[key] = model, fingerprint(model)
    if key[0] == "pruned":
        _USED.add(key)
    return _SHARED[key][0]


def check_bare() -> list[str]:
    """The shared models used since the last call that are not what they were when built; these are built anew."""
    spoilt = []
    for key in list(_USED):
        model, bare = _SHARED[key]
        if difference := changed(bare, fingerprint(model)):
            del _SHARED[key]
            spoilt.append(f"{' '.join(key)}: {difference[0]}")
    _USED.clear()
    return spoilt


_CLASSES = {
    "llava": hf.LlavaForConditionalGeneration,
    "llava_next": hf.LlavaNextForConditionalGeneration,
    "llava_onevision": hf.LlavaOnevisionForConditionalGeneration,
    "llava_next_video": hf.LlavaNextVideoForConditionalGeneration,
    "qwen2_vl": hf.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": hf.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": hf.Qwen3VLForConditionalGeneration,
    "internvl": hf.InternVLForConditionalGeneration,
}
_PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def text_config(**changes) -> dict:
    """Sizes of the decoder."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=None,
    )
    return {**sizes, **changes}


def _config(family: str):
    tower = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3)
    clip = lambda: hf.CLIPVisionConfig(**tower, image_size=TILE, patch_size=4, projection_dim=24)  # noqa: E731
    if family == "llava":
        return hf.LlavaConfig(
            vision_config=clip(),
            text_config=hf.LlamaConfig(**text_config()),
            image_token_index=IMAGE,
            image_seq_length=16,
        )
    if family in ("llava_next", "llava_next_video"):
        video = family == "llava_next_video"
        cls = hf.LlavaNextVideoConfig if video else hf.LlavaNextConfig
        return cls(
            vision_config=clip(),
            text_config=hf.LlamaConfig(**text_config()),
            image_token_index=IMAGE,
            image_seq_length=16,
            image_grid_pinpoints=_PINPOINTS,
            **({"video_token_index": VIDEO} if video else {}),
        )
    if family == "llava_onevision":
        return hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**tower, image_size=TILE, patch_size=4, vision_use_head=False),
            text_config=hf.Qwen2Config(**text_config()),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32], [48, 48], [64, 64]],
            vision_aspect_ratio="anyres_max_9",
        )
    if family == "internvl":
        return hf.InternVLConfig(
            vision_config=dict(**{**tower, "num_hidden_layers": 2}, image_size=[32, 32], patch_size=[4, 4]),
            text_config=hf.Qwen2Config(**text_config()),
            image_token_id=IMAGE,
            image_seq_length=16,
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tokens = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
    )
    if family == "qwen2_vl":
        tower = dict(depth=3, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2)
        return hf.Qwen2VLConfig(vision_config=tower, text_config=text_config(rope_parameters=rope), **tokens)
    tower = dict(depth=4, hidden_size=16, out_hidden_size=32, intermediate_size=24, num_heads=2, patch_size=4)
    if family == "qwen2_5_vl":
        tower |= dict(window_size=16, fullatt_block_indexes=[1, 3])
        return hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text_config(rope_parameters=rope), **tokens)
    tower |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])
    return hf.Qwen3VLConfig(vision_config=tower, text_config=text_config(head_dim=8, rope_parameters=rope), **tokens)


def _fill(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model matters; the library's initialisation is nearly linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise)
            elif "embed" in name and parameter.dim() == 2:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(1.3 / math.sqrt(parameter[0].numel()) * noise)


# --------------------------------------------------------------------------------------------------------- inputs
@dataclass(frozen=True)
class Image:
    """An image; `size` is an index into `IMAGES[family]`, or the size itself."""

    size: object = 0


@dataclass(frozen=True)
class Video:
    """A video; `size` None takes `VIDEOS[family]`."""

    size: object = None


@dataclass
class Medium:
    """One image or video: its pixels as the model wants them, and how many placeholders stand for it.

    `alone`: it is the only image of its turn (OneVision tiles no others).
    """

    modality: str
    size: object
    pixels: Tensor
    tokens: int
    alone: bool = True


@dataclass
class Sample:
    """One conversation, without padding.

    Args:
        family: of the model.
        items: a number n stands for n random text tokens, a list for these tokens, an `Image` or `Video` for itself.
        seed: of tokens and pixels.
        ids, media: what the items amount to.
    """

    family: str
    items: list
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        alone = sum(isinstance(item, Image) for item in self.items) == 1
        for item in self.items:
            if isinstance(item, int):
                self.ids += torch.randint(3, 99, (item,), generator=generator).tolist()
            elif isinstance(item, list):
                self.ids += item
            elif isinstance(item, Image):
                self._add_image(item.size, alone, generator)
            else:
                self._add_video(VIDEOS[self.family] if item.size is None else item.size, generator)

    def _add_image(self, size, alone: bool, generator: torch.Generator) -> None:
        size = IMAGES[self.family][size] if isinstance(size, int) else size
        if self.family.startswith("qwen"):
            tokens = math.prod(size) // 4
            self.ids += [VISION_START] + [IMAGE] * tokens + [VISION_END]
            pixels = torch.randn(math.prod(size), 3 * 2 * 4 * 4, generator=generator)
        else:
            if self.family == "llava":
                tiles, tokens, edge = 1, 16, TILE
            elif self.family == "internvl":
                tiles, tokens, edge = size, 16 * size, 2 * TILE
            else:
                tiles, tokens = _anyres(self.family, size, alone)
                edge = TILE
            self.ids += [IMAGE] * tokens
            pixels = torch.randn(tiles, 3, edge, edge, generator=generator)
        self.media.append(Medium("image", size, pixels, tokens, alone))

    def _add_video(self, size, generator: torch.Generator) -> None:
        if self.family.startswith("qwen"):
            tokens = math.prod(size) // 4
            runs = size[0] if self.family == "qwen3_vl" else 1  # Qwen3 wraps every frame and puts its time before it
            for _ in range(runs):
                self.ids += [99] * (runs > 1) + [VISION_START] + [VIDEO] * (tokens // runs) + [VISION_END]
            pixels = torch.randn(math.prod(size), 3 * 2 * 4 * 4, generator=generator)
        else:
            tokens = 4 * size + (self.family == "llava_onevision")  # one newline at the end
            self.ids += [VIDEO] * tokens
            pixels = torch.randn(size, 3, TILE, TILE, generator=generator)
        self.media.append(Medium("video", size, pixels, tokens))

    def of(self, modality: str) -> list[Medium]:
        return [medium for medium in self.media if medium.modality == modality]

    def then(self, other: Sample | list[int]) -> Sample:
        """This conversation, continued with token ids or with another sample."""
        ids, media = (other.ids, other.media) if isinstance(other, Sample) else (list(other), [])
        joined = Sample(self.family, [], self.seed)
        joined.ids, joined.media = self.ids + ids, self.media + media
        return joined

    def spans(self) -> list[list[int]]:
        """The placeholder columns of every medium, separators included."""
        columns = {
            modality: [c for c, token in enumerate(self.ids) if token == placeholder]
            for modality, placeholder in (("image", IMAGE), ("video", VIDEO))
        }
        spans = []
        for medium in self.media:
            spans.append(columns[medium.modality][: medium.tokens])
            del columns[medium.modality][: medium.tokens]
        return spans


@cache
def _packer(family: str) -> nn.Module:
    return build(family).model


@cache
def _anyres(family: str, size: tuple[int, int], alone: bool) -> tuple[int, int]:
    """Tiles and placeholders of an image; OneVision does not tile an image that has company in its sample."""
    model, options = _packer(family), {}
    tiles = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, TILE)
    if family == "llava_onevision":
        tiles = tiles if alone else 1
    else:
        options = {"vision_feature_select_strategy": "full"}
    blank = [torch.zeros(tiles, 16, 2)]
    packed, _ = model.pack_image_features(blank, torch.tensor([size]), image_newline=torch.zeros(2), **options)
    return tiles, len(packed[0])


def collate(samples: list[Sample], side: str = "left", dtype: torch.dtype = torch.float32) -> dict:
    """The samples as one batch, padded on `side`, as the family's processor would give it."""
    family = samples[0].family
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), PAD)
    mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        columns = columns_of(samples, row, side)
        ids[row, columns] = torch.tensor(sample.ids)
        mask[row, columns] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    images = [medium for sample in samples for medium in sample.of("image")]
    videos = [medium for sample in samples for medium in sample.of("video")]
    if images and family.startswith("llava_"):
        most = max(len(image.pixels) for image in images)
        pad = lambda x: torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])  # noqa: E731
        inputs["pixel_values"] = torch.stack([pad(image.pixels) for image in images]).to(dtype)
        inputs["image_sizes"] = torch.tensor([image.size for image in images])
        if family == "llava_onevision":
            groups = [sample.of("image") for sample in samples]
            counts = [[1] * len(group) if group[0].alone else [len(group)] for group in groups if group]
            inputs["batch_num_images"] = torch.tensor(sum(counts, []))
    elif images:
        inputs["pixel_values"] = torch.cat([image.pixels for image in images]).to(dtype)
    if videos:
        join = torch.cat if family.startswith("qwen") else torch.stack
        inputs["pixel_values_videos"] = join([video.pixels for video in videos]).to(dtype)
    if family.startswith("qwen"):
        for modality, media in (("image", images), ("video", videos)):
            if media:
                inputs[f"{modality}_grid_thw"] = torch.tensor([medium.size for medium in media])
    return inputs


def with_positions(inputs: dict) -> dict:
    """The inputs with position ids that do not count padding, as `generate` makes them.

    LLaVA models count it when they make their own, and a method may look at keys, which know their position. The
    Qwen models never count it.
    """
    if "mm_token_type_ids" in inputs:
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def columns_of(samples: list[Sample], row: int, side: str = "left") -> list[int]:
    """Where `collate` puts the tokens of a row."""
    length, own = max(len(sample.ids) for sample in samples), len(samples[row].ids)
    start = length - own if side == "left" else 0
    return list(range(start, start + own))


def mixed_batch(family: str, seed: int = 0) -> list[Sample]:
    """Rows with one image, none, and three (two of them adjacent where the family's format allows it)."""
    between = [2] if family == "internvl" else []
    return [
        Sample(family, [4, Image(0), 6], seed + 1),
        Sample(family, [7], seed + 2),
        Sample(family, [3, Image(1), 4, Image(2), *between, Image(0), 5], seed + 3),
    ]


def one(family: str, seed: int = 0, size: int = 0) -> list[Sample]:
    """A batch of one sample with one image."""
    return [Sample(family, [4, Image(size), 6], seed + 1)]
