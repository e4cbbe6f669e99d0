"""Pruning inside lmms-eval: models under new names, and the scenes as a task. `docs/lmms-eval.md` shows the commands.

lmms-eval finds the models by itself (entry point `lmms_eval.models`). Tasks have no entry point there: the folder
`TASKS` goes to `--include_path`, and `python -m prune.evals.lmms` prints it.
"""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
"""The folder with the tasks `prune_scenes` and `prune_scenes_hard`."""


def manifests() -> list:
    """The entry point: an lmms-eval `ModelManifest` for every model in `prune.evals.lmms.models.BASES`.

    Imports no model, neither ours nor lmms-eval's.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    from prune.evals.lmms import models

    return [ModelManifest(name, chat_class_path=f"{models.__name__}.{name}") for name in models.BASES]
