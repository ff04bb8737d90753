"""Tests of collating."""

import numpy as np
import pytest
import torch

from smartbatch_lightning import PackCollator, PadCollator
from smartbatch_lightning.data.collators import batch_lengths

ROWS = [
    {"input_ids": np.array([5, 6, 7], np.int32), "token_type_ids": np.array([0, 1, 1], np.int8), "labels": 1},
    {"input_ids": np.array([8, 9, 10, 11, 12], np.int32), "token_type_ids": np.array([0, 0, 1, 1, 1]), "labels": 0},
]


def test_a_batch_is_padded_to_its_longest_sample_with_a_mask_over_real_tokens() -> None:
    batch = PadCollator(99)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 99, 99], [8, 9, 10, 11, 12]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_packed_batch_is_one_row_without_padding_and_says_where_samples_start() -> None:
    batch = PackCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 8]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 5
    assert batch["labels"].tolist() == [1, 0]
    assert "attention_mask" not in batch


def test_the_lengths_of_a_batch_are_told_padded_and_packed() -> None:
    for collator in (PadCollator(pad_to_multiple_of=8), PackCollator()):
        assert batch_lengths(collator(ROWS)).tolist() == [3, 5]
    assert batch_lengths([1, 2]) is None


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 5),
        ({"pad_to_multiple_of": 4}, 8),
        ({"pad_to_multiple_of": 4, "max_length": 6}, 6),
        ({"padding": "max_length", "max_length": 20}, 20),
        ({"padding": "max_length", "max_length": 20, "pad_to_multiple_of": 8}, 20),
    ],
)
def test_the_width_is_rounded_up_but_never_beyond_max_length(options: dict, width: int) -> None:
    assert PadCollator(**options)(ROWS)["input_ids"].shape == (2, width)


def test_rows_of_a_tokenized_data_set_are_taken_as_they_are() -> None:
    rows = [
        {"input_ids": [1, 2], "attention_mask": [1, 1], "label": 1},
        {"input_ids": [3], "attention_mask": [1], "label": 0},
    ]
    batch = PadCollator()(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "left"}, "padding is 'left'; choose longest or max_length"),
        ({"padding": "max_length"}, "max_length is None; give the width"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; give 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PadCollator(**options)


def test_a_column_of_text_is_refused_by_name() -> None:
    for collator in (PadCollator(), PackCollator()):
        with pytest.raises(ValueError, match="the column 'text' holds str, which makes no tensor. Remove it"):
            collator([{"input_ids": [1, 2], "text": "fine"}])
