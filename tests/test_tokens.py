"""Tests of the token cache."""

import copy
import multiprocessing
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from helpers import damaged
from tokenizers import processors
from transformers import AutoTokenizer, CanineTokenizer, PreTrainedTokenizerBase

from smartbatch_lightning import SmartBatchDataModule
from smartbatch_lightning.data import token_cache
from smartbatch_lightning.data.encoding import TextEncoder, stored_texts, text_blocks
from smartbatch_lightning.data.token_cache import tokenize_to_cache
from smartbatch_lightning.data.tokens import TokenDataset, TokenFile, TokenTable

TEXTS = ["A fine film.", "", "Dull 😀 and ☃ long " * 30, "naïve café — 日本語", "word " * 900]


@pytest.fixture(scope="module")
def tokenizer(minilm: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def tokenize(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    def run(dataset: Dataset, text_columns=("text",), max_length: int = 64, tokenizer=tokenizer) -> TokenTable:
        return tokenize_to_cache(dataset, TextEncoder(tokenizer, text_columns, None, max_length), tmp_path)

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.arrow"))


def test_the_ids_are_those_of_the_tokenizer(tokenize, tokenizer) -> None:
    table = tokenize(Dataset.from_dict({"text": TEXTS}))
    expected = tokenizer(TEXTS, truncation=True, max_length=64)["input_ids"]
    assert [table[row]["input_ids"].tolist() for row in range(len(table))] == expected
    assert table.lengths.tolist() == [len(ids) for ids in expected]
    assert set(table[0]) == {"input_ids"}


def test_pairs_have_token_types_and_are_cut_together(tokenize, tokenizer) -> None:
    pairs = {"a": TEXTS, "b": TEXTS[::-1]}
    table = tokenize(Dataset.from_dict(pairs), ("a", "b"))
    for row, (a, b) in enumerate(zip(pairs["a"], pairs["b"], strict=True)):
        expected = tokenizer(a, b, truncation=True, max_length=64)
        assert table[row]["input_ids"].tolist() == expected["input_ids"]
        assert table[row]["token_type_ids"].tolist() == expected["token_type_ids"]


def test_shards_are_one_table(tokenize, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"film {number} " * (number % 40) for number in range(50)]
    whole = tokenize(Dataset.from_dict({"text": texts}))
    monkeypatch.setattr(token_cache, "_ROWS_PER_SHARD", 7)
    table = tokenize(Dataset.from_dict({"text": texts}))
    assert len(list(table.path.glob("*.arrow"))) == 8
    expected = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    for one in (table, pickle.loads(pickle.dumps(table))):
        assert [row["input_ids"].tolist() for row in one] == expected
        assert one.lengths.tolist() == [len(ids) for ids in expected]
        assert one.lost_tokens.tolist() == whole.lost_tokens.tolist()
        assert one.lost_tokens.any()
        assert one.digest == whole.digest
        assert one.counts(2143).tolist() == [ids.count(2143) for ids in expected]
    with pytest.raises(IndexError):
        table[50]


def test_only_what_is_missing_or_damaged_is_made_again(tokenize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_PER_SHARD", 10)
    data = Dataset.from_dict({"text": [f"film {number}" for number in range(40)]})
    table = tokenize(data)
    expected = [row["input_ids"].tolist() for row in table]
    shards = sorted(table.path.glob("*.arrow"))
    shards[1].write_bytes(b"damaged")
    shards[3].unlink()
    before = [path.stat().st_mtime_ns for path in (shards[0], shards[2])]
    with pytest.raises(ValueError, match="000001.arrow is not a valid token file"):
        TokenFile(table.path)
    assert [row["input_ids"].tolist() for row in tokenize(data)] == expected
    assert [path.stat().st_mtime_ns for path in (shards[0], shards[2])] == before
    shards[3].unlink()
    with pytest.raises(ValueError, match="does not hold the samples that its files declare"):
        TokenFile(table.path)


def _tokenize_slowly(folder: Path, minilm: str, made: Path) -> None:
    """Tokenizes 30 shards of ten rows, a twentieth of a second each, and notes which it begins."""

    class Slow(TextEncoder):
        def __call__(self, texts, rows):
            with made.open("a") as note:
                note.write(f"{rows[0]}\n")
            time.sleep(0.05)
            return super().__call__(texts, rows)

    encoder = Slow(AutoTokenizer.from_pretrained(minilm), ("text",), None, 64)
    data = Dataset.from_dict({"text": [f"film {number}" for number in range(300)]})
    token_cache._ROWS_PER_SHARD = 10  # in this process
    tokenize_to_cache(data, encoder, folder)


def _start(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_tokenize_slowly, args=arguments)
    process.start()
    return process


@pytest.mark.slow
def test_a_start_after_a_kill_goes_on_and_does_one_shard_again_at_most(tmp_path: Path, minilm: str) -> None:
    killed = 0
    for run in range(40):
        process = _start(tmp_path, minilm, tmp_path / "made")
        before = len(files(tmp_path))
        while process.is_alive() and len(files(tmp_path)) < before + 1 + run % 5:
            time.sleep(0.003)
        time.sleep(0.01 * (run % 7))
        process.kill()
        process.join(30)
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert killed >= 5
    begun = (tmp_path / "made").read_text().splitlines()
    assert len(set(begun)) == 30
    assert len(begun) <= 30 + killed


@pytest.mark.slow
def test_processes_share_the_shards_and_take_over_those_of_one_that_is_killed(tmp_path: Path, minilm: str) -> None:
    notes = [tmp_path / f"made-{number}" for number in range(3)]
    processes = [_start(tmp_path, minilm, note) for note in notes]
    while not all(note.exists() and len(note.read_text().splitlines()) > 3 for note in notes):
        time.sleep(0.003)
    processes[0].kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    begun = "".join(note.read_text() for note in notes).splitlines()
    assert len(set(begun)) == 30
    assert len(begun) <= 31


def test_blocks_hold_few_bytes_of_text_however_long_texts_are() -> None:
    sizes = [10, 3_000_000, 3_000_000, 9_000_000, *[1000] * 9000]
    data = Dataset.from_dict({"text": ["x" * size for size in sizes]})
    blocks = list(text_blocks(stored_texts(data, ["text"]), range(1, len(sizes))))
    rows = [(first, len(texts)) for first, texts in blocks]
    assert [first for first, _ in rows] == [1, *(first + count for first, count in rows[:-1])]
    assert sum(count for _, count in rows) == len(sizes) - 1
    for first, count in rows:
        of_block = sizes[first : first + count]
        assert sum(of_block) - max(of_block) <= 2**22
        assert count <= 4096


def test_many_blocks_are_one_table(tokenize) -> None:
    table = tokenize(Dataset.from_dict({"text": [f"film {number}" for number in range(9000)]}))
    assert len(table) == 9000
    assert len({table[row]["input_ids"].tobytes() for row in range(9000)}) == 9000


def test_rows_are_views_of_the_file_not_copies(tokenize) -> None:
    row = tokenize(Dataset.from_dict({"text": TEXTS}))[0]["input_ids"]
    assert not row.flags.owndata
    assert not row.flags.writeable


def test_a_second_start_finds_the_file(tokenize, tmp_path: Path) -> None:
    tokenize(Dataset.from_dict({"text": TEXTS}))
    [name] = files(tmp_path)
    before = (tmp_path / name).stat().st_mtime_ns
    tokenize(Dataset.from_dict({"text": TEXTS}))
    assert files(tmp_path) == [name]
    assert (tmp_path / name).stat().st_mtime_ns == before


def test_a_tokenizer_that_was_used_or_told_to_pad_finds_the_file(tokenize, minilm: str, tmp_path: Path) -> None:
    dataset = Dataset.from_dict({"text": TEXTS})
    tokenize(dataset)
    used = AutoTokenizer.from_pretrained(minilm)
    used(TEXTS, padding="max_length", truncation=True, max_length=17)
    tokenize(dataset, tokenizer=used)
    assert len(files(tmp_path)) == 1
    assert len(used("word " * 100)["input_ids"]) == 102


def test_the_file_is_found_by_data_read_from_disk_by_another_process_count(tokenize, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(f"film {n},{n % 2}" for n in range(50)))
    for num_proc in (None, 2):
        data = load_dataset("csv", data_files=str(tmp_path / "data.csv"), split="train", num_proc=num_proc)
        tokenize(data)
    assert len(files(tmp_path)) == 1


def test_other_data_columns_or_length_have_a_file_of_their_own(tokenize, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": TEXTS, "other": TEXTS})
    tokenize(data)
    tokenize(data, max_length=32)
    tokenize(data, ("other",))
    tokenize(data, ("text", "other"))
    tokenize(Dataset.from_dict({"text": TEXTS[::-1], "other": TEXTS}))
    assert len(files(tmp_path)) == 5


def test_a_data_set_of_selected_rows_is_tokenized_in_its_own_order(tokenize, tokenizer) -> None:
    data = Dataset.from_dict({"text": TEXTS}).select([3, 0])
    assert [tokenize(data)[row]["input_ids"].tolist() for row in range(2)] == [
        tokenizer(TEXTS[row])["input_ids"] for row in (3, 0)
    ]


@pytest.mark.parametrize("damage", ["cut short", "empty", "zeros", "text", "zeros inside"])
def test_a_damaged_file_is_made_again(tokenize, tmp_path: Path, damage: str) -> None:
    data = Dataset.from_dict({"text": [f"film {n} " * (n + 1) for n in range(100)]})
    table = tokenize(data)
    expected = [table[row]["input_ids"].tolist() for row in range(100)]
    [path] = table.path.glob("*.arrow")
    content = path.read_bytes()
    middle = bytes(len(content) // 2)
    damaged = {
        "cut short": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "text": b"not arrow at all",
        "zeros inside": content[:400] + middle + content[400 + len(middle) :],
    }
    del table
    path.write_bytes(damaged[damage])
    again = tokenize(data)
    assert [again[row]["input_ids"].tolist() for row in range(100)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("places", [40, 800])
def test_no_damaged_file_is_used(places: int, tokenize, tmp_path: Path) -> None:
    """Bits flipped, bytes inserted, taken out and zeroed at random places."""
    rng = random.Random(1)
    data = Dataset.from_dict({"text": [f"film {n} " * (n + 1) for n in range(40)]})
    table = tokenize(data)
    [path] = table.path.glob("*.arrow")
    expected = [table[row]["input_ids"].tolist() for row in range(40)]
    del table
    whole = path.read_bytes()
    for _ in range(places):
        path.write_bytes(damaged(whole, rng))
        again = tokenize(data)
        assert [again[row]["input_ids"].tolist() for row in range(40)] == expected
        del again
        assert path.read_bytes() == whole


def test_ids_out_of_the_vocabulary_are_refused() -> None:
    class Wrong(SmartBatchDataModule):
        def tokenize(self, dataset: Dataset) -> list[list[int]]:
            return [[2, 5000, 3]] * len(dataset)

    with pytest.raises(ValueError, match="tokenize gave ids from 2 to 5000, but the tokenizer has [0-9,]+ tokens"):
        Wrong().prepare_data()


def test_the_same_tokens_have_the_same_digest_in_memory_and_in_files(tokenize) -> None:
    table = tokenize(Dataset.from_dict({"text": TEXTS * 1000}))  # several blocks
    rows = [table[row]["input_ids"].tolist() for row in range(len(table))]
    assert TokenTable.from_rows(rows).digest == table.digest
    rows[4500][1] += 1
    assert TokenTable.from_rows(rows).digest != table.digest


def test_opening_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "000000.arrow").write_bytes(b"half")
    with pytest.raises(ValueError, match="000000.arrow is not a valid token file.*Delete it"):
        TokenFile(tmp_path)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["fine", None, "film"], "the text column 'text' has no text in row 1.*Drop such rows"),
        ([1, 2, 3], "the text column 'text' holds int64, not text. Set --data.text_columns"),
    ],
)
def test_a_column_without_text_is_refused(tokenize, column: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize(Dataset.from_dict({"text": column}))


def test_a_data_set_with_a_transform_is_refused(tokenize) -> None:
    dataset = Dataset.from_dict({"text": ["a dull film"]}).with_transform(lambda rows: {"text": ["z"]})
    with pytest.raises(ValueError, match=r"has a transform.* Use Dataset.map instead of set_transform"):
        tokenize(dataset)


def test_what_an_attention_mask_leaves_out_is_left_out() -> None:
    rows = [
        {"input_ids": [2, 5, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [2, 3], "attention_mask": [1, 1]},
    ]
    table = TokenTable.from_rows(rows)
    assert [table[row]["input_ids"].tolist() for row in range(2)] == [[2, 5, 3], [2, 3]]


def test_a_text_without_tokens_is_one_of_padding_or_told_by_its_number(tokenize, tokenizer) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    dataset = Dataset.from_dict({"text": ["a dull film", "", "fine"]})
    table = tokenize(dataset, tokenizer=bare)
    assert table[1]["input_ids"].tolist() == [tokenizer.pad_token_id]
    assert table[2]["input_ids"].tolist() == [tokenizer.vocab["fine"]]
    bare.pad_token = None
    with pytest.raises(ValueError, match="row 1 .counted from 0. has no tokens. Drop it"):
        tokenize(dataset, tokenizer=bare)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_slow_tokenizer_is_called_as_transformers_calls_it_and_its_ids_are_kept(
    pairs: bool, tokenize, tmp_path: Path
) -> None:
    tokenizer, columns = CanineTokenizer(), {"a": TEXTS, "b": TEXTS[::-1]}
    assert not tokenizer.is_fast
    names = ("a", "b") if pairs else ("a",)
    for _ in range(2):
        table = tokenize(Dataset.from_dict(columns), names, tokenizer=CanineTokenizer())
        assert len(files(tmp_path)) == 1
    rows = [*zip(*(columns[name] for name in names), strict=True)]
    expected = [tokenizer(*row, truncation=True, max_length=64) for row in rows]
    assert [table[row]["input_ids"].tolist() for row in range(len(table))] == [one["input_ids"] for one in expected]
    if pairs:
        types = [table[row]["token_type_ids"].tolist() for row in range(len(table))]
        assert types == [one["token_type_ids"] for one in expected]
    whole = [len(tokenizer(*row)["input_ids"]) for row in rows]
    assert np.count_nonzero(table.lost_tokens) == sum(length > 64 for length in whole) > 0


def test_samples_know_their_row_and_label_and_survive_pickling(tokenize) -> None:
    table = tokenize(Dataset.from_dict({"text": TEXTS}))
    data = TokenDataset(table, np.array([0, 1, 0, 1, 0]), rows=np.array([4, 1]))
    for samples in (data, pickle.loads(pickle.dumps(data))):
        assert [samples[0]["index"], samples[1]["index"]] == [4, 1]
        assert [samples[0]["labels"], samples[1]["labels"]] == [0, 1]
        assert samples.lengths.tolist() == [64, 2]
        assert samples[1]["input_ids"].tolist() == table[1]["input_ids"].tolist()


def test_a_text_of_a_megabyte_is_cut_like_any_other(tokenize) -> None:
    assert tokenize(Dataset.from_dict({"text": ["film " * 210_000]})).lengths.tolist() == [64]
