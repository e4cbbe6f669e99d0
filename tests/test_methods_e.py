"""Methods that read the vision encoder: what each owes and what it is, against slow oracles written from the specs."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Image, Sample, collate, mixed_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from prune import Budget, ConfigError, Geometry, VisualTokens, apply_pruner, get_method
from prune.kernels.tiles import group_extreme, group_rank, group_sum, tile_groups, tile_shares
from prune.reducers.hiprune import anchors
from prune.reducers.pooling import cells
from prune.reducers.todre import Diverse, DropUnseen, diverse, image_attention
from prune.reducers.vispruner import rounds, vispruner
from prune.reducers.zooprune import sensitivity, sensitivity_jvp, unit_directions
from prune.tokens import AttentionInputs, Tower

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=30)
METHODS = [
    ("hiprune", {"alpha": 0.8}),
    ("hiprune", {"alpha": 0.8, "compat": True}),
    ("visionzip", {"contextual": 0.4}),
    ("visionzip", {"contextual": 2, "space": "here", "score": "received"}),
    ("vispruner", {}),
    ("vispruner", {"important_ratio": 0.0, "drop": 2}),
    ("fastervlm", {}),
    ("prumerge", {"neighbours": 3}),
    ("prumerge", {"variant": "base", "adaptive": False, "neighbours": 3}),
    ("prumerge", {"adaptive": False, "neighbours": 0}),
    ("prumerge", {"adaptive": False, "ratio": 0.125, "compat": True}),
    ("todre", {}),
    ("todre", {"selector": "kcenter", "pivot": "random"}),
    ("zooprune", {"directions": 3}),
    ("zooprune", {"directions": 2, "estimator": "jvp"}),
    ("norm_diversity", {}),
    ("pooling", {}),
]
EVERY = pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
W1, W2 = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), torch.eye(16)[:, :12]


def project(rows):
    return torch.nn.functional.gelu(rows @ W1.to(rows) + 0.1) @ W2.to(rows)


def reducer(name, **options):
    """What is tried here: the method, or its first stage."""
    method = get_method(name, **options)
    return Diverse(method.selector, method.pivot, method.seed) if name == "todre" else method


def make(lengths, seed=0, dtype=torch.float32, garbage=math.nan, width=4, tile=9) -> VisualTokens:
    """Images of so many tokens in tiles of `tile` tokens, `width` in a row."""
    g = torch.Generator().manual_seed(seed)
    b, n = len(lengths), max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]

    def fill(*shape, like=torch.randn):
        real = like(b, n, *shape, generator=g).to(dtype)
        return real.masked_fill(~mask.view(b, n, *(1,) * len(shape)), garbage)

    index = torch.arange(n)
    number, place = index // tile, index % tile
    attention = lambda: fill(like=torch.rand).float() ** 4 / 9  # noqa: E731
    return VisualTokens(
        features=fill(12),
        mask=mask,
        coordinates=torch.stack([number, index * 0, place // width, place % width], 1).expand(b, n, 4),
        tile=number.expand(b, n),
        patch=torch.stack([place // width, place % width], 1).expand(b, n, 2),
        tower={
            "attention": attention(),
            "object": attention(),
            "deep": attention(),
            "features": fill(6),
            "keys": fill(2, 3),
        },
        projector=project,
    )


def changed(tokens: VisualTokens, change) -> VisualTokens:
    """The tokens with `change` applied to every tensor."""
    values = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    values |= {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return VisualTokens(**{**values, "tower": {name: change(value) for name, value in tokens.tower.items()}})


def alone(tokens: VisualTokens, b: int) -> VisualTokens:
    return changed(tokens, lambda x: x[b][tokens.mask[b]][None])


def kept(method, tokens, keep):
    reduction = method.reduce(tokens, keep)
    return [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)]


def merged(method, tokens, keep):
    """Per row the merged features, in the space the method merges in."""
    reduction = method.reduce(tokens, keep)
    space = reduction.merge.space if reduction.merge else "here"
    out = reduction.apply(tokens.features if space == "here" else tokens.tower["features"])
    return [row[valid] for row, valid in zip(out, reduction.valid)]


# ------------------------------------------------------------------------------------------------ what all owe
@EVERY
@REPEATABLE
@given(
    batch=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    garbage=st.sampled_from([math.nan, math.inf, -math.inf, 7.0]),
)
def test_counts_batches_and_padding(name, options, batch, seed, garbage):
    lengths, keeps = zip(*((n, 1 + k % n) for n, k in batch))
    method, tokens = reducer(name, **options), make(lengths, seed, garbage=garbage)
    rows, values = kept(method, tokens, keeps), merged(method, tokens, keeps)
    for b, row in enumerate(rows):
        assert row == sorted(set(row)) and row[-1] < lengths[b]
        assert 1 <= len(row) <= keeps[b] and (method.adaptive or len(row) == keeps[b])
        assert row == kept(method, alone(tokens, b), [keeps[b]])[0]
        torch.testing.assert_close(values[b], merged(method, alone(tokens, b), [keeps[b]])[0])
        assert values[b].isfinite().all()


@EVERY
def test_half_precision_is_scored_in_fp32(name, options):
    options = {**options, "step": 0.5} if name == "zooprune" else options
    method, tokens = reducer(name, **options), make([36, 25], dtype=torch.bfloat16)
    tokens.projector = lambda rows: project(rows.float())
    wide = changed(tokens, lambda x: x.float() if x.is_floating_point() else x)
    wide.projector = tokens.projector
    assert kept(method, tokens, [11, 10]) == kept(method, wide, [11, 10])


@EVERY
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_keep_as_many_as_asked(name, options, value):
    method = reducer(name, **options)
    flat = changed(make([18, 5]), lambda x: torch.full_like(x, value) if x.is_floating_point() else x)
    rows = kept(method, flat, [7, 2])
    assert method.adaptive or [len(row) for row in rows] == [7, 2]
    assert all(row == sorted(set(row)) for row in rows)
    assert all(out.isfinite().all() for out in merged(method, flat, [7, 2]))


@EVERY
def test_all_stays_on_the_device_and_nothing_waits_for_it(name, options):
    """On fake CUDA tensors, which complain of mixed devices and of values read back."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = changed(make([40, 25]), lambda x: x.cuda())
        tokens.projector = project
        reduction = reducer(name, **options).reduce(tokens, [9, 7])
        found = [reduction.keep, reduction.valid]
        if reduction.merge is not None:
            found += [x for x in vars(reduction.merge).values() if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in found} == {"cuda"}


@EVERY
def test_keeping_all_keeps_all(name, options):
    method = reducer(name, **options)
    rows = kept(method, make([20, 3, 1]), [20, 3, 1])
    assert method.adaptive or rows == [list(range(n)) for n in (20, 3, 1)]


@pytest.mark.parametrize("name", ["hiprune", "visionzip", "vispruner", "fastervlm", "zooprune", "norm_diversity"])
def test_tiles_have_their_share_and_choose_alone(name):
    """Two tiles give what each gives as an image of its own."""
    for seed in range(4):
        method, tokens = get_method(name), make([18], seed)
        both = kept(method, tokens, [7])[0]
        parts = [changed(tokens, lambda x, s=s: x[:, s]) for s in (slice(0, 9), slice(9, 18))]
        first, second = kept(method, parts[0], [4])[0], kept(method, parts[1], [3])[0]
        assert both == first + [index + 9 for index in second]


@pytest.mark.parametrize("name", ["hiprune", "vispruner", "fastervlm", "norm_diversity"])
def test_ties_go_to_the_lowest_index(name):
    tokens = changed(make([8], tile=8), lambda x: torch.ones_like(x) if x.is_floating_point() else x)
    options = {"important_ratio": 1.0} if name == "vispruner" else {}
    assert kept(get_method(name, **options), tokens, [3]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("hiprune", "alpha", 1.5),
        ("hiprune", "alpha", "x"),
        ("visionzip", "contextual", 1.0),
        ("visionzip", "contextual", -1),
        ("visionzip", "score", "best"),
        ("visionzip", "space", "up"),
        ("vispruner", "important_ratio", -0.1),
        ("vispruner", "score", "best"),
        ("vispruner", "drop", 0),
        ("fastervlm", "score", "best"),
        ("prumerge", "variant", "best"),
        ("prumerge", "ratio", 0.5),  # adaptive
        ("prumerge", "neighbours", -1),
        ("prumerge", "space", "up"),
        ("todre", "selector", "best"),
        ("todre", "pivot", "best"),
        ("todre", "seed", 0.5),
        ("todre", "layer", 0),
        ("todre", "tau", 2),
        ("zooprune", "directions", 0),
        ("zooprune", "step", 0.0),
        ("zooprune", "estimator", "best"),
        ("zooprune", "seed", "x"),
    ],
)
def test_bad_options(name, option, value):
    with pytest.raises(ConfigError, match=f"{option}={value!r} must be"):
        get_method(name, **{option: value})


def test_bad_tower_layer():
    with pytest.raises(ConfigError, match="layer=1.5"):
        get_method("hiprune", object_layer=1.5)


# ------------------------------------------------------------------------------------------------ tiles
@REPEATABLE
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 10**6))
def test_tile_kernels(tiles, k, seed):
    n, k = len(tiles), k % (len(tiles) + 1)
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (1, n), generator=g).float()
    score[torch.rand(1, n, generator=g) < 0.1] = math.nan
    candidates = torch.rand(1, n, generator=g) < 0.7
    padded = torch.tensor([tiles + [3, 3]]), torch.tensor([[True] * n + [False] * 2])
    group = tile_groups(*padded)
    assert group[0, :n].tolist() == [sorted(set(tiles)).index(t) for t in tiles]
    group = group[:, :n]
    assert group_sum(candidates, group)[0].tolist() == [
        sum(c for t, c in zip(tiles, candidates[0].tolist()) if t == tile) for tile in tiles
    ]
    number = torch.arange(n)[None]
    assert group_extreme(number, group, "amax")[0].tolist() == [
        max(i for i in range(n) if tiles[i] == tile) for tile in tiles
    ]
    rank = group_rank(score, group, candidates)[0].tolist()
    key = lambda i: (math.isnan(score[0, i]), -score[0, i].nan_to_num(), i)  # noqa: E731
    for i in range(n):
        rivals = [j for j in range(n) if tiles[j] == tiles[i] and candidates[0, j]]
        assert rank[i] == (sorted(rivals, key=key).index(i) if candidates[0, i] else n)
    share = tile_shares([k], group, torch.ones(1, n, dtype=torch.bool))[0].tolist()
    want = {tile: k * tiles.count(tile) // n for tile in tiles}
    by_remainder = sorted(want, key=lambda tile: (-(k * tiles.count(tile) % n), tile))
    for tile in by_remainder[: k - sum(want.values())]:
        want[tile] += 1
    assert share == [want[tile] for tile in tiles]


# ------------------------------------------------------------------------------------------------ hiprune
def test_hiprune_has_the_published_numbers_of_anchors():
    tokens = make([576], tile=576, width=24)
    for budget, count in ((192, 4), (128, 3), (64, 1), (25, 0)):
        assert anchors(tokens, [budget], 0.1, False)[0].sum() == count
    assert anchors(tokens, [25], 0.5, False)[0].sum() == 2  # 2.5 rounds to even
    assert get_method("hiprune").tower["object"].layer * 24 == 9


@REPEATABLE
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 49), st.integers(0, 10**6))
def test_hiprune_is_anchors_then_grid_neighbours_then_registers(height, width, keep, seed):
    n = height * width
    keep, tokens = 1 + keep % n, make([n], seed, width=width, tile=n)
    objects, deep = (tokens.tower[name][0].tolist() for name in ("object", "deep"))
    by = lambda score: sorted(range(n), key=lambda i: -score[i])  # noqa: E731
    chosen = by(objects)[: round(keep * 0.8 / 5)]
    near = {i for a in chosen for i in range(n) if abs(i // width - a // width) + abs(i % width - a % width) == 1}
    for group in (near, range(n)):
        chosen += [i for i in by(deep) if i in group and i not in chosen]
    assert kept(get_method("hiprune", alpha=0.8), tokens, [keep])[0] == sorted(chosen[:keep])


# ------------------------------------------------------------------------------------------------ visionzip
@pytest.mark.parametrize(("budget", "few"), [(64, 10), (128, 20), (192, 30), (32, 5)])
def test_visionzip_splits_as_published(budget, few):
    reduction = get_method("visionzip").reduce(make([576], tile=576), [budget])
    assert len(reduction.merge.slot[reduction.merge.weight > 0].unique()) == few


@REPEATABLE
@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 10**6))
def test_visionzip_matches_oracle(n, keep, seed):
    keep, tokens = 1 + keep % n, make([n], seed, tile=n)
    score, x = tokens.tower["attention"][0].numpy(), tokens.tower["features"][0].numpy()
    metric = tokens.tower["keys"][0].mean(1).double().numpy()
    metric /= np.linalg.norm(metric, axis=1, keepdims=True)
    few = round(keep * 0.4)
    dominant = sorted(range(n), key=lambda i: -score[i])[: keep - few]
    rest = [i for i in range(n) if i not in dominant]
    targets = rest[:: max(1, len(rest) // max(few, 1))][:few]
    out, joined = {i: x[i].copy() for i in [*dominant, *targets]}, {t: [] for t in targets}
    for i in set(rest) - set(targets) if targets else ():
        joined[targets[int(np.argmax(metric[targets] @ metric[i]))]].append(x[i])
    for target, rows in joined.items():
        if rows:
            out[target] += np.mean(rows, 0)
    method = get_method("visionzip", contextual=0.4)
    assert kept(method, tokens, [keep])[0] == sorted(out)
    torch.testing.assert_close(merged(method, tokens, [keep])[0], torch.tensor(np.stack([out[i] for i in sorted(out)])))


# ------------------------------------------------------------------------------------------------ vispruner
@REPEATABLE
@given(st.integers(1, 60), st.integers(0, 59), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 10**6))
def test_vispruner_matches_oracle_for_odd_rests_too(n, keep, ratio, seed):
    keep, tokens = 1 + keep % n, make([n], seed, tile=n)
    score = tokens.tower["attention"][0].tolist()
    x = tokens.tower["features"][0].double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    order = sorted(range(n), key=lambda i: -score[i])
    important, rest = order[: int(keep * ratio)], order[int(keep * ratio) :]
    target = keep - len(important)
    while len(rest) > target:
        even, odd = rest[::2], rest[1::2]
        gone = min(8, len(rest) - target, len(even))
        like = lambda i, odd=odd: -max((x[i] @ x[j] for j in odd), default=-2)  # noqa: E731
        rest = (sorted(even, key=like)[gone:] if target else []) + (odd if target else [])
    assert kept(get_method("vispruner", important_ratio=ratio), tokens, [keep])[0] == sorted(important + rest)


@pytest.mark.parametrize("drop", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("n", "keep"), [(700, 1), (300, 3), (130, 1), (90, 89), (17, 2), (1, 1)])
def test_vispruner_has_rounds_enough(n, keep, drop):
    g = torch.Generator().manual_seed(n)
    ones, attention = torch.ones(1, n, dtype=torch.bool), torch.rand(1, n, generator=g)
    _, rest = vispruner(attention, torch.randn(1, n, 4, generator=g), ones * 0, ones, [keep], 0.0, drop)
    assert (rest < n).sum() == keep
    assert n < 600 or drop or rounds(n, keep, None) < 90


def test_vispruner_in_chunks_is_the_same(monkeypatch):
    tokens = make([40, 33])
    whole = kept(get_method("vispruner"), tokens, [9, 8])
    monkeypatch.setattr("prune.reducers.vispruner.STORED", 16)
    assert kept(get_method("vispruner"), tokens, [9, 8]) == whole


def test_vispruner_removes_duplicates():
    tokens = make([12], tile=12)
    tokens.tower["features"][0, 6:] = tokens.tower["features"][0, :6]
    rest = kept(get_method("vispruner", important_ratio=0.0), tokens, [8])[0]
    assert len({i % 6 for i in rest}) >= 5


# ------------------------------------------------------------------------------------------------ prumerge
def slow_prumerge(tokens, keep, variant, adaptive, ratio=None, compat=False, neighbours=3):
    """One tile: kept token -> merged features."""
    a, x = tokens.tower["attention"][0].double().numpy(), tokens.tower["features"][0].double().numpy()
    keys = tokens.tower["keys"][0].flatten(1).double().numpy()
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    n = len(a)
    room = keep - 1 if keep < n else keep
    order = sorted(range(n), key=lambda i: -a[i])
    low, high = np.percentile(a, [25, 75])
    count = int((a > high + 1.5 * (high - low)).sum())
    if adaptive:
        first, step = 0, max(1, n // max(count, 1) // 3)
    elif ratio is None:
        count, first, step = (room if variant == "base" else (room + 1) // 2), 0, 1
    else:
        count, first, step = int(n * ratio), int(1 / ratio) // 2, int(1 / ratio)
    top = order[: min(count, room)]
    if variant == "plus":
        free = [i for i in range(first, n - compat, step) if i not in top]
        m = min(room - len(top), len(free))
        top = top + [free[i] for i in range(len(free)) if m and (2 * i * m + len(free)) // (2 * len(free)) < (2 * (i + 1) * m + len(free)) // (2 * len(free))]  # fmt: skip # noqa: E501
        if not adaptive:
            top += [i for i in order if i not in top][: room - len(top)]
    out = {}
    for i in top:
        near = sorted((j for j in range(n) if j != i), key=lambda j: -keys[i] @ keys[j])[:neighbours]
        out[i] = x[i] + sum(a[j] * x[j] for j in near)
    dropped = [i for i in order if i not in top]
    if dropped:
        out[dropped[0]] = sum(a[i] * x[i] for i in dropped)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "plus", "adaptive": True},
        {"variant": "base", "adaptive": True},
        {"variant": "base", "adaptive": False},
        {"variant": "plus", "adaptive": False},
        {"variant": "plus", "adaptive": False, "ratio": 0.125, "compat": True},
    ],
    ids=str,
)
@REPEATABLE
@given(n=st.integers(1, 60), keep=st.integers(0, 59), seed=st.integers(0, 10**6))
def test_prumerge_matches_oracle(options, n, keep, seed):
    keep, tokens = 1 + keep % n, make([n], seed, tile=n)
    want = slow_prumerge(tokens, keep, **options)
    method = get_method("prumerge", neighbours=3, **options)
    assert kept(method, tokens, [keep])[0] == sorted(want)
    rows = torch.tensor(np.stack([want[i] for i in sorted(want)])).float()
    torch.testing.assert_close(merged(method, tokens, [keep])[0], rows)


def test_prumerge_count_follows_the_content():
    tokens = make([100], tile=100)
    attention = torch.linspace(1.0, 1.1, 100)[None] / 200
    for spikes in (3, 9):
        tokens.tower["attention"] = attention.clone().index_fill(1, torch.arange(spikes) * 7, 0.1)
        row = kept(get_method("prumerge", variant="base"), tokens, [60])[0]
        assert len(row) == spikes + 1 and {i * 7 for i in range(spikes)} < set(row)
        assert len(kept(get_method("prumerge"), tokens, [60])[0]) > spikes + 1
    assert len(kept(get_method("prumerge"), tokens, [6])[0]) == 6


# ------------------------------------------------------------------------------------------------ todre
def slow_diverse(x, first, keep, selector):
    x = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    picks = [first]
    while len(picks) < keep:
        cosine = x @ x[picks].T
        score = x @ x[picks].sum(0) if selector == "maxsum" else cosine.max(1)
        picks.append(min((i for i in range(len(x)) if i not in picks), key=lambda i: score[i]))
    return picks


@pytest.mark.parametrize("selector", ["maxsum", "kcenter"])
@REPEATABLE
@given(n=st.integers(1, 40), keep=st.integers(0, 39), seed=st.integers(0, 10**6))
def test_todre_matches_oracle(selector, n, keep, seed):
    keep, tokens = 1 + keep % n, make([n], seed)
    first = int(tokens.tower["attention"][0, :9].argmax())  # tile 0 is the whole image
    want = slow_diverse(tokens.features[0], first, keep, selector)
    order, _ = diverse(tokens.features, torch.tensor([[first]]), [keep], tokens.mask, selector)
    assert order[0].tolist() == want
    assert kept(Diverse(selector), tokens, [keep])[0] == sorted(want)


def sequence(seed=0, scale=1.0) -> tuple[VisualTokens, AttentionInputs]:
    """Two samples of 12 columns: image tokens 2 to 6 and text 7 to 11; and 4 padded columns, image 6 to 8, text 9."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.tensor([[2, 3, 4, 5, 6], [6, 7, 8, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    text = torch.tensor([[7, 8, 9, 10, 11], [9, 0, 0, 0, 0]])
    rand = lambda heads: scale * torch.randn(2, 12, heads, 4, generator=g)  # noqa: E731
    attention = AttentionInputs(
        queries=rand(4),
        keys=rand(2),
        values=rand(2),
        valid=torch.tensor([[True] * 12, [False] * 4 + [True] * 6 + [False] * 2]),
        scale=0.5,
        sample=torch.tensor([0, 1]),
        slots=slots,
        text_slots=text,
        text_mask=torch.tensor([[True] * 5, [True] + [False] * 4]),
        last=torch.tensor([11, 9]),
    )
    return VisualTokens(torch.randn(2, 5, 3), mask, attention=attention), attention


def test_todre_measures_the_share_of_attention_the_image_gets(monkeypatch):
    tokens, a = sequence()
    logits = torch.einsum("sqhd,skhd->shqk", a.queries, a.keys.repeat_interleave(2, 2)) * 0.5
    seen = torch.ones(12, 12).tril().bool() & a.valid[:, None]
    weights = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1).mean(1)
    want = torch.stack([weights[0, 7:12, 2:7].sum() / 5, weights[1, 9, 6:9].sum()])
    torch.testing.assert_close(image_attention(a, tokens.mask), want)
    monkeypatch.setattr("prune.reducers.todre.ELEMENTS", 200)  # two rows at a time
    torch.testing.assert_close(image_attention(a, tokens.mask), want)


def test_todre_drops_all_or_nothing():
    tokens, a = sequence()
    low, high = sorted(image_attention(a, tokens.mask).tolist())
    for tau, counts in ((low / 2, [5, 3]), (high * 1.01, [0, 0]), ((low + high) / 2, None)):
        rows = kept(DropUnseen(tau), tokens, [0, 0])
        counts = counts or [
            5 * (image_attention(a, tokens.mask)[0] >= tau),
            3 * (image_attention(a, tokens.mask)[1] >= tau),
        ]
        assert rows == [list(range(int(count))) for count in counts]
    assert kept(DropUnseen(1.0), tokens, [5, 0]) == [[0, 1, 2, 3, 4], []]  # a row whose budget allows all
    a.text_mask[:] = False
    assert [len(row) for row in kept(DropUnseen(1.0), tokens, [0, 0])] == [5, 3]


def test_todre_stages_and_budgets():
    method = get_method("todre")
    sites = {layers: [str(site) for site in method.sites(layers)] for layers in (32, 28, 4, 2)}
    assert sites[32] == ["projected", "decoder:29"] and sites[28][1] == "decoder:25"
    assert sites[4][1] == "decoder:3" and sites[2][1] == "decoder:1"
    assert [str(site) for site in get_method("todre", tau=0).sites(32)] == ["projected"]
    geometry = Geometry(2880)
    for budget in (Budget(keep=288), Budget(average=288), Budget(ratio=0.9)):
        assert [stage.keep for stage in method.stages(geometry, budget)] == [288, 0]
        assert method.kept(2880, budget) == 288
    assert [stage.keep for stage in method.stages(geometry, Budget(ratio=0))] == [2880, 2880]


# ------------------------------------------------------------------------------------------------ zooprune
def jacobian_norm(x):
    jacobian = torch.func.vmap(torch.func.jacrev(project))(x.double())
    return torch.linalg.matrix_norm(jacobian) / math.sqrt(x.shape[-1])


def test_zooprune_sensitivity_is_that_of_the_jacobian():
    x = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(2))
    bank = unit_directions(4000, 6, 0)
    torch.testing.assert_close(torch.linalg.vector_norm(bank, dim=1), torch.ones(4000))
    found = sensitivity(x, project, bank[:500], 0.01, 12)
    torch.testing.assert_close(found, sensitivity_jvp(x, project, bank[:500]), rtol=1e-3, atol=1e-4)
    mean_square = torch.stack([sensitivity_jvp(x, project, part) ** 2 for part in bank[:400].split(1)]).mean(0)
    torch.testing.assert_close(mean_square.sqrt()[0].double(), jacobian_norm(x[0]), rtol=0.1, atol=0)


def test_zooprune_in_chunks_is_the_same(monkeypatch):
    x, bank = torch.randn(2, 9, 6), unit_directions(7, 6, 0)
    whole = sensitivity(x, project, bank, 0.01, 12)
    monkeypatch.setattr("prune.reducers.zooprune.ELEMENTS", 2 * 9 * 12 * 2)
    torch.testing.assert_close(sensitivity(x, project, bank, 0.01, 12), whole)


def slow_greedy(x, importance, keep):
    """One tile."""
    x = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    s = (importance - importance.min()) / (importance.max() - importance.min() + 1e-8)
    picks = [int(s.argmax())]
    while len(picks) < keep:
        distance = (1 - x @ x[picks].T).min(1)
        picks.append(max((i for i in range(len(x)) if i not in picks), key=lambda i: float(s[i]) * distance[i]))
    return sorted(picks)


@REPEATABLE
@given(n=st.integers(2, 40), keep=st.integers(0, 39), seed=st.integers(0, 10**6))
def test_norm_diversity_and_zooprune_match_oracle(n, keep, seed):
    keep, tokens = 1 + keep % n, make([n], seed, tile=n)
    norm = tokens.features[0].norm(dim=-1)
    assert kept(get_method("norm_diversity"), tokens, [keep])[0] == slow_greedy(tokens.features[0], norm, keep)
    bank = unit_directions(5, 6, 7)
    moved = sensitivity(tokens.tower["features"], project, bank, 0.01, 12)[0]
    method = get_method("zooprune", directions=5, seed=7)
    assert kept(method, tokens, [keep])[0] == slow_greedy(tokens.features[0], moved, keep)


# ------------------------------------------------------------------------------------------------ pooling
@pytest.mark.parametrize(
    ("grid", "keep", "kernel"),
    [((24, 24), 64, (3, 3)), ((24, 24), 144, (2, 2)), ((8, 12), 6, (4, 4)), ((3, 9), 3, (3, 3))],
)
def test_pooling_is_average_pooling(grid, keep, kernel):
    n = grid[0] * grid[1]
    tokens = make([n], width=grid[1], tile=n)
    want = torch.nn.functional.avg_pool2d(tokens.features[0].T.view(1, 12, *grid), kernel)[0].flatten(1).T
    got = merged(get_method("pooling"), tokens, [keep])[0]
    rows, columns = (range(size // 2, grid[d], size) for d, size in enumerate(kernel))
    if kernel == (3, 3):  # the middle token of every cell
        assert kept(get_method("pooling"), tokens, [keep])[0] == [r * grid[1] + c for r in rows for c in columns]
    order = torch.tensor(sorted(range(keep), key=lambda i: want[i].tolist()))
    other = torch.tensor(sorted(range(keep), key=lambda i: got[i].tolist()))
    torch.testing.assert_close(got[other], want[order])


@REPEATABLE
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 80))
def test_pooling_cells_are_rectangles_of_like_size(height, width, keep):
    n = height * width
    keep = 1 + keep % n
    tokens = make([n], width=width, tile=n)
    cell, row, column, pooled = (x[0] for x in cells(tokens.mask, tokens.coordinates, [keep]))
    assert pooled.all() and cell.unique().tolist() == list(range(keep))
    for number in range(keep):
        high, wide = (x[cell == number].unique() for x in (row, column))
        assert len(high) * len(wide) == (cell == number).sum()
        assert high.diff().eq(1).all() and wide.diff().eq(1).all()
    sizes = cell.bincount()
    assert sizes.max() <= 4 * sizes.min() + 2
    merge = get_method("pooling").reduce(tokens, [keep]).merge
    assert merge.weight.sum() + merge.scale.sum() == pytest.approx(keep)


def test_pooling_fills_holes():
    tokens = make([30], width=6, tile=30)
    holes = torch.ones(30, dtype=torch.bool)
    holes[7:23] = False
    rest = changed(tokens, lambda x: x[:, holes])
    assert [len(row) for row in kept(get_method("pooling"), rest, [12])] == [12]


# ------------------------------------------------------------------------------------------------ on models
@pytest.mark.parametrize("family", ["llava_next", "internvl"])
@pytest.mark.parametrize("name", ["visionzip", "prumerge"])
def test_merging_before_the_projector(name, family):
    """What enters the decoder is the projector's output for the merged features of the vision encoder."""
    model = tiny.shared(family)
    inputs = collate([Sample(family, [3, Image(0), 4])])
    seen, method = [], get_method(name)
    reduce = type(method).reduce

    def spy(self, tokens, keep):
        seen.append((tokens, reduce(self, tokens, keep)))
        return seen[-1][1]

    @property
    def with_features(self):
        return {**method.tower, "features": Tower("features")}

    spied = type("Spied", (type(method),), {"reduce": spy, "tower": with_features})
    entering = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, a, k: entering.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), hook, apply_pruner(model, spied(**vars(method)), ratio=0.6) as handle:
        model(**inputs)
        columns = handle.last.images[0].kept
    ((tokens, reduction),) = seen
    seen_features, project_rows = tokens.tower["features"], tokens.projector
    index = reduction.keep[0][reduction.valid[0]]
    assert index.tolist() == columns.tolist() and len(index) < tokens.features.shape[1]
    # The definition once more, in loops.
    plain, merge = seen_features[0], reduction.merge
    scale = torch.ones(len(index)) if merge.scale is None else merge.scale[0]
    rows = [scale[i] * plain[token] for i, token in enumerate(index)]
    touched = {i for i in range(len(index)) if scale[i] != 1}
    for source, slot, weight in zip(merge.source[0].tolist(), merge.slot[0].tolist(), merge.weight[0].tolist()):
        if weight:
            rows[slot] = rows[slot] + weight * plain[source]
            touched.add(slot)
    assert touched
    want = tokens.features[0][index].clone()
    for i in touched:
        want[i] = project_rows(rows[i])
    at = 3 + torch.arange(entering[0].shape[1] - 7)  # all between the text before and after are visual, or newlines
    found = entering[0][0][at]
    for row in want:
        assert (found - row).abs().amax(-1).min() < 1e-4


@pytest.mark.parametrize("family", ["llava_next", "internvl"])
@pytest.mark.parametrize("name", ["prumerge", "visionzip", "hiprune", "vispruner"])
def test_defaults_on_a_model_choose_row_by_row(name, family):
    """With CLS attention, merging in the space of the vision encoder, and counts that follow the content."""
    model, samples = tiny.shared(family), mixed_batch(family)
    with torch.no_grad(), apply_pruner(model, name, ratio=0.5) as handle:
        model(**collate(samples))
        together = [image.kept.tolist() for image in handle.last.images]
        alone = []
        for sample in samples:
            if sample.media:
                model(**collate([sample]))
                alone += [image.kept.tolist() for image in handle.last.images]
                assert all(0 < len(image.kept) <= round(image.tokens / 2) for image in handle.last.images)
    assert together == alone


def test_todre_on_a_model_drops_all_before_the_last_layer():
    model, samples = tiny.shared("llava"), [Sample("llava", [3, Image(0), 4], 1), Sample("llava", [2, Image(1), 3], 2)]
    for tau, count in ((1.0, 0), (1e-9, 4)):
        with torch.no_grad(), apply_pruner(model, "todre", keep=4, tau=tau) as handle:
            model(**collate(samples))
            report = handle.last
        assert report.tokens_per_layer == [[4, 4, 4, count]] * 2
