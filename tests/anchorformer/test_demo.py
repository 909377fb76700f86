"""What lies behind an answer, other selectors before a connector, and the page in a browser."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anchorformer.answering import Answer
from anchorformer.chat import chat
from anchorformer.demo.choices import nearest
from anchorformer.demo.seeing import NO_ANCHOR, heads_of, see
from anchorformer.demo.session import Session, Shown
from anchorformer.errors import UserError
from anchorformer.opening import Opened, newest_run, open_model
from tests.browser import CHROMIUM, open_page

ROOT = Path(__file__).resolve().parents[2]
TURNS = [("user", "<image>\nwhat color is the star?")]


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> Opened:
    return open_model(tiny_folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.effect_noise((40, 28), 90).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def answered(opened: Opened, picture: Path) -> Answer:
    answer = Answer(opened.model, opened.processor, TURNS, [Image.open(picture)], max_new_tokens=6)
    assert "".join(answer) == answer.text
    return answer


def test_streamed_is_generated(opened: Opened, picture: Path) -> None:
    answer = answered(opened, picture)
    inputs = opened.processor([[Image.open(picture)]], conversations=[TURNS])
    stops = opened.processor.stop_token_ids
    ids = opened.model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=stops)
    assert answer.ids == ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_attention_is_that_of_eager_attention(opened: Opened, picture: Path) -> None:
    answer = answered(opened, picture)
    sight = see(opened.model, answer)
    inputs = dict(answer.inputs)
    prompt = inputs.pop("input_ids")
    ids = torch.cat([prompt, torch.tensor([answer.ids])], 1)
    inputs["attention_mask"] = torch.ones_like(ids)
    opened.model.language_model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = opened.model(input_ids=ids, output_attentions=True, **inputs).attentions
    finally:
        opened.model.language_model.set_attn_implementation("anchorformer_text")
    rows = slice(prompt.shape[1] - 1, ids.shape[1] - 1)
    expected = torch.stack([each[0, :, rows].mean((0, 1)) for each in maps]).mean(0)[
        ids[0] == opened.model.image_token_id
    ]
    assert sight.image_share == pytest.approx(float(expected.sum()), abs=1e-5)
    assert sight.attention_BP is not None and sight.cls_share is not None  # noqa: PT018
    assert sight.attention_BP.sum() + sight.cls_share == pytest.approx(sight.image_share, abs=1e-5)


def test_heads_take_what_no_earlier_one_has(opened: Opened, picture: Path) -> None:
    pixels = torch.randn(2, 3, 28, 28)
    features = opened.model.vision_tower(pixels)
    anchors = opened.model.selector(features)
    heads, count = heads_of(features, anchors)
    assert heads is not None
    assert count == 4
    for row in range(2):
        taken = {0}
        for head in range(4):
            order = features.cls_scores_BHN[row, head].argsort(descending=True, stable=True).tolist()
            own = [token for token in order if token not in taken][:2]
            assert sorted(own) == [token for token in (heads[row] == head).nonzero().flatten().tolist() if token]
            taken |= {*own}
        assert (heads[row] != NO_ANCHOR).sum() == 9


def test_every_selector_answers_and_is_drawn(opened: Opened, picture: Path) -> None:
    session = Session(opened)
    assert set(session.choices) >= {"anchor", "average", "mean_pool", "random", "uniform", "all"}
    assert "cls_similarity" not in session.choices  # the tower was cut before its end
    for name, counts in session.choices.items():
        wanted = 6
        *_, last = session.ask(str(picture), "what?", name, wanted, max_new_tokens=3)
        assert isinstance(last, Shown)
        assert last.row is not None
        assert last.row[:3] == [name, nearest(counts, wanted), nearest(counts, wanted)]
        assert last.anchors is not None
        assert last.attention is not None
    *_, own = session.ask(str(picture), "what?", *session.trained_with, max_new_tokens=6)
    assert own.text == answered_as(opened, picture, "what?")


def answered_as(opened: Opened, picture: Path, question: str) -> str:
    turns = [("user", f"<image>\n{question}")]
    return "".join(Answer(opened.model, opened.processor, turns, [Image.open(picture)], max_new_tokens=6))


def test_mistakes_are_told(opened: Opened, picture: Path, tmp_path: Path) -> None:
    session = Session(opened)
    for arguments in ((None, "what?", "anchor"), (str(picture), " ", "anchor"), (str(picture), "what?", "none")):
        with pytest.raises(UserError):
            list(session.ask(*arguments, 9))
    with pytest.raises(UserError, match="make train"):
        newest_run(tmp_path)
    with pytest.raises(UserError, match="no model"):
        open_model(tmp_path / "nothing")


def test_a_conversation_in_the_terminal(opened: Opened, picture: Path) -> None:
    lines = ["what?", "and now?", "/image /nowhere.png", f"/image {picture}", "/what", "a <image>", "/quit", "never"]
    told = "".join(chat(opened, Image.open(picture), lines, max_new_tokens=4))
    assert "40 x 28 pixels" in told
    assert "/what is no command" in told
    assert told.count("error:") == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is missing: pip install '.[demo]'")
@pytest.mark.skipif(importlib.util.find_spec("websockets") is None, reason="websockets is missing")
def test_the_page(tiny_folder: Path, picture: Path, tmp_path: Path) -> None:
    """Load, ask, move T and selector, upload what is no image; no console error, nothing asked of another host."""
    run = tmp_path / "checkpoints" / "run"
    shutil.copytree(tiny_folder, run / "model")
    (run / "DONE").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "anchorformer.demo", "--images", str(picture.parent)]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        address = next(word for line in server.stdout for word in line.split() if word.startswith("http"))
        with open_page(address, tmp_path / "profile") as page:
            use(page, picture)
        assert page.requests
        assert [each for each in page.requests if not each.startswith((address, "data:", "blob:"))] == []
        assert page.complaints == []
    finally:
        server.terminate()
        server.wait(60)


def use(page: Any, picture: Path) -> None:
    newest = "document.querySelector('#table div[role=row]').innerText.split('\\n').map(cell => cell.trim())"
    page.until("document.querySelectorAll('#examples button').length > 0")
    page.value("document.querySelector('#examples button').click()")
    page.until("!!document.querySelector('#image img')")
    page.type("#question textarea", "what color is the star?")
    page.value("document.querySelector('#ask').click()")
    for name in ("anchors", "attention"):
        page.until(f"(document.querySelector('#{name} img') || {{}}).naturalWidth > 0")
    page.until("!!document.querySelector('#answer textarea').value")
    page.until("document.querySelectorAll('#table div[role=row]').length == 1")
    page.type("#budget input[type=number]", "13")
    page.value("document.querySelector('#budget input[type=number]').blur()")
    page.until(f"{newest}.includes('13')")
    page.type("#selector input", "uniform")
    page.enter()
    page.until(f"{newest}.includes('uniform')")
    broken = picture.with_name("broken.png")
    broken.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    page.value("document.querySelector('#image button[aria-label=\"Remove Image\"]').click()")
    page.upload("#image input[type=file]", broken)
    page.until("!!document.querySelector('#image img')")
    page.value("document.querySelector('#ask').click()")
    page.until("document.body.innerText.includes('cannot be decoded')")
    assert page.value("document.querySelectorAll('#table div[role=row]').length") == 3
