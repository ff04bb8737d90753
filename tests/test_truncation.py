"""Tests of what is kept of long texts, and of windows from the text to the prediction."""

import copy
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import slow, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerBase, pipeline

from smartbatch_lightning import (
    BatchSpec,
    PackCollator,
    PadCollator,
    SequenceClassifier,
    SmartBatchDataModule,
    demo,
    plan_epoch,
)
from smartbatch_lightning.batching.jitter import MAX_OVERLAP, choose_jitter, measure_jitter
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.data.collators import batch_lengths, window_lengths
from smartbatch_lightning.data.encoding import TextEncoder
from smartbatch_lightning.data.tokenizers import check_end_tokens
from smartbatch_lightning.data.tokens import TokenTable
from smartbatch_lightning.data.truncation import Truncation

TEXT = "one two three four five six seven eight nine ten film [SEP] eleven twelve"
TEXTS = ["one two", TEXT, "", "one two three four five six", f"{TEXT} " * 3]

# Post-processors, and the special tokens before and after a text.
AFFIXES = {
    "bert": (["[CLS]"], ["[SEP]"]),
    "xlnet": ([], ["[SEP]", "[CLS]"]),
    "t5": ([], ["[SEP]"]),
    "gpt": (["[CLS]"], []),
    "none": ([], []),
}


@pytest.fixture(scope="module")
def tokenizer(minilm: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


def with_affixes(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    changed, (before, after) = copy.deepcopy(tokenizer), AFFIXES[name]
    single = [*before, "$A", *(f"{token}:{number}" for number, token in enumerate(after, 1))]
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(single, None, special)
    return changed


def encode(tokenizer: PreTrainedTokenizerBase, texts: list, max_length: int, **options) -> list:
    columns = ["a", "b"] if isinstance(texts[0], tuple) else ["a"]
    return TextEncoder(tokenizer, columns, None, max_length, Truncation(**options))(texts, range(len(texts)))


@pytest.mark.parametrize("name", AFFIXES)
def test_head_and_tail_are_what_transformers_keeps_on_either_side(tokenizer, name: str) -> None:
    for side, truncation in (("right", "head"), ("left", "tail")):
        own = with_affixes(tokenizer, name)
        samples = encode(own, TEXTS, 8, truncation=truncation)
        own.truncation_side = side
        expected = own(TEXTS, truncation=True, max_length=8)
        assert [sample.ids for sample in samples] == [ids or [own.pad_token_id] for ids in expected["input_ids"]]
        assert [sample.type_ids for sample in samples] == [types or [0] for types in expected["token_type_ids"]]
        whole = own(TEXTS)["input_ids"]
        assert [sample.lost_tokens for sample in samples] == [max(0, len(ids) - 8) for ids in whole]


@pytest.mark.parametrize("name", AFFIXES)
@pytest.mark.parametrize("head_tokens", [None, slow(0), slow(1), 4])
def test_head_tail_keeps_both_ends_of_the_text_and_the_special_tokens(tokenizer, name: str, head_tokens) -> None:
    before, after = AFFIXES[name]
    own, words = with_affixes(tokenizer, name), tokenizer.tokenize(TEXT)
    [sample] = encode(own, [TEXT], 8, truncation="head_tail", head_tokens=head_tokens)
    head = 2 if head_tokens is None else head_tokens  # a quarter
    tail = 8 - len(before) - len(after) - head
    kept = [*before, *words[:head], *words[len(words) - tail :], *after]
    assert own.convert_ids_to_tokens(sample.ids) == kept
    assert sample.type_ids == [0] * (len(kept) - len(after)) + list(range(1, 1 + len(after)))
    assert sample.lost_tokens == len(words) - head - tail


@pytest.mark.parametrize("name", AFFIXES)
@pytest.mark.parametrize("stride", [0, 3])
def test_windows_are_those_of_transformers_one_after_another(tokenizer, name: str, stride: int) -> None:
    own = with_affixes(tokenizer, name)
    samples = encode(own, TEXTS, 8, truncation="windows", stride=stride)
    several = 0
    for text, sample in zip(TEXTS, samples, strict=True):
        windows = own(text, truncation=True, max_length=8, stride=stride, return_overflowing_tokens=True)["input_ids"]
        assert sample.ids == ([*chain(*windows)] or [own.pad_token_id])
        assert {len(window) for window in windows[:-1]} <= {8}
        assert sample.lost_tokens == 0
        several += len(windows) > 1
    assert several == 2


def test_windows_beyond_the_most_are_cut(tokenizer) -> None:
    [sample] = encode(tokenizer, [TEXT], 6, truncation="windows", stride=1, max_windows=2)
    words = tokenizer.tokenize(TEXT)
    assert tokenizer.convert_ids_to_tokens(sample.ids) == [
        *("[CLS]", *words[:4], "[SEP]"),
        *("[CLS]", *words[3:7], "[SEP]"),
    ]
    assert sample.lost_tokens == len(words) - 7


@pytest.mark.parametrize("truncation", [slow("head"), slow("tail"), slow("head_tail"), "windows"])
def test_a_slow_tokenizer_keeps_the_same_as_by_its_own_special_tokens(truncation: str) -> None:
    """CANINE's tokens are characters, with one special token at each end."""
    canine = CanineTokenizer()
    assert not canine.is_fast
    [sample] = encode(canine, ["abcdefghij"], 6, truncation=truncation)
    first, last = (canine("")["input_ids"][place] for place in (0, 1))
    pieces = {"head": ["abcd"], "tail": ["ghij"], "head_tail": ["ahij"], "windows": ["abcd", "defg", "ghij"]}
    expected = [[first, *map(ord, piece), last] for piece in pieces[truncation]]
    assert sample.ids == [*chain(*expected)]
    assert canine.truncation_side == "right"


def test_pairs_are_cut_at_their_ends_and_otherwise_refused(tokenizer) -> None:
    pair = ("one two three", TEXT)
    own = copy.deepcopy(tokenizer)
    own.truncation_side = "left"
    [sample] = encode(tokenizer, [pair], 9, truncation="tail")
    expected = own(*pair, truncation=True, max_length=9)
    assert (sample.ids, sample.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    assert sample.lost_tokens == len(own(*pair)["input_ids"]) - 9
    for truncation in ("head_tail", "windows"):
        with pytest.raises(ValueError, match=f"truncation is '{truncation}', but text pairs .* or join the two with"):
            encode(tokenizer, [pair], 9, truncation=truncation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "middle"}, "truncation is 'middle'; choose one of 'head', 'tail', 'head_tail', 'windows'"),
        ({"head_tokens": 3}, "head_tokens is 3, but truncation is 'head'; set that to 'head_tail'"),
        ({"truncation": "head_tail", "stride": 3}, "stride is 3, but .* set that to 'windows'"),
        ({"truncation": "windows", "stride": -1}, "stride is -1; give 0 or more"),
        ({"truncation": "windows", "max_windows": 0}, "max_windows is 0; give 1 or more"),
        ({"truncation": "windows", "window_pooling": "sum"}, "window_pooling is 'sum'; choose one of 'mean', 'max'"),
        ({"truncation": "windows", "stride": 4}, "stride is 4, but with max_length 6 it can be 3 at most"),
        ({"truncation": "head_tail", "head_tokens": 5}, "head_tokens is 5, but with max_length 6 it can be 4 at most"),
    ],
)
def test_options_that_do_not_fit_are_refused(tokenizer, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, [TEXT], 6, **options)


# --- windows in batches ---

ROWS = [{"input_ids": np.arange(10, 10 + length), "labels": number} for number, length in enumerate([3, 9, 4])]


def test_padded_windows_are_rows_of_their_own_and_labels_are_the_texts() -> None:
    batch = PadCollator(0, BatchSpec(max_length=4, window_pooling="mean"))(ROWS)
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 0],
        *([10, 11, 12, 13], [14, 15, 16, 17], [18, 0, 0, 0]),
        [10, 11, 12, 13],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 4, 4, 1, 4]
    assert batch["window_counts"].tolist() == [1, 3, 1]
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch_lengths(batch).tolist() == [3, 9, 4]
    assert window_lengths(batch).tolist() == [3, 4, 4, 1, 4]


@pytest.mark.parametrize("multiple", [1, 8])
def test_packed_windows_are_sequences_of_their_own(multiple: int) -> None:
    spec = BatchSpec(max_length=4, padding="packed", pad_to_multiple_of=multiple, window_pooling="max")
    batch = PackCollator(0, spec)(ROWS)
    assert batch["cu_seq_lens_q"][:6].tolist() == [0, 3, 7, 11, 12, 16]
    assert batch["position_ids"][0, :16].tolist() == [0, 1, 2, *range(4), *range(4), 0, *range(4)]
    assert batch["max_length_q"] == 4
    assert batch["window_counts"].tolist() == [1, 3, 1]
    assert batch["window_pooling"] == "max"
    assert batch_lengths(batch).tolist() == [3, 9, 4]
    assert window_lengths(batch).tolist() == [3, 4, 4, 1, 4]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=30),
    padding=st.sampled_from(["longest", "max_length", "packed"]),
    batching=st.sampled_from(["smart", "tutorial", "random"]),
    multiple=st.sampled_from([1, 4]),
    ranks=st.sampled_from([1, 2]),
)
def test_a_token_budget_counts_windows_and_is_kept(lengths, padding, batching, multiple, ranks) -> None:
    """Against the batches that the collators make."""
    spec = BatchSpec(
        batching,
        max_tokens_per_batch=112,
        padding=padding,
        pad_to_multiple_of=multiple,
        max_length=7,
        window_pooling="mean",
        jitter=2.0,
    )
    plan = plan_epoch(lengths, spec, num_replicas=ranks)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    tokens = spec.tokens(np.array(lengths)[plan.order], plan.offsets)
    pairs = spec.token_pairs(np.array(lengths)[plan.order], plan.offsets)
    collator = (PackCollator if spec.packed else PadCollator)(0, spec)
    for batch in range(len(plan)):
        made = collator([{"input_ids": np.ones(lengths[sample], int)} for sample in plan[batch]])
        assert made["input_ids"].numel() == tokens[batch] <= 112
        rows, width = made["input_ids"].shape
        in_rows = made["cu_seq_lens_q"].diff().square().sum() if spec.packed else rows * width**2
        assert pairs[batch] == in_rows


def test_a_text_of_more_windows_than_the_budget_is_refused_with_the_option_that_bounds_them() -> None:
    spec = BatchSpec(max_tokens_per_batch=20, max_length=8, window_pooling="mean", padding="packed")
    with pytest.raises(
        ValueError, match="sample 1 takes 30 tokens, .* is 20. Set it to 30 or more, or lower max_windows"
    ):
        plan_epoch([5, 30], spec)


def test_batches_of_windows_are_mixed_from_epoch_to_epoch_though_last_windows_are_padded_in_any_order() -> None:
    lengths = np.random.default_rng(1).lognormal(5.5, 0.7, 2000).astype(int) + 3
    for padding in ("longest", "packed"):
        spec = BatchSpec(padding=padding, max_length=64, window_pooling="mean")
        before, mixed = (measure_jitter(lengths, spec, jitter) for jitter in (0.0, choose_jitter(lengths, spec)))
        assert before.batch_overlap > 0.5
        assert mixed.batch_overlap < 1.1 * MAX_OVERLAP  # which is kept for the lengths in order
        assert mixed.padding_ratio < before.padding_ratio + 0.01


# --- windows in models ---

MODEL = str(demo.model_dir())


def module(padding: str = "longest", **options) -> SmartBatchDataModule:
    """A few of the demo's reviews, most of which are longer than 24 tokens."""
    splits = {name: pq.read_table(demo.data_dir() / f"{name}.parquet")[:48] for name in ("train", "test")}
    return SmartBatchDataModule(splits, MODEL, padding=padding, seed=1, batch_size=8, **{"max_length": 24, **options})


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_texts_logits_are_pooled_over_its_windows_padded_and_packed(pooling: str, tmp_path: Path) -> None:
    model, own = SequenceClassifier(MODEL, num_labels=2), AutoTokenizer.from_pretrained(MODEL)
    outputs = {}
    for padding in ("longest", "packed"):
        data = module(padding, truncation="windows", stride=5, window_pooling=pooling)
        run = trainer(tmp_path, limit_predict_batches=2)
        outputs[padding] = run.predict(model, data)
    texts = data.splits["test"]["text"]
    model.eval()
    several = 0
    for padded, packed in zip(*outputs.values(), strict=True):
        for row, one, other in zip(padded["index"], padded["probabilities"], packed["probabilities"], strict=True):
            options = {"truncation": True, "max_length": 24, "stride": 5, "return_overflowing_tokens": True}
            windows = own(texts[int(row)], **options)["input_ids"]
            with torch.no_grad():
                logits = torch.cat([model.model(torch.tensor([window])).logits for window in windows])
            pooled = logits.mean(dim=0) if pooling == "mean" else logits.max(dim=0).values
            assert torch.allclose(pooled.softmax(-1), one, atol=1e-5)
            assert torch.allclose(one, other, atol=1e-5)
            several += len(windows) > 1
    assert several


@pytest.mark.parametrize(
    ("truncation", "given"),
    [
        ("windows", {"stride": 5, "max_windows": 3, "window_pooling": "max"}),
        slow("head_tail", {"head_tokens": 6}),
        slow("tail", {}),
    ],
)
def test_texts_are_cut_as_in_training_by_checkpoint_and_exported_model(
    truncation: str, given: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "model"
    data, model = module("packed", truncation=truncation, **given), SequenceClassifier(MODEL)
    run = trainer(tmp_path, limit_train_batches=3, limit_val_batches=1, callbacks=[ModelExport(str(folder))])
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    limits = {"limit_predict_batches": 1, "limit_test_batches": 1}
    [expected] = trainer(tmp_path, **limits).predict(model, data)
    loaded = SequenceClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    for again in (loaded, SequenceClassifier(str(folder))):
        undecided = module("packed", max_length=None)
        [predicted] = trainer(tmp_path, **limits).predict(again, undecided)
        assert undecided.max_length == 24
        assert undecided.truncation_in_use.to_dict() == {"truncation": truncation, **given}
        assert torch.allclose(predicted["probabilities"], expected["probabilities"], atol=1e-6)
    for options, met in [
        ({}, rf"trained with truncation .*'{truncation}'.* but now it is .*'head'"),
        ({"max_length": None}, "trained with max_length 24, but now it is 400"),
    ]:
        with pytest.raises(ValueError, match=met):
            trainer(tmp_path, **limits).test(
                SequenceClassifier(MODEL), module("packed", **options), ckpt_path=str(tmp_path / "a.ckpt")
            )
    trainer(tmp_path, **limits).test(SequenceClassifier(MODEL), data, ckpt_path=str(tmp_path / "a.ckpt"))
    card = (folder / "README.md").read_text()
    assert (
        f"| truncation | {truncation.replace('_', chr(92) + '_')} |" in card or f"| truncation | {truncation} |" in card
    )
    if truncation == "tail":
        classify = pipeline("text-classification", str(folder), truncation=True, device="cpu", top_k=None)
        texts = [data.splits["test"]["text"][int(row)] for row in predicted["index"]]
        scores = [{one["label"]: one["score"] for one in answer} for answer in classify(texts)]
        assert pd.DataFrame(scores)[data.label_names].to_numpy() == pytest.approx(
            expected["probabilities"].numpy(), abs=1e-5
        )
    else:
        assert "but a pipeline reads only the" in card
        assert "but a pipeline reads only the" in capsys.readouterr().out


def test_a_trained_model_that_reads_texts_in_another_way_says_so(tmp_path: Path, caplog) -> None:
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(trained := SequenceClassifier(MODEL), module("packed", truncation="head_tail", head_tokens=6))
    run.save_checkpoint(tmp_path / "a.ckpt")

    def said(model: SequenceClassifier = trained, ckpt_path: Path | None = None, **options) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            trainer(tmp_path, limit_predict_batches=1).predict(model, module("packed", **options), ckpt_path=ckpt_path)
        return [one for one in caplog.messages if "was trained with" in one]

    assert said(max_length=None) == said(truncation="head_tail", head_tokens=6) == []
    windows = {"max_length": 20, "truncation": "windows", "stride": 5}
    told = [
        "The model was trained with max_length 24, truncation head_tail, head_tokens 6; "
        "this run uses max_length 20, truncation windows, stride 5."
    ]
    assert said(**windows) == told
    again = SequenceClassifier(MODEL, num_labels=2)
    assert said(again, tmp_path / "a.ckpt", **windows) == told


def test_a_fit_on_windows_is_resumed_exactly_and_refuses_another_pooling(tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "max_steps": 4}
    data = {"truncation": "windows", "stride": 5, "max_windows": 3, "max_tokens_per_batch": 300}
    whole = SequenceClassifier(MODEL, lr_scheduler="constant")
    trainer(tmp_path, **options).fit(whole, module("packed", **data))
    half = trainer(tmp_path, **{**options, "max_steps": 2})
    half.fit(SequenceClassifier(MODEL, lr_scheduler="constant"), module("packed", **data))
    half.save_checkpoint(tmp_path / "a.ckpt")
    resumed = SequenceClassifier(MODEL, lr_scheduler="constant")
    trainer(tmp_path, **options).fit(resumed, module("packed", **data), ckpt_path=str(tmp_path / "a.ckpt"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    other = module("packed", **data, window_pooling="max")
    with pytest.raises(ValueError, match="window_pooling was mean, now max"):
        trainer(tmp_path, **options).fit(
            SequenceClassifier(MODEL, lr_scheduler="constant"), other, ckpt_path=str(tmp_path / "a.ckpt")
        )


def test_of_a_model_that_reads_the_last_end_token_each_window_has_one(tokenizer) -> None:
    rows = TokenTable.from_rows([[5, 2, 6, 2], [7, 2], [8, 2]])
    windows = np.array([2, 1, 1])
    check_end_tokens(rows, range(3), tokenizer, 2, windows)
    with pytest.raises(ValueError, match="tokens in row 0 .counted from 0. is 2"):
        check_end_tokens(rows, range(3), tokenizer, 2, np.ones(3, int))
