"""`import prune` is light and changes nothing."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys, warnings, logging
import torch
hooks = [len(getattr(torch.nn.modules.module, f"_global_forward_{kind}")) for kind in ("hooks", "pre_hooks")]
before = (hooks, list(warnings.filters), logging.root.handlers[:], torch.get_num_threads(), torch.is_grad_enabled())
modules = set(sys.modules)
import prune
prune.list_methods()
hooks = [len(getattr(torch.nn.modules.module, f"_global_forward_{kind}")) for kind in ("hooks", "pre_hooks")]
after = (hooks, list(warnings.filters), logging.root.handlers[:], torch.get_num_threads(), torch.is_grad_enabled())
print(json.dumps([before == after, sorted({m.partition(".")[0] for m in set(sys.modules) - modules})]))
"""


def test_import_is_light_and_patches_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=tmp_path)
    unchanged, new = json.loads(done.stdout)
    assert unchanged
    assert not {"transformers", "timm", "open_clip", "matplotlib", "PIL", "sklearn", "rich", "typer"} & set(new)
    assert not {"adapters", "kernels", "evals"} & set(new)
