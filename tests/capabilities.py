"""Which method works on which family, found out by running it: `python tests/capabilities.py` writes the table.

Every registered method, as its paper has it, is attached to every family's tiny model and prunes an image, and a video
where the family has videos. A method may refuse with `UnsupportedMethodError`; anything else that goes wrong is a bug
and ends the probe.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from tiny import LAYERS, VIDEO_FAMILIES, Image, Sample, Video, collate, shared

import prune
from prune import apply_pruner, list_methods
from prune.adapters.families import FAMILIES
from prune.errors import UnsupportedMethodError
from prune.evals.grid import Spec
from prune.registry import method_class

FILE = Path(prune.__file__).with_name("capabilities.json")
INSTEAD = ({"score": "received"}, {"pivot": "random"})
"""Options that do without CLS, tried where a method with its own defaults refuses."""


def probe() -> dict[str, dict[str, str]]:
    """method -> family, as the documentation names it -> "works" or why not."""
    types = {family.name: family.model_types[0] for family in FAMILIES}
    return {method: {name: cell(method, kind) for name, kind in types.items()} for method in list_methods()}


def cell(method: str, family: str) -> str:
    """What happens to one method on one family: "works", or why not and which option helps."""
    try:
        run(method, family)
    except UnsupportedMethodError as error:
        way_out = next((options for options in INSTEAD if helps(method, family, options)), {})
        return "; ".join([reason(error), *(f"works with {name}={value!r}" for name, value in way_out.items())])
    return "works"


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


def helps(method: str, family: str, options: dict[str, str]) -> bool:
    """Whether the method has these options and works with them."""
    if not set(options) <= {field.name for field in fields(method_class(method))}:
        return False
    try:
        run(method, family, **options)
    except UnsupportedMethodError:
        return False
    return True


def reason(error: UnsupportedMethodError) -> str:
    """What is missing, without the names of the method, of the model and of methods that work."""
    cause = str(error).partition(";")[0]
    return "no " + cause.rpartition(" has no ")[2] if " has no " in cause else cause


def text(found: dict[str, dict[str, str]]) -> str:
    """The file's content: one line per method."""
    lines = [f"  {json.dumps(method)}: {json.dumps(cells)}" for method, cells in sorted(found.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(text(probe()))
    print(FILE)
