"""What pruning costs and saves: prefill time of a LLaVA with and without a pruner."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial

import torch
import typer
from rich.console import Console
from rich.table import Table

from prune import Budget, Geometry, apply_pruner, get_method
from prune.evals.bench_paired import Case, paired, quartiles_ms, setting, setting_line
from prune.evals.csv_file import write_csv

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Row:
    """One line of a benchmark.

    Args:
        case: what ran.
        median_ms, low_ms, high_ms: median and quartiles of the rounds.
        ratio_to_full: against the un-pruned model, per round, median.
        ratio_to_short: against the physical limit: the un-hooked model fed the short sequence; for a cut at decoder
            layer k, k layers of the full and the rest of the short run.
    """

    case: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio_to_full: float
    ratio_to_short: float


def llava(width: int, layers: int, device: str, dtype: torch.dtype):
    """A LLaVA-1.5 with a decoder of the given size and a 24 x 24 grid; random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=4096,
        ),
        image_token_index=1000,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).to(device, dtype).eval()


def engine(
    width: int = typer.Option(512, help="Decoder width."),
    layers: int = typer.Option(8, help="Decoder layers."),
    text: int = typer.Option(64, help="Text tokens, half before and half after the 576 visual tokens."),
    batch: int = typer.Option(1, help="Batch size."),
    ratio: float = typer.Option(0.889, help="Share of visual tokens removed."),
    rounds: int = typer.Option(20, help="Measured rounds."),
    threads: int = typer.Option(0, help="CPU threads; 0: as torch chooses. On a busy machine 1 is steadier."),
    device: str = typer.Option("cuda" if torch.cuda.is_available() else "cpu"),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    csv: str = typer.Option("", help="Write the rows, with device and versions, to this file."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Prefill time: full, pruned, and the un-hooked model fed the short sequence.

    The image is encoded before the clock starts, so all cases time the decoder (and, when pruned, the selection).
    `random` shows the engine's own overhead, the other methods add their scoring.
    """
    if threads:
        torch.set_num_threads(threads)
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} must be one of {', '.join(DTYPES)}")
    model = llava(width, layers, device, DTYPES[dtype])
    side = torch.arange(text // 2, device=device)
    ids = torch.cat([side + 3, torch.full((576,), 1000, device=device), side + 99]).expand(batch, -1)
    pixels = torch.randn(batch, 3, 336, 336, device=device, dtype=DTYPES[dtype])
    with torch.inference_mode():
        features = model.model.get_image_features(pixel_values=pixels, return_dict=True)
        embeds = model.get_input_embeddings()(ids)
        kept = Budget(ratio=ratio).solve(Geometry(576), lambda k: [k])
        short = torch.cat([embeds[:, : text // 2], features.pooler_output[0][:kept].expand(batch, -1, -1)], 1)
        short = torch.cat([short, embeds[:, -(text // 2) :]], 1)

    def full() -> None:
        model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)

    def limit() -> None:
        model(inputs_embeds=short, use_cache=True, logits_to_keep=1)

    cases = {"full": Case(full, full_layers=layers), "short": Case(limit)}
    methods = [("random", {}), ("uniform", {}), ("divprune", {}), ("random", {"layer": 2}), ("fastv", {}), ("dart", {})]
    for method in [get_method(name, **options) for name, options in methods]:
        (site,) = method.sites()
        attach = partial(apply_pruner, model, method, ratio=ratio)
        cases[f"{method.name} @ {site}"] = Case(full, attach, site.layer)
    with torch.inference_mode():
        times = paired(cases, rounds)
    rows = [_row(name, times[name], times, case.full_layers / layers) for name, case in cases.items()]
    sizes = {"width": width, "layers": layers, "text": text, "batch": batch, "kept": kept, "dtype": dtype}
    sizes["rounds"] = rounds
    if csv:
        write_csv(csv, [sizes | asdict(row) | setting(device) for row in rows])
    if as_json:
        for row in rows:
            print(json.dumps({**asdict(row), **sizes, **setting(device)}))
        return
    note = f"576 -> {kept} visual + {text} text tokens, width {width}, {layers} layers, batch {batch}, {dtype}"
    _print(rows, f"{note}\n{setting_line(device)}")


def _row(name: str, seconds: list[float], times: dict[str, list[float]], share: float) -> Row:
    low, median, high = quartiles_ms(seconds)
    full, short = times["full"], times["short"]
    ideal = short if name == "full" else [share * f + (1 - share) * s for f, s in zip(full, short)]
    return Row(
        case=name,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        ratio_to_full=round(statistics.median(t / f for t, f in zip(seconds, full)), 3),
        ratio_to_short=round(statistics.median(t / s for t, s in zip(seconds, ideal)), 3),
    )


def _print(rows: list[Row], note: str) -> None:
    table = Table(
        title=f"Prefill, {note}", caption="ratio to short: for decoder:k against k full + the rest short layers"
    )
    for heading in ("case", "median ms", "quartiles", "ratio to full", "ratio to short"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        spread = f"{row.low_ms:.1f}-{row.high_ms:.1f}"
        table.add_row(row.case, f"{row.median_ms:.1f}", spread, f"{row.ratio_to_full:.3f}", f"{row.ratio_to_short:.3f}")
    Console().print(table)
