"""`python -m prune.evals`: `prune eval`, as `accelerate launch -m prune.evals` starts it."""

from prune.cli import app

if __name__ == "__main__":
    import sys

    app(["eval", *sys.argv[1:]], prog_name="prune")
