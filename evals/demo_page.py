"""The page of `prune demo`: gradio's components around `prune.evals.demo_compare`. Needs the extra `demo`."""

from __future__ import annotations

from html import escape

import gradio as gr

from prune.errors import PruneError
from prune.evals.demo_compare import BUDGETS, Demo, Example, batch_html, comparison_html, open_upload
from prune.evals.grid import parse_share

LARGEST_FILE = "64mb"
KEEP_FILES = 3600  # seconds drawings stay on the disk
ASK = "Press Ask."
CSS = """
.prune-table { overflow-x: auto; }
.prune-table table { width: 100%; border-collapse: collapse; margin: 0; font-variant-numeric: tabular-nums; }
.prune-table table, .prune-table thead, .prune-table tbody, .prune-table tr { border: none !important; }
.prune-table th, .prune-table td { padding: 5px 10px !important; text-align: left; vertical-align: top;
  border: none !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.prune-table tbody th { font-weight: 400; min-width: 11em; }
.prune-table thead th { font-weight: 600; }
.prune-table small { opacity: 0.65; margin-left: 4px; }
.prune-table .trouble { color: #b91c1c; max-width: 20em; }
.dark .prune-table .trouble { color: #fca5a5; }
.prune-table .wrong { opacity: 0.65; }
.prune-table p { margin: 8px 10px; }
.prune-table .number { white-space: nowrap; }
#examples .grid-wrap { height: auto; min-height: 0; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
footer { display: none !important; }
"""
_SYSTEM = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_SYSTEM_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]


def launch(demo: Demo, host: str = "127.0.0.1", port: int | None = None):
    """Serve the page; returns at once.

    Args:
        demo: a loaded model.
        host: address to listen on.
        port: None takes the first free one from 7860 on.

    Returns:
        gradio's Blocks: `local_url` says where it is, `block_thread()` waits, `close()` ends it.

    Raises:
        OSError: the port is taken.
    """
    page = build(demo)
    page.queue(default_concurrency_limit=1, max_size=32)
    page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=_SYSTEM, font_mono=_SYSTEM_MONO),  # gradio's own theme asks Google for its font
        css=CSS,
        footer_links=[],
        run_history=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=LARGEST_FILE,
        prevent_thread_lock=True,
        quiet=True,
    )
    return page


def build(demo: Demo) -> gr.Blocks:
    """The page, not served yet. It asks nothing of the network."""
    first = demo.examples[0]
    method_a, method_b = demo.first_choice
    with gr.Blocks(title="prune", analytics_enabled=False, delete_cache=(KEEP_FILES, KEEP_FILES)) as page:
        chosen = gr.State(first)
        gr.Markdown(f"# prune\n{_about(demo)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                shown = gr.Image(
                    first.picture, show_label=False, interactive=False, height=260, buttons=[], elem_id="picture"
                )
                upload = gr.File(show_label=False, height=130, type="filepath", elem_id="upload")
                question = gr.Textbox(first.question, label="Question", lines=1, max_lines=4, elem_id="question")
                with gr.Row():
                    a = gr.Dropdown(demo.offered, value=method_a, label="Method A", min_width=120, elem_id="method-a")
                    b = gr.Dropdown(demo.offered, value=method_b, label="Method B", min_width=120, elem_id="method-b")
                percent = gr.Slider(1, 100, value=25, step=1, label="Budget: % left over", elem_id="budget")
                by = gr.Radio(list(BUDGETS), value=next(iter(BUDGETS)), label="... of what")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=480):
                gr.Markdown("Pick an example, or upload a picture on the left.")
                examples = gr.Gallery(
                    [one.picture for one in demo.examples],
                    show_label=False,
                    columns=6,
                    allow_preview=False,
                    interactive=False,
                    object_fit="cover",
                    buttons=[],
                    elem_id="examples",
                )
                with gr.Tabs():
                    with gr.Tab("This question"):
                        table = gr.HTML(ASK, elem_id="answers", padding=True)
                        with gr.Row():
                            drawing_a, drawing_b = (
                                gr.Image(show_label=False, interactive=False, buttons=[], elem_id=f"kept-{name}")
                                for name in "ab"
                            )
                    with gr.Tab("Many questions"):
                        count = gr.Slider(4, 100, value=12, step=1, label="Example questions with known answers")
                        run = gr.Button("Ask all", elem_id="ask-all")
                        many = gr.HTML(elem_id="many")
        if demo.refused:
            with gr.Accordion(f"{len(demo.refused)} methods are not offered, because ...", open=False):
                gr.Markdown("\n".join(f"- `{name}`: {why}" for name, why in demo.refused.items()))

        def pick(event: gr.SelectData):
            example = demo.examples[event.index]
            return example, example.picture, example.question, ASK, None, None

        def take(path: str | None):
            """An upload becomes the picture; a bad one leaves the picture as it is. The drop zone is emptied."""
            try:
                picture, note = open_upload(path)
            except PruneError as error:
                gr.Warning(escape(str(error)))
                return None, *[gr.skip()] * 5
            if note:
                gr.Info(escape(note))
            return None, Example(picture, ""), picture, ASK, None, None

        def compare(example: Example, question: str, a: str, b: str, percent: int, by: str):
            right = example.answer if question.strip() == example.question else ""
            results = []
            try:
                for result in demo.compare(example.picture, question, (a, b), parse_share(f"{percent}%"), BUDGETS[by]):
                    results.append(result)
                    drawings = [one.drawing for one in results[1:]] + [None, None]
                    yield comparison_html(results, right), drawings[0], drawings[1]
            except PruneError as error:
                gr.Warning(escape(str(error)))
                yield gr.skip(), gr.skip(), gr.skip()
            if results and (unknown := demo.unknown_words(question)):
                gr.Info(f"The model does not know: {', '.join(unknown)}")

        def ask_all(count: int, a: str, b: str, percent: int, by: str, progress=gr.Progress()):  # noqa: B008
            try:
                return batch_html(demo.batch(count or 12, (a, b), parse_share(f"{percent}%"), BUDGETS[by], progress))
            except PruneError as error:  # a field that was emptied
                gr.Warning(escape(str(error)))
                return gr.skip()

        hidden = {"api_visibility": "private"}
        settings, answers = [a, b, percent, by], [table, drawing_a, drawing_b]
        examples.select(pick, None, [chosen, shown, question, *answers], **hidden)
        upload.upload(take, upload, [upload, chosen, shown, *answers], **hidden)
        for asked in (ask.click, question.submit):
            asked(compare, [chosen, question, *settings], answers, **hidden)
        run.click(ask_all, [count, *settings], many, **hidden)
    return page


def _about(demo: Demo) -> str:
    about = f"`{demo.name}` answers three times: un-pruned, and with each method at the same budget."
    if demo.built_in:
        about += (
            " This built-in model has 1.6 million parameters and was trained on pictures of coloured digits only: "
            "of other pictures its answers mean nothing. `prune demo --model llava-hf/llava-1.5-7b-hf` asks a real one."
        )
    elif demo.name.startswith("demo:"):
        about += " This model is untrained: it shows which tokens are dropped, its answers are noise."
    return about
