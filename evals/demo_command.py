"""The command `prune demo`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from prune.evals.command import DEFAULT_MODEL, Dtype

GRADIO_FOLDER = "GRADIO_TEMP_DIR"
LOCAL = ("127.0.0.1", "localhost", "::1")


def demo(
    model: Annotated[
        str, typer.Option(help="scenes-llava (built in), demo:..., a folder or a hub name.")
    ] = DEFAULT_MODEL,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; without it the GPU if there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto is the checkpoint's own.")] = Dtype.auto,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; 3 for the built-in model, else 48.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = LOCAL[0],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on without it.")
    ] = None,
) -> None:
    """Serve a page that compares two methods on a picture of yours: kept tokens, answers, costs.

    Prints its address on stdout and runs until Ctrl-C. Questions and pictures stay on this machine.
    """
    from prune.loading import UserError, check_model_name

    if find_spec("gradio") is None:
        raise UserError('prune demo needs the package gradio: pip install "prune-vlm[demo]"')
    check_model_name(model)
    # gradio leaves uploads and drawings where it has put them
    with TemporaryDirectory(prefix="prune-demo-", dir=os.environ.get(GRADIO_FOLDER)) as folder:
        os.environ[GRADIO_FOLDER] = folder
        from prune.evals.demo_compare import Demo
        from prune.evals.demo_page import launch

        served = launch(Demo(model, device, dtype.value, max_new_tokens), host, port)
        if host not in LOCAL:
            print(f"prune: whoever reaches this machine on port {served.server_port} can use the page", file=sys.stderr)
        print(served.local_url, flush=True)
        served.block_thread()
