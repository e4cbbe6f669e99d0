"""What every reducer owes (exact counts, rows that do not influence each other, no padding) and what each one is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import ConfigError, VisualTokens, get_method
from prune.reducers.dart import set_order
from prune.reducers.uniform import evenly_spread

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


METHODS = [
    ("random", {}),
    ("random", {"seed": 5, "layer": 3}),
    ("uniform", {}),
    ("fastv", {}),
    ("divprune", {}),
    ("dart", {}),
    ("dart", {"pivot_order": "authors"}),
    ("dart", {"image_pivots": 2, "text_pivots": 7}),
]
EVERY = pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")


def make(lengths, texts, seed=0, dtype=torch.float32, garbage=math.nan) -> VisualTokens:
    """Images of these numbers of tokens with prompts of these numbers, padded together, `garbage` in the padding."""
    g = torch.Generator().manual_seed(seed)
    b, n, t, d = len(lengths), max(lengths), max(texts), 12
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    text_mask = torch.arange(t) >= t - torch.tensor(texts)[:, None]  # left-padded: anywhere is allowed

    def fill(real, *shape):
        return (
            torch.randn(*real.shape, *shape, generator=g)
            .to(dtype)
            .masked_fill(~real.view(*real.shape, *(1,) * len(shape)), garbage)
        )

    index = torch.arange(n)
    return VisualTokens(
        features=fill(mask, d),
        mask=mask,
        coordinates=torch.stack([index * 0, index * 0, index // 5, index % 5], 1).expand(b, n, 4),
        columns=(index + 6).expand(b, n),
        keys=fill(mask, 2, 4),
        last_token_attention=fill(mask).float(),
        normed_features=fill(mask, d),
        text_features=fill(text_mask, d),
        text_mask=text_mask,
        text_columns=torch.arange(t) + 6 + n - (t - torch.tensor(texts))[:, None],
        text_keys=fill(text_mask, 2, 4),
        normed_text=fill(text_mask, d),
    )


def tensors(tokens: VisualTokens) -> dict[str, torch.Tensor]:
    """The fields that hold a tensor."""
    return {k: v for k, v in vars(tokens).items() if isinstance(v, torch.Tensor)}


def alone(tokens: VisualTokens, b: int) -> VisualTokens:
    """Row b without its padding."""
    real, text = tokens.mask[b], tokens.text_mask[b]
    pick = {name: text if "text" in name else real for name in tensors(tokens)}
    return VisualTokens(**{k: getattr(tokens, k)[b][m][None] for k, m in pick.items()})


def kept(method, tokens, keep):
    reduction = method.reduce(tokens, keep)
    return [row[valid].tolist() for row, valid in zip(reduction.keep, reduction.valid)]


batches = st.lists(st.tuples(st.integers(1, 23), st.integers(0, 6), st.integers(0, 22)), min_size=1, max_size=3)


@EVERY
@given(batch=batches, seed=st.integers(0, 10**6), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 7.0]))
def test_every_reducer(name, options, batch, seed, garbage):
    """Exact counts, ascending, real tokens only, padding without influence, and the row alone gives the same."""
    lengths, texts, keeps = zip(*((n, t, 1 + k % n) for n, t, k in batch))
    method, tokens = get_method(name, **options), make(lengths, texts, seed, garbage=garbage)
    reduction = method.reduce(tokens, keeps)
    assert reduction.keep.dtype == torch.int64 and reduction.keep.shape == (len(batch), max(keeps))
    assert reduction.valid.tolist() == [[slot < k for slot in range(max(keeps))] for k in keeps]
    rows = kept(method, tokens, keeps)
    for b, row in enumerate(rows):
        assert row == sorted(set(row)) and row[-1] < lengths[b]
        assert row == kept(method, alone(tokens, b), [keeps[b]])[0]
    assert rows == kept(method, tokens, keeps)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_scored_in_fp32(name, options, dtype):
    method, tokens = get_method(name, **options), make([23, 17], [6, 3], dtype=dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in tensors(tokens).items()}
    assert kept(method, tokens, [9, 8]) == kept(method, VisualTokens(**wide), [9, 8])


@EVERY
def test_keeping_all_keeps_all(name, options):
    assert kept(get_method(name, **options), make([6, 3, 1], [2, 0, 1]), [6, 3, 1]) == [
        list(range(n)) for n in (6, 3, 1)
    ]


@EVERY
def test_identical_tokens_are_kept_once_each(name, options):
    tokens = make([11], [4])
    for field in ("features", "keys", "normed_features", "last_token_attention"):
        getattr(tokens, field)[:] = getattr(tokens, field)[:, :1]
    row = kept(get_method(name, **options), tokens, [6])[0]
    assert len(set(row)) == 6
    if name in ("fastv", "divprune", "dart"):
        assert row == list(range(6))  # ties go to the lowest index


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {"seed": "x"}),
        ("random", {"layer": -1}),
        ("uniform", {"layer": 1.5}),
        ("fastv", {"layer": 0}),
        ("dart", {"layer": 0}),
        ("dart", {"image_pivots": 0}),
        ("dart", {"text_pivots": -1}),
        ("dart", {"pivot_order": "best"}),
    ],
)
def test_bad_options(name, options):
    ((option, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{option}={value!r} must be"):
        get_method(name, **options)


def test_sites():
    sites = {name: get_method(name).site for name in ("random", "uniform", "fastv", "divprune", "dart")}
    assert sites == {name: "projected" for name in ("random", "uniform", "divprune")} | {
        name: "decoder:2" for name in ("fastv", "dart")
    }
    assert get_method("random", layer=0).site == "decoder:0" and get_method("uniform", layer=3).site == "decoder:3"
    assert get_method("dart", layer=5).site == get_method("fastv", layer=5).site == "decoder:5"
    assert get_method("dart", newlines=True).newlines and not get_method("divprune").newlines


# ---------------------------------------------------------------------------------------------------------- random
def test_random_depends_on_seed_and_index_only():
    a, b = make([20, 11], [3, 3], seed=1), make([20], [3], seed=2)
    one, other = get_method("random"), get_method("random", seed=1)
    torch.manual_seed(99)
    assert kept(one, a, [9, 5])[0] == kept(one, b, [9])[0]
    assert kept(one, b, [9]) != kept(other, b, [9])
    state = torch.get_rng_state()
    one.score(a)
    assert torch.equal(state, torch.get_rng_state())


def test_random_is_uniform():
    tokens = VisualTokens(torch.zeros(1, 30, 1))
    hits = torch.zeros(30)
    for seed in range(400):
        hits[kept(get_method("random", seed=seed), tokens, [10])[0]] += 1
    assert 90 < hits.min() and hits.max() < 180  # 133 expected, standard deviation 9.4


# --------------------------------------------------------------------------------------------------------- uniform
def grid(*tiles):
    """Coordinates of (frames, rows, columns) tiles."""
    return torch.tensor(
        [[i, f, r, c] for i, (t, h, w) in enumerate(tiles) for f in range(t) for r in range(h) for c in range(w)]
    )


def spread(coordinates, k):
    mask = torch.ones(1, len(coordinates), dtype=torch.bool)
    return evenly_spread(mask, coordinates[None], [k])[0]


def test_uniform_64_of_576_is_an_8_by_8_grid():
    picture = spread(grid((1, 24, 24)), 64).view(24, 24)
    assert picture[1::3, 1::3].all() and picture.sum() == 64


@pytest.mark.parametrize("k", [1, 2, 5, 58, 64, 100, 144, 200, 288, 400, 518, 575])
def test_uniform_leaves_no_hole_and_no_clump(k):
    """Every window of the grid holds about its share, of the kept and so of the dropped ones."""
    picture = spread(grid((1, 24, 24)), k).view(1, 1, 24, 24).float()
    assert picture.sum() == k
    for size in (6, 8, 12):
        inside = torch.nn.functional.avg_pool2d(picture, size, 1) * size**2
        share = k * size**2 / 576
        assert (inside - share).abs().max() <= 1 + 1.4 * size * math.sqrt(min(k, 576 - k) / 576), (size, share)


def test_uniform_shares_by_tile_and_frame():
    places = grid((1, 8, 8), (1, 12, 18))
    for k in (14, 28, 70, 140):
        chosen = spread(places, k)
        assert chosen.sum() == k and abs(chosen[:64].sum() - k * 64 / 280) <= 3
    frames = grid((4, 8, 12))
    per_frame = spread(frames, 48).view(4, 96).sum(1)
    assert per_frame.sum() == 48 and per_frame.min() >= 8  # 12 each, to within a row's worth


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6), st.integers(0, 300))
def test_uniform_count_is_exact_whatever_is_left_of_the_grid(h, w, t, seed, k):
    """Also on a grid an earlier stage has thinned out, with tokens of no place in between."""
    places = torch.cat([grid((t, h, w)), torch.full((1, 4), -1)])
    g = torch.Generator().manual_seed(seed)
    places = places[torch.rand(len(places), generator=g) < 0.7]
    n = len(places)
    if n:
        k = 1 + k % n
        row = kept(get_method("uniform"), VisualTokens(torch.zeros(1, n, 1), coordinates=places[None]), [k])[0]
        assert len(row) == len(set(row)) == k
        if k <= (places[:, 0] >= 0).sum():
            assert (places[row, 0] >= 0).all()


def test_uniform_without_coordinates_is_a_line():
    assert kept(get_method("uniform"), VisualTokens(torch.zeros(1, 12, 1)), [4]) == [[1, 4, 7, 10]]


# ----------------------------------------------------------------------------------------------------------- fastv
def test_fastv_keeps_the_most_attended():
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.5, 0.0], [0.0, 0.1, 0.9, 9.0, 9.0]])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    tokens = VisualTokens(torch.zeros(2, 5, 1), mask, last_token_attention=attention)
    assert kept(get_method("fastv"), tokens, [3, 1]) == [[1, 2, 3], [2]]


# -------------------------------------------------------------------------------------------------------- divprune
def test_divprune_covers_every_cluster():
    centres = torch.eye(6)
    features = (centres.repeat(5, 1) + 0.01 * torch.randn(30, 6))[None]
    row = kept(get_method("divprune"), VisualTokens(features), [6])[0]
    assert sorted(j % 6 for j in row) == list(range(6))


# ------------------------------------------------------------------------------------------------------------ dart
def reference_dart(tokens, keep, p_img=4, p_txt=4):
    """One row without padding, sorted order, one token at a time."""
    norm = tokens.keys[0].abs().sum((1, 2)).tolist()
    text_norm = tokens.text_keys[0].abs().sum((1, 2)).tolist()
    image = sorted(sorted(range(len(norm)), key=lambda j: -norm[j])[: min(p_img, keep)])
    text = sorted(sorted(range(len(text_norm)), key=lambda j: -text_norm[j])[:p_txt])
    pivots = [tokens.normed_features[0, j] for j in image] + [tokens.normed_text[0, j] for j in text]
    rest, taken = keep - len(image), list(image)
    for turn, pivot in enumerate(pivots):
        pool = [j for j in range(len(norm)) if j not in taken]
        cosine = torch.cosine_similarity(tokens.normed_features[0].double(), pivot.double(), dim=-1).tolist()
        share = rest // len(pivots) + (turn < rest % len(pivots))
        taken += sorted(pool, key=lambda j, cosine=cosine: cosine[j])[:share]
    return sorted(taken)


@given(batches, st.integers(0, 10**6))
def test_dart_matches_reference(batch, seed):
    """Every remainder, every short prompt, fewer tokens than pivots."""
    lengths, texts, keeps = zip(*((n, t, 1 + k % n) for n, t, k in batch))
    tokens = make(lengths, texts, seed)
    for b, row in enumerate(kept(get_method("dart"), tokens, keeps)):
        assert row == reference_dart(alone(tokens, b), keeps[b])


def test_dart_without_text():
    tokens = make([20, 9], [0, 0])
    assert tokens.text_features.shape[1] == 0
    for order in ("sorted", "authors"):
        assert [len(row) for row in kept(get_method("dart", pivot_order=order), tokens, [10, 5])] == [10, 5]


def test_dart_keeps_the_pivot_and_drops_its_duplicates():
    tokens = make([20], [0], seed=3)
    tokens.keys[0, 7] *= 50
    tokens.normed_features[0, 5:14] = tokens.normed_features[0, 7]
    assert kept(get_method("dart", image_pivots=1), tokens, [12])[0] == [0, 1, 2, 3, 4, 7, 14, 15, 16, 17, 18, 19]


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=9, unique=True), st.integers(0, 8), st.integers(0, 3))
def test_authors_order_is_that_of_a_set_filled_by_falling_norm(columns, split, padding):
    split = min(split, len(columns))
    norm = [float(9 - j % 5) for j in range(len(columns))]
    by_norm = sorted(range(len(columns)), key=lambda p: (p >= split, -norm[p]))
    expected = set()
    for p in by_norm:
        expected.add(columns[p])
    valid = torch.tensor([[True] * len(columns) + [False] * padding])
    padded = torch.tensor([columns + [columns[0]] * padding])  # padding repeats a column: it must not matter
    order = set_order(padded, torch.tensor([norm + [math.nan] * padding]), valid, split)
    assert sorted(order[0].tolist()) == list(range(len(columns) + padding))
    assert padded.gather(1, order)[0, : len(columns)].tolist() == list(expected)
