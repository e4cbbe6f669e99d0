"""A vision transformer under evaluation: it names the classes of pictures, and says what that cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prune.apply import Handle
from prune.errors import ConfigError
from prune.evals.digits import CHECKPOINT
from prune.evals.grid import Cell
from prune.evals.subject import apply_cell, revision
from prune.evals.tasks import Item, Task
from prune.evals.vision import BUILT_IN, Vision, load_vision
from prune.evals.vit_accounting import account, account_full, vit_parts

NEIGHBOURS = 5
PROBE_PICTURES = 2000  # that probes are fitted on, at most
PROBE_BATCH = 50


@dataclass
class Said:
    """What came of one batch.

    Args:
        texts: the class of every picture, by what decides.
        probes: the same by everything else that was fitted.
        seconds: from pixels to features and logits.
    """

    texts: list[str]
    probes: dict[str, list[str]]
    seconds: float

    @property
    def times(self) -> dict[str, float]:
        """Per picture, in ms; see `Answers.times`."""
        return {"prefill_ms": 1e3 * self.seconds / len(self.texts)}


class ViTSubject:
    """A loaded vision transformer; has what `prune.evals.runner` wants of a subject.

    The class of a picture is what the model's own classifier says if it has as many outputs as the task has classes,
    else the nearest prompt for a model of pictures and texts (zero-shot), else the vote of the nearest neighbours.

    Args:
        name, device, dtype, attention: for `prune.evals.vision.load_vision`.
        vision: instead of them, a model that is there.

    Raises:
        UserError, ConfigError: it cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        device: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        vision: Vision | None = None,
    ):
        self.name = str(Path(name).resolve()) if Path(name).is_dir() else name
        self.vision = vision or load_vision(name, device, dtype, attention)
        self.attention = attention
        self.task: Task | None = None
        self.readers: dict[str, Callable[[Tensor], list[str]]] | None = None

    @property
    def model(self) -> torch.nn.Module:
        return self.vision.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def description(self) -> dict:
        """What a row says of the model; see `Subject.description`."""
        weights = next(self.model.parameters())
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return {
            "name": self.name,
            "revision": commit or revision(CHECKPOINT if self.name == BUILT_IN else Path(self.name)),
            "dtype": str(weights.dtype).removeprefix("torch."),
            "attention": self.attention or getattr(getattr(self.model, "config", None), "_attn_implementation", None),
        }

    @cached_property
    def layers(self) -> int:
        """Number of blocks.

        Raises:
            UnsupportedModelError: it is no vision transformer the library knows.
        """
        return len(vit_parts(self.model).blocks)

    def options(self, task: Task) -> dict:
        """What a row says of how the task is run: what decides about a picture's class."""
        return {"decided_by": self.reader(task)}

    def reader(self, task: Task) -> str:
        """What decides about a picture's class: "head", "zero-shot" or "knn".

        Raises:
            ConfigError: nothing can: no fitting classifier, no texts, no pictures to fit probes on.
        """
        classes = task.classes
        if self.vision.embed_texts is not None:
            return "zero-shot"
        if self.vision.outputs == len(classes.names):
            return "head"
        if classes.train:
            return "knn"
        raise ConfigError(
            f"{self.name} has no classifier of {len(classes.names)} classes, and {task.name} has no pictures to fit "
            'probes on; leave split="all" out'
        )

    @contextmanager
    def under(self, cell: Cell, task: Task) -> Iterator[Handle]:
        """The model pruned as the cell says, answering `task`; probes are fitted at the first answer."""
        with apply_cell(self.model, cell, self.layers) as handle:
            self.task, self.readers = task, None
            try:
                yield handle
            finally:
                self.task = self.readers = None

    @torch.inference_mode()
    def answer(self, items: Sequence[Item], max_new_tokens: int = 0) -> Said:
        """The class of every picture; outside of `under` nothing is asked, and the texts are empty.

        Args:
            items: a batch.
            max_new_tokens: has no meaning here.
        """
        if self.task is not None and self.readers is None:
            self.readers = self._fit(self.task)
        pixels = self._pixels(items)
        self._wait()
        start = time.perf_counter()
        features = self.vision.pooled(pixels)
        if self.vision.head is not None:
            self.vision.head(features)
        self._wait()
        seconds = time.perf_counter() - start
        found = {name: read(features) for name, read in (self.readers or {}).items()}
        texts = found.pop(self.reader(self.task)) if self.task is not None else [""] * len(items)
        return Said(texts, found, seconds)

    def cost(self, handle: Handle, said: Said) -> dict[str, object]:
        """Tokens and FLOPs of a batch, SUMMED over its pictures; keys as of `Subject.cost`."""
        report = handle.last
        pruned, full = (f(self.model, report) for f in (account, account_full))
        return {
            "visual_tokens": sum(image.tokens for image in report.images),
            "kept_tokens": sum(len(image.kept) for image in report.images),
            "average_tokens": sum(one.average_tokens for one in pruned),
            "tokens_per_layer": [sum(layer) for layer in zip(*(one.tokens_per_layer for one in pruned))],
            "flops": {part: sum(one.flops[part] for one in pruned) for part in pruned[0].flops},
            "prefill_flops": sum(one.total for one in pruned),
            "prefill_flops_full": sum(one.total for one in full),
        }

    def _pixels(self, items: Sequence[Item]) -> Tensor:
        weights = next(self.model.parameters())
        return self.vision.prepare([item.images[0] for item in items]).to(weights.device, weights.dtype)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------------------------------------------ classes
    def _fit(self, task: Task) -> dict[str, Callable[[Tensor], list[str]]]:
        """What can name the classes of a task, by name, from pooled features: what decides, and the probes."""
        readers: dict[str, Callable[[Tensor], list[str]]] = {}
        if self.vision.embed_texts is not None:
            readers["zero-shot"] = self._zero_shot(task)
        if self.reader(task) == "head":
            labels = head_labels(self.vision.labels, task.classes.names)
            readers["head"] = lambda features: [labels[at] for at in self.vision.head(features).argmax(-1).tolist()]
        train = task.classes.train[:PROBE_PICTURES]
        if train:
            batches = [train[start : start + PROBE_BATCH] for start in range(0, len(train), PROBE_BATCH)]
            features = np.concatenate([_array(self.vision.pooled(self._pixels(batch))) for batch in batches])
            readers |= probes(features, [item.answer for item in train])
        return readers

    def _zero_shot(self, task: Task) -> Callable[[Tensor], list[str]]:
        names = task.classes.names
        words = [name.replace("_", " ") for name in names]
        texts = self.vision.embed_texts([task.classes.prompt.format(word) for word in words])
        texts = F.normalize(texts.float(), dim=-1)
        return lambda features: [names[at] for at in (features.float() @ texts.T).argmax(-1).tolist()]


def probes(features: np.ndarray, labels: Sequence[str]) -> dict[str, Callable[[Tensor], list[str]]]:
    """scikit-learn's classifiers on features [n, F]: "knn" (nearest by cosine) and "linear" (logistic regression on
    standardised features)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = {
        "knn": KNeighborsClassifier(min(NEIGHBOURS, len(features)), metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    for model in found.values():
        model.fit(features, labels)
    return {name: _reading(model) for name, model in found.items()}


def _reading(model) -> Callable[[Tensor], list[str]]:
    return lambda features: [str(label) for label in model.predict(_array(features))]


def _array(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def head_labels(labels: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The task's classes in the order of a classifier's outputs: by its labels where these name the same classes, else
    in the task's own (sorted, as folders of images are everywhere)."""
    known = {name.casefold(): name for name in names}
    found = [known.get(label.casefold()) for label in labels]
    return found if None not in found and len(set(found)) == len(names) else names
