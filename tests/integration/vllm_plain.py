"""Answers of vLLM without this library: `VLLM_PLUGINS= python vllm_plain.py FAMILY` prints them as JSON."""

from __future__ import annotations

import json
import sys

from vllm_support import engine, photo, prompt, request


def cases(family: str, ratio: float | None = None) -> list[dict]:
    """Requests with one image and two, of several sizes."""
    one, high, wide = photo(1), photo(2, 40, 96), photo(3, 64, 32)
    question = "How many birds are there beside the lake, and of what colour is the house?"
    return [
        request(prompt(family), one, ratio),
        request(prompt(family, question), high, ratio),
        request(prompt(family, images=2), [wide, one], ratio),
        request(prompt(family, question, images=2), [high, high], ratio),
    ]


if __name__ == "__main__":
    family = sys.argv[1]
    with engine(family, None) as ask:
        answers = [vars(answer) for request in cases(family) for answer in ask(request)]
    assert not any("prune" in name for name in sys.modules if "adapters.vllm" in name), "the plug-in was loaded"
    print("ANSWERS" + json.dumps(answers))
