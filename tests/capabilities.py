"""Which method works on which family, found out by running it: `python tests/capabilities.py` writes the table.

Every registered method, as its paper has it, is attached to every family's tiny model and prunes an image, and a video
where the family has videos; vision transformers are families too. A method may refuse with `UnsupportedMethodError`;
anything else that goes wrong is a bug and ends the probe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import tiny_vit
import torch
from tiny import LAYERS, VIDEO_FAMILIES, Image, Sample, Video, collate, shared
from tiny_vit import VITS

import prune
from prune import apply_pruner, list_methods
from prune.adapters.families import FAMILIES
from prune.adapters.vit_families import find_vit
from prune.errors import PruneError, UnsupportedMethodError
from prune.evals.grid import Spec
from prune.registry import method_class

FILE = Path(prune.__file__).with_name("capabilities.json")
INSTEAD = (
    {"score": "received"},
    {"rows": "received"},
    {"pivot": "random"},
    {"space": "here"},
    {"adaptive": False},
    {"variant": "v"},
    {"encoder": "inside", "layer": None},
    {"encoder": "after"},
    {"tau": 0},
    {"tau": 0, "pivot": "random"},
    {"space": "here", "score": "received"},
    {"space": "here", "adaptive": False},
)
"""Options tried where a method with its own defaults refuses: they do without CLS, or act elsewhere."""

IN_SHORT = {
    "acts at": "acts in several decoder layers",
    "acts inside the vision encoder": "its encoder cannot be cut",
    "inside the vision encoder": "its encoder can be cut between blocks only",
    "keeps different numbers": "pools over all patches",
    "reads the attention of one token": "no CLS token",
    "reads a projector": "no projector",
    "reads text_features": "no text",
    "reads inputs": "no text",
}
"""How an error begins -> what the table says."""


def probe() -> dict[str, dict[str, str]]:
    """method -> family, as the documentation names it -> "works" or why not."""
    runs = {family.name: partial(run, family=family.model_types[0]) for family in FAMILIES}
    for name in VITS:
        runs.setdefault(find_vit(tiny_vit.shared(name)).family.name, partial(run_vit, name=name))
    return {method: {family: cell(method, run) for family, run in runs.items()} for method in list_methods()}


def cell(method: str, run: Callable) -> str:
    """What happens to one method on one family: "works", or why not and which options help."""
    try:
        run(method)
    except UnsupportedMethodError as error:
        way_out = next((options for options in INSTEAD if helps(method, run, options)), {})
        helping = ", ".join(f"{name}={value!r}" for name, value in way_out.items())
        return reason(method, error) + (f"; works with {helping}" if helping else "")
    return "works"


def run_vit(method: str, name: str, **options) -> None:
    """Prune pictures in a vision transformer.

    Raises:
        UnsupportedMethodError: the method refuses the family.
    """
    model = tiny_vit.shared(name)
    with apply_pruner(model, Spec(method, options).method(tiny_vit.DEPTH), ratio=0.5) as handle, torch.no_grad():
        tiny_vit.run(name, model, tiny_vit.images(2))
        assert all(len(image.kept) < image.tokens for image in handle.last.images), f"{method} prunes nothing in {name}"


def run(method: str, family: str, **options) -> None:
    """Prune an image and, where there are any, a video.

    Raises:
        UnsupportedMethodError: the method refuses the family.
    """
    samples = [Sample(family, [4, Image(0), 6])]
    if family in VIDEO_FAMILIES:
        samples.append(Sample(family, [3, Video(), 4]))
    model = shared(family)
    pruner = Spec(method, options).method(LAYERS)
    with apply_pruner(model, pruner, ratio=0.75) as handle, torch.no_grad():
        for sample in samples:
            model(**collate([sample]))
            (image,) = handle.last.images
            assert len(image.kept) < image.tokens, f"{method} prunes nothing on {family}"


def helps(method: str, run: Callable, options: dict[str, object]) -> bool:
    """Whether the method has these options and works with them."""
    if not set(options) <= {field.name for field in fields(method_class(method))}:
        return False
    try:
        run(method, **options)
    except PruneError:
        return False
    return True


def reason(method: str, error: UnsupportedMethodError) -> str:
    """What is missing, without the names of the method, of the model and of methods that work."""
    cause = str(error).partition(";")[0].removeprefix(f"{method} ")
    short = next((words for start, words in IN_SHORT.items() if cause.startswith(start)), None)
    return short or "no " + cause.rpartition(" has no ")[2]


def text(found: dict[str, dict[str, str]]) -> str:
    """The file's content: one line per method."""
    lines = [f"  {json.dumps(method)}: {json.dumps(cells)}" for method, cells in sorted(found.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(text(probe()))
    print(FILE)
