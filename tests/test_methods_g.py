"""TransPrune, VFlowOpt, FiCoCo, AIM, FrameFusion and FlowCut, against slow re-computations in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import Budget, ConfigError, Geometry, Reduction, VisualTokens, get_method
from prune.kernels.attention import received_attention, row_attention
from prune.kernels.bipartite import bipartite_merge
from prune.kernels.depth import ascending
from prune.kernels.merging import chosen_indices, folds
from prune.kernels.rows import important_attention, important_rows, mean_row_attention
from prune.kernels.tiles import tile_groups, tile_shares
from prune.method import alive
from prune.reducers import ficoco, transprune, vflowopt
from prune.reducers.aim import Merging, Ranking, halvings
from prune.reducers.flowcut import Encoded, Instructed
from prune.reducers.framefusion import Attended, Fusing, fuse
from prune.tokens import AttentionInputs


class Presets(vflowopt.VFlowOpt):
    """Without the map of one threshold: those of the presets are left, as the engine gives them."""

    def reduce(self, tokens, keep):
        tower = {name: tokens.tower[name] for name in self.tower}
        return super().reduce(replace(tokens, tower=tower), keep)


STAGES = {
    "transprune": get_method("transprune"),
    "transprune-compat": get_method("transprune", compat=True, alpha=0.3),
    "vflowopt": get_method("vflowopt", cell=2.0),
    "vflowopt-later": get_method("vflowopt", recycle=False, alpha=0.5),
    "vflowopt-presets": Presets(),
    "ficoco": get_method("ficoco", quantile=0.9),
    "ficoco-compat": get_method("ficoco", compat=True, quantile=0.8),
    "aim-merging": Merging(),
    "aim-keys": Merging("keys", compat=True),
    "aim-ranking": Ranking(),
    "framefusion-fusing": Fusing(0.2, 0.3),
    "framefusion-cut": Attended(),
    "flowcut-encoder": Encoded(),
    "flowcut-received": Encoded("received"),
    "flowcut-decoder": Instructed(),
}
EVERY = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
repeatable = settings(derandomize=True, deadline=None, max_examples=25)
HEADS, KV_HEADS, DIM, BEFORE, SIDE = 4, 2, 6, 2, 3
CALM = 9.0  # what padding holds where NaN could not be told from a value: sums over all columns, and 0 * NaN


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(lengths, texts=(3,), seed=0, dtype=torch.float32, garbage=math.nan, video=True) -> VisualTokens:
    """One image per sequence, frames (or tiles) of `SIDE` squared; `BEFORE` columns, image, text; left-padded."""
    g = torch.Generator().manual_seed(seed)
    texts = [texts[i % len(texts)] for i in range(len(lengths))]
    b, n, t = len(lengths), max(lengths), max(texts)
    length = BEFORE + n + t
    counts = torch.tensor([lengths, texts]).unbind(0)
    mask = torch.arange(n) < counts[0][:, None]
    text_mask = torch.arange(t) >= t - counts[1][:, None]
    begin = (length - BEFORE - counts[0] - counts[1])[:, None]
    valid = torch.arange(length) >= begin
    index = torch.arange(n).expand(b, n)
    tile = index // SIDE**2

    def fill(real, *shape, positive=False, garbage=garbage, dtype=dtype):
        x = torch.randn(*real.shape, *shape, generator=g)
        x = (x.abs() if positive else x).to(dtype)
        return x.masked_fill(~real.view(*real.shape, *(1,) * len(shape)), garbage)

    def attention():
        finite = garbage if math.isfinite(garbage) else CALM
        return AttentionInputs(
            queries=fill(valid, HEADS, DIM, garbage=finite),
            keys=fill(valid, KV_HEADS, DIM, garbage=finite),
            values=fill(valid, KV_HEADS, DIM, garbage=finite),
            valid=valid,
            scale=DIM**-0.5,
            sample=torch.arange(b),
            slots=(begin + BEFORE + index).clamp(max=length - 1),
            text_slots=torch.arange(length - t, length).expand(b, t),
            text_mask=text_mask,
            last=torch.full((b,), length - 1),
        )

    transition = torch.stack([fill(mask, 2, positive=True), torch.tanh(fill(mask, 2))] * 2, -1).float()
    tower = {"attention": fill(mask, positive=True).float(), "metric": fill(mask, 2, 4), "pixels": fill(mask, 3 * 4)}
    for number in range(4):
        tower |= {f"attention{number}": fill(mask, positive=True).float(), f"values{number}": fill(mask, 3, 4)}
        tower |= {f"similar{number}": fill(mask, positive=True).float()}
    still = tile * 0
    return VisualTokens(
        features=fill(mask, 12),
        mask=mask,
        coordinates=torch.stack(
            [still if video else tile, tile if video else still, index % SIDE**2 // SIDE, index % SIDE], 2
        ).masked_fill(~mask[..., None], -5),
        tile=tile.masked_fill(~mask, -5),
        last_token_attention=fill(mask, positive=True).float(),
        attention=attention(),
        entry_attention=attention(),
        transition=transition,
        transition_sums=fill(torch.ones(b, 2, dtype=torch.bool), 2, positive=True).float(),
        text_mask=text_mask,
        tower=tower,
    )


def row(tokens: VisualTokens, b: int) -> VisualTokens:
    """Row b without its padding."""
    real = tokens.mask[b]
    out = {"tower": {name: x[b][real][None] for name, x in tokens.tower.items()}}
    for name in (f.name for f in fields(tokens)):
        value = getattr(tokens, name)
        if isinstance(value, AttentionInputs):
            valid, text = value.valid[b], value.text_mask[b]
            gap = int((~valid).sum())
            parts = {x: getattr(value, x)[b][valid][None] for x in ("queries", "keys", "values", "valid")}
            parts |= {"slots": value.slots[b][real][None] - gap, "text_slots": value.text_slots[b][text][None] - gap}
            parts |= {"text_mask": value.text_mask[b][text][None], "last": value.last[b][None] - gap}
            out[name] = replace(value, **parts, sample=torch.zeros(1, dtype=torch.long))
        elif name == "transition_sums":
            out[name] = value[b][None]
        elif name == "text_mask":
            out[name] = value[b][value[b]][None]
        elif isinstance(value, torch.Tensor):
            out[name] = value[b][real][None]
    return VisualTokens(**out)


def kept(reduction) -> list[list[int]]:
    return [index[valid].tolist() for index, valid in zip(reduction.keep, reduction.valid)]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- what every stage owes
@EVERY
@repeatable
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=3), st.booleans(), st.data())
def test_counts_are_exact(stage, sizes, video, data):
    keep = [min(n, k) for n, k in sizes]
    tokens = make([n for n, _ in sizes], data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=3)), video=video)
    reduction = stage.reduce(tokens, keep)
    for (n, _), count, indices in zip(sizes, keep, kept(reduction)):
        assert indices == sorted(set(indices)) and set(indices) <= set(range(n))
        assert len(indices) <= count if stage.adaptive else len(indices) == count
    assert not reduction.keep[~reduction.valid].any()
    assert reduction.apply(tokens.features)[reduction.valid].isfinite().all()


@EVERY
def test_a_row_is_not_influenced(stage):
    """Neither by the other rows nor by what its padding holds."""
    lengths, keep = [27, 9, 20, 1], [11, 4, 5, 1]
    tokens, calm = (make(lengths, (5, 2, 3), garbage=garbage) for garbage in (math.nan, CALM))
    both = [stage.reduce(given, keep) for given in (tokens, calm)]
    for b in range(len(lengths)):
        alone = stage.reduce(row(calm, b), keep[b : b + 1])
        for padded, found in zip((tokens, calm), both):
            assert kept(found)[b] == kept(alone)[0]
            close(found.apply(padded.features)[b][found.valid[b]], alone.apply(row(padded, b).features)[0])


@EVERY
def test_scores_are_fp32(stage):
    """Of bf16 inputs the same is chosen as of the same numbers in fp32, and merged features keep their dtype."""
    half = make([27, 20], (4, 2), dtype=torch.bfloat16)
    full = make([27, 20], (4, 2), dtype=torch.bfloat16)
    for holder in (full, full.attention, full.entry_attention):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                setattr(holder, name, value.float())
    full.tower = {name: value.float() for name, value in full.tower.items()}
    found, wanted = stage.reduce(half, [9, 6]), stage.reduce(full, [9, 6])
    assert kept(found) == kept(wanted)
    merged = found.apply(half.features)
    assert merged.dtype == torch.bfloat16
    close(merged[found.valid], wanted.apply(full.features)[wanted.valid], 2**-6)


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 18])
def test_constant_inputs(stage, value, n):
    """Everything alike, zeros too: finite, exact, and the first tokens where only ties are left to decide."""
    tokens = make([n])
    for holder in (tokens, tokens.attention, tokens.entry_attention):
        for name, x in vars(holder).items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                setattr(holder, name, torch.full_like(x, value))
    tokens.tower = {name: torch.full_like(x, value) for name, x in tokens.tower.items()}
    for keep in {1, (n + 1) // 2, n}:
        tokens.memory = {}
        reduction = stage.reduce(tokens, [keep])
        (indices,) = kept(reduction)
        assert len(indices) == keep or stage.adaptive
        assert reduction.apply(tokens.features).isfinite().all()
        ranked_alone = stage in (STAGES["transprune"], STAGES["framefusion-cut"], STAGES["flowcut-decoder"])
        if ranked_alone or stage is STAGES["vflowopt-later"]:
            assert indices == list(range(keep))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transprune", {"layers": (3, 2, 9)}),
        ("transprune", {"layers": (1, 2, 3, 4)}),
        ("transprune", {"layers": (0, 2, 3)}),
        ("transprune", {"alpha": 1.5}),
        ("vflowopt", {"layers": (4, 4)}),
        ("vflowopt", {"layers": ()}),
        ("vflowopt", {"cell": 0.5}),
        ("vflowopt", {"alpha": math.nan}),
        ("vflowopt", {"threshold": -1.0}),
        ("ficoco", {"variant": "x"}),
        ("ficoco", {"layers": (0, 1)}),
        ("ficoco", {"beta": -0.1}),
        ("ficoco", {"quantile": 1}),
        ("aim", {"merge": 0}),
        ("aim", {"layers": (2.5,)}),
        ("aim", {"metric": "pixels"}),
        ("aim", {"iterations": 0}),
        ("aim", {"temperature": 0}),
        ("framefusion", {"similarity": 2}),
        ("framefusion", {"merges_before": 0}),
        ("flowcut", {"layer": 0}),
        ("flowcut", {"share": 0.5}),
        ("flowcut", {"score": "mean"}),
    ],
)
def test_options_out_of_range(name, options):
    with pytest.raises(ConfigError):
        get_method(name, **options)


@pytest.mark.parametrize("name", ["transprune", "vflowopt", "ficoco", "aim", "framefusion", "flowcut"])
@pytest.mark.parametrize("layers", [3, 4, 28, 32, 80])
def test_plans(name, layers):
    """Sites in the decoder that do not depend on the budget; counts that fall, end at the budget, and grow with it."""
    method = get_method(name)
    for n in (1, 5, 64, 577):
        profiles = []
        for keep in range(1, n + 1, max(1, n // 23)):
            geometry = Geometry(n, layers=layers)
            stages = method.plan(geometry, keep)
            counts = [n, *(stage.keep for stage in stages)]
            assert counts == sorted(counts, reverse=True) and counts[-1] == keep
            assert [stage.site for stage in stages] == list(method.sites(layers))
            assert all(0 < site.layer < layers for site in method.sites(layers) if site.kind == "decoder")
            profiles.append(sum(alive(geometry, stages)))
        assert profiles == sorted(profiles) or name == "vflowopt" and n < 64


# ------------------------------------------------------------------------------------------------------- TransPrune
def test_transprune_by_hand():
    """Two cuts, with the sums of the first layers over tokens that the second cut does not see any more."""
    lengths, alpha = [12, 7], 0.3
    method = get_method("transprune", alpha=alpha)
    tokens = make(lengths, (4, 2))
    first = method.reduce(tokens, [6, 5])
    again = make(lengths, (4, 2), seed=1)
    later = pick(again, first)
    later.memory = tokens.memory
    later.transition = torch.cat([gather(tokens.transition, first.keep), later.transition[:, :, :1]], 2)
    second = method.reduce(later, [3, 2])
    for b, n in enumerate(lengths):
        variation = np.zeros(n)
        changes = lambda x: np.exp(1 - np.abs(x[..., 1::2]))  # noqa: E731
        before = tokens.transition[b, :n].double().numpy()
        layer = before[..., 0::2] * changes(before) / changes(before).sum(0)
        variation = layer.sum((1, 2))
        want = combined(variation, attended(tokens.entry_attention, b, n), alpha)
        chosen = np.sort(np.argsort(-want, kind="stable")[: [6, 5][b]])
        assert kept(first)[b] == chosen.tolist()
        after = later.transition[b, : len(chosen), 2:].double().numpy()
        late = after[..., 0::2] * changes(after) / changes(after).sum(0)
        total = variation[chosen] + late.sum((1, 2))
        close(transprune.transition_variation(later)[b, : len(chosen)], total)
        want = combined(total, attended(later.entry_attention, b, len(chosen)), alpha)
        assert kept(second)[b] == np.sort(np.argsort(-want, kind="stable")[: [3, 2][b]]).tolist()


def combined(variation, attention, alpha):
    return alpha * variation / variation.sum() + (1 - alpha) * attention / attention.sum()


def attended(inputs: AttentionInputs, b: int, n: int) -> np.ndarray:
    """Mean attention of the text of row b to its first n image tokens, head by head."""
    found = np.zeros(n)
    rows = inputs.text_slots[b][inputs.text_mask[b]].tolist()
    for slot in rows:
        for head in range(HEADS):
            keys = inputs.keys[b, :, head // (HEADS // KV_HEADS)].double()
            logits = keys @ inputs.queries[b, slot, head].double() * inputs.scale
            seen = inputs.valid[b] & (torch.arange(len(keys)) <= slot)
            found += logits.masked_fill(~seen, -math.inf).softmax(0)[inputs.slots[b, :n]].numpy()
    return found / len(rows) / HEADS


def pick(tokens: VisualTokens, reduction) -> VisualTokens:
    """The survivors, as the engine hands them to the next stage; attention and text stay."""
    given = {
        name: gather(getattr(tokens, name), reduction.keep) for name in ("features", "coordinates", "index", "tile")
    }
    given["mask"] = reduction.valid
    given |= {name: gather(getattr(tokens, name), reduction.keep) for name in ("transition", "last_token_attention")}
    for name in ("attention", "entry_attention"):
        inputs = getattr(tokens, name)
        given[name] = replace(inputs, slots=inputs.slots.gather(1, reduction.keep))
    tower = {name: gather(x, reduction.keep) for name, x in tokens.tower.items()}
    return VisualTokens(**given, tower=tower, transition_sums=tokens.transition_sums, memory=tokens.memory)


def gather(x, keep):
    return x[torch.arange(len(keep))[:, None], keep]


def test_transprune_schedule():
    stages = get_method("transprune").plan(Geometry(576, layers=32), 72)
    assert [(stage.site.layer, stage.keep) for stage in stages] == [(7, 504), (9, 360), (12, 72)]
    assert stages[0].reducer.transition_layers == (6, 7, 8, 9, 10, 11)
    mean = sum(alive(Geometry(576), stages)) / 32 / 576
    assert mean == pytest.approx(0.41, abs=0.001)  # "TransPrune-High"
    assert get_method("transprune", layers=(2, 3)).plan(Geometry(64), 8)[0].keep == 40


# --------------------------------------------------------------------------------------------------------- VFlowOpt
@pytest.mark.parametrize("cell", [1.0, 1.5, 2.0, 7.0])
@pytest.mark.parametrize("compat", [False, True])
def test_vflowopt_recycles_by_hand(cell, compat):
    """Cells per tile, the best of them where there are too many, filled up where there are too few."""
    tokens = make([26, 18], video=False)
    tokens.coordinates[0, 5] = -1  # a separator: importance 1, in no cell
    keep = [10, 7]
    reduction = get_method("vflowopt", cell=cell, compat=compat).reduce(tokens, keep)
    out = reduction.apply(tokens.features)
    for b, n in enumerate([26, 18]):
        worth = tokens.tower["attention"][b, :n].double().numpy().copy()
        if b == 0:
            worth[5] = 1.0
        order = np.argsort(-worth, kind="stable").tolist()
        extra = min(int(n / cell**2), keep[b])
        certain, low = order[: keep[b] - extra], order[keep[b] - extra :]
        cells: dict[tuple, list[int]] = {}
        for token in low:
            tile, _, r, c = tokens.coordinates[b, token].tolist()
            if r >= 0:
                cells.setdefault((tile, int(r / cell), int(c / cell)), []).append(token)
        ranked = sorted(cells.values(), key=lambda members: -worth[members[0]])  # members fall in importance
        used = ranked if compat else ranked[:extra]
        chosen = [*certain, *(members[0] for members in used)]
        if not compat:
            chosen += [token for token in low if token not in chosen][: keep[b] - len(chosen)]
        assert kept(reduction)[b] == sorted(chosen)
        for slot, token in enumerate(sorted(chosen)):
            want = tokens.features[b, token].double()
            for members in used:
                if members[0] == token:
                    members = [m for m in members if m == token or m not in chosen]
                    want = (tokens.features[b, members].double() * torch.tensor(worth[members])[:, None]).sum(0)
                    want = want / worth[members].sum()
            close(out[b, slot], want)


def test_vflowopt_does_not_recycle_videos():
    tokens = make([27], video=True)
    reduction = get_method("vflowopt", cell=1.5).reduce(tokens, [9])
    best = tokens.tower["attention"][0].topk(9).indices.sort().values
    assert kept(reduction)[0] == best.tolist() and not reduction.merge.weight.any()


def test_vflowopt_carries_entropy():
    """The share of the entropy is that among all tokens of the tile, at later stages too."""
    method = get_method("vflowopt", alpha=0.7, recycle=False)
    tokens = make([18, 11])
    whole = method.importance(tokens)
    first = method.reduce(tokens, [8, 5])
    later = pick(tokens, first)
    later.tower["pixels"] = later.tower["pixels"] * 0 + 1
    close(method.importance(later)[later.mask], whole.gather(1, first.keep)[first.valid])
    patch = vflowopt.entropy(tokens.tower["pixels"])[0, :9].double().softmax(0)
    close(whole[0, :9], tokens.tower["attention"][0, :9].double() + 0.7 * patch)


def test_vflowopt_schedule():
    """A final count of one of the released settings gives its counts, a mean budget its share."""
    for nominal, (_, shares) in zip((0.1, 0.25, 0.5), vflowopt.PRESETS):
        n = 2214
        one = n - round(n * (1 - shares[0]))
        two = one - round(one * (1 - shares[1]))
        final = two - round(two * (1 - shares[2]))
        method, geometry = get_method("vflowopt"), Geometry(n, layers=28)
        stages = method.plan(geometry, final)
        assert [(str(stage.site), stage.keep) for stage in stages] == [
            ("projected", one),
            ("decoder:9", two),
            ("decoder:18", final),
        ]
        found = sum(alive(geometry, method.stages(geometry, Budget(average=nominal)))) / 28 / n
        assert found == pytest.approx(nominal, abs=0.002)
        nearest = vflowopt.nearest_preset([one], torch.ones(1, n, dtype=torch.bool))
        assert vflowopt.PRESETS[nearest[0]][1] == shares
        own = get_method("vflowopt", shares=shares[:2])  # the same by hand
        assert [stage.keep for stage in own.plan(geometry, final)] == [one, two, final]
        assert [stage.keep for stage in own.plan(geometry, n - 3)] == [n - 3] * 3  # never less than the last
    with pytest.raises(ConfigError, match="shares"):
        get_method("vflowopt", shares=(0.5, 0.0))


def test_vflowopt_presets():
    """Every image has the threshold and the cells of its own preset, and keeps the map it had at the first cut."""
    tokens, keep = make([27, 26, 25, 27], video=False), [4, 6, 16, 27]  # 0.15, 0.23, 0.64, 1
    chosen = [0, 1, 2, 2]
    del tokens.tower["attention"]
    method = get_method("vflowopt")
    reduction = method.reduce(tokens, keep)
    for b, number in enumerate(chosen):
        (cell, threshold), _ = vflowopt.PRESETS[number]
        alone = row(make([27, 26, 25, 27], video=False), b)
        alone.tower["attention"] = alone.tower[f"attention{number}"]
        given = get_method("vflowopt", cell=cell, threshold=threshold)
        assert method.tower[f"attention{number}"] == given.tower["attention"]
        assert kept(given.reduce(alone, keep[b : b + 1]))[0] == kept(reduction)[b]
    later = pick(tokens, reduction)
    later.tower = {}
    carried = method.importance(later, [1] * 4)
    for b, number in enumerate(chosen):
        close(carried[b, : keep[b]], tokens.tower[f"attention{number}"][b, kept(reduction)[b]])


def test_vflowopt_cells_of_presets():
    """17, 16 and 12 tokens wide: an image of 300 tokens has room for 0, 1 and 2 of them."""
    tokens = make([300] * 3, video=False)
    tokens.coordinates = torch.stack([torch.zeros(300, dtype=torch.long)] * 3 + [torch.arange(300) % 30], 1)
    tokens.coordinates[:, 2] = torch.arange(300) // 30
    tokens.coordinates = tokens.coordinates.expand(3, -1, -1)
    folded = get_method("vflowopt").reduce(tokens, [30, 80, 210]).merge
    assert [len(set(slot[weight > 0].tolist())) for slot, weight in zip(folded.slot, folded.weight)] == [0, 1, 2]


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.3, 2.5, 50.0])
def test_important_attention(threshold, head):
    """Of whatever rows that are not among the first `head` ones."""
    q, k = torch.randn(2, 3, 9, HEADS, DIM)[0], torch.randn(3, 9, KV_HEADS, DIM)
    valid = torch.arange(9) < torch.tensor([9, 6, 1])[:, None]
    q[1, 6:], k[1, 6:] = CALM, math.nan
    candidates = (torch.arange(9) >= head).expand(3, -1) if head else None
    found = important_attention(q, k, 0.4, threshold, valid, candidates, chunk=2)
    for b, n in enumerate([9, 6, 1]):
        weights = row_attention(q[b : b + 1, :n], k[b : b + 1, :n], 0.4)[0].double().mean(0)
        received = weights.mean(0)
        rows = (received > threshold * received[head:].mean()) & (torch.arange(n) >= head)
        rows = rows if rows.any() else torch.ones(n, dtype=torch.bool)
        close(found[b, :n], weights[rows].mean(0))
    received = received_attention(q, k, 0.4, valid, chunk=2)
    assert torch.equal(found, important_attention(q, k, 0.4, threshold, valid, candidates, received, chunk=2))
    if threshold == 0 and not head:
        close(found, received)


@repeatable
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.floats(0, 60))
def test_important_rows(received, threshold):
    """There is room for all that are important."""
    received = torch.tensor(received)
    assert int((received > threshold * received.mean()).sum()) <= important_rows(len(received), threshold)


# ----------------------------------------------------------------------------------------------------------- FiCoCo
def test_ficoco_by_hand():
    lengths, keep, beta, gamma, quantile = [14, 9], [9, 6], 0.7, 0.4, 0.75
    tokens = make(lengths, (4, 2))
    method = get_method("ficoco", beta=beta, gamma=gamma, quantile=quantile)
    reduction = method.reduce(tokens, keep)
    out = reduction.apply(tokens.features)
    for b, n in enumerate(lengths):
        given = tokens.attention
        places = given.slots[b, :n].tolist() + given.text_slots[b][given.text_mask[b]].tolist()
        logits = np.zeros((len(places),) * 2)
        for head in range(HEADS):
            q = given.queries[b, places, head].double().numpy()
            k = given.keys[b, places, head // (HEADS // KV_HEADS)].double().numpy()
            logits += q @ k.T * given.scale / HEADS
        redundant = beta * logits[:n, :n].mean(1) - (1 - beta) * logits[:n, n:].mean(1)
        order = np.argsort(redundant, kind="stable")
        stay, gone = sorted(order[: keep[b]].tolist()), order[keep[b] :].tolist()
        assert kept(reduction)[b] == stay
        correlation = gamma * logits[:n, :n] + (1 - gamma) * logits[:n, n:] @ logits[n:, :n]
        received, total = np.zeros(n), np.zeros((n, 12))
        for source in gone:
            among = correlation[source, stay]
            most = max(1, int((among > np.quantile(among, quantile)).sum()))
            best = np.argsort(-among, kind="stable")[:most]
            weights = np.exp(among[best]) / np.exp(among[best]).sum()
            for share, target in zip(weights, np.array(stay)[best]):
                received[target] += share
                total[target] += share * tokens.features[b, source].double().numpy()
        want = (tokens.features[b, :n].double().numpy() + total) / (1 + received)[:, None]
        close(out[b, : keep[b]], want[stay])


def test_ficoco_schedule():
    stages = get_method("ficoco").plan(Geometry(576, layers=32), 198)
    assert [stage.keep for stage in stages] == [576 - 14 * done for done in range(1, 28)]
    assert [stage.site.layer for stage in stages] == list(range(5, 32))


def test_ficoco_without_text():
    """The filter then goes by the image alone, and nothing correlates over the text."""
    tokens = make([12])
    tokens.attention.text_mask = torch.zeros_like(tokens.attention.text_mask)
    found = ficoco.Logits.of(tokens.attention, tokens.mask)
    assert found.redundancy(0.6).isfinite().all()
    every = torch.arange(12)[None]
    close(found.correlation(every, 0.6), 0.6 * found.correlation(every, 1.0))


# -------------------------------------------------------------------------------------------------------------- AIM
@pytest.mark.parametrize(
    ("sizes", "shares"),
    [([9, 9, 7], [9, 9, 7]), ([9, 9, 7], [5, 5, 4]), ([9, 9, 7], [3, 3, 3]), ([9, 9, 7], [2, 1, 1]), ([44], [4])],
)
def test_aim_merges_by_hand(sizes, shares):
    """Tile by tile, halving; neighbours in reading order; plain means of means."""
    n, begin, want = sum(sizes), 0, {}
    tokens = make([n], video=False)
    tokens.features[0, 7] = tokens.features[0, 3]  # two best matches: the first one
    tokens.tile = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    reduction = Merging().reduce(tokens, [sum(shares)])
    for size, share in zip(sizes, shares):
        tile = [(begin + i, tokens.features[0, begin + i].double()) for i in range(size)]
        begin += size
        while len(tile) > share:
            sources, destinations = tile[0::2], tile[1::2]
            cosine = [[float(torch.cosine_similarity(a[1], b[1], 0)) for b in destinations] for a in sources]
            best = [each.index(max(each)) for each in cosine]
            falling = sorted(range(len(sources)), key=lambda i: (-cosine[i][best[i]], i))
            merged = falling[: min(len(tile) // 2, len(tile) - share)]
            groups = {j: [b[1]] + [sources[i][1] for i in merged if best[i] == j] for j, b in enumerate(destinations)}
            left = [(b[0], torch.stack(groups[j]).mean(0)) for j, b in enumerate(destinations)]
            tile = sorted(left + [sources[i] for i in range(len(sources)) if i not in merged], key=lambda x: x[0])
        want |= dict(tile)
    assert kept(reduction)[0] == sorted(want)
    close(reduction.apply(tokens.features)[0], torch.stack([want[token] for token in sorted(want)]))


def test_aim_drops_tiles_without_a_share():
    reduction = Merging().reduce(make([27], video=False), [2])
    assert len(kept(reduction)[0]) == 2 and {token // 9 for token in kept(reduction)[0]} == {0, 1}


@repeatable
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5))
def test_aim_rounds_are_enough(n, keep, tiles):
    """Merging itself reaches every tile's share, nothing is left to be dropped."""
    keep = min(n, keep)
    mask = torch.ones(1, n, dtype=torch.bool)
    group = tile_groups((torch.arange(n) * tiles // n)[None], mask)
    share = tile_shares([keep], group, mask)
    merged = bipartite_merge(torch.randn(1, n, 4), group, share.clamp(min=1), mask, halvings(n, keep))
    for tile in range(tiles):
        members = group[0] == tile
        if members.any() and (wanted := int(share[0][members][0])):
            assert int(merged.alive[0][members].sum()) == wanted
    totals = torch.zeros(1, n).scatter_add(1, merged.into, merged.weight)
    close(totals[merged.alive], torch.ones(int(merged.alive.sum())))


def test_aim_ranks_by_hand():
    tokens = make([11, 7], (3, 2))
    found = Ranking(iterations=3, temperature=0.5).score(tokens)
    for b, n in enumerate([11, 7]):
        given = tokens.attention
        real = given.valid[b].nonzero()[:, 0]
        length, total = len(real), 0.0
        for head in range(HEADS):
            q = given.queries[b, real, head].double()
            k = given.keys[b, real, head // (HEADS // KV_HEADS)].double()
            logits = (q @ k.T * given.scale / 0.5).masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
            rank = torch.full((length,), 1 / length, dtype=torch.float64)
            for _ in range(3):
                rank = rank @ logits.softmax(-1)
            total = total + rank**2 / HEADS
        close(found[b, :n], total.sqrt()[BEFORE : BEFORE + n])


def test_aim_schedule():
    """The released one for videos: 49 of 196 tokens per frame, then an eighth of them less per layer."""
    stages = get_method("aim").plan(Geometry(1568, layers=28), 1)
    assert stages[0].keep == 392 and str(stages[0].site) == "projected"
    assert [stage.site.layer for stage in stages[1:]] == list(range(15, 23))
    assert [stage.keep for stage in stages[1:]] == [1 + 391 * (7 - i) // 8 for i in range(8)]


def test_aim_merges_in_the_tower():
    method = get_method("aim", metric="keys")
    merging = method.plan(Geometry(16), 4)[0].reducer
    assert merging.needs_projector and merging.tower == method.tower and merging.tower["metric"].kind == "keys"
    assert merging.reduce(make([9]), [4]).merge.space == "tower"
    assert not Merging().needs_projector and Merging().reduce(make([9]), [4]).merge.space == "here"


# ------------------------------------------------------------------------------------------------------ FrameFusion
@pytest.mark.parametrize("least", [0, 12])
@pytest.mark.parametrize("keep", [36, 20])
def test_framefusion_by_hand(least, keep):
    """Runs of frames become the mean of run and anchor; at least down to `keep`, at most down to `least`."""
    tokens = make([36])
    tokens.features = (tokens.features[:, :9].repeat(1, 4, 1) + 0.8 * tokens.features).contiguous()
    reduction = fuse(tokens, [keep], 0.6, torch.tensor([least]))
    x = tokens.features[0].double()
    cosine = {i: float(torch.cosine_similarity(x[i], x[i - 9], 0)) for i in range(9, 36)}
    falling = sorted(cosine, key=lambda i: (-cosine[i], i))
    count = max(min(sum(value >= 0.6 for value in cosine.values()), 36 - least), 36 - keep)
    merged = set(falling[:count])
    assert 0 < count < 27 and kept(reduction)[0] == [i for i in range(36) if i not in merged]
    for slot, token in enumerate(kept(reduction)[0]):
        run = [token]
        while run[-1] + 9 in merged:
            run.append(run[-1] + 9)
        close(reduction.apply(tokens.features)[0, slot], x[run].mean(0))


def test_framefusion_after_a_merge():
    """The predecessor of a patch is the last of its place that is left."""
    tokens = make([27])
    tokens.features[0, 18:] = tokens.features[0, :9]
    later = pick(tokens, Reduction(torch.tensor([[*range(9), *range(18, 27)]])))
    reduction = fuse(later, [18], 0.99, torch.tensor([0]))
    assert kept(reduction)[0] == list(range(9))
    close(reduction.apply(later.features)[0, :9], tokens.features[0, :9])


def test_framefusion_schedule():
    """Merging may stop no sooner than at the budget's share, of all tokens there were before the first merge."""
    method = get_method("framefusion", similarity=0.0, merges_before=3)
    stages = method.plan(Geometry(40), 10)
    assert [str(stage.site) for stage in stages] == ["projected", "decoder:1", "decoder:2", "decoder:3"]
    assert [stage.keep for stage in stages] == [39, 38, 37, 10] and method.adaptive
    tokens, again = make([36]), make([36])
    tokens.features[:] = again.features[:] = 1
    first = Fusing(0.5, 0.5).reduce(tokens, [35])
    assert len(kept(first)[0]) == 18
    assert len(kept(Fusing(0.5, 0.5).reduce(pick(tokens, first), [17]))[0]) == 17  # not half of the 18
    assert len(kept(Fusing(0.5, 0.1).reduce(again, [35]))[0]) == 9  # all frames but the first


def test_framefusion_cannot_join_other_patches():
    """Fewer tokens than places: a run whose anchor goes goes with it."""
    tokens = make([3])
    tokens.coordinates = torch.tensor([[[0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1]]])
    tokens.features[0, 2] = tokens.features[0, 0]
    reduction = fuse(tokens, [1], 0.9, torch.tensor([0]))
    assert kept(reduction)[0] == [1]  # of the first tokens of their places the first one goes
    close(reduction.apply(tokens.features)[0], tokens.features[0, 1:2])


def test_framefusion_still_image():
    """Nothing to merge: one token goes, as the stage must leave fewer."""
    reduction = fuse(make([9], video=False), [8], 0.0, torch.tensor([2]))
    assert len(kept(reduction)[0]) == 8 and not reduction.merge.weight.any()


# ---------------------------------------------------------------------------------------------------------- FlowCut
@pytest.mark.parametrize("score", ["cls", "received"])
def test_flowcut_encoder_by_hand(score):
    lengths, keep = [20, 9], [7, 4]
    tokens = make(lengths, video=False)
    reduction = Encoded(score).reduce(tokens, keep)
    for b, n in enumerate(lengths):
        chosen = []
        for tile, share in {20: ((0, 3), (1, 3), (2, 1)), 9: ((0, 4),)}[n]:
            span, total = slice(9 * tile, min(n, 9 * tile + 9)), None
            for number in range(4):
                attention = tokens.tower[f"attention{number}"][b, span].double()
                values = tokens.tower[f"values{number}"][b, span].double()
                similar = sum((values[:, h] @ values[:, h].mean(0)).softmax(0) for h in range(3)) / 3
                if score == "cls":
                    similar = tokens.tower[f"similar{number}"][b, span].double()
                    similar = similar / similar.sum()
                flow = (attention / attention.sum() + similar) * values.mean(1).abs().sum(1)
                total = flow if total is None else 0.5 * total + 0.5 * flow
            chosen += (9 * tile + total.topk(share).indices).tolist()
        assert kept(reduction)[b] == sorted(chosen)


def test_flowcut_decoder_by_hand():
    tokens = make([10, 6], (3, 2))
    found = Instructed().score(tokens)
    for b, n in enumerate([10, 6]):
        given, here = tokens.attention, tokens.attention.slots[b, :n]
        last = int(given.last[b])
        attention = similar = 0.0
        for head in range(HEADS):
            k, v = given.keys[b, :, head // 2].double(), given.values[b, :, head // 2].double()
            attention = attention + (k[here] @ given.queries[b, last, head].double() * given.scale).softmax(0) / HEADS
            similar = similar + (v[here] @ v[last] * DIM**-0.5).softmax(0) / HEADS
        strength = given.values[b, here].double().mean(1).abs().sum(1)
        close(found[b, :n], (attention + similar) * strength)


def test_flowcut_schedule():
    both, encoder = get_method("flowcut"), get_method("flowcut", layer=None)
    assert [(str(s.site), s.keep) for s in both.plan(Geometry(2880), 320)] == [("projected", 640), ("decoder:2", 320)]
    assert [(str(s.site), s.keep) for s in encoder.plan(Geometry(576), 64)] == [("projected", 64)]
    assert both.needs_question and both.signals and not encoder.needs_question and not encoder.signals
    assert {spec.layer for spec in both.tower.values()} == {19 / 24, 20 / 24, 21 / 24, 22 / 24}
    kinds = {name[:-1]: spec.kind for name, spec in both.tower.items()}
    assert kinds == {"attention": "cls_attention", "similar": "cls_value_similarity", "values": "values"}
    assert not any("cls" in spec.kind for spec in get_method("flowcut", score="received").tower.values())


# ---------------------------------------------------------------------------------------------------------- kernels
def test_mean_row_attention():
    tokens = make([9, 5], (4, 2))
    given = tokens.attention
    q = given.queries[torch.arange(2)[:, None], given.text_slots]
    whole = mean_row_attention(q, given.keys, given.scale, given.text_slots, given.text_mask, given.valid)
    parts = mean_row_attention(q, given.keys, given.scale, given.text_slots, given.text_mask, given.valid, chunk=1)
    close(whole, parts)
    for b, n in enumerate([9, 5]):
        close(whole[b, given.slots[b, :n]], attended(given, b, n))
    none = torch.zeros_like(given.text_mask)
    assert not mean_row_attention(q, given.keys, given.scale, given.text_slots, none, given.valid).any()


def test_folds():
    chosen = torch.tensor([[False, True, False, True]])
    index, valid = chosen_indices(chosen, 3)
    assert index.tolist() == [[1, 3, 0]] and valid.tolist() == [[True, True, False]]
    source, slot, weight = folds(
        chosen, torch.tensor([[0, 2, 2]]), torch.tensor([[3, 1, 0]]), torch.tensor([[0.5, 0.0, 1.0]])
    )
    assert source.tolist() == [[0, 1, 1]] and slot.tolist() == [[1, 0, 0]] and weight.tolist() == [[0.5, 0.0, 0.0]]


def test_ascending():
    assert ascending((1, 2, 9)) and ascending(range(3, 5))
    assert not any(map(ascending, [(), (0, 1), (2, 2), (3, 1), (1.0, 2.0)]))


def test_transprune_power():
    assert transprune.stage_counts(96, 12) == (84, 60, 12)
    assert transprune.stage_counts(100, 100) == (100, 100, 100)
