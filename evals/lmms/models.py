"""lmms-eval's chat models with a pruner on them: every id of `BASES` is a class of this module, made when asked for."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from importlib import import_module

import torch

from prune.apply import apply_pruner
from prune.errors import ConfigError
from prune.evals.lmms.observed import Observed, Stop
from prune.options import parse_options

BASES = {
    "llava_hf_pruned": "lmms_eval.models.chat.llava_hf.LlavaHf",
    "qwen2_5_vl_pruned": "lmms_eval.models.chat.qwen2_5_vl.Qwen2_5_VL",
    "qwen3_vl_pruned": "lmms_eval.models.chat.qwen3_vl.Qwen3_VL",
    "internvl_hf_pruned": "lmms_eval.models.chat.internvl_hf.InternVLHf",
    "huggingface_pruned": "prune.evals.lmms.huggingface.Huggingface",
}
"""Model id -> the lmms-eval class it extends, mended in one case. An id loads what its class loads and takes the same
`model_args`."""


class Pruned:
    """What the classes of `BASES` have before lmms-eval's own: the arguments of a pruner, and what pruning costs.

    Args:
        pruner: a method's name or what else `apply_pruner` takes by name. None is the un-pruned model, measured alike.
        ratio, keep, average, flops: the budget, as in `apply_pruner`; `ratio` is the share of visual tokens REMOVED.
        pruner_options: further keywords of `apply_pruner`, as a dictionary or the JSON of one.
        **arguments: `pruner_NAME=VALUE` for a single one of these keywords; the rest are lmms-eval's.

    Raises:
        ConfigError: an argument neither knows, or a budget or options without a pruner.
        PruneError: what else `apply_pruner` raises; the model has been loaded by then.
    """

    _observed: Observed | None = None

    def __init__(
        self,
        pruner: str | None = None,
        ratio: float | None = None,
        keep: int | None = None,
        average: float | None = None,
        flops: float | None = None,
        pruner_options: dict | str | None = None,
        **arguments,
    ):
        given = {"ratio": ratio, "keep": keep, "average": average, "flops": flops}
        options = take_options(arguments, pruner_options)
        parameters = inspect.signature(super().__init__).parameters
        known = [name for name in parameters if name != "kwargs"]
        if unknown := sorted(set(arguments) - set(known)):  # some of lmms-eval's classes ignore what they do not know
            raise ConfigError(
                f"{type(self).__name__} has no argument {', '.join(unknown)}; it has pruner, {', '.join(given)}, "
                f"pruner_options, pruner_NAME for an option of the method, and lmms-eval's {', '.join(known)}"
            )
        if pruner is None:
            if options or any(given.values()):
                raise ConfigError("a budget or options without a method: give pruner=NAME too, such as pruner=divprune")
            pruner, given["ratio"] = "random", 0.0  # computes bit for bit what the model alone does, and is counted
        super().__init__(**arguments, **place(arguments, parameters))
        self._observed = Observed(self.model, apply_pruner(self.model, pruner, **given, **options))

    @property
    def model(self):
        """The model as lmms-eval's own code calls it: `generate` is measured."""
        return super().model if self._observed is None else self._observed

    def generate_until(self, requests) -> list:
        """lmms-eval's answers; the means of `Observed.metrics` go to its efficiency metrics."""
        return self._measure(super().generate_until, requests)

    def generate_until_multi_round(self, requests) -> list:
        """As `generate_until`."""
        return self._measure(super().generate_until_multi_round, requests)

    def _measure(self, answer, requests) -> list:
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        try:
            answers = answer(requests)
        except Stop as stop:
            raise stop.__cause__ from None
        if metrics := self._observed.metrics():  # zeros leave lmms-eval's own sums as they are
            log_metrics(total_elapsed_time=0, total_gen_tokens=0, avg_speed=0, additional_metrics=metrics)
        return answers

    def clean(self) -> None:
        """Remove the pruner and let go of the model, at the end of an evaluation."""
        if self._observed is not None:
            self._observed.handle.remove()
            self._observed = None
        super().clean()


def place(arguments: Mapping, parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """`device` and `device_map` where lmms-eval's own defaults fail: "cuda" without a GPU; "" under transformers 5;
    "auto", which sends inputs to a GPU even on a CPU. Several processes place themselves."""
    if "device" not in parameters or "device_map" in arguments or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return {}
    chosen = {} if "device" in arguments or torch.cuda.is_available() else {"device": "cpu"}
    device = arguments.get("device") or chosen.get("device") or parameters["device"].default
    if "device_map" in parameters and (parameters["device_map"].default == "" or device == "cpu"):
        chosen["device_map"] = device
    return chosen


def take_options(arguments: dict, options: dict | str | None) -> dict:
    """Remove every `pruner_NAME` from `arguments`: {NAME: value} with `options`, values as in `prune eval --method`.

    Raises:
        ConfigError: `options` are no JSON object, or name something a second time.
    """
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f'pruner_options must be JSON, such as {{"layer": 3}}: {error}') from None
    if not isinstance(options, dict | None):
        raise ConfigError(f'pruner_options must be a JSON object, such as {{"layer": 3}}, got {options!r:.80}')
    found = dict(options or {})
    for name in [name for name in arguments if name.startswith("pruner_")]:
        value, name = arguments.pop(name), name.removeprefix("pruner_")
        if name in found:
            raise ConfigError(f"{name} is given by pruner_options and by pruner_{name}; give it once")
        found |= parse_options([f"{name}={value}"]) if isinstance(value, str) else {name: value}
    return found


def __getattr__(name: str) -> type:
    """The class of a model id. lmms-eval's class is imported now: each needs other libraries, and one is asked for."""
    if name not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, base = BASES[name].rpartition(".")
    made = type(
        name, (Pruned, getattr(import_module(module), base)), {"__module__": __name__, "__doc__": Pruned.__doc__}
    )
    globals()[name] = made
    return made
