"""A pruned model whose `generate` is measured: time to the first token, visual tokens, FLOPs, KV bytes."""

from __future__ import annotations

import logging
from statistics import mean, median

from torch import nn
from transformers import LogitsProcessorList

from prune.adapters.images import PIXELS
from prune.apply import Handle
from prune.errors import PruneError
from prune.evals.accounting import account, account_full
from prune.evals.subject import Clock

logger = logging.getLogger(__name__)


class Stop(BaseException):
    """Carries a `PruneError` (its cause) out of lmms-eval's loops, which make empty answers of any `Exception`."""


class Observed:
    """A model to call in the place of `model`; everything but `generate` is the model's own.

    Args:
        model: carries the pruner.
        handle: the pruner's.
    """

    def __init__(self, model: nn.Module, handle: Handle):
        self.model, self.handle = model, handle
        self._times: list[float] = []
        self._costs: dict[str, list[float]] = {}
        self._priced = True

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def generate(self, **inputs):
        """As the model's. Closed formulas price the call afterwards, about 2 ms per image.

        Raises:
            Stop: from the `PruneError` that ended the call.
        """
        clock = Clock(self.model.device)
        processors = LogitsProcessorList([*(inputs.get("logits_processor") or ()), clock])
        try:
            tokens = self.model.generate(**{**inputs, "logits_processor": processors})
        except PruneError as error:
            raise Stop(str(error)) from error
        self._times.append(1e3 * clock.first)
        if any(inputs.get(name) is not None for name in PIXELS.values()):
            self._price(inputs)
        return tokens

    def _price(self, inputs: dict) -> None:
        report = self.handle.last
        rows = range(len(report.tokens_per_layer))
        kept = [sum(len(image.kept) for image in report.images if image.sample == row) for row in rows]
        whole = [sum(image.tokens for image in report.images if image.sample == row) for row in rows]
        found = {
            "visual_tokens": whole,
            "kept_tokens": kept,
            "average_tokens": report.average_tokens,
            "kv_bytes": report.kv_bytes,
            "kv_bytes_full": report.kv_bytes_full,
        }
        try:
            found["prefill_flops"] = [one.prefill for one in account(self.model, report, inputs)]
            found["prefill_flops_full"] = [one.prefill for one in account_full(self.model, report, inputs)]
        except PruneError as error:  # beams, or a family without formulas: no reason to end an evaluation
            if self._priced:
                logger.warning("prefill FLOPs are left out: %s", error)
            self._priced = False
        for name, values in found.items():
            self._costs.setdefault(name, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """Numbers of all calls since the last time, empty without a call.

        Returns:
            "ttft_ms": median over the calls of the time from the call of `generate` to the logits of the first token.
            Means over the samples with images, named as in a row of `prune eval`: "visual_tokens" before pruning,
            "kept_tokens" after the last stage, "average_tokens" over the decoder layers, "kv_bytes" and
            "prefill_flops" (tower, projector, decoder, selection, head), both also un-pruned ("..._full").
        """
        found = {"ttft_ms": median(self._times)} if self._times else {}
        found |= {name: mean(values) for name, values in self._costs.items()}
        self._times, self._costs = [], {}
        return found
