"""Tests of the data module: what it takes, what it refuses, and what the Trainer gets from it."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers import trainer
from torch.utils.data import DataLoader

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule, demo
from smartbatch_lightning.data.collators import PadCollator
from smartbatch_lightning.data.loader import SmartBatchLoader

REVIEWS = [("a fine film " * (row % 7 + 1), row % 2) for row in range(60)]


@pytest.fixture
def reviews(tmp_path: Path) -> DatasetDict:
    """Training and test reviews with named labels."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    texts, labels = zip(*REVIEWS, strict=True)
    train = Dataset.from_dict({"text": texts, "label": labels}, features=features)
    return DatasetDict({"train": train, "test": train.select(range(20))})


@pytest.fixture
def module(minilm: str):
    def make(dataset, tokenizer: str = minilm, **options) -> SmartBatchDataModule:
        return SmartBatchDataModule(dataset, tokenizer, **{"max_length": 32, **options})

    return make


def write_csv(path: Path, rows: list[tuple], columns: tuple[str, ...] = ("text", "label")) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def samples(loader) -> list[int]:
    return [row for batch in loader for row in batch["index"].tolist()]


# --- what it takes ---


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet", "tsv"])
def test_local_files_are_read_by_their_ending(module, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"reviews.{ending}"
    data = Dataset.from_dict({"text": [text for text, _ in REVIEWS], "label": [label for _, label in REVIEWS]})
    write = {"csv": data.to_csv, "parquet": data.to_parquet}.get(ending, data.to_json)
    data.to_csv(path, sep="\t") if ending == "tsv" else write(path)
    data_module = module(str(path))
    data_module.prepare_data()
    data_module.setup("fit")
    assert data_module.label_names == ["0", "1"]
    assert len(data_module.train_data) == 54
    assert len(data_module.validation_data[0]) == 6


def test_files_by_split_folders_of_files_and_saved_folders_are_the_same_data(module, tmp_path: Path, reviews) -> None:
    reviews.save_to_disk(tmp_path / "saved")
    for split, data in reviews.items():
        data.to_parquet(tmp_path / "files" / f"{split}.parquet")
    by_split = {split: str(tmp_path / "files" / f"{split}.parquet") for split in reviews}
    for dataset in (str(tmp_path / "saved"), str(tmp_path / "files"), by_split):
        data_module = module(dataset)
        data_module.setup("test")
        assert data_module.label_names == ["bad", "good"]
        assert sorted(samples(data_module.test_dataloader())) == list(range(20))


def test_a_single_saved_data_set_is_the_training_split(module, tmp_path: Path, reviews) -> None:
    reviews["train"].save_to_disk(tmp_path / "saved")
    data_module = module(str(tmp_path / "saved"))
    data_module.setup("fit")
    assert len(data_module.train_data) == 54


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "meh"], ["meh", "neg", "pos"]),
        ([7, 1, 3], ["1", "3", "7"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_labels_of_any_kind_are_numbered_in_order(module, tmp_path: Path, labels: list, names: list[str]) -> None:
    rows = Dataset.from_dict({"text": [f"film {row}" for row in range(30)], "label": labels * 10})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    data_module = module(str(tmp_path / "saved"))
    data_module.setup("test")
    assert data_module.label_names == names
    assert data_module.num_labels == len(names)
    assert [names[number] for number in data_module.test_data[0].labels[:3]] == [str(label) for label in labels]


def test_labels_are_matched_by_value_whatever_their_type(module, tmp_path: Path) -> None:
    train = Dataset.from_dict({"text": ["film"] * 4, "label": [1, 2, 1, 2]})
    features = Features({"text": Value("string"), "label": Value("int32")})

    def numbers(labels: list[int]) -> list[int]:
        test = Dataset.from_dict({"text": ["film"] * len(labels), "label": labels}, features=features)
        DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
        data_module = module(str(tmp_path / "saved"))
        data_module.setup("test")
        return data_module.test_data[0].labels.tolist()

    assert numbers([1, 1, 2, 1]) == [0, 0, 1, 0]
    with pytest.raises(ValueError, match="row 2 .* has the label '0', which is not one of the 2 classes: '1', '2'"):
        numbers([1, 2, 0])


def test_label_names_may_be_given_for_data_that_has_only_numbers(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", REVIEWS)
    data_module = module({"test": path}, label_names=["bad", "good", "unsure"])
    data_module.setup("test")
    assert data_module.num_labels == 3
    assert data_module.test_data[0].labels.tolist() == [label for _, label in REVIEWS]


def test_pairs_of_sentences_come_with_token_types(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "p.csv", [("a b", "c", row % 2) for row in range(40)], ("premise", "claim", "label"))
    data_module = module(path, text_columns=["premise", "claim"])
    data_module.setup("fit")
    batch = next(iter(data_module.train_dataloader()))
    assert batch["token_type_ids"].sum(1).unique().tolist() == [2]


def test_empty_texts_emoji_and_words_that_mean_missing_elsewhere_are_texts(module, tmp_path: Path) -> None:
    texts = ["", "😀", "None", "NA", "null", "nan", "n/a", "film"]
    data_module = module(
        write_csv(tmp_path / "t.csv", [(text, len(text) % 2) for text in texts]), validation_split=None
    )
    data_module.setup("fit")
    tokens = [data_module.tokenizer(text)["input_ids"] for text in texts]
    assert [data_module.train_data[row]["input_ids"].tolist() for row in range(8)] == tokens
    assert data_module.val_dataloader() == []


def test_a_data_set_smaller_than_a_batch_is_one_batch(module, tmp_path: Path) -> None:
    data_module = module(write_csv(tmp_path / "t.csv", REVIEWS[:3]), validation_split=None, batch_size=16)
    data_module.setup("fit")
    assert [len(batch["labels"]) for batch in data_module.train_dataloader()] == [3]


def test_the_validation_share_is_stratified_and_drawn_from_the_seed(module, reviews, tmp_path: Path) -> None:
    reviews.save_to_disk(tmp_path / "saved")
    drawn = []
    for seed in (1, 1, 2):
        data_module = module(str(tmp_path / "saved"), validation_split=0.2, seed=seed)
        data_module.setup("fit")
        assert data_module.validation_data[0].labels[data_module.validation_data[0].rows].tolist().count(1) == 6
        train, validation = data_module.train_data.rows.tolist(), data_module.validation_data[0].rows.tolist()
        assert sorted(train + validation) == list(range(60))
        drawn.append(validation)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("split", "sizes"), [("test", [60, 20]), (("test", "train"), [60, 20, 60]), (np.float32(0.5), [30, 30])]
)
def test_the_validation_split_is_what_its_value_says_of_whatever_type(module, reviews, split, sizes) -> None:
    data_module = module(reviews, validation_split=split)
    data_module.setup("fit")
    assert [len(data_module.train_data), *map(len, data_module.validation_data)] == sizes


def test_the_seed_is_that_of_seed_everything_unless_given(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    assert module("demo").seed == 77
    assert module("demo", seed=5).seed == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(13)
    assert module("demo").seed == 13


@pytest.mark.parametrize("split", ["test", "train", "new"])
def test_prediction_needs_no_labels_and_takes_the_only_split(module, tmp_path: Path, split: str) -> None:
    path = write_csv(tmp_path / "new.csv", [(text,) for text, _ in REVIEWS], ("text",))
    data_module = module({split: path})
    data_module.prepare_data()
    data_module.setup("predict")
    assert sorted(samples(data_module.predict_dataloader())) == list(range(60))
    assert data_module.num_labels is None


@pytest.mark.parametrize("method", ["load_dataset", "tokenize", "configure_collator"])
def test_loading_tokenizing_and_collating_are_each_one_method_to_override(minilm: str, reviews, method: str) -> None:
    class Own(SmartBatchDataModule):
        def load_dataset(self) -> DatasetDict:
            return reviews

    class OwnTokens(Own):
        def tokenize(self, dataset: Dataset):
            return super().tokenize(dataset.map(lambda row: {"text": row["text"].replace("fine", "dull")}))

    class OwnCollator(Own):
        def configure_collator(self):
            pad = PadCollator(103)
            return lambda rows: {**pad(rows), "batch_size": len(rows)}

    kind = {"load_dataset": Own, "tokenize": OwnTokens, "configure_collator": OwnCollator}[method]
    data_module = kind("mine", minilm, validation_split=None)
    data_module.setup("fit")
    batch = next(iter(data_module.train_dataloader()))
    words = data_module.tokenizer.decode(batch["input_ids"][0])
    assert ("dull" in words) == (method == "tokenize")
    assert ("batch_size" in batch) == (method == "configure_collator")


def test_the_demo_needs_nothing_but_its_name() -> None:
    data_module = SmartBatchDataModule()
    data_module.prepare_data()
    data_module.setup("fit")
    assert data_module.label_names == ["negative", "positive"]
    assert len(data_module.train_data) + len(data_module.validation_data[0]) == demo.REVIEWS["train"]


@pytest.mark.slow
def test_imdb_has_the_tokens_that_were_published(module, imdb: Path) -> None:
    """Tokens with the vocabulary of bert-base-uncased: real, fixed, and by each batching."""
    files = {split: str(imdb / f"{split}.parquet") for split in ("train", "test")}
    tokens = {}
    for batching in ("smart", "tutorial"):
        data_module = module(files, max_length=400, validation_split=None, batching=batching, seed=321)
        data_module.setup("fit")
        lengths = data_module.train_data.lengths
        assert (lengths.sum(), lengths.min(), lengths.max(), len(lengths)) == (6_358_424, 13, 400, 25_000)
        assert round((data_module.train_data.table.lost_tokens > 0).mean(), 3) == 0.233
        batches = [np.array(batch) for batch in data_module.train_dataloader().batch_sampler]
        tokens[batching] = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert tokens["smart"] != tokens["tutorial"]
    assert tokens["smart"] <= 6_372_000
    assert 6_370_000 <= tokens["tutorial"] <= 6_385_000


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; give 1 or more"),
        ({"max_length": 2}, "max_length is 2, .* set --data.max_length to 3 or more"),
        ({"num_workers": -1}, "num_workers is -1; give 0 or more"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number, 1 or more"),
        ({"batch_size": "8"}, "batch_size is '8'; give a whole number"),
        ({"max_length": 40.0}, "max_length is 40.0; give a whole number"),
        ({"max_tokens_per_batch": True}, "max_tokens_per_batch is True; give a whole number"),
        ({"seed": 0.5}, "seed is 0.5; give a whole number, 0 or more"),
        ({"validation_split": float("nan")}, "validation_split is nan. Give a fraction between 0 and 1"),
        ({"validation_split": True}, "validation_split is True. Give a fraction between 0 and 1"),
        ({"validation_split": np.float32(2)}, "validation_split is 2.0. Give a fraction between 0 and 1"),
        ({"validation_split": ["dev", "dev"]}, "validation_split is .*. Give a fraction .* one or more splits"),
        ({"test_split": []}, "test_split is .*; give the name of a split"),
        ({"test_split": ["a", "a"]}, "test_split is .*; give the name of a split"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module("files.csv", **options)


@pytest.mark.parametrize(
    ("padding", "tokens"), [("longest", "1[0-9]{2}"), ("max_length", "200"), ("packed", "1[0-9]{2}")]
)
def test_a_review_longer_than_the_token_budget_is_refused_by_its_row(
    module, padding: str, tokens: str, tmp_path
) -> None:
    path = write_csv(tmp_path / "reviews.csv", [("good", 1), ("long " * 150, 0), ("bad", 0), ("fine", 1)])
    data = module(path, validation_split=None, max_length=200, max_tokens_per_batch=100, padding=padding)
    with pytest.raises(ValueError, match=f"sample 1 takes {tokens} tokens, but max_tokens_per_batch is 100. Set it to"):
        data.setup("fit")


def test_the_demos_tokenizer_is_refused_for_other_data(tmp_path: Path, reviews) -> None:
    class Own(SmartBatchDataModule):
        def load_dataset(self) -> DatasetDict:
            return reviews

    with pytest.raises(ValueError, match=r"no tokenizer is given for Own.load_dataset\(\).* Set --data.tokenizer"):
        Own().prepare_data()
    path = write_csv(tmp_path / "mine.csv", REVIEWS)
    with pytest.raises(ValueError, match="know few words besides the demo's. For .*mine.csv, set --model.pretrained"):
        SmartBatchDataModule(Path(path), "demo").prepare_data()


def test_a_length_beyond_the_tokenizers_is_refused(module) -> None:
    with pytest.raises(
        ValueError, match="max_length is 513, but .* takes 512 tokens at most. Set --data.max_length to"
    ):
        module("demo", max_length=513).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_columns": "sentence"},
            "the text column 'sentence' is not in .*'text', 'label'. Set --data.text_columns",
        ),
        ({"label_column": "stars"}, "the label column 'stars' is not in .*'text', 'label'. Set --data.label_column"),
        ({"train_split": "training"}, "the split 'training' is not in .*'train', 'test'. Set --data.train_split"),
        (
            {"validation_split": "dev"},
            "the split 'dev' is not in .*'train', 'test'. Set --data.validation_split to one",
        ),
        ({"validation_split": 0.001}, "setting aside 0.001 of 60 samples leaves one part of the split empty"),
        ({"validation_split": 1.5}, "Give a fraction between 0 and 1"),
    ],
)
def test_names_that_are_not_in_the_data_are_refused(module, reviews, tmp_path, options: dict, message: str) -> None:
    reviews.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        module(str(tmp_path / "saved"), **options).setup("fit")


def test_an_empty_split_is_refused(module, reviews, tmp_path: Path) -> None:
    for split, data in reviews.items():
        data.select(range(0 if split == "train" else 5)).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="the split 'train' of .* has no samples. Give data with at least one."):
        module(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_an_empty_file_is_refused(module, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.csv").write_text(content)
    with pytest.raises(ValueError, match="empty.csv.*(Check that the file is complete|Give data with at least one)"):
        module(str(tmp_path / "empty.csv")).setup("fit")


def test_a_missing_text_is_refused(module, tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_text('{"text": "fine", "label": 1}\n{"text": null, "label": 0}\n')
    with pytest.raises(ValueError, match="the text column 'text' has no text in row 1 .*Drop such rows"):
        module(str(tmp_path / "reviews.jsonl"), validation_split=None).setup("fit")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_missing_label_is_refused(module, tmp_path: Path, ending: str) -> None:
    rows = {
        "csv": "text,label\nfine,1\ndull,\ngood,1\n",
        "jsonl": '{"text": "fine", "label": 1}\n{"text": "dull", "label": null}\n',
    }
    (tmp_path / f"reviews.{ending}").write_text(rows[ending])
    with pytest.raises(ValueError, match="row 1 .* of the split 'train' has no label in 'label'. Drop such rows"):
        module(str(tmp_path / f"reviews.{ending}"), validation_split=None).setup("fit")


@pytest.mark.parametrize(("known", "unknown"), [("pos", "great"), (1, 5), (1, -1)])
def test_a_label_never_seen_in_training_is_refused(module, tmp_path: Path, known, unknown) -> None:
    files = {
        "train": write_csv(tmp_path / "train.csv", [("film", known), ("dull film", type(known)(0))]),
        "test": write_csv(tmp_path / "test.csv", [("film", known), ("film", unknown)]),
    }
    with pytest.raises(
        ValueError, match=f"row 1 .* of the split 'test' has the label '?{unknown}'?, which is not one of"
    ):
        module(files).setup("test")


def test_labels_that_are_all_the_same_are_refused(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("a dull film", "no"), ("no fine film", "no")])
    with pytest.raises(ValueError, match="all labels of the split 'train' are 'no'.*--data.label_column"):
        module(path, validation_split=None).setup("fit")


def test_an_ignored_label_is_no_class_unless_it_is_named(module, tmp_path: Path) -> None:
    rows = [("a dull film", 0), ("a fine film", 1), ("a film", -100)]
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError, match="row 2 .* has the label -100, which torch's losses ignore. Drop such rows"):
        module(path, validation_split=None).setup("fit")
    data = module(path, validation_split=None, label_names=["-100", "0", "1"])
    data.setup("fit")
    assert data.task.label_counts(data.train_data.labels) == {"-100": 1, "0": 1, "1": 1}


def test_a_split_that_is_trained_and_validated_on_is_told(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("a dull film", "no"), ("a fine film", "yes")])
    with pytest.warns(UserWarning, match="The split 'train' is trained on and validated on"):
        module(path, validation_split="train").setup("fit")


def test_measurements_are_refused_as_classes(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [("film", 0.5), ("film", 1.5)])
    with pytest.raises(ValueError, match="holds double; labels are whole numbers, strings or booleans"):
        module(path, validation_split=None, problem_type="single_label_classification").setup("fit")


def test_testing_without_any_classes_says_how_to_name_them(module, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", REVIEWS)
    with pytest.raises(ValueError, match="the label classes are unknown.*Set --ckpt_path, or --data.label_names"):
        module({"test": path}).setup("test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("half.parquet", b"PAR1 and then nothing"),
        ("half.jsonl", b'{"text": "fine", "label": 1}\n{"text": "du'),
        ("bytes.csv", b"\xff\xfe\x00text,label\n\xff,1\n"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(module, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* cannot be read as .*Check that the file is complete"):
        module(str(tmp_path / name)).setup("fit")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.csv", "the file missing.csv does not exist. Set --data.dataset"),
        ("/no/such/folder", "the folder /no/such/folder does not exist"),
        ({"train": "missing.csv", "test": "b.parquet"}, "the file missing.csv does not exist. Set --data.dataset"),
    ],
)
def test_files_that_are_not_there_are_refused(module, dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(dataset).setup("fit")


def test_files_of_several_formats_or_of_none_are_refused(module, tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("reviews.txt", "a.csv", "b.parquet")}
    for file in files.values():
        Path(file).touch()
    with pytest.raises(ValueError, match="reviews.txt.*; give files of one format, ending in one of '.csv'"):
        module({"train": files["reviews.txt"]}).setup("fit")
    with pytest.raises(ValueError, match="end in '.csv', '.parquet'; give files of one format"):
        module({"train": files["a.csv"], "test": files["b.parquet"]}).setup("fit")


def test_a_folder_without_data_is_refused(module, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder cannot be read as a data set: .*Check that its files are complete"):
        module(str(tmp_path / "folder")).setup("fit")


def test_a_configuration_that_a_folder_has_not_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\ngood,1\nbad,0\n")
    with pytest.raises(ValueError, match="leave out its configuration 'mrpc', --data.dataset_config=null"):
        SmartBatchDataModule(str(tmp_path), dataset_config="mrpc").load_dataset()


def test_a_configuration_of_what_has_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\ngood,1\nbad,0\n")
    rows = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]})
    rows.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "train.csv")
    for dataset in (path, [path], {"train": path}, rows, str(tmp_path / "saved")):
        with pytest.raises(ValueError, match="dataset_config is 'mrpc', but dataset is .*which has no configurations"):
            SmartBatchDataModule(dataset, dataset_config="mrpc").load_dataset()


def test_a_hub_name_without_a_network_says_how_to_use_local_files(module) -> None:
    with pytest.raises(
        ValueError, match="'stanfordnlp/imdb' was not found locally or on the Hub.*set --data.dataset to a local"
    ):
        module("stanfordnlp/imdb").setup("fit")


def test_a_tokenizer_name_without_a_network_says_how_to_use_a_folder(module) -> None:
    with pytest.raises(
        ValueError,
        match="the tokenizer 'bert-base-uncased' was not found locally or on the Hub.*written by save_pretrained",
    ):
        module("demo", "bert-base-uncased").setup("fit")


def test_a_failing_loader_hook_leaves_no_method_of_data_loaders_replaced(tmp_path: Path) -> None:
    class Failing(SmartBatchDataModule):
        def train_dataloader(self):
            raise RuntimeError("no loader")

    kinds = [DataLoader, SmartBatchLoader]
    before = [dict(vars(kind)) for kind in kinds]
    with pytest.raises(RuntimeError, match="no loader"):
        trainer(tmp_path).fit(SequenceClassifier(), Failing(max_length=16))
    assert [dict(vars(kind)) for kind in kinds] == before
