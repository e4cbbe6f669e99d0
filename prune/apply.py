"""The front door: `apply_pruner` attaches a method to a model and returns a `Handle`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune.budget import Budget
from prune.config import PrunerConfig, find_config
from prune.errors import BudgetError, ConfigError, UnsupportedModelError
from prune.method import Method, options_of
from prune.options import check_types
from prune.registry import get_method
from prune.report import Report


def apply_pruner(
    model: nn.Module,
    method: str | os.PathLike | Method,
    *,
    ratio: float | None = None,
    keep: int | None = None,
    average: float | None = None,
    flops: float | None = None,
    positions: str | None = None,
    restore: bool = False,
    proportional: bool | None = None,
    block: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **options,
) -> Handle:
    """Prune the visual tokens of an unmodified vision-language model or vision transformer from now on.

    Forward hooks go on; weights, classes and `forward` methods stay as they are. All checks run first: an error
    leaves the model untouched.

    Args:
        model: a Hugging Face image-text-to-text model, or a vision transformer of timm, open_clip or Hugging Face (see
            the README for the families), PEFT-wrapped or not. Of a CLIP model the image side is pruned.
        method: a registered name (`list_methods()`), a method object (`get_method(...)`, `Compose(...)`), a folder
            (or file) that `save_pretrained` or `prune tune` wrote, or "user/repo", a repository of the Hugging Face
            hub that `push_to_hub` wrote. A registered name wins over a folder of that name, a folder over a repository.
        ratio, keep, average, flops: the budget, exactly one of them; see `Budget`. `ratio` is the share REMOVED. A
            saved pruner brings its own, which one given here replaces.
        positions: "original" (kept tokens keep their position ids, gaps stay) or "compact" (renumbered without gaps;
            for methods that act before the decoder only). None takes the method's own. Not for vision transformers:
            there patches keep their place.
        restore: for vision transformers: from the first cut on every block hands out features of all patches again
            (the blocks work on the survivors alone). A merged patch gets a copy of its group, a dropped one what it was
            when it was dropped, and methods with a reconstruction of their own (`Reducer.restore`) use it. What reads
            features as a grid, such as `forward_intermediates`, `get_intermediate_layers(reshape=True)` or dense
            prediction, needs it, and an average over patches then counts merged ones by their number. False leaves the
            survivors only: hidden states of later layers are shorter, an average is one over the survivors, each
            counted once. Either way `hidden_states[0]` of a Hugging Face model is what enters block 0, short after a
            cut at its input. Methods that keep different numbers of patches in the images of a batch need it where
            the model pools over patches; else their padding is zero behind the last block.
        proportional: for vision transformers: whether attention counts a merged token as the patches it stands for, by
            log(size) added to the logits of its key in an additive mask. None takes the method's own
            (`Reducer.proportional`).
        block: for vision transformers: the block at whose input a method written for vision-language models acts. None
            is block k for a method at `decoder:k`, and a third of the depth for one at `projected`. Where such a method
            reads the attention of the last prompt token it gets that of CLS.
        revision: branch, tag or commit of the repository. None is main. Refused for anything but a repository.
        cache_dir, token, local_files_only: as in `huggingface_hub`; they mean nothing for anything but a repository.
        **options: the method's options, when it is given by name; they replace those of a saved pruner.

    Returns:
        The handle; also a context manager that removes the pruner at its end.

    Raises:
        UnknownMethodError, ConfigError: no such method, option, position policy, folder, repository or revision, a
            broken config, or no network.
        BudgetError: not exactly one budget, or out of range.
        UnsupportedModelError: not a model we know how to attach to.
        UnsupportedMethodError: the model lacks what the method needs.
        AlreadyAttachedError: the model carries a pruner already.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"apply_pruner wants a model (torch.nn.Module), got {type(model).__name__}")
    given: dict[str, Any] = {"ratio": ratio, "keep": keep, "average": average, "flops": flops}
    source = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    saved = find_config(method, **source) if isinstance(method, str | os.PathLike) else None
    if saved is None and revision is not None:
        raise ConfigError(f"revision={revision!r:.80} is of a repository on the hub, and {method!r:.80} is none")
    if saved is not None:
        as_saved = all(value is None for value in given.values())
        method = saved.build(options, own_budgets=as_saved)
        given = vars(saved.budget) if as_saved and saved.budget is not None else given
        positions = saved.positions if positions is None else positions
        restore = restore or saved.vit.get("restore", False)
        proportional = saved.vit.get("proportional") if proportional is None else proportional
        block = saved.vit.get("block") if block is None else block
    elif isinstance(method, Method):
        if not is_dataclass(method):
            raise ConfigError(f"{type(method).__name__} must be a dataclass, so that its options say what it is")
        if options:
            raise ConfigError(f"options {sorted(options)} go into the method object: {type(method).__name__}(...)")
        for one in getattr(method, "members", (method,)):  # made by hand: nobody has looked at the types
            check_types(type(one), options_of(one))
    elif isinstance(method, str):
        method = get_method(method, **options)
    else:
        raise ConfigError(f"method wants a name or a method object, got {type(method).__name__}")
    carries_own = getattr(method, "budgets", None) is not None
    if carries_own and any(value is not None for value in given.values()):
        raise BudgetError("this Compose has budgets of its own; give apply_pruner none, or Compose none")
    budget = None if carries_own else Budget(**given)
    if positions not in (None, "original", "compact"):
        raise ConfigError(f"positions={positions!r} must be 'original' or 'compact'")
    if not isinstance(restore, bool):
        raise ConfigError(f"restore={restore!r:.80} must be True or False")
    if not (proportional is None or isinstance(proportional, bool)):
        raise ConfigError(f"proportional={proportional!r:.80} must be True, False or None")

    from prune.adapters import attach  # model code, and with it transformers, is imported only when there is a model

    handle = Handle(attach(model, method, budget, positions, restore, proportional, block))
    handle._engine.saved = saved
    return handle


def get_handle(model: nn.Module) -> Handle | None:
    """The handle of the pruner a model carries (a deep copy of a pruned model carries its own), or None."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"get_handle wants a model (torch.nn.Module), got {type(model).__name__}")
    from prune.adapters import attached

    engine = attached(model)
    return None if engine is None else Handle(engine)


class Handle:
    """A pruner on a model: inspect it, change its budget, switch it off, remove it.

    Attributes:
        method: the method object.
    """

    def __init__(self, engine):
        self._engine = engine

    @property
    def method(self) -> Method:
        return self._engine.method

    @property
    def budget(self) -> Budget | None:
        """The budget of the next prefill; assign a `Budget` to change it without re-attaching."""
        return self._engine.budget

    @budget.setter
    def budget(self, budget: Budget):
        if not isinstance(budget, Budget):
            raise BudgetError(f"assign a Budget, such as Budget(keep=128), not {budget!r}")
        if self._engine.budget is None:
            raise BudgetError("this Compose has budgets of its own; attach a Compose without them to set one budget")
        self._engine.budget = budget

    @property
    def last(self) -> Report | None:
        """What the last prefill with images did (None before the first). Reading it may wait for the device.

        On a vision transformer a `prune.report.BlockReport` of the last forward.
        """
        record = self._engine.record
        return None if record is None else record.report()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context new prefills are not pruned: the model computes bit for bit what it would un-hooked.

        Conversations that were pruned before go on correctly. The switch is the handle's: other threads see it too.
        """
        before, self._engine.enabled = self._engine.enabled, False
        try:
            yield
        finally:
            self._engine.enabled = before

    @contextmanager
    def visual_mask(self, mask: Tensor) -> Iterator[None]:
        """Within this context `mask` (`[B, L]` bool) says which columns of `inputs_embeds` are visual tokens.

        Needed only when image features were merged into `inputs_embeds` by hand: nothing marks them then. Each
        contiguous run of True counts as one image.
        """
        if not self._engine.takes_visual_mask:
            raise ConfigError("visual_mask is for vision-language models; every patch of an image is a visual token")
        if not (isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool):
            raise ConfigError("visual_mask wants a tensor [B, L] of bool: the columns of inputs_embeds that are visual")
        before, self._engine.visual_mask = self._engine.visual_mask, mask
        try:
            yield
        finally:
            self._engine.visual_mask = before

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        metrics: dict | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ) -> Path:
        """Write the pruner to `folder/pruner_config.json`; `apply_pruner(model, folder)` attaches it again.

        Weights of the method (the `scorer` of `index_preserving`) are copied to `folder/weights/`, as safetensors. What
        a pruner was loaded with and this version does not know is written back, and so are its metrics while method and
        budget are what they were.

        Args:
            folder: is made if it is not there.
            metrics: numbers to keep with it, JSON-able.
            push_to_hub: whether to upload it too.
            repo_id: for the upload; None is the folder's name, in the namespace of whom the token belongs to.
            **kwargs: for the upload, see `push_to_hub`.

        Returns:
            The path of the file.

        Raises:
            ConfigError: the method is not registered, the file cannot be written, or the upload fails.
        """
        if (kwargs or repo_id) and not push_to_hub:
            raise ConfigError(f"{', '.join(sorted(kwargs)) or 'repo_id'} wants push_to_hub=True")
        config = self._config(metrics)
        file = config.save_pretrained(folder)
        if push_to_hub:
            config.push_to_hub(repo_id or file.parent.resolve().name, **kwargs)
        return file

    def push_to_hub(self, repo_id: str, metrics: dict | None = None, **kwargs) -> str:
        """Upload the pruner with a model card to the Hugging Face hub. `apply_pruner(model, repo_id)` attaches it.

        Args:
            repo_id: "user/repo", or "repo" of whom the token belongs to; made if need be.
            metrics: numbers to keep with it, JSON-able; the card shows them.
            **kwargs: commit_message, private, token, revision, create_pr, as in `PrunerConfig.push_to_hub`.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            ConfigError: the method is not registered, or the upload fails; says why.
        """
        return self._config(metrics).push_to_hub(repo_id, **kwargs)

    def _config(self, metrics: dict | None) -> PrunerConfig:
        family = self._engine.family
        config = PrunerConfig.of(
            self.method,
            self.budget,
            positions=self._engine.positions,
            families=() if family == "unknown" else (family,),
            vit=self._engine.arguments,
            metrics=metrics or {},
        )
        saved = getattr(self._engine, "saved", None)
        return config if saved is None else config.continuing(saved)

    def remove(self) -> None:
        """Take every hook off; the model is what it was before. Safe to call twice.

        A KV cache that was filled while the pruner was on still misses what was dropped: start a new one.
        """
        self._engine.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def __repr__(self):
        state = "attached" if self._engine.attached else "removed"
        return f"Handle({self.method!r}, {self.budget}, {state})"
