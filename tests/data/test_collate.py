"""Packing: borders, restarting positions, and targets that never reach over a sample's end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchorformer.contracts import IGNORE_INDEX, Example
from anchorformer.processing import AnchorFormerProcessor
from data.collate import collate, make_filler

supervised = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5)


def _examples(masks: list[list[bool]]) -> list[Example]:
    examples, token = [], 10
    for index, mask in enumerate(masks):
        ids = torch.arange(token, token + len(mask))
        token += len(mask)
        labels = torch.where(torch.tensor(mask), ids, IGNORE_INDEX)
        examples.append(Example(str(index), ids, labels, torch.full((index % 2, 3, 2, 2), index, dtype=torch.uint8)))
    return examples


@given(supervised)
def test_batch_is_the_samples_end_to_end(masks: list[list[bool]]) -> None:
    examples = _examples(masks)
    batch = collate(examples)
    borders = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == max(map(len, masks))
    assert batch.sample_ids == tuple(example.sample_id for example in examples)
    targets = []
    for example, start, stop in zip(examples, borders[:-1], borders[1:], strict=True):
        assert batch.input_ids_S[start:stop].tolist() == example.input_ids_S.tolist()
        assert batch.position_ids_S[start:stop].tolist() == list(range(stop - start))
        # Alone, position i predicts label i + 1; the last position predicts nothing, the first label nobody.
        targets += [(start + i, label) for i, label in enumerate(example.labels_S[1:].tolist()) if label >= 0]
    assert list(zip(batch.predict_index_Q.tolist(), batch.targets_Q.tolist(), strict=True)) == targets
    assert batch.num_supervised == len(targets)
    assert batch.tiles_B3HW[:, 0, 0, 0].tolist() == [index for index in range(len(masks)) if index % 2]


def test_empty_batch_keeps_the_ranks_in_step(processor: AnchorFormerProcessor) -> None:
    batch = collate([], make_filler(processor), num_skipped=2)
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert batch.input_ids_S.tolist() == [processor.tokenizer.bos_token_id]
    assert batch.num_supervised == 0
    assert tuple(batch.tiles_B3HW.shape) == (0, 3, 14, 14)
    assert batch.sample_ids == ()
    assert batch.num_skipped == 2
    with pytest.raises(ValueError, match="filler"):
        collate([])


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
def test_filler_fits_every_template(processor: AnchorFormerProcessor, template: str) -> None:
    filler = make_filler(processor.with_template(template))
    assert filler.input_ids_S.numel() == 1
    assert filler.input_ids_S[0] != processor.image_token_id
    assert (filler.labels_S == IGNORE_INDEX).all()
