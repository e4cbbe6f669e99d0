"""The command `prune tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune.evals.command import DEFAULT_MODEL, DEFAULT_TASK, By

if TYPE_CHECKING:
    from prune.config import PrunerConfig

DEFAULT_FOLDER = Path("prune-tune")


def tune(
    method: Annotated[str, typer.Argument(help="Name of the method, see `prune list`.")],
    model: Annotated[
        str, typer.Option(help="scenes-llava (built in), demo:..., a folder or a hub name.")
    ] = DEFAULT_MODEL,
    task: Annotated[
        str, typer.Option("--task", "-t", help="To calibrate on: scenes, scenes-hard, a folder, hf:DATASET.")
    ] = DEFAULT_TASK,
    split: Annotated[
        str | None, typer.Option(help="Of the task; without it train for scenes, else the task's own.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="KEY=NAME", help="hf: where image, question, answer, kind are; repeat."),
    ] = None,
    by: Annotated[
        By, typer.Option(help="What the share is of: tokens per decoder layer, final count, or prefill FLOPs.")
    ] = By.average,
    share: Annotated[
        str, typer.Option("--budget", "-b", help="Share of the tokens LEFT, fixed in the search.")
    ] = "1/9",
    trials: Annotated[int, typer.Option(min=1, help="Of the whole search, those of earlier runs included.")] = 40,
    items: Annotated[int, typer.Option(min=1, help="To calibrate on; as many others are held out.")] = 256,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="KEY=LOW:HIGH", help="Search an option here (choices: KEY=a,b); repeat."),
    ] = None,
    fixes: Annotated[
        list[str] | None, typer.Option("--fix", metavar="KEY=VALUE", help="Hold an option still; repeat.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    early: Annotated[bool, typer.Option("--early", help="Give up on trials worse than the median half-way.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Items per batch.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; without it the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attention: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2; else as the model.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; without it prune-tune/METHOD.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw the folder's study away first.")] = False,
) -> None:
    """Search the options of a method that change what the model computes least, at a fixed budget, on sample questions.

    Writes a folder for `apply_pruner(model, FOLDER)` and compares it with the defaults, also on questions that were
    held out; an interrupted search goes on where it was.
    """
    from prune.errors import BudgetError, ConfigError, UnknownMethodError
    from prune.evals.grid import parse_share
    from prune.evals.scenes import LEVELS
    from prune.evals.space import parse_ranges, search_space
    from prune.evals.tasks import load_task
    from prune.evals.tune import STUDY, Search, check_optuna
    from prune.loading import check_model_name
    from prune.options import parse_options

    check_optuna()
    try:  # whatever is wrong with the words of the command is said before anything is loaded
        left, fixed, given = parse_share(share), parse_options(fixes or []), parse_ranges(ranges or [])
        wanted = dict(pair.split("=", 1) for pair in columns or [] if "=" in pair)
        if len(wanted) != len(columns or []):
            raise ConfigError("write --column KEY=NAME, such as --column question=text")
        space = search_space(method, 32, fixed, given)
    except (BudgetError, ConfigError) as error:
        if isinstance(error, UnknownMethodError):
            raise
        raise typer.BadParameter(str(error)) from None
    check_model_name(model)
    split = split or ("train" if task in LEVELS else None)
    loaded = load_task(task, split=split, limit=2 * items, columns=wanted or None)

    import optuna
    from tqdm import tqdm

    from prune.evals.subject import Subject

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = output or DEFAULT_FOLDER / method
    if fresh:
        (folder / STUDY).unlink(missing_ok=True)

    def tell(line: str) -> None:
        tqdm.write(f"prune: {line}", file=sys.stderr)

    subject = Subject(model, device, dtype, attention)
    space = search_space(method, subject.layers, fixed, given)
    tell(f"{method} on {model} at {left} ({by.value}); searching {', '.join(map(show, space.items()))}")
    if by is By.keep and any(key.partition(".")[0] in ("layer", "layers") for key in space):
        tell("under --by keep a later layer costs more and always wins; take --by average, or --fix the layer")
    if len(loaded.items) <= items:
        tell(f"{loaded.name} has {len(loaded.items)} items: none are held out, over-fitting will not show")
    bar: tqdm | None = None

    def progress(done: int, total: int, best: float | None) -> None:
        nonlocal bar
        bar = bar or tqdm(desc="prune tune", unit="trial", total=total, initial=done, disable=None, leave=False)
        bar.set_postfix_str("" if best is None else f"best {best:.4f}", refresh=False)
        bar.update(done - bar.n)

    search = Search(
        subject=subject,
        method=method,
        space=space,
        task=loaded,
        items=items,
        by=by.value,
        share=left,
        fixed=fixed,
        trials=trials,
        seed=seed,
        batch_size=batch_size,
        early=early,
        output=folder,
        tell=tell,
        progress=progress,
    )
    try:
        config = search.run()
    except KeyboardInterrupt:
        tell(f"stopped; finished trials are in {folder / STUDY}, the same command goes on")
        raise typer.Exit(130) from None
    finally:
        if bar is not None:
            bar.close()
    _print(config)
    print(folder)


def show(pair: tuple[str, tuple]) -> str:
    """A range as a person would type it."""
    from prune.evals.space import is_interval

    key, where = pair
    return f"{key}={(':' if is_interval(where) else ',').join(map(brief, where))}"


def brief(value: object) -> str:
    """Four digits of a number are enough to look at."""
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(config: PrunerConfig) -> None:
    """Default and best, on calibration and held-out items, and the options that differ."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = config.metrics
    heads = (f"calibration ({found['task']['items']})", f"held out ({found['held_out_items']})", "tokens per layer")
    table = Table("1 - cosine", *heads, box=box.SIMPLE_HEAD)
    columns = [found[key] for key in ("calibration", "held_out", "average_tokens")]
    for name in ("default", "best"):
        numbers = [column[name] for column in columns]
        texts = [("-" if value is None else f"{value:.4f}") for value in numbers[:2]]
        table.add_row(name, *texts, "-" if numbers[2] is None else f"{numbers[2]:.1f}")
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=120)
    console.print(table)
    before = found["default_options"]
    changed = [
        f"{key} {brief(before[key])} -> {brief(value)}" for key, value in config.options.items() if before[key] != value
    ]
    console.print(", ".join(changed) or "nothing better than the default options was found", soft_wrap=True)
    held = found["held_out"]
    if changed and None not in held.values() and held["best"] >= held["default"]:
        console.print(
            "no better than the defaults on held-out items: over-fitted; keep those, or take more --items",
            soft_wrap=True,
        )
    if found["impossible_trials"]:
        console.print(f"{found['impossible_trials']} of {found['trials']} trials were impossible", soft_wrap=True)
