"""Trains the built-in vision transformer on digits: `python -m prune.evals.train_digits`.

Cross entropy on the 1,437 training digits, each drawn anew every time: another size, place, shade, noise and turn; from
every other picture a rectangle is erased. The curve is measured on a tenth of the training digits that is left out for
it; the held-out digits are looked at when the training is over.

The model that ships was first trained with large patches, which is four times as fast:

    python -m prune.evals.train_digits --patch 4 --epochs 130 --out patch4 --state patch4.pt
    python -m prune.evals.train_digits --patch 2 --start patch4 --epochs 32 --rate 1e-3 --seed 1
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from . import training_state
from .csv_file import write_csv
from .digits import ARCHITECTURE, CHECKPOINT, MEAN, SIDE, STD, Digits, build_digits_vit, drawings, render, to_pixels

TURN = 15  # degrees to either side
ERASED = 0.5  # share of the pictures a rectangle is erased in
EVERY = 10  # every tenth training digit validates
SMOOTHING = 0.1  # of the labels


def make_batch(seed: int, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The training pictures `first` to `first + size`, a function of its arguments alone: pixels, labels."""
    images_of, labels = drawings("train")
    ours = [index for index in range(len(labels)) if index % EVERY]
    images, wanted = [], []
    for number in range(first, first + size):
        epoch, place = divmod(number, len(ours))
        index = ours[np.random.default_rng([seed, epoch]).permutation(len(ours))[place]]
        rng = np.random.default_rng([1, seed, number])
        image = render(rng, images_of[index], angle=rng.uniform(-TURN, TURN))
        if rng.random() < ERASED:  # random erasing: a rectangle of one colour
            height, width = rng.integers(4, 13, size=2)
            top, left = rng.integers(SIDE - height), rng.integers(SIDE - width)
            image[top : top + height, left : left + width] = rng.integers(256, size=3)
        images.append(image)
        wanted.append(labels[index])
    return to_pixels(images), torch.tensor(np.array(wanted))


@torch.no_grad()
def accuracy(model, pictures) -> float:
    """Share of (picture, label) pairs whose digit has the highest logit."""
    images, labels = zip(*pictures)
    said = torch.cat([model(to_pixels(images[i : i + 60])).argmax(-1) for i in range(0, len(images), 60)])
    return (said == torch.tensor(labels)).float().mean().item()


def measure(model) -> list[dict]:
    """Rows of accuracy.csv: on the held-out digits, drawn twice."""
    found = []
    for seed in (0, 1):
        pictures = list(Digits(seed=seed))
        found.append(dict(seed=seed, items=len(pictures), accuracy=round(accuracy(model, pictures), 4)))
    return found


def resample(folder: Path, model) -> dict[str, Tensor]:
    """Weights of a folder for a model that differs in the size of its patches alone: filters and positions resized."""
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    filters, positions = "patch_embed.proj.weight", "pos_embed"
    weights[filters] = resample_patch_embed(weights[filters], list(model.patch_embed.patch_size))
    weights[positions] = resample_abs_pos_embed(weights[positions], list(model.patch_embed.grid_size))
    return weights


def train(
    epochs: Annotated[int, typer.Option(help="Times every training digit is drawn.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.")] = 64,
    rate: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 2e-3,
    decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.05,
    patch: Annotated[int, typer.Option(help="Edge of a patch in pixels.")] = ARCHITECTURE["patch_size"],
    start: Annotated[Path | None, typer.Option(help="Folder of trained weights to begin with.")] = None,
    patch_drop: Annotated[float, typer.Option(help="Share of the patches a training step drops (PatchDropout).")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights and pictures.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    state: Annotated[Path, typer.Option(help="File to resume from, written every epoch.")] = Path("train_digits.pt"),
    resume: Annotated[bool, typer.Option(help="Go on from --state.")] = False,
) -> None:
    """Train the model, write its folder, and measure it on the held-out digits."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    architecture = {**ARCHITECTURE, "patch_size": patch}
    model = build_digits_vit(**architecture, patch_drop_rate=patch_drop).train()
    if start and not resume:
        model.load_state_dict(resample(start, model))
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    validation = list(Digits("train"))[::EVERY]
    size = len(Digits("train")) - len(validation)
    per_epoch = size // batch_size
    steps, step, elapsed, log = epochs * per_epoch, 0, 0.0, []
    parts = dict(model=model, optimizer=optimizer)
    if resume:
        log, counters = training_state.load(state, parts)
        step, elapsed = counters["step"], counters["elapsed"]

    sums, before = [0.0, 0.0], time.perf_counter()
    with tqdm(total=steps, initial=step, unit="step", desc="training") as bar:
        while step < steps:
            now = rate * min((step + 1) / (3 * per_epoch), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = now
            pixels, labels = make_batch(seed, step * batch_size, batch_size)
            logits = model(pixels)
            loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            sums[0] += loss.item() / per_epoch
            sums[1] += (logits.argmax(-1) == labels).float().mean().item() / per_epoch
            bar.update()
            if step % per_epoch == 0:
                right = accuracy(model.eval(), validation)
                model.train()
                elapsed, before = elapsed + time.perf_counter() - before, time.perf_counter()
                log.append(dict(epoch=step // per_epoch, step=step, seconds=round(elapsed), rate=f"{now:.2e}"))
                log[-1] |= dict(loss=round(sums[0], 4), train=round(sums[1], 4), validation=round(right, 4))
                bar.set_postfix(loss=f"{sums[0]:.3f}", train=f"{sums[1]:.3f}", validation=f"{right:.3f}")
                sums = [0.0, 0.0]
                training_state.save(state, parts, log, step=step, elapsed=elapsed)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.eval().state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    about = dict(library="timm", architecture="VisionTransformer", arguments=architecture, mean=MEAN, std=STD)
    (out / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    model.load_state_dict({name: value.float() for name, value in weights.items()})  # as rounded by saving
    rows = measure(model)
    write_csv(out / "accuracy.csv", rows)
    write_csv(out / "training.csv", log)
    print(*rows, sep="\n")


if __name__ == "__main__":
    typer.run(train)
