"""The parts of the vLLM plug-in that need no vLLM: options, counts, the tokens that are left, M-RoPE positions.

And what the parts refuse that import vLLM, over stand-ins for its modules.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from prune import apply_pruner, get_method
from prune.adapters.families import SIGNAL_TOWERS
from prune.adapters.vllm import ARCHITECTURES, guard, mrope, register
from prune.adapters.vllm.options import OPTION, Pruning, Served, check_unpruned, refusal, strip, works
from prune.adapters.vllm.reduction import PROJECTOR_READS, reduce_images, texts_after
from prune.adapters.vllm.tower import TowerReader
from prune.adapters.vllm.worker import check_engine
from prune.budget import Budget
from prune.errors import BudgetError, ConfigError, PruneError, UnsupportedMethodError
from prune.kernels.attention import received_attention
from prune.kernels.topk import topk_indices
from prune.method import Reducer
from prune.tokens import Reduction, VisualTokens
from prune.tokens import Tower as Spec

CLIP = Served("LLaVA-1.5", "compact", SIGNAL_TOWERS["clip_vision_model"], "clip_vision_model", 24, 23, 22, 16)
QWEN = Served("Qwen2.5-VL", "original", SIGNAL_TOWERS["qwen2_5_vl_vision"], "qwen2_5_vl_vision", 32, 32, 31, 16)
UNIFORM = {"method": "uniform", "ratio": 0.5}


def pruning(served=CLIP, **given) -> Pruning:
    return Pruning.parse({**UNIFORM, **given}, served)


# ------------------------------------------------------------------------------------------------------- options
def test_options_are_those_of_apply_pruner():
    found = Pruning.parse({"method": "hiprune", "keep": 64, "alpha": 0.2}, CLIP)
    assert found.method == get_method("hiprune", alpha=0.2)
    assert found.budget == Budget(keep=64)
    assert found.kept(576, found.budget) == 64


def test_a_saved_pruner(tmp_path):
    with apply_pruner(tiny.build("llava"), "random", keep=5, seed=7, positions="compact") as handle:
        handle.save_pretrained(tmp_path)
    found = Pruning.parse({"method": str(tmp_path)}, CLIP)
    assert (found.method, found.budget) == (get_method("random", seed=7), Budget(keep=5))
    assert Pruning.parse({"method": str(tmp_path), "ratio": 0.5}, CLIP).budget == Budget(ratio=0.5)
    with pytest.raises(ConfigError, match="give positions='original'"):
        Pruning.parse({"method": str(tmp_path)}, QWEN)
    assert Pruning.parse({"method": str(tmp_path), "positions": "original"}, QWEN).method == found.method


@pytest.mark.parametrize(
    "found, error, message",
    [
        ("divprune", ConfigError, "must be an object with a method"),
        ({"ratio": 0.5}, ConfigError, "must be an object with a method"),
        ({"method": "uniform"}, BudgetError, "exactly one"),
        ({"method": "uniform", "ratio": 1.0}, BudgetError, r"in \[0, 1\)"),
        ({"method": "uniform", "ratio": 0.5, "keep": 4}, BudgetError, "exactly one"),
        ({"method": "uniform", "flops": 0.5}, BudgetError, "whole prompt"),
        ({"method": "uniform", "ratio": 0.5, "layre": 2}, ConfigError, "Did you mean 'layer'"),
        ({"method": "uniform", "ratio": 0.5, "positions": "original"}, ConfigError, "give positions='compact'"),
        ({"method": "random", "ratio": 0.5, "seed": "one"}, ConfigError, "seed='one' must be"),
        ({"method": "cdpruner", "ratio": 0.5, "joint": True}, UnsupportedMethodError, "other requests in the batch"),
    ],
)
def test_wrong_options(found, error, message):
    with pytest.raises(error, match=message):
        Pruning.parse(found, CLIP)


FIXED = ["cdpruner", "divprune", "gprune", "hiprune", "norm_diversity", "pooling", "random", "script", "uniform"]


def test_methods_that_work_and_reasons_of_those_that_do_not():
    assert works(CLIP) == sorted([*FIXED, "fastervlm", "visionzip", "vispruner", "zooprune"])
    assert works(QWEN) == sorted([*FIXED, "zooprune"])
    reasons = {
        ("fastv", CLIP): "acts at decoder:2: in vLLM all layers share",
        ("tome", CLIP): "acts at block:0",
        ("prumerge", CLIP): "depends on the picture",
        ("fastervlm", QWEN): "reads cls_attention, and the vision encoder of Qwen2.5-VL has no CLS token",
    }
    for (name, served), reason in reasons.items():
        assert reason in refusal(get_method(name), served)
    assert refusal(get_method("vispruner", score="received"), QWEN) is None
    # The last layer of CLIP is not built, for the projector reads the one before.
    for late in (get_method("fastervlm", score="received"), get_method("prumerge", adaptive=False)):
        assert "reads layer 23 of the vision encoder, and vLLM builds layers 0 to 22 only" in refusal(late, CLIP)


def test_a_refusal_names_the_methods_that_can():
    with pytest.raises(UnsupportedMethodError, match="cannot run on LLaVA-1.5 in vLLM: it acts at .*divprune"):
        Pruning.parse({"method": "pyramiddrop", "ratio": 0.5}, CLIP)


@pytest.mark.parametrize(
    "request_, kept", [({}, 288), ({"prune_ratio": 0.0}, 576), ({"prune_ratio": 0.9}, 58), ({"prune_keep": 64}, 64)]
)
def test_counts_of_a_request(request_, kept):
    asked = pruning().asked(request_)
    assert pruning().kept(576, asked) == kept
    assert pruning().kept(1, asked) == 1


@pytest.mark.parametrize("request_", [{"prune_ratio": 1.5}, {"prune_ratio": "x"}, {"prune_ratio": 0, "prune_keep": 3}])
def test_a_bad_budget_of_a_request_is_a_value_error(request_):
    with pytest.raises(ValueError) as caught:  # vLLM's server makes it a bad request
        pruning().asked(request_)
    assert isinstance(caught.value, PruneError)


def test_stamps_differ_with_everything_that_changes_the_tokens():
    one = pruning()
    stamps = [
        one.stamp("image", Budget(ratio=0.5)),
        one.stamp("other", Budget(ratio=0.5)),
        one.stamp("image", Budget(ratio=0.50001)),  # what str() rounds away
        one.stamp("image", Budget(keep=5)),
        one.stamp("image", Budget(ratio=0.5), [1, 2]),
        one.stamp("image", Budget(ratio=0.5), [1, 2, 3]),
        pruning(method="random").stamp("image", Budget(ratio=0.5)),
        pruning(method="random", seed=1).stamp("image", Budget(ratio=0.5)),
    ]
    assert len(set(stamps)) == len(stamps)
    assert all(int(stamp, 16) for stamp in stamps)
    assert one.stamp("image", Budget(ratio=0.5)) == pruning().stamp("image", Budget(ratio=0.5))


def test_requests_without_our_keys_and_to_servers_that_do_not_prune():
    assert strip({"prune_ratio": 0.5, "prune_keep": 1, "size": 3, "text": []}, "text") == {"size": 3}
    check_unpruned({"size": 3})
    with pytest.raises(ConfigError, match="needs a server that prunes"):
        check_unpruned({"prune_ratio": 0.5})


@pytest.mark.parametrize(
    "version, served",
    [((0, 32, 0), True), ((0, 33, 0), True), ((1, 0, 0), True), ((0, 0, "dev"), True), ((0, 9), False)],
)
def test_old_versions_of_vllm_are_left_as_they_are(monkeypatch, recwarn, version, served):
    registered = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(sys.modules, "vllm.version", SimpleNamespace(__version_tuple__=version))
    register()
    register()
    assert registered == (ARCHITECTURES if served else {})
    told = ["it is 0.9" in str(one.message) for one in recwarn]
    assert told == ([] if served else [True, True])


# ------------------------------------------------------------------------------------------------------- engine
READS_TOWER = {"method": "fastervlm", "ratio": 0.5}


def engine(tensor=1, lora=None, **compilation) -> SimpleNamespace:
    """A configuration as vLLM's `VllmConfig` has it, as far as `check_engine` looks."""
    compilation = {"compile_mm_encoder": False, "cudagraph_mm_encoder": False} | compilation
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor),
        compilation_config=SimpleNamespace(**compilation),
        lora_config=lora,
    )


TOWER_LORA, TEXT_LORA = (SimpleNamespace(enable_tower_connector_lora=on) for on in (True, False))


@pytest.mark.parametrize(
    "setting, message, all_methods",
    [
        ({"tensor": 2}, "tensor parallelism: every rank holds some of the heads", False),
        ({"compile_mm_encoder": True}, "compile_mm_encoder: a compiled encoder runs no hooks", False),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder: a graph goes past the pruning", True),
        ({"lora": TOWER_LORA}, "LoRA on the tower or connector", True),
        ({"lora": TEXT_LORA}, None, False),
        ({"lora": SimpleNamespace()}, None, False),  # of a vLLM that has no such switch
        ({}, None, False),
    ],
)
def test_settings_of_the_engine(setting, message, all_methods):
    for options, refused in ((READS_TOWER, message is not None), (UNIFORM, all_methods)):
        parsed = Pruning.parse(options, CLIP)
        if refused:
            with pytest.raises(ConfigError, match=f"{parsed.method.name} does not go with {message}.*switch it off"):
                check_engine(parsed, engine(**setting))
        else:
            check_engine(parsed, engine(**setting))


def test_a_method_that_reads_the_projector_reads_the_encoder():
    class Projects(Reducer):
        needs_projector = True

    reads = SimpleNamespace(reducer=Projects(), method=SimpleNamespace(name="projects"))
    with pytest.raises(ConfigError, match="projects does not go with tensor parallelism"):
        check_engine(reads, engine(tensor=2))


# ------------------------------------------------------------------------------- what imports vLLM, over stand-ins
class Stock:
    """A model or processor of vLLM's, as far as it is built here."""

    def __init__(self, *, vllm_config, prefix=""):
        self.served = vllm_config, prefix
        self.visual = SimpleNamespace(attn_backend=getattr(vllm_config, "backend", ""))


def model_config(option=None, embeds=False, pruned_videos=True, **more) -> SimpleNamespace:
    vision = SimpleNamespace(depth=32, num_heads=16)
    multimodal = SimpleNamespace(
        mm_processor_kwargs=None, enable_mm_embeds=embeds, is_multimodal_pruning_enabled=lambda: pruned_videos
    )
    hf_config = SimpleNamespace(vision_config=vision, **({} if option is None else {OPTION: option}))
    return SimpleNamespace(hf_config=hf_config, multimodal_config=SimpleNamespace(**{**vars(multimodal), **more}))


@pytest.fixture
def vllm(monkeypatch):
    """Modules of vLLM with the names ours import, and a way to import ours once more; both go after the test."""
    ours = "prune.adapters.vllm."
    processors = SimpleNamespace(BaseMultiModalProcessor=type("Base", (), {}), PromptReplacement=None)
    qwen = {f"Qwen2_5_VL{name}": type(name, (), {}) for name in ("ProcessingInfo", "DummyInputsBuilder")}
    qwen["Qwen2_5_VLMultiModalProcessor"] = type("Processor", (processors.BaseMultiModalProcessor,), {})
    models = SimpleNamespace(
        qwen2_5_vl=SimpleNamespace(Qwen2_5_VLForConditionalGeneration=Stock, **qwen),
        llava=SimpleNamespace(LlavaForConditionalGeneration=Stock),
    )
    registry = SimpleNamespace(register_processor=lambda *args, **kwargs: lambda model: model)
    for name, module in {
        "multimodal": SimpleNamespace(MULTIMODAL_REGISTRY=registry),
        "multimodal.inputs": SimpleNamespace(MultiModalFieldConfig=None),
        "multimodal.processing": processors,
        "model_executor.models": models,
        "model_executor.models.qwen2_5_vl": models.qwen2_5_vl,
        "model_executor.models.llava": models.llava,
    }.items():
        monkeypatch.setitem(sys.modules, f"vllm.{name}", module)
    before = {name for name in sys.modules if name.startswith(ours)}
    yield lambda module: import_module(ours + module)
    for name in {name for name in sys.modules if name.startswith(ours)} - before:
        del sys.modules[name]
        vars(sys.modules[ours[:-1]]).pop(name.removeprefix(ours), None)


def test_embeddings_from_outside_are_refused(vllm):
    pruning_of = vllm("processing").pruning_of
    served = lambda config: CLIP  # noqa: E731
    assert pruning_of(model_config(UNIFORM), served) == Pruning.parse(UNIFORM, CLIP)
    assert pruning_of(model_config(embeds=True), served) is None
    with pytest.raises(ConfigError, match="does not go with enable_mm_embeds"):
        pruning_of(model_config(UNIFORM, embeds=True), served)
    for option in (None, UNIFORM):
        with pytest.raises(ConfigError, match="prune_keep is for requests"):
            pruning_of(model_config(option, mm_processor_kwargs={"prune_keep": 3}), served)


def test_settings_that_qwen_is_refused_under(vllm):
    model = vllm("qwen2_5_vl").PrunedQwen2_5_VL
    reads = {"method": "vispruner", "score": "received", "ratio": 0.5}

    def start(speculative=None, backend="FLASH_ATTN", option=reads, **more):
        return model(
            vllm_config=SimpleNamespace(
                **vars(engine()),
                model_config=model_config(option, **more),
                speculative_config=speculative,
                backend=backend,
            )
        )

    for message, setting in {
        "needs --video-pruning-rate 0.5 too": {"pruned_videos": False},
        "does not go with speculative decoding": {"speculative": "eagle"},
        "vispruner does not go with FlashInfer": {"backend": "FLASHINFER"},
    }.items():
        with pytest.raises(ConfigError, match=message):
            start(**setting)
        assert start(**setting, option=None)._pruner is None  # a server that does not prune
    with pytest.raises(AttributeError, match="spatial_merge_size"):  # past all refusals, at what the stand-in has not
        start()


@pytest.mark.parametrize("name", guard.STOCK)
def test_where_our_class_does_not_fit_vllm_serves_its_own(vllm, monkeypatch, name):
    module, _ = guard.STOCK[name]
    if module == "qwen2_5_vl":  # llava's stand-in lacks a name anyway
        monkeypatch.delattr(sys.modules["vllm.multimodal"], "MULTIMODAL_REGISTRY")
    with pytest.warns(UserWarning, match=r"not fit this vLLM \(ImportError: cannot import .*served as without it"):
        model = getattr(guard, name)
    assert issubclass(model, Stock) and model.__name__ == "Stock"
    plain = SimpleNamespace(model_config=model_config())
    assert model(vllm_config=plain, prefix="x").served == (plain, "x")
    with pytest.raises(ConfigError, match="does not work in this vLLM .*install another version"):
        model(vllm_config=SimpleNamespace(model_config=model_config(UNIFORM)))


def test_where_our_class_fits_it_serves(vllm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.PrunedQwen2_5_VL is vllm("qwen2_5_vl").PrunedQwen2_5_VL
    with pytest.raises(AttributeError, match="no attribute 'PrunedGemma'"):
        guard.PrunedGemma  # noqa: B018


# ------------------------------------------------------------------------------------------------------- tokens
def test_text_after_every_image():
    assert texts_after([5, 100, 6, 7, 100, 8], 100, 2) == [[6, 7, 8], [8]]
    assert texts_after([100, 100, 6], 100, 2) == [[6], [6]]
    assert texts_after([6, 100], 100, 1) == [[]]
    assert texts_after([6, 100, 100], 100, 1) == [[]]  # vLLM says what is wrong with it


SHAPES = [(4, 4), (3, 6), (2, 2)]


def images(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(high * wide, 8, generator=generator) for high, wide in SHAPES]


def signals_of(reducer) -> dict:
    widths = {"features": (6,), "keys": (2, 3), "values": (2, 3)}
    generator = torch.Generator().manual_seed(1)
    rows = {
        name: [torch.rand(h * w, *widths.get(spec.kind, ()), generator=generator) for h, w in SHAPES]
        for name, spec in reducer.tower.items()
    }
    return rows | {PROJECTOR_READS: [torch.rand(h * w, 6, generator=generator) for h, w in SHAPES]}


PROJECT = nn.Linear(6, 8)


def reduced(name: str, keep, chosen=(0, 1, 2), **options):
    reducer = get_method(name, **options)
    pick = lambda rows: [rows[i] for i in chosen]  # noqa: E731
    texts = [torch.randn(t, 8, generator=torch.Generator().manual_seed(t)) for t in (3, 5, 2)]
    signals = {name: pick(rows) for name, rows in signals_of(reducer).items()}
    shapes, texts = pick(SHAPES), pick(texts)
    return reduce_images(reducer, pick(images()), pick(keep), shapes, signals, texts, PROJECT)


@pytest.mark.parametrize("name", works(CLIP))
def test_a_mixed_batch_is_each_image_alone(name):
    keep = [5, 18, 1]  # the second stays whole
    batch = reduced(name, keep)
    for i, (rows, index) in enumerate(batch):
        ((alone, alone_index),) = reduced(name, keep, [i])
        assert rows.shape == (keep[i], 8)
        assert index.equal(alone_index)
        torch.testing.assert_close(rows, alone)
        assert index.diff().gt(0).all()
    assert batch[1][0].equal(images()[1])


class Shown(Reducer):
    """Keeps the first tokens and remembers what it saw."""

    signals: ClassVar = ("inputs",)
    tower: ClassVar = {"score": Spec("received_attention")}

    def reduce(self, tokens, keep):
        self.tokens, self.keep = tokens, keep
        return Reduction(*topk_indices(-tokens.index.float(), keep, tokens.mask))


def test_what_a_reducer_is_shown():
    reducer, features = Shown(), images()
    texts = [torch.ones(t, 8) for t in (3, 1, 2)]
    scores = [torch.arange(len(rows)).float() for rows in features]
    found = reduce_images(reducer, features, [5, 18, 2], SHAPES, {"score": scores}, texts)
    shown = reducer.tokens
    assert reducer.keep == [5, 2]  # the second image stays whole
    assert shown.mask.sum(1).tolist() == [16, 4] and shown.text_mask.sum(1).tolist() == [3, 2]
    assert shown.features[1, :4].equal(features[2]) and shown.inputs is shown.features
    assert shown.coordinates[0, 6].tolist() == [0, 0, 1, 2] and shown.patch[0, 6].tolist() == [1, 2]
    assert (shown.coordinates[1, 4:] == -1).all()
    assert shown.tower["score"][1].tolist()[:4] == [0, 1, 2, 3]
    assert [len(rows) for rows, _ in found] == [5, 18, 2]

    reduce_images(None, features, [16, 18, 4], SHAPES, {})  # nothing to choose: nobody is asked


def test_an_image_left_does_not_hold_the_memory_of_its_batch():
    for rows, _ in reduced("uniform", [5, 18, 2]):
        assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()


def test_tokens_that_are_not_merged_are_taken_as_they_are():
    for name in ("divprune", "uniform", "cdpruner"):
        for (rows, index), features in zip(reduced(name, [5, 7, 2]), images()):
            assert rows.equal(features[index])


def test_merging_is_that_of_the_reducer():
    ((rows, _), _, _) = reduced("pooling", [4, 18, 4])
    grid = images()[0].view(2, 2, 2, 2, 8)  # 4 x 4 in cells of 2 x 2
    torch.testing.assert_close(rows, grid.mean((1, 3)).flatten(0, 1))


def test_merging_in_the_space_of_the_tower_goes_through_the_projector():
    reducer, keep = get_method("visionzip", contextual=2), [5, 18, 4]
    ((rows, index), _, _) = reduced("visionzip", keep, contextual=2)
    signals = signals_of(reducer)
    tokens = VisualTokens(images()[0][None], tower={name: signals[name][0][None] for name in reducer.tower})
    reduction = reducer.reduce(tokens, [5])
    projected = PROJECT(reduction.apply(signals[PROJECTOR_READS][0][None]))[0]
    merged = torch.zeros(5, dtype=torch.bool)
    merged[reduction.merge.slot[reduction.merge.weight > 0]] = True
    assert 0 < merged.sum() <= 2
    torch.testing.assert_close(rows[merged], projected[merged])
    assert rows[~merged].equal(images()[0][index][~merged])


# ------------------------------------------------------------------------------------------------------- positions
IMAGE = 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_survive_every_dtype(dtype):
    shape = (700, 400)  # beyond what bfloat16 counts to
    index = torch.tensor([0, 399, 400, 257 * 400 + 301, 699 * 400 + 399])
    rows = torch.randn(5, 8).to(dtype)
    features, places = mrope.detach(mrope.attach(rows, index, shape))
    assert features.equal(rows)
    assert places.tolist() == [[0] * 5, [0, 0, 1, 257, 699], [0, 399, 0, 301, 399]]


def prompt_of(counts: list[int]) -> list[int]:
    """Three ids of text, and after every image as many more."""
    ids = [1, 2, 3]
    for count in counts:
        ids += [IMAGE] * count + [4, 5, 6]
    return ids


def oracle(kept: list[torch.Tensor], shapes: list[tuple[int, int]]) -> tuple[torch.Tensor, int]:
    """Positions of Hugging Face's model for the whole prompt, at the columns that are left; and its delta."""
    config = hf.Qwen2_5_VLConfig(image_token_id=IMAGE, vision_start_token_id=3)
    model = SimpleNamespace(config=config)
    cls = hf.Qwen2_5_VLModel
    model.get_vision_position_ids = lambda *args, **kwargs: cls.get_vision_position_ids(model, *args, **kwargs)
    ids = torch.tensor([prompt_of([high * wide for high, wide in shapes])])
    grid = torch.tensor([(1, 2 * high, 2 * wide) for high, wide in shapes])
    positions, delta = cls.get_rope_index(
        model, ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=grid, attention_mask=torch.ones_like(ids)
    )
    alive, at = [torch.arange(3)], 3
    for index, (high, wide) in zip(kept, shapes):
        alive += [at + index, at + high * wide + torch.arange(3)]
        at += high * wide + 3
    columns = torch.cat(alive)
    return positions[:, 0, columns], int(delta) + ids.shape[1] - len(columns)


GRIDS = [(4, 6), (9, 2), (1, 1)]
KEPT = [torch.tensor([0, 5, 13, 23]), torch.tensor([3, 17]), torch.tensor([0])]


def started() -> tuple[list[int], torch.Tensor, int, torch.Tensor]:
    ids = prompt_of([len(index) for index in KEPT])
    given, at = [], 3
    for index, shape in zip(KEPT, GRIDS):
        given.append((at, len(index), shape))
        at += len(index) + 3
    positions, delta = mrope.prompt_positions(len(ids), given)
    rows = [mrope.attach(torch.zeros(len(index), 4), index, shape) for index, shape in zip(KEPT, GRIDS)]
    return ids, positions, delta, torch.cat([mrope.detach(one)[1] for one in rows], 1)


def test_kept_tokens_hold_the_positions_they_had():
    ids, positions, delta, places = started()
    expected, expected_delta = oracle(KEPT, GRIDS)
    tokens = torch.tensor(ids)
    assert positions[:, tokens != IMAGE].equal(expected[:, tokens != IMAGE])  # text is right before any image is seen
    assert delta == expected_delta
    assert mrope.place(tokens, IMAGE, positions, places, 0).equal(expected)


def test_places_may_come_in_chunks_that_cut_images_and_come_twice():
    ids, positions, _, places = started()
    tokens, (expected, _) = torch.tensor(ids), oracle(KEPT, GRIDS)
    image = (tokens == IMAGE).nonzero()[:, 0].tolist()
    for width in (1, 2, 5):
        found = positions
        for first in range(0, len(ids), width):
            now = [number for number, slot in enumerate(image) if first <= slot < first + width]
            if now:
                found = mrope.place(tokens, IMAGE, found, places[:, now], first)
        assert found.equal(expected)
        again = mrope.place(tokens, IMAGE, found, places, 0)  # a request that was put back to its start
        assert again.equal(expected)


def test_an_image_may_begin_the_prompt():
    positions, delta = mrope.prompt_positions(4, [(0, 2, (3, 5))])
    assert positions[0].tolist() == [0, 0, 5, 6] and delta == 3
    tokens, places = torch.tensor([IMAGE, IMAGE, 1, 2]), torch.tensor([[0, 0], [0, 2], [1, 4]])
    found = mrope.place(tokens, IMAGE, positions, places, 0)
    assert found.tolist() == [[0, 0, 5, 6], [0, 2, 5, 6], [1, 4, 5, 6]]


# ------------------------------------------------------------------------------------------------------- tower
class FusedAttention(nn.Module):
    """Attention with one projection for q, k and v that returns a tuple, as vLLM's layers do."""

    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    def __init__(self, width: int, name: str):
        super().__init__()
        self.name = name
        setattr(self, name, self.Linear(width, 3 * width))

    def forward(self, x, **kwargs):
        return getattr(self, self.name)(x)[0][..., : x.shape[-1]]


class Tower(nn.Module):
    def __init__(self, width: int, layers: int, path: str, attention: str, qkv: str):
        super().__init__()
        self.spatial_merge_size = 2
        blocks = nn.ModuleList(nn.ModuleDict({attention: FusedAttention(width, qkv)}) for _ in range(layers))
        holder = self
        *parents, last = path.split(".")
        for name in parents:
            setattr(holder, name, nn.Module())
            holder = getattr(holder, name)
        setattr(holder, last, blocks)
        for block in blocks:
            block.__dict__[attention] = block[attention]
        self.blocks_, self.attention = blocks, attention

    def forward(self, x, **kwargs):
        for block in self.blocks_:
            x = x + block[self.attention](x, **kwargs)
        return x


def test_signals_of_a_clip_tower():
    torch.manual_seed(0)
    served = Served("tiny", "compact", SIGNAL_TOWERS["clip_vision_model"], "clip_vision_model", 4, 3, 2, 2)
    tower, projector = Tower(8, 3, "encoder.layers", "self_attn", "qkv_proj"), nn.Linear(8, 8)
    reader = TowerReader(Pruning.parse({"method": "visionzip", "ratio": 0.5}, served), tower, "qkv_proj", projector)
    x = torch.randn(2, 1 + 16, 8)
    with torch.no_grad(), reader.taken():
        out = tower(x)
        projector(out[:, 1:])
    found = reader.split([(4, 4)] * 2)

    with torch.no_grad():
        entering = x
        for block in tower.blocks_[:2]:
            entering = entering + block["self_attn"](entering)
        q, k, _ = (
            part.view(2, 17, 2, 4).transpose(1, 2)
            for part in tower.blocks_[2]["self_attn"].qkv_proj(entering)[0].chunk(3, -1)
        )
        attention = (q @ k.transpose(2, 3) / 2).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(torch.stack(found["attention"]), attention)
    torch.testing.assert_close(torch.stack(found["keys"]), k.transpose(1, 2)[:, 1:])
    assert torch.stack(found[PROJECTOR_READS]).equal(out[:, 1:])


def test_signals_of_packed_images_with_windows_come_in_the_order_of_their_tokens():
    torch.manual_seed(0)
    served = Served("tiny", "original", SIGNAL_TOWERS["qwen2_5_vl_vision"], "qwen2_5_vl_vision", 1, 1, 0, 2)
    tower, norm = Tower(8, 1, "blocks", "attn", "qkv"), nn.Identity()
    tower.window_size, tower.patch_size = 8, 2  # windows of 2 x 2 tokens
    options = {"method": "vispruner", "score": "received", "ratio": 0.5}
    reader = TowerReader(Pruning.parse(options, served), tower, "qkv", norm, 4)
    shapes = [(4, 4), (2, 6)]
    # Tokens as the encoder works on them: window by window.
    windows = [
        torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten(),
        torch.arange(12).view(2, 3, 2).transpose(0, 1),
    ]
    order = torch.cat([windows[0], 16 + windows[1].flatten()])
    x = torch.randn(len(order) * 4, 1, 8)
    bounds = torch.tensor([0, 64, 112])
    angle = torch.rand(len(x), 2)
    cos, sin = angle.cos(), angle.sin()
    with torch.no_grad(), reader.taken():
        norm(tower(x, cu_seqlens=bounds, rotary_pos_emb_cos=cos, rotary_pos_emb_sin=sin))
    found = reader.split(shapes)

    with torch.no_grad():
        q, k, _ = (part.view(-1, 2, 4) for part in tower.blocks_[0]["attn"].qkv(x[:, 0])[0].chunk(3, -1))
        first, second = (torch.stack([y[..., :2], y[..., 2:]]) for y in (q, k))
        q, k = (
            torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1)
            for a, b in (first, second)
        )
        received = torch.cat([received_attention(q[None, a:b], k[None, a:b], 0.5)[0] for a, b in ((0, 64), (64, 112))])
        expected = torch.empty(len(order)).scatter_(0, order, received.view(-1, 4).mean(1))
        features = (x + tower.blocks_[0]["attn"](x)).view(-1, 32)
    torch.testing.assert_close(torch.cat(found["attention"]), expected)
    assert torch.cat(found["features"])[order].equal(features)
    assert [len(one) for one in found["attention"]] == [16, 12]


def test_nothing_is_taken_outside_and_nothing_is_kept():
    served = Served("tiny", "compact", SIGNAL_TOWERS["clip_vision_model"], "clip_vision_model", 4, 3, 2, 2)
    tower, projector = Tower(8, 3, "encoder.layers", "self_attn", "qkv_proj"), nn.Linear(8, 8)
    reader = TowerReader(Pruning.parse({"method": "visionzip", "ratio": 0.5}, served), tower, "qkv_proj", projector)
    projector(tower(torch.randn(1, 17, 8))[:, 1:])
    assert reader.rows is None and not reader.raw
    with reader.taken():
        projector(tower(torch.randn(1, 17, 8))[:, 1:])
    reader.split([(4, 4)])
    assert reader.rows is None and not reader.raw
