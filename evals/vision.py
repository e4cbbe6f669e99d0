"""Vision transformers by name: what evaluation needs of them, whichever library they come from.

    load_vision("digits-vit")                        built in, trained, no download
    load_vision("timm:vit_base_patch16_224")         timm, with its published weights
    load_vision("open_clip:ViT-B-32:openai")         open_clip; without the tag the first of the model's published ones
    load_vision("google/vit-base-patch16-224")       Hugging Face, from the hub or a folder: classifiers, CLIP, SigLIP,
                                                     and towers without a head (ViTModel, DINOv2 ...)

`Vision` is what they have in common.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from prune.errors import ConfigError
from prune.evals.digits import CHECKPOINT, SIDE, load_digits_vit, to_pixels
from prune.loading import UserError, pick_device

BUILT_IN = CHECKPOINT.name
LIBRARIES = ("timm", "open_clip")


@dataclass
class Vision:
    """A vision transformer with what is around it.

    Args:
        model: what `apply_pruner` is given.
        prepare: pictures -> pixels [B, 3, H, W] fp32, on the CPU.
        pooled: pixels -> features [B, F], what a classifier reads.
        head: features -> logits [B, classes]; None without a classifier of its own.
        outputs: of the head; 0 without one.
        labels: the head's classes by name, in order; "" where nothing names them.
        embed_texts: texts -> [T, F], to compare features with; for models of pictures and texts.
    """

    model: nn.Module
    prepare: Callable[[Sequence[Image.Image]], Tensor]
    pooled: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None
    outputs: int = 0
    labels: tuple[str, ...] = ()
    embed_texts: Callable[[Sequence[str]], Tensor] | None = None


def load_vision(name: str, device: str | None = None, dtype: str = "auto", attention: str | None = None) -> Vision:
    """A model by name (see above), on the device, in eval mode.

    Args:
        device: None takes the GPU if there is one.
        dtype: of the weights; "auto" is the checkpoint's own, but float32 for half-precision ones on a CPU.
        attention: Hugging Face only: "sdpa", "eager".

    Raises:
        UserError: no such model, a broken one, or no such device.
        ConfigError: timm or open_clip is not installed.
    """
    device = pick_device(device)
    check_vision_name(name)
    library, colon, rest = name.partition(":")
    if attention is not None and (name == BUILT_IN or colon):
        raise UserError(f"{name} takes no --attention: it is for models of Hugging Face")
    try:
        if name == BUILT_IN:
            model = load_digits_vit()
            found = of_timm(model, lambda images: to_pixels([image.resize((SIDE, SIDE)) for image in images]))
        elif colon:
            found = {"timm": _timm, "open_clip": _open_clip}[library](rest)
        else:
            found = _hugging_face(name, attention)
    except (ConfigError, UserError):
        raise
    except Exception as error:  # a broken checkpoint raises anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"cannot load the model {name}: {reason}") from None
    now = next(found.model.parameters()).dtype
    if dtype != "auto":
        found.model.to(getattr(torch, dtype))
    elif torch.device(device).type == "cpu" and now in (torch.float16, torch.bfloat16):
        found.model.float()
    found.model.to(device).eval()
    return found


def check_vision_name(name: str) -> None:
    """Find typing errors before anything is loaded.

    Raises:
        UserError: no such model of timm or open_clip, or a bare name that is neither built in nor a folder here.
        ConfigError: timm or open_clip is not installed.
    """
    library, colon, rest = name.partition(":")
    if name == BUILT_IN or Path(name).is_dir():
        return
    if colon and library in LIBRARIES:
        known = _known(library)
        wanted = rest.partition(":")[0].partition(".")[0] if library == "timm" else rest.partition(":")[0]
        if wanted in known or rest.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            return
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f" Did you mean {library}:{close[0]}?" if close else ""
        raise UserError(f"{library} has no model {wanted!r}.{hint}")
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {name}")
    if "/" not in name or colon:
        raise UserError(
            f"there is no vision transformer {name!r}; give {BUILT_IN}, timm:NAME, open_clip:NAME, a folder, or a hub "
            "name (org/name)"
        )


def import_library(name: str):
    """timm or open_clip.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"models of {name} need the package: pip install prune-vlm[vit]") from None


def _known(library: str) -> list[str]:
    return import_library(library).list_models()


# --------------------------------------------------------------------------------------------------------- timm
def _timm(name: str) -> Vision:
    timm = import_library("timm")
    model = timm.create_model(name, pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = of_timm(model, lambda images: torch.stack([transform(image) for image in images]))
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    found.labels = tuple(map(str, names))
    return found


def of_timm(model: nn.Module, prepare: Callable[[Sequence[Image.Image]], Tensor]) -> Vision:
    """A timm model that is there: features before the classifier, and the classifier."""
    head = model.get_classifier()
    return Vision(
        model=model,
        prepare=prepare,
        pooled=lambda pixels: model.forward_head(model.forward_features(pixels), pre_logits=True),
        head=None if isinstance(head, nn.Identity) else head,
        outputs=0 if isinstance(head, nn.Identity) else model.num_classes,
    )


# ---------------------------------------------------------------------------------------------------- open_clip
def _open_clip(name: str) -> Vision:
    open_clip = import_library("open_clip")
    name, _, tag = name.partition(":") if not name.startswith("hf-hub:") else (name, "", "")
    if not tag and not name.startswith("hf-hub:"):
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags:
            raise UserError(f"open_clip publishes no weights for {name}; give open_clip:{name}:PATH")
        tag = tags[0]
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag or None)
    return of_open_clip(model, transform, open_clip.get_tokenizer(name))


def of_open_clip(model: nn.Module, transform: Callable[[Image.Image], Tensor], tokenizer: Callable) -> Vision:
    """A CLIP model of open_clip that is there."""

    def embed(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(texts)).to(next(model.parameters()).device))

    return Vision(
        model=model,
        prepare=lambda images: torch.stack([transform(image) for image in images]),
        pooled=model.encode_image,
        embed_texts=embed,
    )


# ------------------------------------------------------------------------------------------------- Hugging Face
def _hugging_face(name: str, attention: str | None) -> Vision:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(name)
    named = (getattr(config, "architectures", None) or [""])[0]
    options = {} if attention is None else {"attn_implementation": attention}
    maker = AutoModelForImageClassification if named.endswith("ForImageClassification") else AutoModel
    model = maker.from_pretrained(name, dtype="auto", **options)
    texts = hasattr(model, "get_text_features")
    return of_hugging_face(
        model, AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name) if texts else None
    )


def of_hugging_face(model: nn.Module, processor: Callable, tokenizer: Callable | None = None) -> Vision:
    """A model of Hugging Face that is there: a classifier, a model of pictures and texts, or a tower.

    Raises:
        UserError: a classifier whose last layer is not called `classifier`.
    """
    found = Vision(
        model=model,
        prepare=lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"],
        pooled=lambda pixels: _pooled(model(pixel_values=pixels)),
    )
    if hasattr(model, "get_text_features"):

        def embed(texts: Sequence[str]) -> Tensor:
            longest = getattr(model.config.text_config, "max_position_embeddings", None)
            # SigLIP was trained with texts padded to the full length
            inputs = tokenizer(list(texts), padding="max_length", truncation=True, max_length=longest)
            wanted = [key for key in ("input_ids", "attention_mask") if key in inputs]
            kept = {key: torch.tensor(inputs[key], device=model.device) for key in wanted}
            return _pooled(model.get_text_features(**kept))

        found.pooled = lambda pixels: _pooled(model.get_image_features(pixel_values=pixels))
        found.embed_texts = embed
    elif type(model).__name__.endswith("ForImageClassification"):
        head = getattr(model, "classifier", None)
        if head is None:
            raise UserError(f"{type(model).__name__} has no `classifier`, whose input would be the pooled features")
        found.pooled = lambda pixels: _into(head, lambda: model(pixel_values=pixels))
        found.head, found.outputs = head, model.config.num_labels
        found.labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    return found


def _pooled(output) -> Tensor:
    """Pooled features of what a model of transformers returns."""
    if isinstance(output, Tensor):
        return output
    for field in ("image_embeds", "pooler_output"):
        if getattr(output, field, None) is not None:
            return getattr(output, field)
    return output.last_hidden_state[:, 0]


def _into(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `module` is given while `run` runs."""
    given = []
    hook = module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    return given[-1]
