"""How many visual tokens to keep: one `Budget` with four spellings, resolved against a `Geometry`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Real

from prune.errors import BudgetError

FINITE = 2.0**63


@dataclass(frozen=True)
class Geometry:
    """The sizes a budget is resolved against: one image in one sample, and the decoder it goes through.

    For a vision transformer the decoder's layers are its blocks, the visual tokens its patches, and the text tokens the
    prefix tokens (CLS, registers), which always stay.

    Args:
        visual_tokens: visual tokens of the image (or of the whole sample, for a `flops` budget).
        text_tokens: all other tokens of the sample; only a `flops` budget looks at them.
        layers: number of decoder layers.
        hidden_size, intermediate_size, heads, kv_heads, head_dim: decoder widths; only for FLOPs and KV bytes.
        tower_width, tower_heads: width of the vision encoder's layers and number of their heads; 0 where unknown, as
            the next two: only for the FLOPs of a selection that works on its signals.
        tower_features: channels of what the projector reads for one token.
        projector_flops: of the projector for one token.
        projector_hidden: width between the two linear layers of a projector that has just these and an activation; 0
            for other projectors.
        tower_layers: layers of the vision encoder up to the last one that is read; 0 for a vision transformer alone,
            whose blocks are `layers`.
        gated: whether the MLP has three matrices (decoders) or two (most vision transformers).
    """

    visual_tokens: int
    text_tokens: int = 0
    layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    tower_width: int = 0
    tower_heads: int = 1
    tower_features: int = 0
    projector_flops: int = 0
    projector_hidden: int = 0
    tower_layers: int = 0
    gated: bool = True

    @property
    def blocks(self) -> int:
        """Blocks of the vision encoder, or of the vision transformer."""
        return self.tower_layers or self.layers

    def prefill_flops(self, alive: Sequence[int], in_mlp: Sequence[int] | None = None) -> int:
        """FLOPs of the decoder's prefill, two per multiply-add.

        Counts the q, k, v, o projections, the MLP and attention over all T x T pairs (as
        `torch.utils.flop_counter` counts SDPA: causal masking is not subtracted). Tower, projector and LM head
        are left out: pruning does not change them.

        Args:
            alive: visual tokens entering each decoder layer, one number per layer.
            in_mlp: those its MLP sees, where a cut lies between attention and MLP; None means the same.
        """
        width = self.heads * self.head_dim
        projections = 2 * self.hidden_size * (width + self.kv_heads * self.head_dim)
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        totals = [n + self.text_tokens for n in alive]
        after = totals if in_mlp is None else [n + self.text_tokens for n in in_mlp]
        return sum(2 * t * projections + 4 * t * t * width + 2 * m * mlp for t, m in zip(totals, after))

    def kv_bytes(self, alive: Sequence[int], bytes_per_value: int = 2) -> int:
        """Bytes of keys and values the decoder stores for `alive` visual tokens per layer plus the text."""
        per_token = 2 * self.kv_heads * self.head_dim * bytes_per_value
        return sum((n + self.text_tokens) * per_token for n in alive)


@dataclass(frozen=True)
class Budget:
    """How many visual tokens survive. Exactly one of the four spellings is given.

    Args:
        ratio: share of the visual tokens REMOVED after the last stage, in [0, 1).
        keep: visual tokens kept per image after the last stage, >= 1.
        average: visual tokens per image, averaged over the decoder layers, > 0: the equal-compute comparison. Below 1
            it is a share of the image's tokens, for images of different sizes: 1 / 9 of 576 tokens is 64.
        flops: share of the un-pruned decoder prefill FLOPs (`Geometry.prefill_flops`) left over, in (0, 1].

    Counts round to nearest, ties to even, and never fall below 1 per image. `ratio` is read as the decimal it was
    written as (0.9 of 15 tokens keeps 1.5 -> 2, not 1.4999... -> 1).

    Raises:
        BudgetError: none or several are given, or the value is out of range, NaN or no number.
    """

    ratio: float | None = None
    keep: int | None = None
    average: float | None = None
    flops: float | None = None

    def __post_init__(self):
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise BudgetError(f"give exactly one of ratio, keep, average, flops (got {names}), for example ratio=0.9")
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= FINITE:
            raise BudgetError(f"{name}={value!r:.80} is not a finite number, or too large a one")
        good, domain = {
            "ratio": (0 <= value < 1, "in [0, 1): the share of visual tokens removed"),
            "keep": (value >= 1 and value == int(value), "a whole number >= 1: visual tokens kept per image"),
            "average": (value > 0, "> 0: mean visual tokens per decoder layer"),
            "flops": (0 < value <= 1, "in (0, 1]: the share of prefill FLOPs left"),
        }[name]
        if not good:
            raise BudgetError(f"{name}={value!r} must be {domain}")

    def __str__(self):
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{name}={value:.4g}" for name, value in given.items() if value is not None)

    def solve(
        self,
        geometry: Geometry,
        alive: Callable[[int], Sequence[int]],
        in_mlp: Callable[[int], Sequence[int]] | None = None,
    ) -> int:
        """The number of visual tokens one image keeps after the last stage.

        Args:
            geometry: sizes; `geometry.visual_tokens` is the un-pruned count N.
            alive: the method's profile: final count -> visual tokens entering each decoder layer. It must not
                decrease with the final count.
            in_mlp: the same for what each layer's MLP sees, which `flops` looks at; None means the same numbers.

        Returns:
            A count in [1, N]; for `average` and `flops` the one whose cost is nearest (the smaller one on a tie).

        Raises:
            BudgetError: even one token left over costs more than `average` or `flops` allows.
        """
        n = geometry.visual_tokens
        if self.ratio is not None:
            return min(n, max(1, round(n * (1 - Fraction(str(float(self.ratio)))))))
        if self.keep is not None:
            return min(n, int(self.keep))
        if self.average is not None:
            target = self.average if self.average >= 1 else max(1, self.average * n)
            cost = lambda k: sum(alive(k)) / geometry.layers  # noqa: E731
        else:
            assert self.flops is not None  # exactly one of the four is set
            full = geometry.prefill_flops([n] * geometry.layers)
            in_mlp = in_mlp or alive
            target, cost = self.flops, lambda k: geometry.prefill_flops(alive(k), in_mlp(k)) / full
        return self._nearest(target, cost, n)

    def _nearest(self, target: float, cost: Callable[[int], float], n: int) -> int:
        if cost(n) <= target:
            return n
        if cost(1) > target:
            raise BudgetError(
                f"{self} is out of reach: one token kept of {n} still costs {cost(1):.4g}, more than "
                f"{target:.4g}; raise the budget or prune at an earlier layer"
            )
        low, high = 1, n  # cost(low) <= target < cost(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= target else (low, middle)
        return low if target - cost(low) <= cost(high) - target else high
