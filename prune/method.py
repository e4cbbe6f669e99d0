"""The method ladder: `Scorer.score` < `Reducer.reduce` < `Method.plan`. Stop at the first rung that suffices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from prune.budget import Budget, Geometry
from prune.errors import ConfigError
from prune.kernels import topk_indices
from prune.tokens import Reduction, Tower, VisualTokens


@dataclass(frozen=True, order=True)
class Site:
    """Where a stage acts: `projected` (before decoder layer 0), `decoder:k` (input of layer k), `vision:l`, `block:i`.

    Sites order as data flows: vision < projected < decoder.
    """

    rank: int
    layer: int
    KINDS: ClassVar[tuple[str, ...]] = ("block", "vision", "projected", "decoder")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        if isinstance(text, Site):
            return text
        kind, _, layer = str(text).partition(":")
        indexed = kind != "projected"
        if kind not in cls.KINDS or indexed != layer.isdecimal() or (layer and not indexed):
            raise ConfigError(f"site {text!r} is none of projected, decoder:<layer>, vision:<layer>, block:<index>")
        return cls(cls.KINDS.index(kind), int(layer) if indexed else 0)

    @property
    def kind(self) -> str:
        return self.KINDS[self.rank]

    def __str__(self):
        return self.kind if self.kind == "projected" else f"{self.kind}:{self.layer}"


@dataclass(frozen=True)
class Stage:
    """One cut: at `site`, `reducer` leaves `keep` tokens of the image."""

    site: Site
    reducer: Reducer
    keep: int


class Method:
    """A way to reduce visual tokens, in one or several stages.

    Subclasses are dataclasses whose fields are the method's options. Class attributes describe it:

    Attributes:
        name: registry name, lower case.
        title, arxiv: paper.
        signals: names out of `prune.tokens.SIGNALS` the reducer reads beside `features`.
        tower: name -> `prune.tokens.Tower`, the signals of the vision encoder it reads, as `tokens.tower[name]`; may be
            a property computed from the options.
        transition_layers: decoder layers whose "transition" it reads; may be a property.
        needs_projector: True if it reads `tokens.projector` or merges in the space of the tower.
        needs_question: True if a prompt without text after the image is an error.
        merges: True if dropped tokens are folded into kept ones.
        adaptive: True if the kept count depends on the content (then the budget is an upper bound).
        positions: "original" (kept tokens keep their position ids) or "compact" (renumbered): the paper's choice.
        search: option -> range or choices that `prune tune` searches; None searches every numeric option.
        newlines: True if separator columns inside the image (`image_newline`) count as visual tokens.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    tower: ClassVar[Mapping[str, Tower]] = MappingProxyType({})
    transition_layers: ClassVar[tuple[int, ...]] = ()
    needs_projector: ClassVar[bool] = False
    needs_question: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    positions: ClassVar[str] = "original"
    search: ClassVar[Mapping[str, tuple] | None] = None
    newlines = False

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        """The stages, in order, that leave `keep` of `geometry.visual_tokens` after the last one.

        The sites may depend on `geometry.layers` only: hooks are registered for them once.
        """
        raise NotImplementedError

    def sites(self, layers: int = 32) -> tuple[Site, ...]:
        """Where the method acts in a decoder of `layers` layers, in order."""
        return tuple(stage.site for stage in self.plan(Geometry(100, layers=layers), 10))

    def stages(self, geometry: Geometry, budget: Budget) -> tuple[Stage, ...]:
        """The stages for one image under a budget."""
        return self.plan(
            geometry,
            budget.solve(
                geometry,
                lambda keep: alive(geometry, self.plan(geometry, keep)),
                lambda keep: alive(geometry, self.plan(geometry, keep), in_mlp=True),
            ),
        )

    def kept(self, n_visual: int, budget: Budget, geometry: Geometry | None = None) -> int:
        """Exactly how many of `n_visual` tokens are left after the last stage (an upper bound if `adaptive`)."""
        geometry = replace(geometry or Geometry(n_visual), visual_tokens=n_visual)
        stages = self.stages(geometry, budget)
        return stages[-1].keep if stages else n_visual


def options_of(method: Method) -> dict[str, Any]:
    """Name and value of a method's options: its dataclass fields."""
    return {f.name: getattr(method, f.name) for f in fields(method) if f.init}  # type: ignore[arg-type]


def option_names(cls: type[Method]) -> list[str]:
    """The options of a class of methods."""
    return [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]


def alive(geometry: Geometry, stages: Sequence[Stage], in_mlp: bool = False) -> list[int]:
    """Visual tokens entering each decoder layer (or block), `geometry.layers` numbers.

    Args:
        in_mlp: count those each layer's MLP sees instead; they are fewer where a stage acts inside that block.
    """
    count, out, pending = geometry.visual_tokens, [], list(stages)
    for layer in range(geometry.layers):
        while pending and _first_short(pending[0], in_mlp) <= layer:
            count = pending.pop(0).keep
        out.append(count)
    return out


def _first_short(stage: Stage, in_mlp: bool) -> int:
    """The first layer that is entered by (or whose MLP sees) what the stage leaves over."""
    if stage.site.kind not in ("decoder", "block"):
        return 0
    inside = stage.site.kind == "block" and stage.reducer.place == "inside"
    return stage.site.layer + (inside and not in_mlp)


class Reducer(Method):
    """A one-stage method: implement `reduce`, and set `site` (an attribute or a property).

    Attributes:
        site: where it acts, as `Site.parse` reads it.
        place: at a block of a vision transformer, where in it: "input" (the tokens that enter the block) or "inside"
            (between attention, with its residual, and the second norm: the MLP sees the survivors only). May be a
            property or an option.
        proportional: True if attention should count merged tokens by their size, by default: log(size) is added to
            the logits of every key. `apply_pruner(proportional=...)` overrides it.
        reconstructs: True if the reducer has a `restore` of its own.
        block_reads: which of "q", "k" and "v" it reads of the signal "block"; others are not made where that costs a
            projection, and not priced.
        reads_last: False if it reads the signal "attention" without the `last` token, which vision transformers without
            CLS do not have. May be set by an option.
    """

    site: str = "projected"
    place: str = "input"
    proportional: bool = False
    reconstructs: ClassVar[bool] = False
    block_reads: ClassVar[str] = "qk"
    reads_last = True

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        """Choose the survivors.

        Args:
            tokens: the images' tokens.
            keep: per row the count to keep, on the host; at most the row's number of real tokens. The engine relies on
                it: a reducer that may return fewer valid slots says so with `adaptive = True`.
        """
        raise NotImplementedError

    def restore(self, before: Tensor, after: Tensor, now: Tensor) -> Tensor:
        """The full grid again, for `apply_pruner(restore=True)` on a vision transformer, if `reconstructs`.

        Args:
            before: `[B, N, D]` patches that entered this reducer.
            after: `[B, K, D]` those that left it.
            now: `[B, K, D]` the same K tokens after the last block (or as the stage behind this one restored them).

        Returns:
            `[B, N, D]`.
        """
        raise NotImplementedError

    def restore_flops(self, geometry: Geometry, keep: int) -> int:
        """FLOPs of the matrix products in `restore` for one image; 0 by default. See `selection_flops`."""
        return 0

    def selection_flops(self, geometry: Geometry, keep: int) -> int:
        """FLOPs of the matrix products in one image's selection, two per multiply-add; 0 by default.

        Return what `reduce` hands to `@`, `matmul`, `einsum` or a convolution: `[n, d] @ [d, m]` is `2 * n * d * m`.
        Sorting, norms, comparisons and products summed element by element (`kernels.dot`) are not counted, as
        `torch.utils.flop_counter` does not; nor are signals, which the engine makes and `evals.accounting` prices.
        `tests/test_accounting.py` compares the number with the counter for every row of `tests/matrix.py`.

        Args:
            geometry: of the stage: `visual_tokens` N of the image that enter it, `text_tokens` T, the columns of
                `text_features`, `hidden_size` D and the heads of the decoder.
            keep: tokens left over.
        """
        return 0

    def plan(self, geometry: Geometry, keep: int) -> tuple[Stage, ...]:
        return (Stage(Site.parse(self.site), self, keep),)


class Scorer(Reducer):
    """A reducer that keeps the highest-scored tokens: implement `score`."""

    def score(self, tokens: VisualTokens) -> Tensor:
        """`[B, N]` fp32, higher = keep. Values at padding are ignored."""
        raise NotImplementedError

    def reduce(self, tokens: VisualTokens, keep: Sequence[int]) -> Reduction:
        return Reduction(*topk_indices(self.score(tokens), keep, tokens.mask))
