"""What the page of `prune demo` does, without the page: open uploads, ask one model three times, write the tables.

No gradio here; `prune.evals.demo_page` lays it out.
"""

from __future__ import annotations

import logging
import os
import re
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape

import torch
from PIL import Image

from prune.apply import Handle
from prune.errors import InputError, PruneError
from prune.evals.command import DEFAULT_MODEL, By
from prune.evals.grid import Cell, Spec, applicable
from prune.evals.results import BASELINE
from prune.evals.scenes import LEVELS, Item, Scenes
from prune.evals.scorers import SCORERS
from prune.evals.subject import Subject
from prune.loading import BUILT_IN_IMAGES, UserError, on_white, open_image
from prune.show import overlay

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # no EPS: Pillow would run Ghostscript
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20  # processors enlarge the shorter edge: 1 x 50,000 pixels would be gigabytes
MAX_EDGE = 2048  # of what is kept of an upload
MAX_QUESTION = 1000  # characters
UNPRUNED = "un-pruned"
PREFERRED = ("norm_diversity", "random", "divprune", "uniform")  # what the page begins with, if the model runs it
REPEAT_BELOW, REPEATS = 0.5, 3  # seconds: quick answers are timed several times
BATCH = 10
BUDGETS = {
    "visual tokens per decoder layer (equal compute)": By.average,
    "visual tokens after the last cut": By.keep,
    "FLOPs of the decoder's prefill": By.flops,
}
"""What the share that the page asks for is of."""


_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ uploads
def open_upload(path: str | os.PathLike) -> tuple[Image.Image, str]:
    """An uploaded file as the picture to ask about, and what to tell the user about it.

    Sizes are read from the header, before anything is decoded.

    Args:
        path: any file; its name stands in the messages.

    Returns:
        (picture, note): RGB, upright, transparency on white, at most `MAX_EDGE` pixels along an edge; the note is ""
        or says that only the first of several frames is used.

    Raises:
        UserError: empty, no picture of a known format, broken, more than `MAX_PIXELS`, or too narrow.
    """
    name = os.path.basename(path)
    if not os.path.getsize(path):
        raise UserError(f"{name} is empty; choose another file")
    Image.init()
    known = [one for one in FORMATS if one in Image.OPEN]
    try:
        with Image.open(path, formats=known) as file:
            (width, height), frames = file.size, getattr(file, "is_animated", False) and file.format != "MPO"
            _check_size(name, width, height)
            picture = on_white(file)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture in a known format; give one of {', '.join(known)}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has far too many pixels; {_LIMIT}") from None
    except MemoryError:
        raise UserError(f"{name} does not fit into memory; make it smaller") from None
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{name} is broken and cannot be read ({error}); choose another file") from None
    picture.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    return picture, f"{name} has several frames or pages; the first one is used" if frames else ""


_LIMIT = f"this page takes at most {MAX_PIXELS / 1e6:.0f} megapixels, make it smaller"


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; {_LIMIT}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{name} has {width} x {height} pixels; crop it to at most {MAX_ASPECT} : 1")


# ------------------------------------------------------------------------------------------------------------ answers
@dataclass(frozen=True)
class Example:
    """A picture to pick, with a question about it; `answer` is "" where there is no right one."""

    picture: Image.Image
    question: str
    answer: str = ""


@dataclass(frozen=True)
class Result:
    """What one method made of a question, or why it could not.

    Args:
        label: the method's name, or "un-pruned".
        answer: what the model said.
        cost: `Subject.cost` of this one item.
        first, total: ms to the first token and to the last, median of up to `REPEATS` runs.
        drawing: the picture with the dropped patches dimmed; None if un-pruned or if no grid is known.
        trouble: "" or why there is no answer; then the rest is empty.
    """

    label: str
    answer: str = ""
    cost: dict | None = None
    first: float = 0.0
    total: float = 0.0
    drawing: Image.Image | None = None
    trouble: str = ""


class Demo:
    """A model, what it can be pruned with, and examples. Safe to call from several threads: one answers at a time.

    Args:
        name, device, dtype: for `prune.loading.load_model`.
        max_new_tokens: of an answer; None is 3 for the built-in model, whose answers are one word, else 48.

    Attributes:
        offered: names of the methods the model runs.
        refused: name -> why not, for the others.
        examples: to pick from; photographs come first unless the model is the built-in one.

    Raises:
        UserError: the model cannot be loaded, or runs no method.
    """

    def __init__(
        self,
        name: str = DEFAULT_MODEL,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int | None = None,
    ):
        self.subject, self.name = Subject(name, device, dtype), name
        self.built_in = name == DEFAULT_MODEL
        self.max_new_tokens = max_new_tokens or (3 if self.built_in else 48)
        works, self.refused = applicable(self.subject.model, self.subject.layers)
        self.offered = [spec.name for spec in works]
        if not self.offered:
            raise UserError(f"{name} runs none of the methods: {next(iter(self.refused.values()))}")
        self.scenes = Scenes()
        self.examples = self._examples()
        self._lock = threading.Lock()

    def _examples(self) -> list[Example]:
        kinds = 2 * len(LEVELS["scenes"].answers)  # they come in turn: two of each
        scenes = [Example(item.images[0], item.question, item.answer) for item in self.scenes[:kinds]]
        if self.built_in:
            return scenes
        photos = [Example(open_image(name), "What is shown in this picture?") for name in BUILT_IN_IMAGES]
        return photos + scenes

    @property
    def first_choice(self) -> tuple[str, str]:
        """Two methods to begin with."""
        found = list(dict.fromkeys([*(name for name in PREFERRED if name in self.offered), *self.offered]))
        return found[0], found[:2][-1]

    def compare(
        self, picture: Image.Image | None, question: str, methods: Sequence[str], share: Fraction, by: By
    ) -> Iterator[Result]:
        """One question answered un-pruned, then with each method, one by one.

        A method that refuses this budget or input gives a `Result` with `trouble`; the others go on.

        Args:
            picture: RGB, of any size.
            question: at most `MAX_QUESTION` characters.
            methods: names, or `name:option=value`.
            share: left of the visual tokens or FLOPs, in (0, 1].
            by: what the share is of.

        Raises:
            UserError: no picture, no question, or one that holds the tokenizer's special tokens.
        """
        question = self._checked(picture, question)
        item = Item([picture], question, "", "", ())
        for name in (BASELINE, *methods):
            yield self._result(name, item, share, by)

    def _checked(self, picture: Image.Image | None, question: str | None) -> str:
        question = (question or "").strip()
        if picture is None:
            raise UserError("pick an example or upload a picture first")
        if not question:
            raise UserError("ask something about the picture first")
        if len(question) > MAX_QUESTION:
            raise UserError(f"the question has {len(question)} characters; ask in at most {MAX_QUESTION}")
        processor = self.subject.processor
        special = {*processor.tokenizer.all_special_tokens, getattr(processor, "image_token", None)} - {None, ""}
        if found := sorted(token for token in special if token in question):
            raise UserError(f"the question holds {found[0]!r}, which means something to the model; leave it out")
        return question

    def _result(self, name: str, item: Item, share: Fraction, by: By) -> Result:
        label = UNPRUNED if name == BASELINE else name

        def run(handle: Handle) -> Result:
            answers = [self.subject.answer([item], self.max_new_tokens)]
            if answers[0].prefill + answers[0].decode < REPEAT_BELOW:  # then the first run was to warm up
                answers = [self.subject.answer([item], self.max_new_tokens) for _ in range(REPEATS)]
            return Result(
                label,
                answers[-1].texts[0],
                self.subject.cost(handle, answers[-1]),
                1e3 * statistics.median(one.prefill for one in answers),
                1e3 * statistics.median(one.prefill + one.decode for one in answers),
                None if name == BASELINE else self._drawing(item.images[0], handle, label),
            )

        found, trouble = self._under(name, share, by, run)
        return found or Result(label, trouble=trouble)

    def _drawing(self, picture: Image.Image, handle: Handle, title: str) -> Image.Image | None:
        try:
            return overlay(picture, handle.last.images[0], title=title, processor=self.subject.processor)
        except InputError:  # tokens without a known grid: the numbers stand all the same
            return None

    def unknown_words(self, question: str) -> list[str]:
        """The words that the model's vocabulary does not have, each once; the built-in model knows 43."""
        tokenizer = self.subject.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return []
        words = dict.fromkeys(re.findall(r"\w+", question))
        return [word for word in words if tokenizer.unk_token_id in tokenizer.encode(word, add_special_tokens=False)]

    def _under(self, name: str, share: Fraction, by: By, run: Callable):
        """(what `run(handle)` gives with the model pruned, ""), or (None, why not)."""
        with self._lock:
            try:
                spec = Spec.parse(name)
                cell = Cell(spec) if name == BASELINE else Cell(spec, by.value, share)
                with self.subject.under(cell) as handle:
                    return run(handle), ""
            except PruneError as error:
                return None, str(error)
            except torch.OutOfMemoryError:
                return None, "out of memory; take a smaller picture or budget"
            except Exception as error:  # processors raise anything, and one method must not take the page down
                _log.exception("%s failed", name)
                return None, f"failed: {_first_line(error)} ({type(error).__name__}; the server's log has the rest)"

    def batch(
        self,
        count: int,
        methods: Sequence[str],
        share: Fraction,
        by: By,
        progress: Callable[[float], None] = lambda done: None,
    ) -> Batch:
        """The first questions of the test split of scenes, un-pruned and with each method.

        Args:
            count: of questions.
            methods, share, by: as for `compare`.
            progress: told the share that is done.
        """
        items = self.scenes[:count]
        scorer = SCORERS["exact" if self.built_in else "contains"]
        names, columns = [BASELINE, *methods], []
        for number, name in enumerate(names):

            def run(handle, number=number) -> list[str]:
                texts = []
                for start in range(0, len(items), BATCH):
                    texts += self.subject.answer(items[start : start + BATCH], self.max_new_tokens).texts
                    progress((number + min(1.0, (start + BATCH) / len(items))) / len(names))
                return texts

            texts, trouble = self._under(name, share, by, run)
            right = [bool(scorer(text, item)) for text, item in zip(texts or [], items)]
            columns.append(Column(UNPRUNED if name == BASELINE else name, texts or [], right, trouble))
        return Batch(items, columns)


@dataclass(frozen=True)
class Column:
    """One method's answers to a batch, and which are right; or, with `trouble`, none."""

    label: str
    answers: list[str]
    right: list[bool]
    trouble: str = ""


@dataclass(frozen=True)
class Batch:
    """Questions with the answers of all methods."""

    items: list[Item]
    columns: list[Column]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------------------- tables
def comparison_html(results: Sequence[Result], right: str = "") -> str:
    """The table of answers and costs, methods as columns.

    Args:
        results: un-pruned first.
        right: the right answer, "" if there is none.
    """
    rows = [("Answer", [f"<b>{escape(one.answer) or '(nothing)'}</b>" for one in results])]
    full = next((one.cost for one in results if one.cost), None)
    if full:
        rows += [(heading, [text(one) if one.cost else "" for one in results]) for heading, text in _ROWS]
    head = "".join(f'<th scope="col">{escape(one.label)}</th>' for one in results)
    body = []
    for number, (heading, texts) in enumerate(rows):
        cells = []
        for one, text in zip(results, texts):
            if not one.trouble:
                cells.append(f'<td class="number">{text}</td>' if number else f"<td>{text}</td>")
            elif number == 0:  # one cell, all the way down
                cells.append(f'<td class="trouble" rowspan="{len(rows)}">{escape(one.trouble)}</td>')
        body.append(f'<tr><th scope="row">{heading}</th>{"".join(cells)}</tr>')
    note = f"<p>Right answer: <b>{escape(right)}</b></p>" if right else ""
    return (
        f'<div class="prune-table"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{note}</div>"
    )


def batch_html(batch: Batch) -> str:
    """The table of a batch: a question per row, and how many each method got right."""
    head = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in batch.columns)
    sums = "".join(
        f'<td class="trouble">{escape(column.trouble)}</td>'
        if column.trouble
        else f"<td><b>{sum(column.right)} of {len(column.right)}</b></td>"
        for column in batch.columns
    )
    body = [f'<tr class="sum"><th scope="row" colspan="2">right</th>{sums}</tr>']
    for number, item in enumerate(batch.items):
        cells = []
        for column in batch.columns:
            if column.trouble:
                cells.append("<td></td>")
            else:
                kind, mark = ("right", "✓") if column.right[number] else ("wrong", "✗")
                cells.append(f'<td class="{kind}">{mark} {escape(column.answers[number])}</td>')
        body.append(f"<tr><td>{escape(item.question)}</td><td>{escape(item.answer)}</td>{''.join(cells)}</tr>")
    return (
        '<div class="prune-table"><table><thead><tr><th scope="col">question</th><th scope="col">right answer</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _share(part: float, whole: float) -> str:
    return f" <small>{part / whole:.0%}</small>" if whole else ""


def amount(value: float, base: int = 1000) -> str:
    """`12.3 G`, to stand before the name of a unit: powers of 1000 (k, M, G, T) or of 1024 (Ki, Mi, Gi, Ti)."""
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti", "Pi")
    power = 0
    while value >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {prefixes[power]}" if value < 999.5 else f"{value:.0f} {prefixes[power]}"


def _of_full(one: Result, key: str, unit: str, base: int) -> str:
    part, whole = one.cost[key], one.cost[f"{key}_full"]
    return f"{amount(part, base)}{unit}{_share(part, whole)}"


_ROWS: list[tuple[str, Callable[[Result], str]]] = [
    (
        "Tokens after the last cut",
        lambda one: (
            f"{one.cost['kept_tokens']} of {one.cost['visual_tokens']}"
            + _share(one.cost["kept_tokens"], one.cost["visual_tokens"])
        ),
    ),
    (
        "Tokens per decoder layer",
        lambda one: f"{one.cost['average_tokens']:.1f}" + _share(one.cost["average_tokens"], one.cost["visual_tokens"]),
    ),
    ("FLOPs of prefill", lambda one: _of_full(one, "prefill_flops", "FLOPs", 1000)),
    ("KV cache", lambda one: _of_full(one, "kv_bytes", "B", 1024)),
    ("First token", lambda one: f"{one.first:.1f} ms"),
    ("Whole answer", lambda one: f"{one.total:.1f} ms"),
]
