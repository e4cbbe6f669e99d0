"""Thousands of calls with pruners that come, change and go, on every tiny model: is anything left over?

    python tests/integration/soak.py [CALLS]      (default 2,000; the figures go to stdout)

What is counted are calls of `generate`. Between them, not counted, vision transformers run about half as many
forwards.

Every call draws a model, a method with its budget and options, a prompt, and what happens around it: a budget changed
between calls, a pruner switched off, left on for the next calls, removed, or refused; an exception in the middle of a
forward. At the end no hook is left, every model is what it was, and memory is flat: the process may not have grown by
more than 5 % between a tenth of the calls and all of them, nor Python's own memory (tracemalloc) by more than 2 MB.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, for tiny and its neighbours

import psutil
import tiny_vit
import torch
from fingerprint import changed, fingerprint
from test_properties import specs
from tiny import FAMILIES, IMAGES, LAYERS, SPECIAL, Image, Sample, collate, shared

from prune import Budget, PruneError, apply_pruner, get_handle
from prune.adapters.families import FAMILIES as KNOWN
from prune.adapters.vit_families import find_vit

SEED = 0
GROWTH = 0.05
PYTHON_GROWTH = 2 * 2**20


class Broken(Exception):
    pass


def budget(draw: random.Random) -> dict:
    return draw.choice(
        [
            {"ratio": draw.choice([0, 0.5, 0.75, 0.9])},
            {"keep": draw.randint(1, 20)},
            {"average": draw.choice([0.5, 0.8, 9, 12])},
            {"flops": draw.uniform(0.6, 1)},
        ]
    )


class VisionLanguage:
    """A tiny model with its methods, and calls of `generate`."""

    def __init__(self, family: str):
        self.family, self.model = family, shared(family)
        self.specs = specs(next(known.name for known in KNOWN if family in known.model_types))
        self.layers = LAYERS
        self.breakable = self.model.model.language_model.layers[2].mlp

    def call(self, draw: random.Random) -> None:
        samples = []
        for _ in range(draw.randint(1, 2)):
            items: list = [draw.randint(2, 6)]
            for _ in range(draw.randint(0, 2)):
                items += [Image(draw.randrange(len(IMAGES[self.family]))), draw.randint(1, 4)]
            samples.append(Sample(self.family, [*items, draw.randint(1, 5)], draw.randrange(1000)))
        steps = dict(max_new_tokens=draw.randint(1, 3), do_sample=False, suppress_tokens=SPECIAL)
        self.model.generate(**collate(samples), **steps)


class Vision:
    """A tiny vision transformer with its methods, and forwards."""

    def __init__(self, name: str):
        self.name, self.model = name, tiny_vit.shared(name)
        self.specs = specs(find_vit(self.model).family.name)
        self.layers = tiny_vit.DEPTH
        self.breakable = find_vit(self.model).blocks[-1].block

    def call(self, draw: random.Random) -> None:
        generator = torch.Generator().manual_seed(draw.randrange(1000))
        tiny_vit.run(self.name, self.model, torch.randn(draw.randint(1, 2), 3, 20, 20, generator=generator))


def attach(subject, draw: random.Random, counts: Counter) -> None:
    """A pruner on the model, or none where it refuses."""
    spec, more = draw.choice(subject.specs), {}
    if isinstance(subject, Vision):
        more = {"restore": draw.random() < 0.5}
    try:
        apply_pruner(subject.model, spec.method(subject.layers), **budget(draw), **more)
        counts["attached"] += 1
    except PruneError:
        counts["refused when attached"] += 1


def step(subject, draw: random.Random, counts: Counter) -> None:
    """One call, and what happens around it."""
    if get_handle(subject.model) is None:
        attach(subject, draw, counts)
    handle, around = get_handle(subject.model), draw.random()
    try:
        if handle is not None and around < 0.1:
            with handle.disabled():
                subject.call(draw)
            counts["disabled"] += 1
        elif around < 0.15:
            hook = subject.breakable.register_forward_hook(breaks)
            try:
                subject.call(draw)
            finally:
                hook.remove()
        else:
            if handle is not None and around < 0.4:
                handle.budget = Budget(**budget(draw))
                counts["budget changed"] += 1
            subject.call(draw)
            counts["reports read"] += handle is not None and handle.last is not None and bool(str(handle.last))
        counts["went well"] += 1
    except Broken:
        counts["broken off"] += 1
    except PruneError:
        counts["refused in a call"] += 1
    if handle is not None and draw.random() < 0.6:
        handle.remove()
        counts["removed"] += 1


def breaks(*args):
    raise Broken


def resident() -> int:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss


def main(calls: int) -> int:
    torch.set_num_threads(1)
    draw, start = random.Random(SEED), monotonic()
    generations, forwards = Counter(), Counter()
    models, vits = [*map(VisionLanguage, FAMILIES)], [*map(Vision, tiny_vit.VITS)]
    subjects = [*models, *vits]
    for subject in subjects:  # transformers installs hooks of its own when outputs are first recorded, and leaves them
        subject.call(draw)
    before = [fingerprint(subject.model) for subject in subjects]
    early, snapshot = calls // 10, None
    tracemalloc.start(1)
    for number in range(1, calls + 1):
        step(draw.choice(models), draw, generations)
        if draw.random() < 0.5:
            step(draw.choice(vits), draw, forwards)
        if number == early:
            first, traced, snapshot = resident(), tracemalloc.get_traced_memory()[0], tracemalloc.take_snapshot()
        if number in (early, calls) or number % max(1, calls // 10) == 0:
            traced_now = tracemalloc.get_traced_memory()[0]
            print(
                f"{number:6d} generate calls  RSS {resident() / 2**20:8.1f} MiB  Python {traced_now / 2**20:6.2f} MiB  "
                f"{monotonic() - start:6.0f} s",
                flush=True,
            )
    last, traced_last = resident(), tracemalloc.get_traced_memory()[0]
    print("\nlargest differences of Python's memory:")
    for line in tracemalloc.take_snapshot().compare_to(snapshot, "lineno")[:8]:
        print("  ", line)
    tracemalloc.stop()
    for kind, counts in (("generate", generations), ("forwards of vision transformers", forwards)):
        print(f"\n{kind}: " + ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))

    spoilt = []
    for subject, was in zip(subjects, before):
        if (handle := get_handle(subject.model)) is not None:
            handle.remove()
        if difference := changed(was, fingerprint(subject.model)):
            spoilt.append(difference[0])
    growth, traced_growth = last / first - 1, traced_last - traced
    print(
        f"{calls} generate calls on {len(models)} models, forwards on {len(vits)}: RSS {first / 2**20:.1f} MiB at "
        f"{early}, {last / 2**20:.1f} MiB at {calls} ({growth:+.1%}); Python's memory "
        f"{traced_growth / 2**20:+.2f} MiB; models that changed: {len(spoilt)}"
    )
    for difference in spoilt:
        print("  changed:", difference[:300])
    return int(bool(spoilt) or growth > GROWTH or traced_growth > PYTHON_GROWTH)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
