"""The command line: `prune list`, `show` and `env`; `prune eval`, `report` and `tune` are in `prune.evals`.

Results go to stdout, everything else (progress, summaries, errors) to stderr; progress and summaries only when somebody
is looking. Exit code 1 is a failure with its cause in a line or two, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from prune.errors import BudgetError, ConfigError, PruneError
from prune.evals import command, demo_command, tune_command
from prune.loading import DEFAULT_IMAGE, UserError, load_model, open_image, prefill

if TYPE_CHECKING:  # torch, transformers and Pillow are imported by the commands that use them: --help is quick
    from rich.progress import Progress

DEFAULT_QUESTION = "What is shown in this picture?"
DEFAULT_RATIO = 0.9
_AS_IS: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}


class _Group(TyperGroup):
    """Errors with a known cause end a command with a short message instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our stdout left (`prune list | head`): typer ends quietly
            raise
        except (PruneError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            print("prune:", "\n       ".join(lines[:2]) or type(error).__name__, file=sys.stderr)
            raise typer.Exit(1) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported for the sake of its name
                raise
            print("prune: out of memory; try --dtype bfloat16, a smaller model or --device cpu", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Training-free visual-token pruning for unmodified vision-language models.",
)


def main() -> None:
    """Entry point of the `prune` command."""
    app(prog_name="prune")


# ---------------------------------------------------------------------------------------------------------- list


class Where(str, Enum):
    vision = "vision"
    projected = "projected"
    decoder = "decoder"
    block = "block"


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Wildcard over names, such as '*prune*'.")] = "*",
    where: Annotated[Where | None, typer.Option(help="Only methods that act here.")] = None,
    needs_question: Annotated[
        bool | None, typer.Option("--needs-question/--no-needs-question", help="Reads the text after the image?")
    ] = None,
    merges: Annotated[
        bool | None, typer.Option("--merges/--no-merges", help="Folds dropped tokens into kept ones?")
    ] = None,
    adaptive: Annotated[
        bool | None, typer.Option("--adaptive/--no-adaptive", help="Kept count depends on the content?")
    ] = None,
    signals: Annotated[
        str | None, typer.Option(help="Only methods that need none but these, comma-separated ('' for none).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every method's options.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's tables.")] = False,
) -> None:
    """Print the table of methods: paper, where it acts, what it needs, families it works on."""
    from prune import tables
    from prune.registry import list_methods, method_info

    names = list_methods(
        pattern,
        where=where and where.value,
        needs_question=needs_question,
        merges=merges,
        adaptive=adaptive,
        signals=None if signals is None else _signals(signals),
    )
    infos = [method_info(name) for name in names]
    if as_json:
        rows = [asdict(info) | {"families": tables.families_of(info.name)} for info in infos]
        print(json.dumps(rows, indent=2, default=str))
    elif as_markdown:
        print(tables.methods_markdown(infos), tables.families_markdown(), tables.vits_markdown(), sep="\n\n")
    elif infos:
        console = _stdout()
        console.print(tables.methods_table(infos, console.width))
    else:
        print("prune: no method fits; `prune list` without filters shows all", file=sys.stderr)


def _signals(text: str) -> set[str]:
    from prune.tokens import SIGNALS

    wanted = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(wanted - set(SIGNALS)):
        raise typer.BadParameter(f"unknown signal {', '.join(unknown)}; there are {', '.join(SIGNALS)}")
    return wanted


# ---------------------------------------------------------------------------------------------------------- show


@app.command()
def show(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Picture files. china.jpg (the default) and flower.jpg are built in.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="Name of the method, see `prune list`.")] = "dart",
    ratio: Annotated[
        float | None,
        typer.Option(help=f"Budget: share of the visual tokens REMOVED; {DEFAULT_RATIO} if no budget is given."),
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Budget: visual tokens kept per image.")] = None,
    average: Annotated[
        float | None, typer.Option(help="Budget: mean visual tokens per decoder layer; below 1 a share of them.")
    ] = None,
    flops: Annotated[float | None, typer.Option(help="Budget: share of the prefill FLOPs left over.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="demo:llava, demo:llava-next, demo:qwen2.5-vl (small, untrained, embedded), or a folder or hub name."
        ),
    ] = "demo:llava",
    question: Annotated[str, typer.Option(help="The text after the image.")] = DEFAULT_QUESTION,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File (numbered out-1.png ... if there are several images) or folder. "
            "Without it: IMAGE-METHOD.png in this folder.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; without it the GPU if there is one.")
    ] = None,
    dtype: Annotated[
        command.Dtype, typer.Option(help="Of the model's weights; auto is the checkpoint's own.")
    ] = command.Dtype.auto,
) -> None:
    """Prune, and draw which patches of the pictures were dropped. Prints the paths of the drawings.

    Dropped patches are dark and grey, kept ones untouched, the title says how many. One drawing per image.
    """
    from prune.budget import Budget
    from prune.options import parse_options
    from prune.registry import get_method

    given: dict[str, Any] = {"ratio": ratio, "keep": keep, "average": average, "flops": flops}
    if all(value is None for value in given.values()):
        given["ratio"] = DEFAULT_RATIO
    try:
        budget, options = Budget(**given), parse_options(option or [])
    except (BudgetError, ConfigError) as error:
        raise typer.BadParameter(str(error)) from None
    pruner = get_method(method, **options)
    images = images or [DEFAULT_IMAGE]
    photos = [open_image(name) for name in images]  # everything cheap is checked before a model is loaded
    targets = _targets(images, output, method)

    from prune.apply import apply_pruner
    from prune.show import overlay

    # Loading from the hub shows bars of its own.
    with _waiting(f"loading {model}") if model.startswith("demo:") else nullcontext():
        network, processor = load_model(model, device, dtype.value)
    with apply_pruner(network, pruner, **given) as handle, _progress() as bar:
        task = bar.add_task("", total=len(photos))
        for name, photo, target in zip(images, photos, targets):
            bar.update(task, description=name)
            prefill(network, processor, photo, question, name)
            report = handle.last
            assert report is not None  # a prefill with an image has one
            drawing = overlay(photo, report.images[0], title=f"{method}, {budget}", processor=processor)
            drawing.save(target)
            bar.advance(task)
            if bar.console.is_terminal:
                bar.console.print(str(report), **_AS_IS)
            _say(target, bar)


def _targets(images: list[str], output: Path | None, method: str) -> list[Path]:
    """Where the drawings go: the output file (numbered if there are several), or one file per image in a folder."""
    from PIL import Image

    if output is None or output.is_dir() or not output.suffix:
        folder = output or Path()
        folder.mkdir(parents=True, exist_ok=True)
        stems = [f"{Path(name).stem}-{method}" for name in images]
        repeats = [stems[:at].count(stem) for at, stem in enumerate(stems)]
        targets = [folder / (f"{stem}-{n + 1}.png" if n else f"{stem}.png") for stem, n in zip(stems, repeats)]
    else:
        Image.init()
        if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
            raise typer.BadParameter(f"-o {output}: cannot write {output.suffix!r} pictures; use .png or .jpg")
        if not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent} to write {output.name} to")
        numbered = [output.with_stem(f"{output.stem}-{at + 1}") for at in range(len(images))]
        targets = numbered if len(images) > 1 else [output]
    for target in targets:
        if not os.access(target.parent, os.W_OK):
            raise UserError(f"the folder {target.parent} cannot be written to")
        if any(Path(name).exists() and target.exists() and target.samefile(name) for name in images):
            raise UserError(f"{target} is one of the images and would be overwritten; give another -o")
    return targets


def _progress() -> Progress:
    """Bars on stderr, while somebody is looking."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True, redirect_stdout=False)


def _say(result: object, bar: Progress) -> None:
    """A line on stdout, in peace with the bar if both are on the screen."""
    if bar.console.is_terminal and sys.stdout.isatty():
        bar.console.print(str(result), **_AS_IS)
    else:
        print(result, flush=True)


def _waiting(text: str) -> AbstractContextManager:
    """A spinner on stderr, while somebody is looking."""
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


# -------------------------------------------------------------------------------------------------- eval, report
app.command("eval")(command.evaluate)
app.command("tune")(tune_command.tune)
app.command("demo")(demo_command.demo)
app.command("report")(command.report)


# ---------------------------------------------------------------------------------------------------------- push


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `handle.save_pretrained` or `prune tune` wrote.")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hugging Face hub; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be; main without it.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Upload a saved pruner with a model card to the Hugging Face hub. Prints the URL."""
    from prune.config import PrunerConfig

    config = PrunerConfig.from_pretrained(folder)
    print(config.push_to_hub(repo, private=private or None, revision=revision, create_pr=create_pr))


# ----------------------------------------------------------------------------------------------------------- env


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices and attention back-ends, for bug reports."""
    from prune.env import environment

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = _stdout()
    for section, entries in found.items():
        console.print(f"[bold]{section}[/bold]")
        width = max(map(len, entries))
        for name, value in entries.items():
            console.print(f"  {name:<{width}}  {_plain(value)}", **_AS_IS)


def _plain(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else "-" if value is None else str(value)


def _stdout() -> Console:
    """Wide enough for whole lines when piped; without colours then."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)
