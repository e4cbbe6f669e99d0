"""Images in Qwen2.5-VL in the real vLLM: kept tokens hold their M-RoPE positions."""

from __future__ import annotations

import pytest
from vllm_support import LONG, WORST, engine, hugging_face, photo, prompt, request, runner_of, same

METHODS = {
    "cdpruner": {},
    "divprune": {},
    "fastervlm": {"score": "received"},
    "gprune": {},
    "hiprune": {"object_layer": 0.5},
    "norm_diversity": {},
    "pooling": {},
    "random": {"seed": 3},
    "script": {},
    "uniform": {},
    "visionzip": {"score": "received"},
    "vispruner": {"score": "received"},
    "zooprune": {"directions": 8},
}
SQUARE, HIGH, WIDE = photo(1), photo(2, 40, 96), photo(3, 64, 32)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_hugging_face(method):
    options = METHODS[method]
    with engine("qwen", {"method": method, "ratio": 0.5, **options}) as ask:
        two = prompt("qwen", LONG, images=2)
        same(
            "qwen",
            method,
            options,
            ask,
            (prompt("qwen"), SQUARE, 0.5),
            (prompt("qwen", LONG), HIGH, 0.9),
            (prompt("qwen", LONG), HIGH, 0.0),
            (two, [WIDE, HIGH], 0.75),
            (two, [HIGH, HIGH], 0.5),
        )


def test_one_batch_of_many_budgets_and_sizes_and_its_caches():
    cases = [(SQUARE, 0.0), (HIGH, 0.25), (WIDE, 0.5), (HIGH, 0.9)]
    text = prompt("qwen", LONG)
    expected = [hugging_face("qwen", "divprune", text, picture, ratio) for picture, ratio in cases]
    with engine("qwen", {"method": "divprune", "ratio": 0.5}, enable_prefix_caching=True) as ask:
        for answer, right in zip(ask(*(request(text, *case) for case in cases)), expected):
            answer.check(right)
            assert answer.length == right.length
        for case, right in reversed(list(zip(cases, expected))):
            (again,) = ask(request(text, *case))
            assert again.cached > 0
            again.check(right)
        (fresh,) = ask(request(text, HIGH, 0.5))
        assert fresh.cached == 0, "blocks of another budget were taken"
        fresh.check(hugging_face("qwen", "divprune", text, HIGH, 0.5))


@pytest.mark.parametrize("chunk", [16, 40])
def test_images_cut_by_chunked_prefill(chunk):
    text, images = prompt("qwen", LONG, images=3), [HIGH, SQUARE, WIDE]
    settings = dict(max_num_batched_tokens=chunk, max_num_seqs=2, enable_chunked_prefill=True)
    with engine("qwen", {"method": "divprune", "ratio": 0.5}, **settings) as ask:
        same("qwen", "divprune", {}, ask, *((text, images, ratio) for ratio in (0.0, 0.25, 0.5)))


def test_prompts_whose_positions_would_be_unknown():
    with engine("qwen", {"method": "uniform", "ratio": 0.5}) as ask:
        with pytest.raises(ValueError, match="text before it and the prompt text at its end"):
            ask(request("What is shown? <|vision_start|><|image_pad|>", SQUARE))
        with pytest.raises(ValueError, match="text before it and the prompt text at its end"):
            ask(request("<|image_pad|><|image_pad|> What is shown?", [SQUARE, HIGH]))
        text = "<|image_pad|> What is shown?"  # nothing before the image: position 0
        same("qwen", "uniform", {}, ask, (text, HIGH, 0.5))


def test_without_the_switch_the_server_does_not_start():
    with pytest.raises(Exception, match="needs --video-pruning-rate 0.5 too"):
        with engine("qwen", {"method": "uniform", "ratio": 0.5}, video_pruning_rate=None):
            pass


def test_methods_that_want_cls_are_refused():
    with pytest.raises(Exception, match="(?s)no CLS token.*Methods that can: .*hiprune"):
        with engine("qwen", {"method": "fastervlm", "ratio": 0.5}):
            pass


def test_videos_are_refused():
    import numpy as np

    with engine("qwen", {"method": "uniform", "ratio": 0.5}) as ask:
        video = np.zeros((4, 32, 32, 3), dtype=np.uint8)
        with pytest.raises(ValueError, match="(?i)video"):
            text = "<|vision_start|><|video_pad|><|vision_end|> What?"
            ask({"prompt": text, "multi_modal_data": {"video": video}})


def test_an_engine_that_does_not_ask_for_positions_says_so():
    with engine("qwen", {"method": "uniform", "ratio": 0.5}) as ask:
        runner_of(ask.llm).is_multimodal_pruning_enabled = False  # as vLLM 0.32 has it on CPUs
        with pytest.raises(Exception, match="vLLM did not ask for the positions"):
            ask(request(prompt("qwen"), SQUARE))


def test_all_differences_were_small():
    print(f"\n{len(WORST)} comparisons with Hugging Face, worst difference of a log-probability {max(WORST):.1e}")
    assert len(WORST) > 60
