"""Language models beyond Vicuna, each with its own chat template: assembled, supervised, trained, asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anchorformer.assemble import assemble
from anchorformer.contracts import IGNORE_INDEX
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import check_folder, load_model
from tests.conftest import ANCHOR, CONNECTOR

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = [("user", "<image>\nwhat color is the star?"), ("assistant", "red"), ("user", "how many?"), ("assistant", "3")]
FAMILIES: dict[str, tuple[str, str, list[str], str, str, dict[str, Any]]] = {
    "Llama 3": ("llama", LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", "",
                {"rope_theta": 500000.0}),
    "Qwen2.5": ("qwen2", CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "",
                {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "", {"head_dim": 16}),
    "Mistral": ("mistral", MISTRAL, ["[INST]", "[/INST]"], "</s>", " ", {"head_dim": 16}),
}  # fmt: skip
"""Family -> its model_type, its template reduced to what frames a turn, its special tokens, what ends an answer, what
stands before one, and what is particular about its configuration. Source: the model cards of
meta-llama/Meta-Llama-3-8B-Instruct, Qwen/Qwen2.5-7B-Instruct, Qwen/Qwen3-8B, mistralai/Mistral-7B-Instruct-v0.2."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_the_whole_way(family: str, tiny_backbones: Path, tmp_path: Path) -> None:
    kind, template, specials, stop, space, more = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones / "llama")
    tokenizer.add_tokens(specials, special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = template, stop
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer), "bos_token_id": 1,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vision, out = str(tiny_backbones / "clip"), tmp_path / "model"
    assemble(vision, str(tmp_path / "llm"), ANCHOR, CONNECTOR, out, template="chat")
    check_folder(out, every_hash=True)
    processor = AnchorFormerProcessor.from_pretrained(out)
    image = Image.new("RGB", (28, 28), (200, 30, 30))

    example = processor.encode(TURNS, [image], sample_id="one")
    supervised = example.labels_S != IGNORE_INDEX
    assert processor.tokenizer.decode(example.labels_S[supervised]) == f"{space}red{stop}{space}3{stop}"
    assert int((example.input_ids_S == processor.image_token_id).sum()) == processor.num_image_tokens

    model = load_model(out, torch.float32)
    model.vision_tower.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    inputs = {"input_ids": example.input_ids_S[None], "attention_mask": torch.ones_like(example.input_ids_S)[None],
              "pixel_values": example.tiles_B3HW, "labels": example.labels_S[None]}  # fmt: skip
    losses = []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[1] < losses[0]
    assert math.isfinite(losses[1])

    asked = processor(images=image, conversations=[TURNS[:1]])
    ids = model.eval().generate(**asked, max_new_tokens=4, do_sample=False, eos_token_id=processor.stop_token_ids)
    assert processor.image_token_id not in ids[0, -1:].tolist()
    assert processor.tokenizer.convert_tokens_to_ids(stop) in processor.stop_token_ids
