"""A model under evaluation: it answers batches of items, and says what that cost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from prune.apply import Handle, apply_pruner
from prune.evals.accounting import account, account_full
from prune.evals.grid import Cell, budget
from prune.evals.tasks import Item, Task
from prune.loading import load_model, model_path


@dataclass
class Answers:
    """What came of one batch: texts and new tokens per item, seconds to the first token and after it."""

    texts: list[str]
    new_tokens: list[int]
    inputs: dict
    prefill: float
    decode: float
    probes: ClassVar[dict] = {}  # what `prune.evals.vit_subject` has, and questions have not

    @property
    def times(self) -> dict[str, float]:
        """In ms: to the first token, per item, and per further token."""
        count = len(self.texts)
        return {
            "prefill_ms": 1e3 * self.prefill / count,
            "decode_ms": 1e3 * self.decode / max(1, sum(self.new_tokens) - count),
        }


class Subject:
    """A loaded model and its processor.

    Args:
        name, device, dtype, attention: for `prune.loading.load_model`.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name: str, device: str | None = None, dtype: str = "auto", attention: str | None = None):
        self.name = str(Path(name).resolve()) if Path(name).is_dir() else name
        self.model, self.processor = load_model(name, device, dtype, attention)
        self.processor.tokenizer.padding_side = "left"  # generation goes on at the right end

    @cached_property
    def description(self) -> dict:
        """What a row says of the model; `revision` tells apart what a name stood for on different days."""
        return {
            "name": self.name,
            "revision": getattr(self.model.config, "_commit_hash", None) or revision(model_path(self.name)),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
        }

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def options(self, task: Task) -> dict:
        """What a row says of how a task is run."""
        return {"max_new_tokens": task.max_new_tokens}

    @contextmanager
    def under(self, cell: Cell, task: Task | None = None) -> Iterator[Handle]:
        """The model pruned as the cell says, whatever the task."""
        with apply_cell(self.model, cell, self.layers) as handle:
            yield handle

    def inputs(self, items: Sequence[Item]):
        """What the model takes for a batch of questions, by the processor's chat template, on its device."""
        conversations = []
        for item in items:
            content = [{"type": "image", "image": image} for image in item.images]
            conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": item.question}]}])
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], max_new_tokens: int) -> Answers:
        """Greedy answers to a batch."""
        inputs = self.inputs(items)
        clock = Clock(self.model.device)
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([clock]),
        )
        total = clock.elapsed()
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return Answers([text.strip() for text in texts], self._count(new), inputs, clock.first, total - clock.first)

    def _count(self, new: Tensor) -> list[int]:
        """Tokens generated per row, the end token included, padding not."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([-1] if ends is None else ends, device=new.device).flatten()
        before = torch.isin(new, ends).cumsum(1) - torch.isin(new, ends).long()
        return (before == 0).sum(1).tolist()

    def cost(self, handle: Handle, answers: Answers) -> dict[str, object]:
        """Tokens, FLOPs and bytes of a batch, SUMMED over its items; the keys of a row's `cost`."""
        report = handle.last
        pruned, full = (f(self.model, report, answers.inputs) for f in (account, account_full))
        kept = [sum(len(image.kept) for image in report.images if image.sample == row) for row in range(len(pruned))]
        return {
            "visual_tokens": sum(image.tokens for image in report.images),
            "kept_tokens": sum(kept),
            "average_tokens": sum(one.average_tokens for one in pruned),
            "tokens_per_layer": [sum(layer) for layer in zip(*(one.tokens_per_layer for one in pruned))],
            "text_tokens": sum(report.text_tokens),
            "new_tokens": sum(answers.new_tokens),
            "flops": {part: sum(one.flops[part] for one in pruned) for part in pruned[0].flops},
            "prefill_flops": sum(one.prefill for one in pruned),
            "prefill_flops_full": sum(one.prefill for one in full),
            "decode_flops": sum(one.decode(new - 1) for one, new in zip(pruned, answers.new_tokens)),
            "kv_bytes": sum(one.kv_bytes for one in pruned),
            "kv_bytes_full": sum(one.kv_bytes for one in full),
        }


def apply_cell(model: nn.Module, cell: Cell, layers: int) -> Handle:
    """Prune a model of so many layers as the cell says; at ratio 0 it computes bit for bit what it would un-pruned, and
    its tokens are counted all the same."""
    if not cell.pruned:
        return apply_pruner(model, "random", ratio=0.0)
    wanted = budget(cell.by, cell.share)
    given = {f.name: getattr(wanted, f.name) for f in fields(wanted)}
    return apply_pruner(model, cell.spec.method(layers), **given)


class Clock(LogitsProcessor):
    """Notes when the first token's logits are there, and leaves them alone."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.first = None
        self.wait()
        self.start = time.perf_counter()

    def elapsed(self) -> float:
        self.wait()
        return time.perf_counter() - self.start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.elapsed()
        return scores


def revision(folder: Path) -> str | None:
    """A short name for the weights in a folder: of their bytes, or of their sizes and dates if there are many."""
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    small = sum(file.stat().st_size for file in files) <= 2**26
    for file in files:
        about = file.stat()
        digest.update(file.read_bytes() if small else f"{file.name} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12] if files else None


def score(task: Task, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """What the task gives for each answer."""
    return [float(task.scorer(text, item)) for text, item in zip(texts, items)]


def add(total, more):
    """Sums of nested dictionaries and lists of numbers, of one shape."""
    if isinstance(more, dict):
        return {key: add(total[key], more[key]) for key in more}
    if isinstance(more, list):
        return [add(a, b) for a, b in zip(total, more)]
    return total + more


def divide(total, by: float):
    """Means from sums, in the same shapes."""
    if isinstance(total, dict):
        return {key: divide(value, by) for key, value in total.items()}
    if isinstance(total, list):
        return [divide(value, by) for value in total]
    return total / by
