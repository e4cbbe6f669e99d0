"""`python -m prune.evals.lmms` prints the folder for lmms-eval's `--include_path`."""

from prune.evals.lmms import TASKS

if __name__ == "__main__":
    print(TASKS)
