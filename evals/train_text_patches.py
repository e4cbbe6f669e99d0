"""Trains the text classifier of `index_preserving`: `python -m prune.evals.train_text_patches`.

Pages drawn by `prune.evals.text_pages` are cut into blocks of 28, 16 or 14 pixels at random offsets and resized to 28;
a block is text if ink covers half a percent of it. Text and the rest weigh the same in the loss, whatever their shares.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from prune.learned_scorer import SHIPPED, LearnedScorer, resize

from . import training_state
from .csv_file import write_csv
from .text_pages import KINDS, SHARE, SIDE, Page, Pages, system_fonts

EDGE = 28  # pixels along one edge of what the classifier sees
EDGES = (EDGE, 16, 14)  # of tokens: Qwen's groups, and plain vision transformers
NORMALISED = (  # mean and deviation per channel, as processors have them
    ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP, Qwen
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # SigLIP, many timm models
)
LOG_EVERY = 50


# ----------------------------------------------------------------------------------------------------------- data
def blocks(page: Page, edge: int, top: int = 0, left: int = 0) -> tuple[Tensor, Tensor]:
    """A page in blocks.

    Args:
        page: the page.
        edge: of a block, in pixels.
        top, left: where the grid begins; blocks that do not fit are left out.

    Returns:
        `[n, 3, edge, edge]` fp32 in [0, 1], and `[n]` bool, whether they are text.
    """
    rows, columns = (SIDE - top) // edge, (SIDE - left) // edge
    window = slice(top, top + rows * edge), slice(left, left + columns * edge)
    pixels = torch.from_numpy(page.pixels[window].copy()).view(rows, edge, columns, edge, 3)
    ink = torch.from_numpy(page.ink[window].copy()).view(rows, edge, columns, edge)
    return pixels.permute(0, 2, 4, 1, 3).flatten(0, 1) / 255, ink.sum((1, 3)).flatten() >= SHARE * edge * edge


def normalise(patches: Tensor, which: int) -> Tensor:
    """As a processor would: row `which` of `NORMALISED`."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in NORMALISED[which])
    return (patches - mean) / deviation


def make_batch(seed: int, first: int, size: int, fonts: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Blocks `[n, 3, EDGE, EDGE]` of the training pages `first` to `first + size`, normalised, and labels `[n]` fp32.

    A function of its arguments alone. Every page gives two grids of 28-pixel blocks and 256 smaller blocks; half of all
    have a black hole of 4 x 4 pixels.
    """
    pages = Pages("train", first + size, seed, fonts)
    found = []
    for index in range(first, first + size):
        page, rng = pages[index], np.random.default_rng([seed, index])
        for edge in (EDGE, EDGE, int(rng.choice(EDGES[1:]))):
            patches, text = blocks(page, edge, *(int(n) for n in rng.integers(0, edge, 2)))
            if edge < EDGE:
                some = torch.from_numpy(rng.permutation(len(patches))[:256])
                patches, text = resize(patches[some], EDGE), text[some]
            patches = patches * ~_holes(rng, len(patches))
            found.append((normalise(patches, int(rng.integers(len(NORMALISED)))), text))
    patches, text = (torch.cat(parts) for parts in zip(*found))
    return patches, text.float()


def _holes(rng, count: int) -> Tensor:
    """`[count, 1, EDGE, EDGE]` bool: a square of 4 x 4 in half of the blocks."""
    corner = torch.from_numpy(rng.integers(0, EDGE - 3, (2, count, 1)))
    inside = (torch.arange(EDGE) >= corner) & (torch.arange(EDGE) < corner + 4)
    some = torch.from_numpy(rng.random(count) < 0.5)
    return (inside[0][:, :, None] & inside[1][:, None] & some[:, None, None])[:, None]


# ---------------------------------------------------------------------------------------------------- measurement
@torch.no_grad()
def measure(scorer, pages: Pages, edges=EDGES, which: int = 0) -> list[dict]:
    """How well a scorer tells text from the rest.

    Args:
        scorer: patches `[n, 3, h, w]`, normalised, to logits `[n]`.
        pages: to measure on.
        edges: block sizes in pixels.
        which: row of `NORMALISED`.

    Returns:
        Rows of edge, kind of page ("all" too), blocks, the share that is text, and in percent: accuracy, balanced
        accuracy (mean of recall and of the same for what is no text), precision, recall, and the blocks kept.
    """
    counts: dict[tuple, np.ndarray] = {}
    for page in pages:
        for edge in edges:
            patches, text = blocks(page, edge)
            found = scorer(normalise(patches, which)) > 0
            table = np.array([[(found & text).sum(), (~found & text).sum()], [(found & ~text).sum(), 0]])
            table[1, 1] = len(text) - table.sum()
            for kind in (page.kind, "all"):
                counts[edge, kind] = counts.get((edge, kind), 0) + table
    return [
        {"edge": edge, "kind": kind, **_rates(counts[edge, kind])}
        for edge in edges
        for kind in ("all", *KINDS)
        if (edge, kind) in counts
    ]


def _rates(table: np.ndarray) -> dict:
    """Shares of a table [[found text, missed text], [found other, rest]]; empty where there is nothing to share."""
    (hit, miss), (wrong, rest) = table.tolist()
    blocks = hit + miss + wrong + rest

    def percent(part, whole):
        return round(100 * part / whole, 2) if whole else ""

    recall, rejected = percent(hit, hit + miss), percent(rest, wrong + rest)
    balanced = round((recall + rejected) / 2, 2) if "" not in (recall, rejected) else ""
    return {
        "blocks": blocks,
        "text": percent(hit + miss, blocks),
        "accuracy": percent(hit + rest, blocks),
        "balanced": balanced,
        "precision": percent(hit, hit + wrong),
        "recall": recall,
        "kept": percent(hit + wrong, blocks),
    }


def balanced_loss(logits: Tensor, text: Tensor) -> Tensor:
    """Binary cross entropy, text and the rest weighing the same."""
    loss = F.binary_cross_entropy_with_logits(logits, text, reduction="none")
    return 0.5 * sum((loss * side).sum() / side.sum().clamp(min=1) for side in (text, 1 - text))


# ------------------------------------------------------------------------------------------------------- training
def train(
    steps: Annotated[int, typer.Option(help="Training steps; the rate falls to 0 in a cosine.")] = 5000,
    pages: Annotated[int, typer.Option(help="Pages per step.")] = 4,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    hidden: Annotated[int, typer.Option(help="Width of the hidden layer.")] = 160,
    eps: Annotated[float, typer.Option(help="Of the LayerNorm.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and pages.")] = 0,
    fonts: Annotated[bool, typer.Option("--system-fonts", help="Train on this machine's fonts too.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the weights.")] = SHIPPED,
    state: Annotated[Path, typer.Option(help="File to resume from, written twice a minute.")] = Path(
        "train_text_patches.pt"
    ),
    test_pages: Annotated[int, typer.Option(min=1, help="Held-out pages to measure on.")] = 400,
    resume: Annotated[bool, typer.Option(help="Go on from --state.")] = False,
) -> None:
    """Train the classifier, write its folder, and measure it on held-out pages."""
    from tqdm import trange

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    scorer = LearnedScorer(EDGE, hidden=hidden, eps=eps).train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.01)
    more = tuple(system_fonts()) if fonts else ()
    done, elapsed, log = 0, 0.0, []
    parts = dict(scorer=scorer, optimizer=optimizer)
    if resume:
        log, counters = training_state.load(state, parts)
        done, elapsed = counters["step"], counters["elapsed"]

    sums, before, last_save = np.zeros(2), time.perf_counter(), elapsed
    bar = trange(done, steps, initial=done, total=steps, desc="training")
    try:
        for step in bar:
            now = rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = now
            patches, text = make_batch(seed, step * pages, pages, more)
            logits = scorer(patches)
            loss = balanced_loss(logits, text)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            sums += loss.item(), ((logits > 0) == text.bool()).float().mean().item()
            spent = time.perf_counter() - before
            before, elapsed = before + spent, elapsed + spent
            if done % LOG_EVERY == 0:
                mean, accuracy = (sums / LOG_EVERY).tolist()
                log.append(dict(step=done, pages=done * pages, seconds=round(elapsed), rate=f"{now:.2e}"))
                log[-1].update(loss=round(mean, 4), accuracy=round(100 * accuracy, 2))
                bar.set_postfix(loss=f"{mean:.3f}", accuracy=f"{100 * accuracy:.1f} %")
                sums[:] = 0
            if elapsed - last_save > 30:
                training_state.save(state, parts, log, step=done, elapsed=elapsed)
                last_save = elapsed
    except KeyboardInterrupt:
        print(f"interrupted after {done} steps; go on with --resume --state {state}")
        raise
    finally:
        training_state.save(state, parts, log, step=done, elapsed=elapsed)
    scorer.save_pretrained(out)
    rows = measure(LearnedScorer.from_pretrained(out), Pages("test", test_pages))  # the weights as rounded by saving
    write_csv(out / "accuracy.csv", rows)
    write_csv(out / "training.csv", log)
    print(f"{steps} steps, {steps * pages} pages, {elapsed:.0f} s\n" + (out / "accuracy.csv").read_text())


if __name__ == "__main__":
    typer.run(train)
