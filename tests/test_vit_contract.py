"""The contract of pruning on every vision transformer: see `tiny_vit.py` for the models and the methods."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
from fingerprint import changed, fingerprint
from reference_vit import forward_by_hand
from tiny_vit import (
    PATCHES,
    ROWS,
    VITS,
    Fold,
    Loud,
    Spread,
    build,
    images,
    kept_of,
    needs_masks,
    run,
    shared,
    takes_masks,
)

from prune.adapters.vit_families import find_vit
from prune.reducers.bat import BAT
from prune.reducers.divprune import DivPrune
from prune.reducers.fastv import FastV
from prune.reducers.ficoco_v import FiCoCoV
from prune.reducers.tome import ToMe


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def bare(name):
    return fingerprint(shared(name))


@pytest.fixture(autouse=True)
def left_alone(request):
    """Every test leaves the shared model as it was."""
    name, row = (request.node.callspec.params.get(key, "") for key in ("name", "row"))
    if not takes_masks(name):
        masked = any(word in request.node.name for word in ("hand", "alike"))
        if masked or (row and needs_masks(row)):
            pytest.skip("this attention takes no mask in this version of transformers")
    bare(name)
    yield
    assert not changed(bare(name), fingerprint(shared(name)))


@cache
def plain(name):
    return run(name, shared(name), images())


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


cells = pytest.mark.parametrize(("name", "row"), [(name, row) for name in VITS for row in ROWS])
models = pytest.mark.parametrize("name", VITS)


@cells
def test_nothing_to_remove_is_bit_identical(name, row):
    model = shared(name)
    with ROWS[row].attach(model, ratio=0) as handle:
        assert torch.equal(run(name, model, images()), plain(name))
        assert kept_of(handle) == [list(range(PATCHES))] * 3
    with ROWS[row].attach(model) as handle, handle.disabled():
        assert torch.equal(run(name, model, images()), plain(name))
    assert torch.equal(run(name, model, images()), plain(name))


@cells
def test_batch_row_equals_row_alone(name, row):
    model = shared(name)
    with ROWS[row].attach(model) as handle:
        together, kept = run(name, model, images()), kept_of(handle)
        assert all(0 < len(numbers) < PATCHES for numbers in kept)
        for index in range(3):
            alone = run(name, model, images()[index : index + 1])
            assert kept_of(handle) == [kept[index]]
            close(alone[0], together[index])
    assert not torch.allclose(together, plain(name), atol=1e-4), "nothing was pruned"


@models
def test_remove_restores_everything(name):
    model = build(name)
    before = fingerprint(model)
    for row in ROWS:
        if not takes_masks(name) and needs_masks(row):
            continue
        handle = ROWS[row].attach(model)
        assert changed(before, fingerprint(model)), "the fingerprint does not see hooks"
        run(name, model, images())
        handle.remove()
        assert not changed(before, fingerprint(model))


# --------------------------------------------------------------------------------------- against a forward by hand
@contextmanager
def watched():
    """What the reducers return, in order."""
    seen = []

    def watch(reduce):
        def wrapped(self, tokens, keep):
            seen.append(reduce(self, tokens, keep))
            return seen[-1]

        return wrapped

    with pytest.MonkeyPatch.context() as monkey:
        for cls in (Fold, Loud, Spread, FastV, DivPrune, ToMe, BAT, FiCoCoV):
            monkey.setattr(cls, "reduce", watch(cls.reduce))
        yield seen


def last_tokens(name, model, pixels):
    """`[B, T, D]` behind the last block (a hook that comes after ours)."""
    found, parts = [], find_vit(model)
    block = parts.blocks[-1].block
    handle = block.register_forward_hook(lambda module, args, output: found.append(output))
    run(name, model, pixels)
    handle.remove()
    output = found[0][0] if isinstance(found[0], tuple) else found[0]
    return output if parts.batch_first else output.transpose(0, 1)


def row_of(reduction, index):
    stage = {"keep": reduction.keep[index].tolist(), "valid": reduction.valid[index].tolist()}
    if reduction.merge is not None:
        merge = reduction.merge
        stage["merge"] = {key: getattr(merge, key)[index].tolist() for key in ("source", "slot", "weight", "scale")}
    return stage


HAND = (
    "fastv",
    "last block",
    "fold",
    "fold at the input",
    "fold last",
    "loud",
    "loud then fold",
    "tome",
    "bat",
    "ficoco",
)


@pytest.mark.parametrize(("name", "row"), [(name, row) for name in VITS for row in HAND])
def test_forward_equals_one_by_hand(name, row):
    model, prefix = shared(name), VITS[name].prefix
    changes = {"restore": False} if VITS[name].cls_only else {}  # "loud" needs it where the model pools over all
    with watched() as seen, ROWS[row].attach(model, **changes) as handle:
        restored = handle._engine.restore
        tokens, report = last_tokens(name, model, images()), handle.last
        stages = [
            (site.layer, place) for (site, *_), place in zip(handle._engine.record.done, handle._engine.record.places)
        ]
        proportional = handle._engine.proportional
    assert len(stages) == len(seen) > 0
    for index in range(3):
        cuts = {stage: row_of(reduction, index) for stage, reduction in zip(stages, seen)}
        want, sizes, numbers = forward_by_hand(
            model, VITS[name].run, images()[index : index + 1], prefix, cuts, proportional
        )
        assert numbers == report.images[index].order.tolist()
        got = tokens[index]
        if restored:
            got = torch.cat([got[:prefix], got[prefix:][numbers]])
        close(got[: len(want)], want)
        assert not got[len(want) :].any(), "padding is not zero"
        if row.startswith("fold"):
            assert round(float(sizes.sum()), 3) == PATCHES


@models
def test_every_block_alike(name):
    """The engine's table is right about the block: a cut inside equals the same cut by hand; counts are the plan's."""
    model = shared(name)
    with ROWS["fold"].attach(model, keep=7) as handle:
        run(name, model, images())
        report = handle.last
    assert report.tokens_per_layer == [[25, 25, 16, 7]] * 3
    assert report.tokens_per_mlp == [[25, 16, 7, 7]] * 3
    assert report.text_tokens == [VITS[name].prefix] * 3
    assert all(now < full for now, full in zip(report.flops, report.flops_full))
