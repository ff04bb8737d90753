"""Tests of collating."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from smartbatch_lightning import BatchSpec, PackCollator, PadCollator
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
    for end in ("q", "k"):
        assert batch[f"cu_seq_lens_{end}"].tolist() == [0, 3, 8]
        assert batch[f"cu_seq_lens_{end}"].dtype == torch.int32
        assert batch[f"max_length_{end}"] == 5
    assert batch["labels"].tolist() == [1, 0]
    assert "attention_mask" not in batch


def test_rows_that_are_filled_up_have_one_shape_whatever_is_in_them() -> None:
    collator = PackCollator(9, BatchSpec(padding="packed", pad_to_multiple_of=16, max_length=6))
    first, second = collator(ROWS), collator([*ROWS, {**ROWS[0], "label": 0}])
    assert first["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, *[9] * 8]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1]]
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 8, 14, *[16] * 29]
    assert (first["num_samples"], second["num_samples"]) == (2, 3)
    assert first["labels"].tolist() == [1, 0]
    assert batch_lengths(first).tolist() == [3, 5]
    shapes = [
        {name: getattr(value, "shape", value) for name, value in batch.items() if name not in ("labels", "num_samples")}
        for batch in (first, second)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["max_length_q"] == 6


def test_the_lengths_of_a_batch_are_told_padded_and_packed() -> None:
    for collator in (PadCollator(0, BatchSpec(pad_to_multiple_of=8)), PackCollator()):
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
    assert PadCollator(0, BatchSpec(**options))(ROWS)["input_ids"].shape == (2, width)


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
        ({"padding": "left"}, "padding is 'left'; choose one of 'longest', 'max_length', 'packed'"),
        ({"padding": "max_length"}, "max_length is None; set it to the width"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0; give 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PadCollator(0, BatchSpec(**options))


@pytest.mark.parametrize("kind", ["torch", "numpy", None])
def test_rows_of_a_data_set_in_any_format_are_taken(kind: str | None) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "label": [1, 0], "score": [0.5, 1.5]}).with_format(kind)
    for collator in (PadCollator(9), PackCollator()):
        batch = collator([rows[0], rows[1]])
        assert batch["input_ids"].dtype == torch.int64
        assert batch["labels"].tolist() == [1, 0]
        assert batch["score"].tolist() == [0.5, 1.5]
    assert PadCollator(9)([rows[0], rows[1]])["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]


def test_types_of_tokens_are_padded_as_the_tokenizer_pads_them() -> None:
    batch = PadCollator(0, pad_token_type_id=3)(ROWS)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 3, 3], [0, 0, 1, 1, 1]]


def test_a_batch_may_be_padded_on_the_left() -> None:
    batch = PadCollator(99, BatchSpec(pad_to_multiple_of=6, max_length=6), pad_token_type_id=3, padding_side="left")(
        ROWS
    )
    assert batch["input_ids"].tolist() == [[99, 99, 99, 5, 6, 7], [99, 8, 9, 10, 11, 12]]
    assert batch["token_type_ids"].tolist() == [[3, 3, 3, 0, 1, 1], [3, 0, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert batch_lengths(batch).tolist() == [3, 5]


def test_labels_may_have_a_shape_of_their_own() -> None:
    rows = [{"input_ids": [1], "labels": np.array([0.0, 1.0], np.float32)} for _ in range(3)]
    assert PadCollator()(rows)["labels"].shape == (3, 2)
    assert PackCollator()(rows)["labels"].dtype == torch.float32


def test_a_column_of_text_is_refused_by_name() -> None:
    for collator in (PadCollator(), PackCollator()):
        with pytest.raises(ValueError, match="the column 'text' holds str, which cannot become a tensor. Remove it"):
            collator([{"input_ids": [1, 2], "text": "fine"}])
