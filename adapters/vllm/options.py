"""What a vLLM server is asked to do, and whether it can be done there. Plain Python, no vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from prune.adapters.families import TowerShape
from prune.adapters.tower import CLS_KINDS, Key, resolve
from prune.budget import Budget, Geometry
from prune.config import PrunerConfig, find_config
from prune.errors import BudgetError, ConfigError, UnsupportedMethodError
from prune.method import Method, Reducer
from prune.registry import get_method, list_methods
from prune.tokens import ALIVE, Tower

OPTION = "visual_pruning"
"""Key of `hf_overrides` that holds the options."""
REQUEST = {"prune_ratio": "ratio", "prune_keep": "keep"}
"""Keys of a request's `mm_processor_kwargs` -> the budget they stand for."""
BUDGETS = ("ratio", "keep", "average")
PROBE = Geometry(100), 10


@dataclass(frozen=True)
class Served:
    """A model as vLLM runs it.

    Args:
        model: as the documentation calls it.
        positions: what becomes of position ids: "compact" or "original"; the engine has one way only.
        tower_shape: how the vision encoder is built.
        tower_kind: `model_type` of the vision encoder.
        layers: of the vision encoder in the checkpoint.
        built: of these, the first ones that vLLM builds.
        read: the layer whose output the projector reads.
        heads: of a layer of the vision encoder.
    """

    model: str
    positions: str
    tower_shape: TowerShape
    tower_kind: str
    layers: int
    built: int
    read: int
    heads: int

    # what `prune.adapters.tower.resolve` looks at
    @property
    def tower_blocks(self) -> range:
        return range(self.layers)

    @property
    def read_layers(self) -> list[int]:
        return [self.read]

    @property
    def tower(self) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(model_type=self.tower_kind))

    def key(self, spec: Tower, reader: str) -> Key:
        """Kind, layer index and maybe threshold of a signal of the vision encoder on this model.

        Raises:
            UnsupportedMethodError: the encoder has no such signal, or vLLM does not build that layer.
            ConfigError: the checkpoint has no such layer.
        """
        if spec.kind in CLS_KINDS and not self.tower_shape.cls:
            raise UnsupportedMethodError(f"reads {spec.kind}, and the vision encoder of {self.model} has no CLS token")
        if spec.kind in ("pixels", ALIVE) or (spec.kind == "features" and spec.layer is not None):
            raise UnsupportedMethodError(f"reads {spec.kind} of layer {spec.layer}, which is not taken in vLLM")
        key = resolve(self, spec, reader)
        if key[1] is not None and key[1] >= self.built:
            raise UnsupportedMethodError(
                f"reads layer {key[1]} of the vision encoder, and vLLM builds layers 0 to {self.built - 1} only, up to "
                "the one the projector reads"
            )
        return key


def refusal(method: Method, served: Served) -> str | None:
    """Why a method cannot run in vLLM, or None if it can."""
    stages = method.plan(*PROBE)
    outside = [stage for stage in stages if stage.site.kind != "projected"]
    if outside:
        return f"acts at {outside[0].site}: in vLLM all layers share one paged KV cache and one sequence length"
    if len(stages) != 1:
        return "acts several times; give one of its members alone"
    reducer = stages[0].reducer
    if reducer.adaptive:
        return "keeps a number of tokens that depends on the picture, which vLLM must know before it is encoded"
    if missing := sorted(set(reducer.signals) - {"inputs"}):
        return f"reads {', '.join(missing)}, which exist inside the decoder only"
    if getattr(reducer, "joint", False):
        return "has joint=True, which makes an image's tokens depend on the other requests in the batch"
    try:
        for spec in reducer.tower.values():
            served.key(spec, reducer.name)
    except UnsupportedMethodError as error:
        return str(error)
    return None


def works(served: Served) -> list[str]:
    """Names of the registered methods that run with their default options."""
    return [name for name in list_methods() if refusal(get_method(name), served) is None]


@dataclass(frozen=True)
class Pruning:
    """What the server was started with.

    Args:
        method: with a single stage at `projected`.
        budget: of requests that bring none.
        served: the model.
    """

    method: Method
    budget: Budget
    served: Served

    @classmethod
    def parse(cls, found: object, served: Served) -> Pruning:
        """The options as `hf_overrides` holds them, flat as the keywords of `apply_pruner`.

        Args:
            found: {"method": name or folder, "ratio" or "keep" or "average": number, and options of the method}.

        Raises:
            ConfigError, UnknownMethodError: no method, or an option that does not exist or fit.
            BudgetError: not exactly one budget, or out of range, or `flops`.
            UnsupportedMethodError: the method cannot run in vLLM; the message names those that can.
        """
        if not isinstance(found, Mapping) or not isinstance(found.get("method"), str):
            raise ConfigError(
                f"{OPTION} must be an object with a method, such as "
                f'{{"method": "divprune", "ratio": 0.75}}, got {found!r:.80}'
            )
        options = {name: value for name, value in found.items() if name != "method"}
        given = {name: options.pop(name) for name in BUDGETS if name in options}
        if "flops" in options:
            raise BudgetError("flops= counts the whole prompt, which a vLLM server does not know; give ratio= or keep=")
        positions = options.pop("positions", None)
        saved = find_config(found["method"])
        if saved is None:
            method = PrunerConfig(found["method"]).build(options)
            budget = Budget(**given)
        else:
            method = saved.build(options)
            budget = Budget(**given) if given or saved.budget is None else saved.budget
            positions = positions or saved.positions
        if budget.flops is not None:
            raise BudgetError("flops= counts the whole prompt, which a vLLM server does not know; give ratio= or keep=")
        if positions not in (None, served.positions):
            raise ConfigError(
                f"positions={positions!r} cannot be had for {served.model} in vLLM; give "
                f"positions={served.positions!r}, which it has for all methods"
            )
        if (reason := refusal(method, served)) is not None:
            raise UnsupportedMethodError(
                f"{method.name} cannot run on {served.model} in vLLM: it {reason}. "
                f"Methods that can: {', '.join(works(served))}"
            )
        return cls(method, budget, served)

    @property
    def reducer(self) -> Reducer:
        return self.method.plan(*PROBE)[0].reducer

    @property
    def reads_text(self) -> bool:
        """Whether the reducer is to be given the text after the image."""
        return "inputs" in self.reducer.signals

    def asked(self, request: Mapping[str, object]) -> Budget:
        """The budget of one request, out of its `mm_processor_kwargs`.

        Raises:
            BudgetError: a value out of range, or both at once.
        """
        given = {name: request[key] for key, name in REQUEST.items() if request.get(key) is not None}
        return Budget(**given) if given else self.budget

    def kept(self, count: int, budget: Budget) -> int:
        """How many of an image's `count` tokens are left."""
        return self.method.kept(count, budget)

    def stamp(self, digest: str, budget: Budget, text: Sequence[int] | None = None) -> str:
        """The identity of a pruned image, for every cache there is: hex.

        Args:
            digest: that of the image.
            text: ids of the text after it, for methods that read it.
        """
        told = f"{digest}|{self.method!r}|{budget!r}|{'' if text is None else list(text)}"
        return hashlib.sha256(told.encode()).hexdigest()


def strip(request: Mapping[str, object], *more: str) -> dict[str, object]:
    """A request's `mm_processor_kwargs` without our keys."""
    return {key: value for key, value in request.items() if key not in REQUEST and key not in more}


def check_unpruned(request: Mapping[str, object]) -> None:
    """Refuse a budget in a request to a server without the option, where it would do nothing.

    Raises:
        ConfigError: says how to start the server.
    """
    if found := [key for key in REQUEST if key in request]:
        raise ConfigError(
            f'{found[0]} needs a server that prunes; start it with --hf-overrides \'{{"{OPTION}": {{"method": '
            '"divprune", "ratio": 0.75}}\''
        )
