"""What a pruned model must compute, by hand: plain loops over one sample at a time on the un-hooked model.

Nothing of the library's engine, adapters or kernels is used here. The only thing taken from it is which tokens it says
it kept (`handle.last`), and `check_counts` holds these against the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from tiny import Sample, collate
from torch import Tensor, nn

TOLERANCE = 1e-5


@dataclass
class Trace:
    """What the un-hooked model hands to its decoder for one sample.

    `embeds` `[L, D]`, `positions` `[A, L]`, `visual` `[L]` bool and `deepstack` (Qwen3-VL: features added after the
    first layers, one `[visual tokens, D]` each).
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    deepstack: list[Tensor]


class _Stop(Exception):
    pass


def trace(model: nn.Module, inputs: dict) -> Trace:
    """Run the model up to its decoder. `inputs` hold one row without padding."""
    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)
        raise _Stop

    hook = model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        hook.remove()
    embeds = seen["inputs_embeds"][0]
    positions = seen.get("position_ids")
    positions = torch.arange(len(embeds))[None] if positions is None else positions.reshape(-1, len(embeds))
    visual = seen.get("visual_pos_masks")
    visual = torch.zeros(len(embeds), dtype=torch.bool) if visual is None else visual[0]
    return Trace(embeds, positions[-3:], visual, list(seen.get("deepstack_visual_embeds") or []))


def places(model: nn.Module, sample: Sample, embeds: Tensor) -> list[list[int]]:
    """Per image or video the columns a method may choose from: its placeholders without `image_newline`."""
    newline = getattr(model.model, "image_newline", None)
    spans = sample.spans()
    if newline is None:
        return spans
    return [[c for c in span if not torch.equal(embeds[c], newline.to(embeds.dtype))] for span in spans]


@dataclass
class Expected:
    """What the pruned model must give for one sample.

    Args:
        logits: `[L, V]`; a dropped column has those of the last surviving column before it.
        kept: per decoder layer the columns that enter it.
        entering: per decoder layer `[kept, D]` what enters it.
        hidden: as transformers reports `hidden_states`: the first element is what enters layer 0, element i what layer
            i - 1 gives (before deepstack), the last one the final norm's output.
        attention: per layer `[heads, kept, kept]` softmax attention, if the model runs eager attention.
        first: the first surviving column; nothing is promised before it.
    """

    logits: Tensor
    kept: list[list[int]]
    entering: list[Tensor]
    hidden: list[Tensor]
    attention: list[Tensor]
    first: int


def expect(
    model: nn.Module,
    sample: Sample,
    images: list = (),
    positions: str = "original",
    allowed: Tensor | None = None,
    inputs: dict | None = None,
    spans: list[list[int]] | None = None,
    merges: dict | None = None,
) -> Expected:
    """The pruned forward of one sample.

    Tokens dropped before the decoder are cut out of its inputs. Tokens dropped at decoder layer k stay in the sequence
    and are hidden by the attention masks of layers >= k.

    Args:
        model: un-hooked.
        images: `handle.last.images` of this sample (of several turns one after the other).
        positions: the position policy.
        allowed: `[L, L]` bool, who may attend to whom beside causality.
        inputs: the model's inputs, if not `collate([sample])`.
        spans: per image the columns to choose from, if not `places`.
        merges: what `merges_of` found, for methods that fold dropped tokens into kept ones.
    """
    t = trace(model, collate([sample], dtype=model.dtype) if inputs is None else inputs)
    cuts = _cuts(places(model, sample, t.embeds) if spans is None else spans, sample, images, merges or {})
    lm, length = model.model.language_model, len(t.embeds)
    features, gone = t.embeds, set()
    for cut in cuts:
        if cut.layer is None:
            features, gone = _merge(features, cut.merges, range(length)), gone | cut.gone
    columns = [c for c in range(length) if c not in gone]
    embeds = torch.stack([features[c] for c in columns])[None]
    ids = t.positions[:, columns]
    if positions == "compact":
        ids = dense(ids)
    if sample.family.startswith("qwen"):
        ids = ids.expand(3, -1)[:, None]
    rotary = lm.rotary_emb(embeds, ids)
    order = t.visual.nonzero()[:, 0].tolist()
    slots = [i for i, c in enumerate(columns) if c in order]
    deepstack = [torch.stack([feature[order.index(columns[i])] for i in slots]) for feature in t.deepstack if slots]

    kept, entering, hidden, attention = [], [], [], []
    h = embeds
    for number, layer in enumerate(lm.layers):
        for cut in cuts:
            if cut.layer == number:
                h, gone = _merge(h[0], cut.merges, columns)[None], gone | cut.gone
        alive = [i for i, c in enumerate(columns) if c not in gone]
        visible = torch.zeros(len(columns), len(columns), dtype=torch.bool)
        visible[:, alive] = True
        visible = visible.tril()
        if allowed is not None:
            visible = visible & allowed[columns][:, columns]
        visible.fill_diagonal_(True)  # dropped rows too need something to look at; nobody looks at them
        mask = torch.where(visible, 0.0, torch.finfo(h.dtype).min).to(h.dtype)
        kept.append([columns[i] for i in alive])
        entering.append(h[0, alive])
        h, weights = _layer(layer, h, mask[None, None], rotary)
        hidden.append(h[0, alive])
        if weights is not None:
            attention.append(weights[0][:, alive][:, :, alive])
        if number < len(deepstack):
            h = h.clone()
            h[0, slots] = h[0, slots] + deepstack[number]
    h = lm.norm(h)
    hidden = [entering[0], *hidden[:-1], h[0, alive]]
    source, last = [], alive[0]
    for c in range(length):
        last = next((i for i in alive if columns[i] == c), last)
        source.append(last)
    return Expected(model.lm_head(h[0, source]), kept, entering, hidden, attention, columns[alive[0]])


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor, rotary) -> tuple[Tensor, Tensor | None]:
    """One decoder layer, with its attention weights if the implementation gives them."""
    seen = []
    hook = layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    try:
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
    finally:
        hook.remove()
    return (out[0] if isinstance(out, tuple) else out), seen[0]


@dataclass
class _Cut:
    """One stage of one image: before decoder layer `layer` (None: before the decoder) the columns `gone` go, after
    every column in `merges` became the weighted sum of columns."""

    layer: int | None
    gone: set[int]
    merges: dict[int, list[tuple[float, int]]]


def _cuts(spans: list[list[int]], sample: Sample, images: list, merges: dict) -> list[_Cut]:
    cuts = []
    for modality in ("image", "video"):
        own = [span for span, medium in zip(spans, sample.media) if medium.modality == modality]
        reports = [image for image in images if image.layout.modality == modality]
        assert not images or len(own) == len(reports), f"{len(own)} {modality}s, {len(reports)} reports"
        for span, report in zip(own, reports):
            assert report.tokens == len(span), f"{report.tokens} tokens reported, {len(span)} placeholders"
            for site, kept in report.stages.items():
                sums = merges.get((report.sample, report.index, str(site)), {})
                sums = {span[to]: [(weight, span[i]) for weight, i in terms] for to, terms in sums.items()}
                layer = None if str(site) == "projected" else int(str(site).removeprefix("decoder:"))
                cuts.append(_Cut(layer, set(span) - {span[i] for i in kept.tolist()}, sums))
    return cuts


def _merge(features: Tensor, sums: dict[int, list[tuple[float, int]]], columns) -> Tensor:
    """`features` `[len(columns), D]` with the weighted sums in place."""
    if not sums:
        return features
    slot = {column: i for i, column in enumerate(columns)}
    rows = list(features)
    for to, terms in sums.items():
        rows[slot[to]] = sum(weight * features[slot[column]].float() for weight, column in terms).to(features.dtype)
    return torch.stack(rows)


def merges_of(report, reductions: list) -> dict:
    """(sample, image, site) -> {kept token: [(weight, token), ...]} from the `Reduction`s of a prefill, one per stage.

    Reducers get one row per image, images before videos, each in reading order.
    """
    images = sorted(report.images, key=lambda image: (image.layout.modality == "video", image.sample, image.index))
    found = {}
    for row, image in enumerate(images):
        alive = list(range(image.tokens))
        for (site, kept), reduction in zip(image.stages.items(), reductions, strict=True):
            chosen = [alive[i] for i in reduction.keep[row][reduction.valid[row]].tolist()]
            assert chosen == kept.tolist(), "the report tells something else than the method chose"
            if (merge := reduction.merge) is not None:
                scale = torch.ones(len(chosen)) if merge.scale is None else merge.scale[row]
                terms = {token: [(float(scale[i]), token)] for i, token in enumerate(chosen)}
                for source, slot, weight in zip(*(x[row].tolist() for x in (merge.source, merge.slot, merge.weight))):
                    if weight:
                        terms[chosen[slot]].append((weight, alive[source]))
                found[image.sample, image.index, str(site)] = terms
            alive = chosen
    return found


def dense(positions: Tensor) -> Tensor:
    """Positions without gaps: every value becomes its rank among all values used, counted from the smallest."""
    used = sorted(set(positions.flatten().tolist()))
    rank = {value: used[0] + i for i, value in enumerate(used)}
    return torch.tensor([[rank[value] for value in row] for row in positions.tolist()])


# ----------------------------------------------------------------------------------------------------- comparisons
def of_sample(report, row: int) -> list:
    """The image reports of one batch row, in order."""
    return sorted((image for image in report.images if image.sample == row), key=lambda image: image.index)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    off = difference(actual, expected)
    assert off <= tolerance, f"off by {off:.2e} relative"


def check_counts(report, budget: dict, counts=None, at_most: bool = False) -> None:
    """Every image keeps what the budget says, as ascending indices in range, and stages only ever drop.

    Args:
        counts: N -> tokens kept, for budgets other than `ratio` and `keep`.
        at_most: for methods whose counts depend on the content.
    """
    assert report.images
    for image in report.images:
        n = image.tokens
        if "ratio" in budget:
            want = max(1, round(n * (1 - Fraction(str(budget["ratio"])))))
        elif "keep" in budget:
            want = min(n, budget["keep"])
        else:
            want = counts(n)
        right = len(image.kept) <= want if at_most else len(image.kept) == want
        assert right, f"{len(image.kept)} of {n} kept, the budget says {want}"
        alive = set(range(n))
        for kept in image.stages.values():
            kept = kept.tolist()
            assert kept == sorted(set(kept)), "not ascending"
            assert set(kept) <= alive, "out of range, or back from the dead"
            alive = set(kept)
