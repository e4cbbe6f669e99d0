"""LLaVA-1.5 in the real vLLM: pruned as Hugging Face's model under `apply_pruner`, and caches that do not mix."""

from __future__ import annotations

import pytest
from vllm_support import LONG, WORST, engine, hugging_face, photo, prompt, request, same

METHODS = {
    "cdpruner": {},
    "divprune": {},
    "fastervlm": {},
    "gprune": {},
    "hiprune": {},
    "norm_diversity": {},
    "pooling": {},
    "random": {"seed": 3},
    "script": {},
    "uniform": {},
    "visionzip": {},
    "vispruner": {},
    "zooprune": {"directions": 8},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_hugging_face(method):
    options = METHODS[method]
    with engine("llava", {"method": method, "ratio": 0.5, **options}) as ask:
        two = prompt("llava", LONG, images=2)
        same(
            "llava",
            method,
            options,
            ask,
            (prompt("llava"), photo(1), 0.5),
            (prompt("llava", LONG), photo(2), 0.9),
            (two, [photo(3), photo(4)], 0.75),
            (two, [photo(5), photo(5)], 0.75),
        )


def test_one_batch_of_many_budgets_and_its_caches():
    text, picture = prompt("llava", LONG), photo(1)
    ratios = [0.0, 0.25, 0.5, 0.9]
    expected = {ratio: hugging_face("llava", "divprune", text, picture, ratio) for ratio in ratios}
    with engine("llava", {"method": "divprune", "ratio": 0.5}, enable_prefix_caching=True) as ask:
        batch = ask(*(request(text, picture, ratio) for ratio in ratios))
        for ratio, answer in zip(ratios, batch):
            answer.check(expected[ratio])
            assert answer.length == expected[ratio].length
        assert len({answer.length for answer in batch}) == 4

        # The prefix cache and the caches of processed and encoded images: hits for the same budget, and right ones.
        for ratio in (0.9, 0.0, 0.5, 0.25, 0.0):
            (again,) = ask(request(text, picture, ratio))
            assert again.cached > 0
            again.check(expected[ratio])
        (fresh,) = ask(request(text, picture, 0.75))
        assert fresh.cached == 0, "blocks of another budget were taken"
        fresh.check(hugging_face("llava", "divprune", text, picture, 0.75))

        # The server's own budget is the one asked for by the same number; a count is a budget too.
        (plain,) = ask(request(text, picture))
        plain.check(expected[0.5])
        (nine,) = ask(request(text, picture, prune_keep=9))
        nine.check(hugging_face("llava", "divprune", text, picture, keep=9))


def test_images_cut_by_chunked_prefill():
    text = prompt("llava", LONG, images=2)
    images = [photo(1), photo(2)]
    settings = dict(max_num_batched_tokens=16, max_num_seqs=2, enable_chunked_prefill=True)
    with engine("llava", {"method": "fastervlm", "ratio": 0.5}, **settings) as ask:
        same("llava", "fastervlm", {}, ask, *((text, images, ratio) for ratio in (0.0, 0.25, 0.5)))


def test_two_questions_about_one_image_keep_different_tokens():
    picture = photo(1)
    texts = [prompt("llava", question) for question in ("What is shown?", "How many birds are there?")]
    expected = [hugging_face("llava", "cdpruner", text, picture, 0.75) for text in texts]
    with engine("llava", {"method": "cdpruner", "ratio": 0.75}) as ask:
        for answer, right in zip(ask(*(request(text, picture) for text in texts)), expected):
            answer.check(right)
        with pytest.raises(ValueError, match="put the question after the image"):
            ask(request("<image>", picture))
        for text, right in zip(reversed(texts), reversed(expected)):
            ask(request(text, picture))[0].check(right)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"prune_ratio": 1.5}, r"ratio=1.5 must be in \[0, 1\)"),
        ({"prune_ratio": "much"}, "not a finite number"),
        ({"prune_keep": 0}, "keep=0 must be a whole number"),
        ({"prune_ratio": 0.5, "prune_keep": 9}, "exactly one"),
        ({"prune_num_keep": 3}, "not for requests"),
    ],
)
def test_bad_budgets_of_requests(asked, message, uniform):
    with pytest.raises(ValueError, match=message):
        uniform(request(prompt("llava"), photo(1), **asked))
    (answer,) = uniform(request(prompt("llava"), photo(1)))
    answer.check(hugging_face("llava", "uniform", prompt("llava"), photo(1), 0.5))


@pytest.fixture(scope="module")
def uniform():
    with engine("llava", {"method": "uniform", "ratio": 0.5}) as ask:
        yield ask


@pytest.mark.parametrize(
    "pruning, message",
    [
        ({"method": "fastv", "ratio": 0.5}, "acts at decoder:2.*Methods that can: .*divprune"),
        ({"method": "prumerge", "ratio": 0.5}, "depends on the picture"),
        ({"method": "hiprune", "ratio": 0.5, "deep_layer": -1}, "vLLM builds layers 0 to 2 only"),
        ({"method": "divprune"}, "give exactly one of"),
        ({"method": "divprune", "ratio": 0.5, "layer": 2}, "has no option 'layer'"),
        ({"method": "divprune", "ratio": 0.5, "positions": "original"}, "cannot be had for LLaVA-1.5"),
        ({"method": "no_such", "ratio": 0.5}, "unknown method 'no_such'"),
    ],
)
def test_bad_options_stop_the_start(pruning, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        with engine("llava", pruning):
            pass


def test_a_budget_for_the_server_does_not_go_where_requests_have_theirs():
    with pytest.raises(Exception, match="the server's budget goes into visual_pruning"):
        with engine("llava", {"method": "uniform", "ratio": 0.5}, mm_processor_kwargs={"prune_ratio": 0.5}):
            pass


def test_a_server_that_does_not_prune_refuses_budgets():
    with engine("llava", None) as ask:
        with pytest.raises(ValueError, match="needs a server that prunes"):
            ask(request(prompt("llava"), photo(1), 0.5))
        (answer,) = ask(request(prompt("llava"), photo(1)))
        answer.check(hugging_face("llava", None, prompt("llava"), photo(1)))


def test_all_differences_were_small():
    print(f"\n{len(WORST)} comparisons with Hugging Face, worst difference of a log-probability {max(WORST):.1e}")
    assert len(WORST) > 60
