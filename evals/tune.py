"""Search the options of a method that disturb a model least, at a fixed budget.

What is minimised is VFlowOpt's objective (arXiv 2508.05211), for any method: one minus the cosine between what the
pruned and the un-pruned model hand to the LM head after the last prompt token, as a mean over a calibration set. No
answers are needed, and one prefill per item is enough.

The search is optuna's TPE. Its trials are in an SQLite file, which outlives a kill at any moment; the sampler is seeded
anew for every trial from the seed and the number of trials before it, so a search that was stopped and resumed tries
what an uninterrupted one tries.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from prune.adapters.families import family_of
from prune.config import PrunerConfig
from prune.errors import PruneError
from prune.evals.accounting import account
from prune.evals.grid import Cell, Spec, budget, fitted
from prune.evals.results import BASELINE
from prune.evals.runner import versions
from prune.evals.space import TuneError, distribution, entry, with_params
from prune.evals.subject import Subject
from prune.evals.tasks import Item, Task
from prune.method import options_of

STUDY = "study.db"


# ------------------------------------------------------------------------------------------------------- objective
@torch.inference_mode()
def last_state(model: nn.Module, inputs: Mapping[str, object]) -> Tensor:
    """`[B, D]` fp32: what the model hands to its LM head for the last column of a left-padded batch."""
    caught: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: caught.append(args[0][:, -1].float()))
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return caught[-1]


class Drift:
    """How far pruning moves a model's last state, on fixed items: 0 is not at all.

    Processed inputs and the un-pruned model's states are made once.

    Args:
        subject: the model.
        items: at least one.
        batch_size: items per prefill.
    """

    def __init__(self, subject: Subject, items: Sequence[Item], batch_size: int):
        self.subject = subject
        self.batches = []
        with subject.under(Cell(Spec(BASELINE))):
            for start in range(0, len(items), batch_size):
                inputs = subject.answer(items[start : start + batch_size], 1).inputs
                self.batches.append((inputs, last_state(subject.model, inputs)))

    def __call__(self, cell: Cell, step: Callable[[int, float], None] | None = None) -> float:
        """Mean of 1 - cosine over the items.

        Args:
            cell: method, options and budget.
            step: gets (number of the batch, mean so far); what it raises ends the measurement.

        Raises:
            PruneError: the method cannot be run like this.
        """
        total, items = 0.0, 0
        with self.subject.under(cell):
            for number, (inputs, before) in enumerate(self.batches):
                cosine = torch.cosine_similarity(last_state(self.subject.model, inputs), before, dim=-1)
                total += (
                    (1 - cosine.nan_to_num(0.0)).double().sum().item()
                )  # a state of NaN is as bad as an unrelated one
                items += len(before)
                if step is not None:
                    step(number, total / items)
        return total / items

    def average_tokens(self, cell: Cell) -> float:
        """Visual tokens per decoder layer under a cell, mean over the items."""
        costs = []
        with self.subject.under(cell) as handle:
            for inputs, _ in self.batches:
                last_state(self.subject.model, inputs)
                costs += account(self.subject.model, handle.last, inputs)
        return sum(cost.average_tokens for cost in costs) / len(costs)


# ---------------------------------------------------------------------------------------------------------- search
@dataclass
class Search:
    """A search, and where its study file and its result go.

    Args:
        subject: the model.
        method: name.
        space: see `search_space`.
        task: its first `items` calibrate, the next as many (if there are) tell whether the result holds elsewhere.
        items: number of calibration items.
        by, share: the budget, as in `prune.evals.grid.budget`.
        fixed: options that are not searched.
        trials: of the whole search, those of earlier runs among them; the default options come in addition.
        seed: of the search.
        batch_size: items per prefill.
        early: give up on a trial whose batches so far are worse than the median of earlier ones.
        output: folder.
        tell: gets a line when there is something to say.
        progress: gets (trials done, trials of the search, best objective so far or None).
    """

    subject: Subject
    method: str
    space: Mapping[str, tuple]
    task: Task
    items: int = 256
    by: str = "average"
    share: Fraction = Fraction(1, 9)
    fixed: Mapping[str, object] | None = None
    trials: int = 40
    seed: int = 0
    batch_size: int = 16
    early: bool = False
    output: Path = Path("prune-tune")
    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int, float | None], None] = lambda done, total, best: None

    def __post_init__(self):
        items = [self.task.items[i] for i in range(min(2 * self.items, len(self.task.items)))]
        self.calibration = replace(self.task, items=items[: self.items])
        self.held_out = items[self.items :]
        layers = self.subject.layers
        default = PrunerConfig(self.method, fitted(self.method, layers) | dict(self.fixed or {})).build()
        self.default = options_of(default)

    def run(self) -> PrunerConfig:
        """Run the trials the study file lacks, and write the best options to `output/pruner_config.json`.

        Raises:
            TuneError: no optuna, a study of something else in the folder, or no trial was possible.
        """
        check_optuna()
        study = self._open()
        drift = Drift(self.subject, self.calibration.items, self.batch_size)
        default = self._default(study, drift)
        self._search(study, drift)
        config = self._result(study, drift, default)
        config.save_pretrained(self.output)
        return config

    def cell(self, options: Mapping[str, object]) -> Cell:
        return Cell(Spec(self.method, dict(options)), self.by, self.share)

    # ---------------------------------------------------------------------------------------------- the study file
    def _open(self):
        """The study in the folder's file: a new one, or an earlier run's of the same search."""
        import optuna

        about = json.dumps(self._about(), sort_keys=True)
        file = self.output / STUDY
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
        except OSError as error:
            raise TuneError(f"cannot write to {self.output}: {error.strerror}; give another -o") from None
        except Exception as error:  # of sqlite, sqlalchemy and alembic
            reason = str(getattr(error, "orig", error)).splitlines()[0]
            raise TuneError(f"cannot use the study file {file}: {reason}; give another -o, or --fresh") from None
        pruner = optuna.pruners.MedianPruner() if self.early else optuna.pruners.NopPruner()
        study = optuna.create_study(storage=storage, study_name="prune", pruner=pruner, load_if_exists=True)
        before = study.user_attrs.get("about")
        if before is None:
            study.set_user_attr("about", about)
        elif before != about:
            was, now = json.loads(before), json.loads(about)
            other = ", ".join(key for key in now if was.get(key) != now[key])
            raise TuneError(f"{file} holds another search (another {other}); give another -o, or --fresh")
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # what a stopped run was at
        return study

    def _about(self) -> dict:
        """What the search is, as the file remembers it; more trials are the same search."""
        return {
            "model": self.subject.description,
            "task": self._about_task(),
            "method": self.method,
            "options": self.default,
            "space": self.space,
            "budget": {"by": self.by, "share": float(self.share)},
            "seed": self.seed,
            "batch size": self.batch_size,
            "early": self.early,
        }

    def _about_task(self) -> dict:
        task = self.calibration
        options = {key: value for key, value in task.options.items() if key != "limit"}
        return {"name": task.name, "options": options, "items": len(task.items), "digest": task.digest}

    # ---------------------------------------------------------------------------------------------------- trials
    def _default(self, study, drift: Drift) -> float | None:
        """The objective of the default options, or None if they are impossible; measured once per study."""
        import optuna

        if "default" in study.user_attrs:
            return study.user_attrs["default"]
        try:
            value = drift(self.cell(self.default))
        except PruneError as error:
            self.tell(f"the default options are impossible here: {error}")
            value = None
        params = {key: entry(self.default, key) for key in self.space}
        if value is not None and not study.get_trials(deepcopy=False):
            trial = dict(params=params, distributions=self._distributions(), value=value, user_attrs={"default": True})
            with suppress(ValueError):  # a default outside the ranges: the search starts without it
                study.add_trial(optuna.create_trial(**trial))
        study.set_user_attr("default", value)
        return value

    def _distributions(self) -> dict:
        return {key: distribution(where) for key, where in self.space.items()}

    def _search(self, study, drift: Drift) -> None:
        """Run the trials that are missing. Impossible ones count: a search of n trials ends."""
        import optuna

        complete = (optuna.trial.TrialState.COMPLETE,)
        known = {str(trial.params): trial.value for trial in study.get_trials(states=complete)}
        done = len(finished(study))
        self.progress(done, self.trials, least(study))
        for number in range(done, self.trials):
            # Of the trials before and nothing else: resumed or not, the next one is the same.
            study.sampler = optuna.samplers.TPESampler(seed=(1_000_003 * self.seed + number) % 2**32)
            trial = study.ask(self._distributions())

            def step(batch: int, value: float, trial=trial) -> None:
                trial.report(value, batch)
                if trial.should_prune():
                    raise optuna.TrialPruned

            key = str(trial.params)  # counts and choices come again
            try:
                if key not in known:
                    cell = self.cell(with_params(self.default, trial.params))
                    known[key] = drift(cell, step if self.early else None)
                study.tell(trial, known[key])
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except PruneError as error:
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self.progress(number + 1, self.trials, least(study))

    # ---------------------------------------------------------------------------------------------------- result
    def _result(self, study, drift: Drift, default: float | None) -> PrunerConfig:
        """The config of the best options, with everything that was measured on them and on the defaults."""
        value, options = default, self.default
        if (lowest := least(study)) is not None and (default is None or lowest < default):
            value, options = lowest, with_params(self.default, study.best_trial.params)
        if value is None:
            errors = [trial.user_attrs["error"] for trial in finished(study) if "error" in trial.user_attrs]
            reason = errors[-1] if errors else "no trial was run"
            raise TuneError(f"none of {self.trials} trials was possible, nor are the defaults. The last one: {reason}")
        elsewhere = Drift(self.subject, self.held_out, self.batch_size) if self.held_out else None
        cells = {"default": None if default is None else self.cell(self.default), "best": self.cell(options)}

        def measure(function: Callable[[Cell], float] | None) -> dict[str, float | None]:
            return {name: function(cell) if function and cell else None for name, cell in cells.items()}

        trials = finished(study)
        return PrunerConfig.of(
            cells["best"].spec.method(self.subject.layers),
            budget(self.by, self.share),
            families=tuple(
                family.name for family in (family_of(self.subject.model.config.model_type),) if family.model_types
            ),
            metrics={
                "objective": "mean of 1 - cosine of the last prompt token's state before the LM head, to un-pruned",
                "calibration": {"default": default, "best": value},
                "held_out": measure(elsewhere),
                "average_tokens": measure(drift.average_tokens),
                "task": self._about_task(),
                "held_out_items": len(self.held_out),
                "trials": len(trials),
                "impossible_trials": sum("error" in trial.user_attrs for trial in trials),
                "default_options": self.default,
                "space": dict(self.space),
                "seed": self.seed,
                "model": self.subject.description,
                "versions": versions() | {"optuna": metadata.version("optuna")},
            },
        )


def finished(study) -> list:
    """The trials that count: neither the default options nor those a stopped run was at."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if "default" not in trial.user_attrs]


def least(study) -> float | None:
    """The best objective so far, if there is one."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min((trial.value for trial in trials), default=None)


def check_optuna() -> None:
    """Raises TuneError if there is no optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise TuneError('prune tune needs the package optuna: pip install "prune-vlm[tune]"')
