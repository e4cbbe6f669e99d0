"""Run a sweep: models x tasks x methods x budgets, resumable, over one process or several.

A cell is one method at one budget for one model and task. Every finished batch goes to the cell's journal beside the
results file, every finished cell to the results file: whatever ends a run costs one batch. Cells run one after the
other and batches are cut alike however many processes share them, so a run that was killed and resumed, or shared, ends
with the rows of one that was not.
"""

from __future__ import annotations

import glob
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fractions import Fraction
from functools import lru_cache, reduce
from importlib import metadata
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from prune._version import __version__
from prune.apply import Handle
from prune.errors import BudgetError, ConfigError, PruneError
from prune.evals.cache import Cached
from prune.evals.grid import SHARES, Cell, Spec, applicable, cells, fingerprint
from prune.evals.results import SCHEMA, ResultsError, append_line, mend, read_lines, read_rows
from prune.evals.scorers import accepted
from prune.evals.stats import mean_interval
from prune.evals.subject import Subject, add, divide, score
from prune.evals.tasks import Task
from prune.evals.team import Team
from prune.evals.vit_subject import ViTSubject
from prune.method import options_of

TIMES = ("prefill_ms", "decode_ms")
PACKAGES = (
    "torch", "transformers", "timm", "open_clip_torch", "datasets", "scikit-learn", "Pillow", "numpy",
)  # fmt: skip
"""What scores and times may depend on: the models' code, and what makes or decodes the pictures."""


@dataclass
class Sweep:
    """What to run, and where the rows go.

    Args:
        models: names for `prune.loading.load_model`, or for tasks of classes `prune.evals.vision.load_vision`.
        tasks: to answer; all of questions, or all of classes.
        output: the results file; cells it has already are not run again, failed ones are.
        fresh: put the results file aside first.
        methods: None for all that apply to a model.
        by: what is made equal: "average" (tokens per layer), "keep" (tokens after the last stage) or "flops".
        shares: of the un-pruned amount, in (0, 1].
        batch_size: items per batch. Padding moves results in half precision, so it belongs to a cell's identity.
        dtype, attention: for `load_model`.
        tell: gets a line when there is something to say.
        progress: gets (items done now, items of the sweep) after every batch.
        team: the processes that share the sweep, and the device of this one.
    """

    models: Sequence[str]
    tasks: Sequence[Task]
    output: Path
    fresh: bool = False
    methods: Sequence[Spec] | None = None
    by: str = "average"
    shares: Sequence[Fraction] = SHARES
    batch_size: int = 50
    dtype: str = "auto"
    attention: str | None = None
    tell: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda now, total: None
    team: Team = field(default_factory=Team)

    def run(self) -> list[dict]:
        """Run what the results file lacks; the rows of the whole sweep, in order.

        Raises:
            ResultsError: the results file is of another kind, in use or cannot be written; its rows are kept.
            ConfigError: tasks of questions and tasks of classes in one sweep.
        PruneError: no model can be loaded. One of several is told of, and fails the run at its end.
        """
        if len({task.classes is None for task in self.tasks}) > 1:
            raise ConfigError("tasks of questions and tasks of classes are for different models; run them one by one")
        with self._files():
            tasks = [(task, Cached(task.items)) for task in self.tasks]
            rows: list[dict] = []
            self.counted = self.total = 0
            for number, name in enumerate(self.models):
                loaded = self._load(name)
                if loaded is None:
                    rows.append({"cell": name, "status": "failed", "error": "not loaded"})
                    continue
                subject, specs = loaded
                plan = cells(specs, self.by, self.shares)
                left = len(self.models) - number  # taken to have as many cells each
                self.total = self.counted + sum(len(items) for _, items in tasks) * len(plan) * left
                self.warm = False
                rows += [self._cell(cell, subject, task, items) for task, items in tasks for cell in plan]
        return rows

    def _load(self, name: str) -> tuple[Subject, Sequence[Spec]] | None:
        """The model and its methods; None, on all processes alike, if it cannot be loaded on one of them."""
        error = None
        try:
            subject = self._subject(name)
            specs = self._methods(subject)
        except PruneError as failure:
            error = failure
        reasons = [reason for reason in self.team.gather([error and str(error)]) if reason]
        if not reasons:
            return subject, specs
        if len(self.models) == 1:
            raise error or BatchError(reasons[0])
        self.tell(f"{name}: {reasons[0]}")
        return None

    def _subject(self, name: str) -> Subject | ViTSubject:
        make = ViTSubject if self.tasks[0].classes else Subject
        return make(name, self.team.device, self.dtype, self.attention)

    def _methods(self, subject: Subject) -> Sequence[Spec]:
        if self.methods is not None:
            return self.methods
        works, refused = applicable(subject.model, subject.layers)
        for name, reason in refused.items():
            self.tell(f"{subject.name}: without {name}: {reason}")
        return works

    def _count(self, items: int) -> None:
        self.counted += items
        self.progress(items, self.total)

    # ------------------------------------------------------------------------------------------------ one cell
    def _cell(self, cell: Cell, subject: Subject, task: Task, items: Cached) -> dict:
        """The row of a cell: an earlier one, or run now."""
        row = self._describe(cell, subject, task)
        if row["cell"] in self.finished:
            self._count(len(items))
            return self.finished[row["cell"]]
        if not self.warm:  # the first batch of a process pays for what all others find done
            subject.answer([items[i] for i in range(min(self.batch_size, len(items)))], task.max_new_tokens)
            self.warm = True
        start, counted = time.perf_counter(), self.counted
        outcome: dict = {"result": None, "cost": None, "measured": None}
        try:
            records = self._batches(row["cell"], cell, subject, task, items)
        except ResultsError:
            raise
        except BudgetError as error:
            outcome |= {"status": "out of reach", "error": str(error)}
        except PruneError as error:
            outcome |= {"status": "failed", "error": str(error)}
        else:
            outcome |= {"status": "ok", "error": None, **summary(records, len(items))}
            outcome["measured"]["seconds"] = time.perf_counter() - start
            outcome["result"]["majority"] = majority(task)
        self._count(counted + len(items) - self.counted)  # a cell that broke off has no more to do
        device = device_name(subject.device) + (f" x {self.team.size}" if self.team.size > 1 else "")
        row |= {**outcome, "versions": versions(), "device": device}
        if self.team.leads:
            append_line(self.output, row)
            self._journal_of(row["cell"]).unlink(missing_ok=True)
        if row["status"] != "failed":
            self.finished[row["cell"]] = row
        result = f"{row['status']} ({row['error']})" if row["error"] else f"{row['result']['accuracy']:.1%}"
        self.tell(f"{cell}: {result}")
        return row

    def _describe(self, cell: Cell, subject: Subject, task: Task) -> dict:
        """Everything that says what is run, and its fingerprint."""
        method = cell.spec.method(subject.layers) if cell.pruned else None
        about = {
            "model": subject.description,
            "task": {"name": task.name, "options": task.options, "items": len(task.items), "digest": task.digest},
            "method": {
                "name": cell.spec.name,
                "options": options_of(method) if method else {},
                "positions": method.positions if method else None,
            },
            "budget": {"by": cell.by, "share": float(cell.share)} if cell.pruned else None,
            "run": {"batch_size": self.batch_size, **subject.options(task)},
        }
        return {"schema": SCHEMA, "cell": fingerprint(about), **about}

    def _batches(self, key: str, cell: Cell, subject: Subject, task: Task, items: Cached) -> list[dict]:
        """A record of every batch, in order: those of the journal, and the others run now, shared over the team."""
        records = self._journal(key)
        self._count(sum(len(record["scores"]) for record in records.values()))
        every = range(0, len(items), self.batch_size)
        starts = [start for start in every if str(start) not in records]
        with subject.under(cell, task) as handle:
            for turn in range(0, len(starts), self.team.size):
                mine = starts[turn : turn + self.team.size][self.team.rank : self.team.rank + 1]
                found = [self._batch(start, handle, subject, task, items) for start in mine]
                for record in self.team.gather([{"cell": key, **record} for record in found]):
                    if record["cell"] != key:
                        raise BatchError("the processes have lost step: they run different cells")
                    if record["error"]:
                        raise (BudgetError if record["budget"] else BatchError)(record["error"])
                    records[str(record["start"])] = record
                    if self.team.leads:
                        append_line(self._journal_of(key), record)
                    self._count(len(record["scores"]))
        return [records[str(start)] for start in every]

    def _batch(self, start: int, handle: Handle, subject: Subject, task: Task, items: Cached) -> dict:
        """Run one batch; an error becomes part of the record, so that all processes learn of it."""
        try:
            part = [items[i] for i in range(start, min(start + self.batch_size, len(items)))]
            answers = subject.answer(part, task.max_new_tokens)
            return {
                "start": start,
                "error": None,
                "scores": score(task, part, answers.texts),
                "kinds": [item.kind for item in part],
                "probes": {name: score(task, part, texts) for name, texts in answers.probes.items()},
                "cost": subject.cost(handle, answers),
                **answers.times,
            }
        except Exception as error:
            reason = " ".join(str(error).split())
            if not isinstance(error, PruneError):
                reason = f"{type(error).__name__}: {reason}"
            return {"start": start, "error": reason, "budget": isinstance(error, BudgetError)}

    # ------------------------------------------------------------------------------------------------ files
    def _journal_of(self, key: str) -> Path:
        """Where the finished batches of an unfinished cell are kept."""
        return self.output.with_name(f"{self.output.name}.{key}.partial")

    @contextmanager
    def _files(self) -> Iterator[None]:
        """Hold the results file, and find out what is finished; nothing is changed in a file of another kind."""
        lock = FileLock(self.output.with_name(self.output.name + ".lock"), timeout=0)
        reason, self.finished = None, {}
        if self.team.leads:
            try:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                rows = read_rows(self.output) if self.output.exists() else []
                self.finished = {row["cell"]: row for row in rows if row["status"] != "failed"}
                mend(self.output)
                for key in self.finished:  # whose run was killed before this was done
                    self._journal_of(key).unlink(missing_ok=True)
                if self.fresh:
                    self._set_aside()
            except Timeout:
                reason = f"another run is writing to {self.output}; wait for it, or give another -o"
            except ResultsError as error:
                reason = str(error)
            except OSError as error:
                reason = f"cannot write to {self.output}: {error.strerror}; give another -o"
        reason, self.finished = self.team.share((reason, self.finished))
        try:
            if reason:
                raise ResultsError(reason)
            if self.finished:
                self.tell(f"{len(self.finished)} finished cells are in {self.output} already (--fresh starts anew)")
            yield
        finally:
            if lock.is_locked:
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()

    def _set_aside(self) -> None:
        """Start anew: the rows so far go to `<name>.old`."""
        os.replace(self.output, self.output.with_name(self.output.name + ".old"))
        for journal in self.output.parent.glob(f"{glob.escape(self.output.name)}.*.partial"):
            journal.unlink()
        mend(self.output)
        self.finished = {}

    def _journal(self, key: str) -> dict[str, dict]:
        """Records of the batches of a cell that an earlier run finished, by first item."""
        found = None
        if self.team.leads:
            found, path = {}, self._journal_of(key)
            if path.exists():
                found = {str(record["start"]): record for _, record in read_lines(path)}
                mend(path)
        return self.team.share(found)


class BatchError(PruneError):
    """A batch could not be run; the cell is recorded as failed."""


def summary(records: list[dict], items: int) -> dict:
    """`result`, `cost` and `measured` of a row from the records of its batches."""
    scores = [value for record in records for value in record["scores"]]
    kinds: dict[str, list[float]] = {}
    for kind, value in zip([kind for record in records for kind in record["kinds"]], scores):
        kinds.setdefault(kind, []).append(value)
    probes: dict[str, list[float]] = {}
    for name, values in [pair for record in records for pair in record.get("probes", {}).items()]:
        probes.setdefault(name, []).extend(values)
    accuracy = mean_interval(scores)
    return {
        "result": {
            "items": items,
            "accuracy": accuracy.mean,
            "interval": [accuracy.low, accuracy.high],
            "kinds": {k: {"items": len(v), "accuracy": sum(v) / len(v)} for k, v in sorted(kinds.items()) if k},
            "scores": scores,
            **({"probes": {name: sum(values) / items for name, values in probes.items()}} if probes else {}),
        },
        "cost": divide(reduce(add, (record["cost"] for record in records)), items),
        "measured": {
            **{key: statistics.median(record[key] for record in records) for key in TIMES if key in records[0]},
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


@lru_cache(maxsize=8)
def majority(task: Task) -> float:
    """What always giving the most frequent answer of an item's kind would score; opens no picture."""
    kinds: dict[str, list] = {}
    for item in task.items:
        kinds.setdefault(item.kind, []).append(item)
    scores = []
    for items in kinds.values():
        ((answer, _),) = Counter(answer for item in items for answer in accepted(item)).most_common(1)
        scores += [task.scorer(answer, item) for item in items]
    return statistics.fmean(scores)


def versions() -> dict[str, str]:
    """Of `prune`, of Python and of those of `PACKAGES` that are installed."""
    found = {"prune": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """Latencies under one name may be compared."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return (
            f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
        )
    return device.type
