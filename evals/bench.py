"""Benchmarks: `python -m prune.evals.bench engine`, `... methods`, `... kernels`, `... vit`, `... model`, `... all`.

Paired runs in one process, in random order within every round, medians with quartiles; ratios side by side. Speed is
never asserted in a test: machines differ, ratios within one run are what can be compared.
"""

from __future__ import annotations

import typer

from prune.evals.bench_all import everything
from prune.evals.bench_engine import engine
from prune.evals.bench_kernels import kernels
from prune.evals.bench_methods import methods
from prune.evals.bench_model import model
from prune.evals.bench_vit import vit

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
app.command()(engine)
app.command()(methods)
app.command()(vit)
app.command()(model)
app.command("all")(everything)
app.command()(kernels)


if __name__ == "__main__":
    app()
