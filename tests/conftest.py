"""Fixtures that several rooms share: golden vectors, real datasets, and tiny backbones and models on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.products import Beside

ROOT = Path(__file__).resolve().parent.parent

ANCHOR = {"_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig", "num_anchors": 9, "layer": -2}
CONNECTOR = {
    "_target_": "anchorformer.connectors.anchor_former.AnchorFormerConnectorConfig",
    "depth": 2,
    "num_heads": 2,
    "head_dim": 8,
    "ff_mult": 2,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ '<user>' + message['content'] + '<asst>' }}"
    "{% endif %}{% endfor %}"
)
SENTENCES = [
    "what color is the star? red", "how many objects are there? 3", "a large green circle at the top left",
    "a receipt from grand: juice 8, tea 11, total 26", "describe the image. a bar chart: black 4, yellow 6",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
]  # fmt: skip


BESIDE = pytest.StashKey[dict[str, Beside]]()


def pytest_sessionstart() -> None:
    """Models here are so small that a second thread costs a third more processor time and saves none."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks at something that runs beside the tests comes last."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """It takes minutes of processes of its own, so it begins before the first test."""
    wanted = {marker.args[0] for item in session.items for marker in item.iter_markers("beside")}
    begun = wanted if not session.config.option.collectonly else set()
    session.config.stash[BESIDE] = {what: Beside(what) for what in sorted(begun)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    for beside in session.config.stash.get(BESIDE, {}).values():
        beside.end()


@pytest.fixture(scope="module")
def beside(request: pytest.FixtureRequest) -> Beside:
    """What runs beside the tests of this module."""
    return request.config.stash[BESIDE][request.node.get_closest_marker("beside").args[0]]


@pytest.fixture(scope="module")
def runs(beside: Beside) -> Path:
    """Folder of the runs `align` and `finetune` of the module's launch/miniworld.sh."""
    return beside.runs()


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}; set the variable to the folder with these files")
    return folder


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Vectors produced by running the published reference code."""
    return _folder("ANCHORFORMER_GOLDEN", "../shared/golden")


@pytest.fixture(scope="session")
def realdata_root() -> Path:
    """Small real datasets in their native formats."""
    return _folder("ANCHORFORMER_REALDATA", "../shared/realdata")


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `clip` (28 px, 16 patches, 4 heads) and `llama` (with tokenizer), random weights, real files."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("backbones")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<user>", "<asst>"]
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(7)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=16))
    clip.save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.48, 0.46, 0.41],
             "image_std": [0.27, 0.26, 0.28], "size": {"shortest_edge": 28}}
        )
    )  # fmt: skip
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    llm.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


Assemble = Callable[..., Path]


@pytest.fixture(scope="session")
def assemble_tiny(tiny_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Assemble:
    """Assembles a model folder from the tiny backbones: `assemble_tiny(selector=..., connector=...)`."""

    def build(
        selector: dict[str, Any] = ANCHOR, connector: dict[str, Any] = CONNECTOR, template: str = "chat",
        tiling: dict[str, Any] | None = None, integration: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        from anchorformer.assemble import assemble

        out = tmp_path_factory.mktemp("model") / "start"
        clip, llama = str(tiny_backbones / "clip"), str(tiny_backbones / "llama")
        return assemble(
            clip, llama, selector, connector, out, template=template, tiling=tiling, integration=integration
        )

    return build


@pytest.fixture(scope="session")
def tiny_folder(assemble_tiny: Assemble) -> Path:
    """A complete tiny model folder (T = 9, depth 2); tests must not write into it."""
    return assemble_tiny()
