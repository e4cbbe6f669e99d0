"""Pictures and models by name, for the command line: every failure is a `UserError` with its cause."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from PIL import Image, ImageOps

from prune.errors import PruneError

DEFAULT_IMAGE = "china.jpg"
BUILT_IN_IMAGES = (DEFAULT_IMAGE, "flower.jpg")


class UserError(PruneError):
    """Something the user can mend, met outside the library proper."""


def open_image(name: str) -> Image.Image:
    """A picture, upright, RGB on white; or one of the built-in photographs.

    Raises:
        UserError: there is no such file, or it is not a whole picture.
    """
    if name in BUILT_IN_IMAGES and not Path(name).exists():
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    if not Path(name).exists():
        raise UserError(f"there is no image {name}; built in are {' and '.join(BUILT_IN_IMAGES)}")
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder; name the images in it")
    try:
        with Image.open(name) as file:
            return on_white(file)
    except PermissionError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture in a format known to Pillow") from None
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"cannot read {name}: {error}") from None


def on_white(image: Image.Image) -> Image.Image:
    """Upright, RGB, transparency on white."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # a plain conversion would cut brightness off at 255
        upright = upright.point(lambda value: value / 256, "L")
    solid = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")


def load_model(name: str, device: str | None = None, dtype: str = "auto", attention: str | None = None):
    """(model, processor) of the built-in model, a demo, a folder or a hub repository, on the device, in eval mode.

    Args:
        name: "scenes-llava" (built in, trained), "demo:llava" and the like (untrained), a folder, or a hub name.
        device: None takes the GPU if there is one.
        dtype: of the weights; "auto" is the checkpoint's own, but float32 for half-precision ones on a CPU.
        attention: "sdpa", "eager", "flash_attention_2" ...; None lets transformers choose.

    Raises:
        UserError: no such model, a broken or unfit checkpoint, or no such device.
    """
    import torch

    device = pick_device(device)
    check_model_name(name)
    if not sys.stderr.isatty():
        _silence_bars()
    kind, _, demo = name.partition(":")
    if kind == "demo":
        model, processor = _load_demo(demo, dtype)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        path = model_path(name) if name in _built_in() else name
        try:  # shows bars of its own
            processor = AutoProcessor.from_pretrained(path)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        except Exception as error:  # a broken checkpoint raises anything
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"cannot load the model {name}: {reason}") from None
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"{name} cannot use {attention} attention: {str(error).splitlines()[0]}") from None
    if dtype == "auto" and torch.device(device).type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    try:
        return model.to(device).eval(), processor
    except torch.OutOfMemoryError:
        raise UserError(f"{name} does not fit into the memory of {device}; try bfloat16 or several GPUs") from None


def check_model_name(name: str) -> None:
    """Find typing errors before anything is loaded or asked of the hub, whose names all have an owner.

    Raises:
        UserError: a bare name that is neither built in nor a folder here.
    """
    from prune.evals.demo import DEMOS

    known = [*_built_in(), *(f"demo:{one}" for one in DEMOS)]
    if name in known or Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {name}")
    if "/" in name and not name.startswith("demo:"):
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"there is no model {name!r}.{hint} Built in are {', '.join(known)}; "
        "otherwise give a folder or a hub name (org/name)"
    )


def model_path(name: str) -> Path:
    """The folder of a built-in model, or the name as a path."""
    return _built_in().get(name, Path(name))


def _built_in() -> dict[str, Path]:
    from prune.evals.scenes_model import CHECKPOINT

    return {CHECKPOINT.name: CHECKPOINT}


def _load_demo(name: str, dtype: str):
    import torch

    from prune.evals.demo import DEMOS, load_demo

    if name not in DEMOS:
        raise UserError(f"there is no demo model {name!r}; there are {', '.join(f'demo:{one}' for one in DEMOS)}")
    model, processor = load_demo(name)
    return model if dtype == "auto" else model.to(getattr(torch, dtype)), processor


def pick_device(name: str | None) -> str:
    """The device of that name; without one the GPU if there is one.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(name or best))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return name or best


def _silence_bars() -> None:
    """Loading bars of the libraries are for people too."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()


def prefill(model, processor, photo: Image.Image, question: str, name: str) -> None:
    """One forward pass over the photograph and the question."""
    import torch

    content = [{"type": "image", "image": photo}, {"type": "text", "text": question}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
    except ValueError as error:  # for example a picture 300 times as wide as high
        raise UserError(f"the model's processor refuses {name}: {error}") from None
    with torch.inference_mode():
        model(**inputs.to(model.device, model.dtype), logits_to_keep=1)
