"""Trains the built-in model on scenes: `python -m prune.evals.train_scenes`.

A LLaVA in small: CLIP-style tower with CLS, projector, Llama decoder, word tokenizer. First the tower alone, from
labels of its patches (which digit, which colour) and of CLS (which digits and colours are in the picture: CLS has to
look at the objects, so its attention means something); then the answers train the whole model, the labels stay as
helpers. The decoder is given few image tokens at first, then all of them.

Eight questions share one picture: they are packed behind it in one sequence, each blind to the others and at the
positions it would have alone, so the decoder reads the 144 image tokens once for eight answers.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from . import scenes, training_state
from .csv_file import write_csv
from .scenes import GRID, SIDE
from .scenes_model import CHECKPOINT, DECODER, MEAN, STD, TOWER, build_model, build_processor, measure

QUESTIONS = 8  # per picture
BLOCK = 11  # tokens of the longest question and its answer
FEW = 32  # image tokens the decoder is given at first: where to look is found faster, and at half the price
MIN_ITEMS = max(len(level.answers) for level in scenes.LEVELS.values())  # one of every kind
HARD_SHARE = 4  # one picture in four is a hard one
_NAMES = [*"0123456789", *scenes.SHAPES]
_COLOURS = list(scenes.COLOURS)


# ------------------------------------------------------------------------------------------------------- labels
class Heads(nn.Module):
    """What labels the tower in training, and is thrown away: a digit and a colour per patch, the contents per CLS."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(_NAMES) + 1 + len(_COLOURS) + 1))
        # CLS of the layer LLaVA reads and of the last one: methods read the attention of either.
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(_NAMES) + len(_COLOURS) + 9)) for _ in range(2)
        )

        self.place = nn.Linear(DECODER["hidden_size"], 2 * GRID)

    def where(self, features: Tensor) -> Tensor:
        """Loss of reading its row and column off an image token [B, GRID * GRID, D]."""
        places = torch.arange(GRID * GRID, device=features.device).expand(len(features), -1)
        row, column = self.place(features).transpose(1, 2).split(GRID, dim=1)
        return F.cross_entropy(row, places // GRID) + F.cross_entropy(column, places % GRID)

    def forward(self, hidden_states, batch) -> dict[str, Tensor]:
        """Losses {"digit", "colour", "cls"} from all hidden states of the tower."""
        names, colours = self.patch(hidden_states[-2][:, 1:]).split([len(_NAMES) + 1, len(_COLOURS) + 1], dim=-1)
        contents = 0
        for head, states in zip(self.cls, hidden_states[-2:]):
            present, count = head(states[:, 0]).split([len(_NAMES) + len(_COLOURS), 9], dim=-1)
            contents += F.binary_cross_entropy_with_logits(present.float(), batch["present"])
            contents += 0.1 * F.cross_entropy(count.float(), batch["count"])
        return {
            "digit": _balanced(names, batch["name"]),
            "colour": _balanced(colours, batch["colour"]),
            "cls": contents,
        }


def _balanced(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, objects and background (the last class) weighing the same however few patches objects have."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    background = labels.flatten() == logits.shape[-1] - 1
    return 0.7 * loss[~background].mean() + 0.3 * loss[background].mean()


# ----------------------------------------------------------------------------------------------------------- data
def make_batch(tokenizer, seed: int, first: int, size: int) -> dict[str, Tensor]:
    """The training pictures `first` to `first + size` with labels and questions; a function of its arguments alone.

    Returns:
        pixel_values [B, 3, SIDE, SIDE] fp32 normalised; name, colour [B, GRID * GRID] labels of patches; present
        [B, names + colours] 0 or 1; count [B] digits; blocks [B, QUESTIONS, BLOCK] token ids, right-padded; answer
        [B, QUESTIONS] index of the answer's token in its block.
    """
    batch = {
        "name": np.full((size, GRID, GRID), len(_NAMES)),
        "colour": np.full((size, GRID, GRID), len(_COLOURS)),
        "present": np.zeros((size, len(_NAMES) + len(_COLOURS)), dtype=np.float32),
        "count": np.zeros(size, dtype=np.int64),
        "blocks": np.full((size, QUESTIONS, BLOCK), tokenizer.pad_token_id),
        "answer": np.zeros((size, QUESTIONS), dtype=np.int64),
    }
    pixels = np.empty((size, SIDE, SIDE, 3), dtype=np.uint8)
    for row in range(size):
        name = "scenes-hard" if (first + row) % HARD_SHARE == 0 else "scenes"
        rng = scenes.generator(name, "train", seed, first + row)
        things = scenes.draw(rng, name)
        pixels[row] = scenes.render(rng, things, "train")
        batch["count"][row] = sum(thing.is_digit for thing in things)
        where = scenes.patch_labels(things)
        for index, thing in enumerate(things):
            digit, colour = _NAMES.index(thing.name), _COLOURS.index(thing.colour)
            batch["name"][row][where == index] = digit
            batch["colour"][row][where == index] = colour
            batch["present"][row, [digit, len(_NAMES) + colour]] = 1
        asked = {kind: answers for kind, answers in scenes.questions(things, name).items() if answers}
        for column in range(QUESTIONS):
            kind = list(asked)[rng.integers(len(asked))]
            answer = list(asked[kind])[rng.integers(len(asked[kind]))]
            question = asked[kind][answer][rng.integers(len(asked[kind][answer]))]
            tokens = _encode(tokenizer, f"{question} ASSISTANT: {answer}</s>")
            batch["blocks"][row, column, : len(tokens)] = tokens
            batch["answer"][row, column] = len(tokens) - 2
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    tensors["name"], tensors["colour"] = tensors["name"].flatten(1), tensors["colour"].flatten(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    tensors["pixel_values"] = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    return tensors


@cache
def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# --------------------------------------------------------------------------------------------------------- losses
def answer_losses(model, features: Tensor, prefix: Tensor, batch, seen: Tensor) -> dict[str, Tensor]:
    """The losses "look", "say" and "answer", and the share "wrong".

    Args:
        model: the LLaVA model.
        features: [B, GRID * GRID, D] image tokens.
        prefix: [P] token ids before the image.
        batch: of `make_batch`.
        seen: [B, N] ascending indices of the image tokens the decoder is given, at the positions they have among all.
    """
    device, blocks, embed = features.device, batch["blocks"], model.get_input_embeddings()
    n_prefix, n_image = len(prefix), features.shape[1]
    n_shared = n_prefix + seen.shape[1]
    features = features.gather(1, seen[..., None].expand(-1, -1, features.shape[-1]))
    states = torch.cat([embed(prefix).expand(len(blocks), -1, -1), features, embed(blocks.flatten(1))], dim=1)
    # Block of every column; columns see what came before them in the shared part and in their own block.
    block = torch.cat([torch.full((n_shared,), -1), torch.arange(QUESTIONS).repeat_interleave(BLOCK)]).to(device)
    mask = ((block[None] == block[:, None]) | (block[None] == -1)).tril()
    after = n_prefix + n_image + torch.arange(BLOCK, device=device).repeat(QUESTIONS)
    before = torch.arange(n_prefix, device=device)
    positions = torch.cat([before.expand(len(seen), -1), n_prefix + seen, after.expand(len(seen), -1)], dim=1)
    shown, other = _named(model.config.text_config.vocab_size, batch, seen)
    look = _look(model.model.language_model, states, positions, mask[n_shared:], shown)
    with torch.autocast(device.type, torch.bfloat16):
        out = model.model.language_model(
            inputs_embeds=states, attention_mask=mask[None, None], position_ids=positions, use_cache=False
        ).last_hidden_state.float()
    logits = model.lm_head(out[:, n_shared:])
    say = F.cross_entropy(logits[shown.any(-1)], other[shown.any(-1)])
    logits = logits.unflatten(1, (QUESTIONS, BLOCK))
    wanted = batch["answer"][..., None] + torch.arange(2, device=device)  # the answer, then the end
    index = (wanted - 1)[..., None].expand(-1, -1, -1, logits.shape[-1])  # the column before predicts
    logits, wanted = logits.gather(2, index), blocks.gather(2, wanted)
    wrong = (logits[:, :, 0].argmax(-1) != wanted[:, :, 0]).float().mean().detach()
    return dict(look=look, say=say, answer=F.cross_entropy(logits.flatten(0, 2), wanted.flatten()), wrong=wrong)


def _named(vocabulary: int, batch, seen: Tensor) -> tuple[Tensor, Tensor]:
    """What the words of the questions name.

    Returns:
        shown: [B, T, N] whether an image token shows what the column names.
        say: [B, T] the other property of what is shown, a token id: of a digit its colour, of a colour its digit.
    """
    first = vocabulary - 16  # the vocabulary ends: leftmost, topmost, yes, no, the digits, the colours
    columns = torch.arange(BLOCK, device=seen.device).expand_as(batch["blocks"])
    word = torch.where(columns < batch["answer"][..., None], batch["blocks"] - first, -99).flatten(1)
    answer = batch["blocks"].gather(2, batch["answer"][..., None]).expand_as(batch["blocks"]).flatten(1)
    name, colour = (batch[kind].gather(1, seen)[:, None] for kind in ("name", "colour"))
    digit, ask = name < 10, word[..., None]
    shown = digit & ((ask == name) | (ask == colour + 10))
    for number, place in ((-4, seen % GRID), (-3, seen // GRID)):
        ahead = torch.where(digit[:, 0], place, GRID)
        shown |= (ask == number) & (ahead == ahead.amin(1, keepdim=True))[:, None] & digit
    at = shown.int().argmax(-1)
    say = torch.where(word < 10, 10 + colour[:, 0].gather(1, at), name[:, 0].gather(1, at)) + first
    return shown, torch.where(word < 0, answer, say)


def _look(decoder, states: Tensor, positions: Tensor, mask: Tensor, shown: Tensor) -> Tensor:
    """How little two heads of the first layer look from a word at the image tokens that show what it names."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = decoder.layers[0].self_attn
    inputs, size = decoder.layers[0].input_layernorm(states), 2 * attention.head_dim
    query, key = (
        F.linear(inputs, layer.weight[:size]).unflatten(-1, (2, -1)).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(states, positions))
    n_asked = len(mask)
    scores = query[:, :, -n_asked:] @ key.transpose(-1, -2) * attention.scaling
    scores = scores.masked_fill(~mask, -torch.inf)
    target = F.pad(shown, (len(positions[0]) - n_asked - shown.shape[-1], n_asked))[:, None]
    looked = scores.masked_fill(~target, -torch.inf).logsumexp(-1) - scores.logsumexp(-1)
    return -looked.transpose(1, 2)[shown.any(-1)].mean()


def losses(model, heads: Heads, prefix: Tensor, batch, tokens: int) -> dict[str, Tensor]:
    """The losses of one step: `HELPERS`, "answer" and the share "wrong"; of the tower only if there are no `tokens`.

    Args:
        tokens: how many image tokens the decoder is given: all of the objects' and random others.
    """
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    found = heads(states, batch)
    if tokens:
        features = model.model.multi_modal_projector(states[-2][:, 1:])
        # Image tokens are made to resemble the words for what they show, so that a question finds them.
        normed = F.rms_norm(features, features.shape[-1:])
        found["place"] = heads.where(normed)
        words = normed @ model.get_input_embeddings().weight.T
        digit, colour = words[batch["name"] < 10][:, -16:].split([10, 6], dim=-1)  # the last words of the vocabulary
        labels = batch["name"][batch["name"] < 10], batch["colour"][batch["name"] < 10]
        found["word"] = F.cross_entropy(digit, labels[0]) + F.cross_entropy(colour, labels[1])
        wish = (batch["colour"] != len(_COLOURS)) + torch.rand(batch["colour"].shape).to(features.device)
        seen = wish.topk(tokens).indices.sort().values
        found |= answer_losses(model, features, prefix, batch, seen)
    return found


# ------------------------------------------------------------------------------------------------------- training
def train(
    seconds: Annotated[float, typer.Option(help="Training time over all resumed runs; then the rate is 0.")] = 6000,
    steps: Annotated[int, typer.Option(help="Training steps, if these come first.")] = 10**9,
    tower_images: Annotated[int, typer.Option(help="Pictures for the tower alone, before the answers count.")] = 25_000,
    few_images: Annotated[
        int, typer.Option(help=f"Pictures of which the decoder sees {FEW} tokens, after that.")
    ] = 50_000,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.")] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    state: Annotated[Path, typer.Option(help="File to resume from, written every minute.")] = Path("train_scenes.pt"),
    test_items: Annotated[int, typer.Option(min=MIN_ITEMS, help="Held-out items per level.")] = scenes.TEST_ITEMS,
    resume: Annotated[bool, typer.Option(help="Go on from --state.")] = False,
) -> None:
    """Train the model, write its folder, and measure it on the held-out items."""
    from tqdm import tqdm

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(tokenizer).to(device).train()
    heads = Heads(TOWER["hidden_size"]).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    step, seen, elapsed, log = 0, 0, 0.0, []
    parts = dict(model=model, heads=heads, optimizer=optimizer)
    if resume:
        log, counters = training_state.load(state, parts, device)
        step, seen, elapsed = counters["step"], counters["seen"], counters["elapsed"]

    prefix = torch.tensor(_encode(tokenizer, "USER:"), device=device)
    sums, last_save, before = dict.fromkeys(LOSSES, 0.0), elapsed, time.perf_counter()
    bar = tqdm(total=round(seconds), initial=round(elapsed), unit="s", desc="training")
    try:
        while step < steps and elapsed < seconds:
            progress = max(step / steps, elapsed / seconds)
            now = rate * min(1, (step + 1) / 200, (1 - progress) / 0.15)
            batch = {key: value.to(device) for key, value in make_batch(tokenizer, seed, seen, batch_size).items()}
            tokens = 0 if seen < tower_images else FEW if seen < tower_images + few_images else GRID * GRID
            for group in optimizer.param_groups:
                group["lr"] = now
            found = losses(model, heads, prefix, batch, tokens)
            helpers = 0.5 if tokens else 1.0
            (helpers * sum(found[key] for key in HELPERS if key in found) + found.get("answer", 0)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seen = step + 1, seen + batch_size
            for key, value in found.items():
                sums[key] += value.item() / LOG_EVERY
            spent = time.perf_counter() - before
            before, elapsed = before + spent, elapsed + spent
            if step % LOG_EVERY == 0:
                log.append(dict(step=step, images=seen, seconds=round(elapsed), rate=f"{now:.2e}"))
                log[-1].update({key: round(value, 4) for key, value in sums.items()})
                bar.set_postfix({key: f"{value:.3f}" for key, value in sums.items()})
                bar.n = min(round(elapsed), bar.total)
                bar.refresh()
                sums = dict.fromkeys(LOSSES, 0.0)
            if elapsed - last_save > 60:
                training_state.save(state, parts, log, step=step, seen=seen, elapsed=elapsed)
                last_save = elapsed
    except KeyboardInterrupt:
        print(f"interrupted after {step} steps; go on with --resume --state {state}")
        raise
    finally:
        bar.close()
        training_state.save(state, parts, log, step=step, seen=seen, elapsed=elapsed)
    print(f"{step} steps, {seen} pictures, {elapsed:.0f} s; now {test_items} test items of each level")
    model = model.half().eval()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    accuracy, attention = measure(model.float(), processor, test_items)  # the weights as rounded by saving
    write_csv(out / "accuracy.csv", accuracy)
    write_csv(out / "cls_attention.csv", attention)
    write_csv(out / "training.csv", log[:: max(1, len(log) // 100)])
    print((out / "accuracy.csv").read_text(), (out / "cls_attention.csv").read_text(), sep="\n")


HELPERS = ("digit", "colour", "cls", "place", "word", "look", "say")
LOSSES = (*HELPERS, "answer", "wrong")
LOG_EVERY = 50

if __name__ == "__main__":
    typer.run(train)
