"""Whatever prompt, pictures, budget and method: counts as promised, a batch is its rows, nothing stays behind.

`PRUNE_HYPOTHESIS=long` draws new examples, `PRUNE_EXAMPLES` of them per test (default 600). Without it the examples
are few, and the same in every run.
"""

from __future__ import annotations

import json
import os
import re
from ast import literal_eval
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_vit
import torch
from fingerprint import changed, fingerprint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_close, of_sample
from tiny import FAMILIES, LAYERS, SPECIAL, Image, Sample, collate, columns_of, pristine, shared, with_positions

import prune
from prune import Budget, Handle, PruneError, apply_pruner
from prune.adapters.families import FAMILIES as KNOWN
from prune.adapters.vision_sites import BehindTower
from prune.adapters.vit import at_blocks
from prune.adapters.vit_families import find_vit
from prune.evals.grid import Spec
from prune.method import Method
from prune.registry import method_class

LONG = os.environ.get("PRUNE_HYPOTHESIS") == "long"
TOLERANCE = 1e-4  # relative; the same numbers summed in another order


def drawn(strategy, examples: int, check) -> Counter:
    """Run `check(value, tried)` on drawn values; `tried` counts what it wants to count."""
    tried: Counter = Counter()

    @settings(
        max_examples=int(os.environ.get("PRUNE_EXAMPLES", 600)) if LONG else examples,
        deadline=None,
        derandomize=not LONG,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(strategy)
    def run(value):
        tried["examples"] += 1
        check(value, tried)

    with torch.no_grad():
        run()
    if LONG:
        print(f"\n{dict(tried)}")
    return tried


# ----------------------------------------------------------------------------------------------- what can be drawn
@dataclass(frozen=True)
class Attached:
    """A pruner as somebody would attach it."""

    spec: Spec
    arguments: dict

    def attach(self, model, layers: int, **changes) -> Handle:
        arguments = dict(self.arguments)
        if set(changes) & {"ratio"}:
            arguments = {name: value for name, value in arguments.items() if name not in vars(Budget(ratio=0))}
        return apply_pruner(model, self.spec.method(layers), **{**arguments, **changes})


BUDGETS = st.one_of(
    st.builds(dict, ratio=st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.floats(0, 1, exclude_max=True))),
    st.builds(dict, keep=st.integers(1, 40)),
    st.builds(dict, average=st.one_of(st.floats(0.4, 1), st.floats(8, 40))),
    st.builds(dict, flops=st.floats(0.5, 1)),
)


def specs(family: str) -> list[Spec]:
    """The methods this family takes, with the options that make it so where its defaults do not."""
    table = json.loads(Path(prune.__file__).with_name("capabilities.json").read_text())
    found = []
    for name, cells in table.items():
        options = re.search("works with (.*)", cells[family])
        if cells[family] == "works":
            found.append(Spec(name))
        elif options:
            pairs = (pair.split("=") for pair in options[1].split(", "))
            found.append(Spec(name, {key: literal_eval(value) for key, value in pairs}))
    return found


def sizes(family: str):
    """Of an image, as `tiny.Image` takes them: in the family's own unit, or an index into `tiny.IMAGES`."""
    edges = st.integers(6, 70)
    if family == "llava":
        return st.none()
    if family == "internvl":
        return st.integers(0, 2)
    if family.startswith("qwen"):
        return st.tuples(st.just(1), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))
    return st.tuples(edges, edges)


@st.composite
def prompts(draw, family: str) -> list[tuple[list, int]]:
    """Items and seeds of one to three `tiny.Sample`s with up to three images each, at least one with an image."""
    out = []
    for number in range(draw(st.integers(1, 3))):
        items: list = [draw(st.integers(1, 12))]
        for _ in range(draw(st.integers(0 if number else 1, 3))):
            items.append(Image(draw(sizes(family))))
            # tiles of two images without text between them are one run, in InternVL's own format too
            items.append(draw(st.integers(1 if family == "internvl" else 0, 6)))
        items.append(draw(st.integers(1, 12)))
        out.append((items, draw(st.integers(0, 99))))
    return draw(st.permutations(out))


@st.composite
def calls(draw, family: str):
    """(family, prompts, padding side, pruner)."""
    name = next(known.name for known in KNOWN if family in known.model_types)
    arguments = draw(BUDGETS) | {"positions": draw(st.sampled_from([None, None, "original", "compact"]))}
    side = draw(st.sampled_from(["left", "right"]))
    return family, draw(prompts(family)), side, Attached(draw(st.sampled_from(specs(name))), arguments)


# ------------------------------------------------------------------------------------------------- what must hold
def refusal(error: PruneError) -> str:
    """The error's kind, once it is sure that it says what to do."""
    text = str(error)
    fix = r"\b(keep more|use|pass|give|raise|must|put|needs|wants|works?|write|leave|set|switch|upgrade|load|is for)\b"
    assert len(text) > 40 and re.search(fix, text), f"names no fix: {text}"
    return type(error).__name__


def check_images(images) -> None:
    """Indices ascend, are unique and in range, and stages only ever drop."""
    for image in images:
        alive = set(range(image.tokens))
        for kept in image.stages.values():
            kept = kept.tolist()
            assert kept == sorted(set(kept)), "not ascending"
            assert set(kept) <= alive, "out of range, or back from the dead"
            alive = set(kept)


def check_counts(report, method: Method, budget: Budget, at_most: bool) -> None:
    """As many as `Method.kept` says; a FLOPs budget is one of the sample, which its images share."""
    for sample in {image.sample for image in report.images}:
        images = of_sample(report, sample)
        total = sum(image.tokens for image in images)
        geometry = replace(report.geometry, text_tokens=report.text_tokens[sample])
        got = [len(image.kept) for image in images]
        if budget.flops is None:
            want = [method.kept(image.tokens, budget, geometry) for image in images]
        else:
            got, want = [sum(got)], [method.kept(total, budget, geometry)]
            if len(images) > want[0]:  # never below one each
                want = [len(images)]
        if at_most:
            assert all(a <= b for a, b in zip(got, want)), f"{got} kept, at most {want} promised"
        elif budget.flops is not None:
            assert want[0] <= got[0] < want[0] + len(images), f"{got} kept, {want} promised"
        else:
            assert got == want, f"{got} kept, {want} promised"


def kept_of(report, sample: int) -> list[list[int]]:
    return [image.kept.tolist() for image in of_sample(report, sample)]


def holds(call, tried: Counter) -> None:
    family, prompts, side, pruner = call
    samples = [Sample(family, *prompt) for prompt in prompts]
    model, plain = shared(family), pristine(family)
    before, inputs = fingerprint(model), with_positions(collate(samples, side))
    try:
        handle = pruner.attach(model, LAYERS)
    except PruneError as error:
        tried[f"refused: {refusal(error)}"] += 1
        assert not changed(before, fingerprint(model))
        return
    with handle:
        try:
            logits = model(**inputs).logits
        except PruneError as error:
            tried[f"refused: {refusal(error)}"] += 1
        else:
            report = handle.last
            assert logits.isfinite().all()
            check_images(report.images)
            inside = handle.method.sites()[0].kind == "block"
            promise = BehindTower(handle.method, False) if inside else handle.method
            at_most = handle.method.adaptive or (inside and family.startswith("llava_"))  # tiles are cropped behind it
            check_counts(report, promise, handle.budget, at_most)
            dropped = any(len(image.kept) < image.tokens for image in report.images)
            tried["pruned" if dropped else "nothing to prune"] += 1
            for row, sample in enumerate(samples):
                alone = model(**collate([sample])).logits[0]
                if sample.media:
                    assert kept_of(handle.last, 0) == kept_of(report, row), "the choice depends on the batch"
                assert_close(logits[row, columns_of(samples, row, side)], alone, TOLERANCE)
            handle.budget = Budget(ratio=0)
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits), "ratio 0 is not the model"
    assert not changed(before, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_forwards(family):
    tried = drawn(calls(family), 12, holds)
    assert tried["pruned"] > tried["examples"] / 6


def generates(call, tried: Counter) -> None:
    """Greedy decoding of a batch gives every row what it gets alone."""
    family, prompts, _, pruner = call
    samples = [Sample(family, *prompt) for prompt in prompts]
    model, steps = shared(family), 3
    before = fingerprint(model)

    def answers(*rows: Sample) -> list[list[int]]:
        out = model.generate(**collate(list(rows)), max_new_tokens=steps, do_sample=False, suppress_tokens=SPECIAL)
        return out[:, -steps:].tolist()

    try:
        with pruner.attach(model, LAYERS) as handle:
            together, report = answers(*samples), handle.last
            for row, sample in enumerate(samples):
                assert answers(sample) == [together[row]]
                assert not sample.media or kept_of(handle.last, 0) == kept_of(report, row)
        tried["generated"] += 1
    except PruneError as error:
        tried[f"refused: {refusal(error)}"] += 1
    assert not changed(before, fingerprint(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family):
    tried = drawn(calls(family), 5, generates)
    assert tried["generated"]


# -------------------------------------------------------------------------------------------- vision transformers
@st.composite
def vit_calls(draw):
    """(model's name, number of images, their seed, pruner)."""
    name = draw(st.sampled_from(list(tiny_vit.VITS)))
    spec = draw(st.sampled_from(specs(find_vit(tiny_vit.shared(name)).family.name)))
    rest = {
        "restore": draw(st.booleans()),
        "proportional": draw(st.sampled_from([None, None, False])),
        "block": draw(st.sampled_from([None, None, 1, 2, 3])),
    }
    return name, draw(st.integers(1, 3)), draw(st.integers(0, 99)), Attached(spec, draw(BUDGETS) | rest)


def vit_holds(call, tried: Counter) -> None:
    name, count, seed, pruner = call
    model = tiny_vit.shared(name)
    pixels = torch.randn(count, 3, tiny_vit.SIDE, tiny_vit.SIDE, generator=torch.Generator().manual_seed(seed))
    before, plain = fingerprint(model), tiny_vit.run(name, model, pixels)
    try:
        with pruner.attach(model, tiny_vit.DEPTH) as handle:
            out, report = tiny_vit.run(name, model, pixels), handle.last
            assert out.isfinite().all()
            check_images(report.images)
            moved = at_blocks(handle.method, tiny_vit.DEPTH, pruner.arguments["block"])
            check_counts(report, moved, handle.budget, handle.method.adaptive)
            dropped = any(len(image.kept) < image.tokens for image in report.images)
            tried["pruned" if dropped else "nothing to prune"] += 1
            for row in range(len(pixels)):
                alone = tiny_vit.run(name, model, pixels[row : row + 1])
                assert kept_of(handle.last, 0) == kept_of(report, row), "the choice depends on the batch"
                assert_close(out[row], alone[0], TOLERANCE)
            handle.budget = Budget(ratio=0)
            assert torch.equal(tiny_vit.run(name, model, pixels), plain), "ratio 0 is not the model"
    except PruneError as error:
        tried[f"refused: {refusal(error)}"] += 1
    assert not changed(before, fingerprint(model))


def test_vision_transformers():
    tried = drawn(vit_calls(), 60, vit_holds)
    assert tried["pruned"] > tried["examples"] / 3


FOUND = [
    # every row shorter than the count asked for, and merges that go nowhere named a slot behind the last token
    (
        vit_holds,
        ("CLIPVisionModel", 1, 2, Attached(Spec("prumerge", {"space": "here"}), {"flops": 0.7, "block": None})),
    ),
    # a method with `stages` of its own kept more under a FLOPs budget than `Method.kept` promised
    (holds, ("internvl", [([1, Image(0), 1, 1], 0)], "left", Attached(Spec("todre"), {"flops": 0.5}))),
]
"""What longer runs have found."""


@pytest.mark.parametrize(("check", "call"), FOUND, ids=lambda value: getattr(value, "__name__", ""))
def test_what_was_found(check, call):
    tried: Counter = Counter()
    with torch.no_grad():
        check(call, tried)
    assert tried["pruned"]


def test_every_family_has_methods():
    """The examples above draw from this list: an empty one would pass them all."""
    for known in KNOWN:
        names = {spec.name for spec in specs(known.name)}
        assert {"random", "divprune", "fastv"} <= names and len(names) > 20
        for spec in specs(known.name):
            method_class(spec.name)
