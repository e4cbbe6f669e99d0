"""The commands `prune eval` and `prune report`; `python -m prune.evals` is the first, for `accelerate launch`."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "scenes-llava"
DEFAULT_CLASSIFIER = "digits-vit"
DEFAULT_TASK = "scenes"
DEFAULT_LIMIT = 200
CLASS_LIMIT = 1000
DEFAULT_OUTPUT = Path("prune-eval") / "results.jsonl"
DEFAULT_BATCH = 50


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class By(str, Enum):
    average = "average"
    keep = "keep"
    flops = "flops"


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="scenes-llava (built in, the default), demo:..., a folder or a hub name; for tasks of classes "
            "digits-vit (the default), timm:NAME, open_clip:NAME[:PRETRAINED], a folder or a hub name. Repeat.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="NAME or NAME:option=value,...; repeat. Default: all that apply."),
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            help="Share LEFT; repeat. Default: 1/3, 2/9, 1/9, 1/18, for tasks of classes 3/4, 1/2, 2/5.",
        ),
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(
            help="What the share is of: tokens per layer (the default), final count, or FLOPs of the layers (the "
            "default for tasks of classes)."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="scenes, scenes-hard, a folder (JSON lines + images), hf:DATASET; for vision transformers digits, "
            "imagefolder:PATH (a folder per class). Repeat.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the task; its test split without it.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help=f"First items of each task; 0 for all. Default: {DEFAULT_LIMIT}, of classes {CLASS_LIMIT}."),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(help="exact, contains, choice or vqa; the task's own without it.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="KEY=NAME", help="hf: where image, question, answer, kind are; repeat."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; the task's own without it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the task's items.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Items per batch.")] = DEFAULT_BATCH,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; without it the GPU if there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto is the checkpoint's own.")] = Dtype.auto,
    attention: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2; else as the model.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Results file (JSON lines); finished cells in it are not run again.")
    ] = DEFAULT_OUTPUT,
    fresh: Annotated[bool, typer.Option("--fresh", help="Put the results file aside (.old) first.")] = False,
) -> None:
    """Measure accuracy, tokens, FLOPs, KV bytes and latency of pruning methods at equal budgets.

    Without options: every method that applies, on the built-in model and its 200-question test, at 1/3, 2/9, 1/9 and
    1/18 of the visual tokens per decoder layer. An interrupted run goes on where it was; the report is written beside
    the results file.

    Vision transformers: `--task digits` or `--task imagefolder:PATH`. Accuracy is top-1, by the model's classifier, by
    class prompts (CLIP) or by nearest neighbours; kNN and linear probes of the pooled features stand beside the cost.
    """
    from prune.errors import BudgetError, ConfigError
    from prune.evals.grid import BLOCK_SHARES, SHARES, Spec, parse_share
    from prune.evals.image_tasks import is_image_task
    from prune.evals.tasks import load_task
    from prune.evals.team import Team
    from prune.evals.vision import check_vision_name
    from prune.loading import check_model_name

    team = Team(device)
    tell = _teller() if team.leads else _nobody
    classes = any(is_image_task(name) for name in tasks or [])
    models = models or [DEFAULT_CLASSIFIER if classes else DEFAULT_MODEL]
    limit = (CLASS_LIMIT if classes else DEFAULT_LIMIT) if limit is None else limit
    by = by or (By.flops if classes else By.average)
    try:  # whatever is wrong with the words of the command is said before anything is loaded
        shares = [parse_share(text) for text in budgets or []] or list(BLOCK_SHARES if classes else SHARES)
        specs = [Spec.parse(text) for text in methods or []] or None
        wanted = dict(pair.split("=", 1) for pair in columns or [] if "=" in pair)
        if len(wanted) != len(columns or []):
            raise ConfigError("write --column KEY=NAME, such as --column question=text")
    except (BudgetError, ConfigError) as error:
        raise typer.BadParameter(str(error)) from None
    for name in models:
        (check_vision_name if classes else check_model_name)(name)
    options = dict(split=split, limit=limit or None, seed=seed, scorer=scorer, max_new_tokens=max_new_tokens)
    loaded = [load_task(name, columns=wanted or None, **options) for name in tasks or [DEFAULT_TASK]]

    from tqdm import tqdm

    from prune.evals.results import read_rows
    from prune.evals.runner import Sweep

    tell(f"{', '.join(models)} on {', '.join(f'{task.name} ({len(task.items)} items)' for task in loaded)}")
    with tqdm(unit="item", desc="prune eval", disable=None if team.leads else True, leave=False) as bar:

        def progress(now: int, total: int) -> None:
            bar.total = total
            bar.update(now)

        sweep = Sweep(
            models=models,
            tasks=loaded,
            output=output,
            fresh=fresh,
            methods=specs,
            by=by.value,
            shares=shares,
            batch_size=batch_size,
            dtype=dtype.value,
            attention=attention,
            tell=tell,
            progress=progress,
            team=team,
        )
        try:
            rows = sweep.run()
        except KeyboardInterrupt:
            tell(f"stopped; finished work is in {output}, the same command goes on")
            raise typer.Exit(130) from None
    if not team.leads:
        return
    failed = [row for row in rows if row["status"] == "failed"]
    made_by = shlex.join(["prune", "eval", *sys.argv[1 + (sys.argv[1:2] == ["eval"]) :]])
    if shown := [row for row in rows if "result" in row]:
        _report(read_rows(output), shown, _folder(output), made_by)
    if failed:
        tell(f"{len(failed)} of {len(rows)} cells failed; the same command tries them again")
        raise typer.Exit(1)


def report(
    results: Annotated[Path, typer.Argument(help="Results file of `prune eval`.")] = DEFAULT_OUTPUT,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report; NAME-report without it.")
    ] = None,
) -> None:
    """Print the table of a results file; write Markdown, CSV, plots and a page of HTML."""
    from prune.evals.results import read_rows

    rows = read_rows(results)
    _report(rows, rows, output or _folder(results), f"prune report {results}")


def _folder(results: Path) -> Path:
    """Where the report goes without being told: a folder of its own, the default one has one already."""
    return results.parent if results == DEFAULT_OUTPUT else results.with_name(f"{results.stem}-report")


def _report(rows: list[dict], shown: list[dict], folder: Path, made_by: str) -> None:
    """Write the report on `rows`, print the table of `shown` and the files' paths."""
    from rich.console import Console

    from prune.evals.report import terminal_table, write_report

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    written = write_report(rows, folder, made_by)
    console.print(terminal_table(shown, console.width))
    for path in written:
        print(path)


def _teller():
    """Lines on stderr, above the progress bar."""
    from tqdm import tqdm

    return lambda line: tqdm.write(f"prune: {line}", file=sys.stderr)


def _nobody(line: str) -> None:
    """What the other processes say."""
