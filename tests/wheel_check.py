"""Run by CI from another folder, with the built wheel and PyPI's `kernels` installed: everything imports and works."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import kernels  # PyPI's, which transformers imports
import prune

checkout = Path(__file__).resolve().parents[1]
assert checkout not in Path(prune.__file__).resolve().parents, f"imported from the checkout: {prune.__file__}"
assert hasattr(kernels, "get_kernel"), f"{kernels.__file__} is not PyPI's kernels"
assert importlib.util.find_spec("adapters") is None and importlib.util.find_spec("evals") is None
tops = {file.parts[0] for file in files("prune-vlm") if ".." not in file.parts}
assert {top for top in tops if not top.endswith(".dist-info")} == {"prune"}, tops
for name in ("prune.adapters", "prune.evals", "prune.kernels", "prune.reducers", "prune.kernels.fused"):
    importlib.import_module(name)
from prune.evals.scenes_model import CHECKPOINT  # noqa: E402

assert (importlib.import_module("prune.evals.lmms").TASKS / "prune_scenes" / "prune_scenes.yaml").is_file()
assert (Path(CHECKPOINT) / "model.safetensors").stat().st_size > 1_000_000
listed = json.loads(subprocess.run(["prune", "list", "--json"], capture_output=True, text=True, check=True).stdout)
assert {"random", "uniform", "dart", "fastv", "divprune"} <= {row["name"] for row in listed}
subprocess.run(["prune", "show", "--method", "divprune", "-o", "wheel.png"], check=True, stdout=sys.stderr)
assert Path("wheel.png").stat().st_size > 10_000
print("wheel ok")
