"""What the YAML files of this folder call; lmms-eval loads this file by its path."""

from types import SimpleNamespace

from datasets import Dataset

from prune.evals.scenes import Scenes
from prune.evals.scorers import exact


def documents(about: Dataset) -> Dataset:
    """One document per item, without its picture, from a row {"scenes", "split", "seed", "size"}."""
    (row,) = about
    which = {key: row[key] for key in ("scenes", "split", "seed")}
    items = Scenes(row["scenes"], row["split"], row["size"], row["seed"])
    texts = (dict(question=item.question, answer=item.answer, kind=item.kind) for item in items)
    return Dataset.from_list([{**which, "index": index, **text} for index, text in enumerate(texts)])


def pictures(doc: dict) -> list:
    """The picture of a document, drawn again: RGB, to the bit what `prune eval` shows."""
    return Scenes(doc["scenes"], doc["split"], doc["index"] + 1, doc["seed"])[doc["index"]].images


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the first result is the answer, as `prune.evals.scorers.exact` compares."""
    return {"accuracy": exact(results[0], SimpleNamespace(answer=doc["answer"]))}
