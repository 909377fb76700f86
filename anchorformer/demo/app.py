"""The page: its parts, and what happens when one of them is moved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import reduce
from html import escape
from math import gcd
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from anchorformer.demo.session import HEADERS, Row, Session
from anchorformer.errors import UserError

TITLE = "AnchorFormer"
MAX_UPLOAD = "20mb"
LINES = 12
"""Earlier questions that the table keeps."""
Sent = dict[str, Any] | None
"""An image as the browser names it: `path`, of a file in the demo's own folder of uploads."""
WIDTHS = ["17%", "8%", "13%", "13%", "13%", "12%", "12%", "12%"]
FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
"""Those of the machine: no page of this demo asks another host for anything."""


def build(session: Session, images: Sequence[Path], subject: str) -> gr.Blocks:
    """The page of a session; `launch` shows it.

    Args:
        images: to choose from.
        subject: what is shown, one line.
    """
    name, count = session.trained_with

    def ask(sent: Sent, question: str, selector: str, wanted: float, lines: list[Row]) -> Iterator[Any]:
        try:
            for shown in session.ask(sent["path"] if sent else None, question, selector, round(wanted)):
                if shown.row is None:
                    yield {answer: shown.text}
                else:
                    lines = [shown.row, *lines][:LINES]
                    yield {
                        answer: shown.text, anchors: shown.anchors, attention: shown.attention, table: lines,
                        kept: lines, note: shown.note, budget: shown.row[1],
                    }  # fmt: skip
        except UserError as error:
            told = f"{error.what}. Found: {error.found}. Expected: {error.expected}. {error.remedy}."
            gr.Warning(escape(told), duration=None)
            yield {kept: lines}  # what is not named stays; without any, all would be cleared

    def ask_again(sent: Sent, question: str, selector: str, wanted: float, lines: list[Row]) -> Iterator[Any]:
        """Where there is something to ask: moving T before the first question is no mistake."""
        if sent and question.strip():
            yield from ask(sent, question, selector, wanted, lines)
        else:
            yield {kept: lines}

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"## {TITLE}\n{subject}")
        kept = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=220, buttons=[],
                    elem_id="image",
                )  # fmt: skip
                if images:
                    gr.Examples([[str(path)] for path in images], [image], label="Images", elem_id="examples")
                question = gr.Textbox(label="Question", elem_id="question", max_lines=4)
                selector = gr.Dropdown(list(session.choices), value=name, label="Selector", elem_id="selector")
                budget = gr.Slider(**_range(session, name, count), label="T", buttons=[], elem_id="budget")
                go = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3):
                answer = gr.Textbox(label="Answer", elem_id="answer", interactive=False)
                with gr.Row():
                    anchors = _picture("Anchors, in the colours of their heads", "anchors")
                    attention = _picture("Where the answer looked: the brighter, the more", "attention")
                note = gr.Markdown(elem_id="note")
                table = gr.Dataframe(
                    headers=HEADERS, label="Questions so far", interactive=False, wrap=True, buttons=[],
                    column_widths=WIDTHS, elem_id="table",
                )  # fmt: skip

        inputs: list[Any] = [image, question, selector, budget, kept]
        outputs: list[Any] = [answer, anchors, attention, table, kept, note, budget]
        # Without gradio's preprocessing, which would open the image before our limits are asked.
        one_at_a_time: dict[str, Any] = {
            "concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private", "show_progress": "minimal",
            "preprocess": False,
        }  # fmt: skip
        gr.on([go.click, question.submit], ask, inputs, outputs, **one_at_a_time)
        budget.release(ask_again, inputs, outputs, trigger_mode="always_last", **one_at_a_time)
        selector.input(
            lambda chosen, wanted: gr.Slider(**_range(session, chosen, round(wanted))), [selector, budget], budget,
            api_visibility="private",
        ).then(ask_again, inputs, outputs, **one_at_a_time)  # fmt: skip
    return page


def launch(page: gr.Blocks, port: int | None) -> str:
    """Serves the page on loopback and returns its address; the server runs beside the caller.

    Args:
        port: a free one from 7860 on where None.
    """
    _, address, _ = page.queue(max_size=16).launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
        max_file_size=MAX_UPLOAD, footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
        theme=gr.themes.Base(font=FONTS[0], font_mono=FONTS[1]),
    )  # fmt: skip
    return address


def _picture(title: str, name: str) -> gr.Image:
    with gr.Column():
        gr.Markdown(title)  # a label would lie on the picture
        return gr.Image(
            label=title, show_label=False, elem_id=name, type="pil", format="png", interactive=False,
            buttons=["fullscreen"],
        )  # fmt: skip


def _range(session: Session, selector: str, count: int) -> dict[str, Any]:
    """Of a slider: from the smallest T to the largest, in the steps that all of them lie on."""
    counts = list(session.choices[selector])
    return {
        "minimum": counts[0], "maximum": counts[-1],
        "step": reduce(gcd, (each - counts[0] for each in counts)) or 1,
        "value": min(counts, key=lambda each: abs(each - count)),
    }  # fmt: skip
