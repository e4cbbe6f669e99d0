"""The built-in model: its architecture, and what it is measured by. Trained by `python -m prune.evals.train_scenes`.

A LLaVA in small: CLIP-style tower with CLS, projector, Llama decoder, word tokenizer; an ordinary Hugging Face folder.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import scenes
from .scenes import GRID, PATCH, SIDE

CHECKPOINT = Path(__file__).parent / "models" / "scenes-llava"
TOWER = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4)
DECODER = dict(
    hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
PROMPT = "USER: <image>\n{question} ASSISTANT:"
_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------- model
def build_processor():
    """The processor: word-level tokenizer, 96-pixel images, `<image>` standing for 144 tokens, a chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = (
        "user assistant : ? . , what which how many is are there a an the colour digit digits leftmost topmost yes no"
    )
    words = ["<pad>", "</s>", "<unk>", "<image>", *words.split(), *"0123456789", *scenes.COLOURS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    square = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


def build_model(tokenizer) -> nn.Module:
    """The untrained model, `LlavaForConditionalGeneration`, fp32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH, projection_dim=TOWER["hidden_size"]),
        text_config=LlamaConfig(**DECODER, **special, vocab_size=len(tokenizer), max_position_embeddings=2048),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # places must not drown in pixels: CLIP's own start (0.02) leaves the decoder no columns
        model.model.vision_tower.embeddings.position_embedding.weight[1:] += 0.4 * _places()
    model.generation_config.update(**special, max_new_tokens=3, do_sample=False)
    return model


def _places() -> Tensor:
    """[GRID * GRID, D] unit variance: waves along rows and columns in random directions."""
    waves = torch.cos(math.pi * (torch.arange(GRID)[:, None] + 0.5) * torch.arange(1, 7) / GRID) * 2**0.5
    row, column = waves @ torch.randn(2, 6, TOWER["hidden_size"]) / 12**0.5
    return (row[:, None] + column[None]).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------- measurement
@torch.no_grad()
def answer(model, processor, items, batch_size: int = 50) -> list[str]:
    """What the model says to each item: greedy `generate` in batches, in the order of `items`."""
    said = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        prompts = [PROMPT.format(question=item.question) for item in part]
        inputs = processor(images=[item.images[0] for item in part], text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


@torch.no_grad()
def cls_coverage(model, processor, items, top: int = 16) -> list[dict[str, float]]:
    """How much of CLS's attention goes to objects, per layer of the tower.

    Args:
        model: with an attention implementation that can be set to "eager"; it is set back.
        processor: the model's.
        items: of `Scenes`.
        top: how many of the 144 patches count as attended to.

    Returns:
        Per layer {"layer", "lift", "objects"}: lift is the share of objects' patches among the `top` patches over the
        share among all patches (1: chance); objects is the share of objects with at least one patch among the `top`.
    """
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    pixels = processor.image_processor([item.images[0] for item in items], return_tensors="pt")["pixel_values"]
    attentions = tower(pixels.to(model.device, model.dtype), output_attentions=True).attentions
    tower.set_attn_implementation(before)
    where = torch.from_numpy(np.stack([scenes.patch_labels(item.things).ravel() for item in items]))
    rows = []
    for layer, attention in enumerate(attentions):
        best = attention[:, :, 0, 1:].float().mean(1).cpu().topk(top).indices  # [items, top]
        hit = where.gather(1, best)
        found = sum(len(set(row.tolist()) - {-1}) for row in hit)
        lift = (hit >= 0).float().mean() / (where >= 0).float().mean()
        share = found / sum(len(item.things) for item in items)
        rows.append(dict(layer=layer, lift=round(lift.item(), 2), objects=round(share, 3)))
    return rows


def measure(model, processor, size: int = scenes.TEST_ITEMS) -> tuple[list[dict], list[dict]]:
    """Rows of accuracy.csv (per level and question kind) and of cls_attention.csv on the first `size` test items."""
    accuracy, attention = [], []
    for name in scenes.LEVELS:
        items = list(scenes.Scenes(name, size=size))
        right = [said == item.answer for said, item in zip(answer(model, processor, items), items)]
        baseline = scenes.majority(items)
        kinds = list(scenes.LEVELS[name].answers)
        for kind in [*kinds, "all"]:
            of_kind = [ok for ok, item in zip(right, items) if kind in (item.kind, "all")]
            guess = baseline.get(kind) or sum(baseline[item.kind] for item in items) / len(items)
            row = dict(scenes=name, kind=kind, items=len(of_kind))
            accuracy.append(row | dict(accuracy=round(sum(of_kind) / len(of_kind), 4), majority=round(guess, 4)))
        attention += [dict(scenes=name, **row) for row in cls_coverage(model, processor, items)]
    return accuracy, attention
