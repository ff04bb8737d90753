"""Tests of what is read as a checkpoint: undamaged files that run no code, wherever they are."""

import functools
import http.server
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import QUIET, assert_same, cli, damaged, slow, trainer
from lightning.pytorch.callbacks import Callback

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.checkpointing import AtomicCheckpointIO
from smartbatch_lightning.cli import main
from smartbatch_lightning.errors import UsageError

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

SHORT = ["--data.max_length=24", "--data.batch_size=64", "--trainer.limit_train_batches=1"]


class _Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smartbatch"])
        options = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={folder}"]
        run = cli("fit", *SHORT, *options)
    return Path(run.trainer.checkpoint_callback.best_model_path)


class Weighted(SequenceClassifier):
    """Takes arguments of its own, and neither `architecture` nor `model_kwargs`."""

    def __init__(self, pretrained: str = "demo", class_weights=None, learning_rate: float = 1e-3) -> None:
        super().__init__(pretrained, learning_rate=learning_rate)
        self.class_weights = class_weights


class Framed(SmartBatchDataModule):
    def __init__(self, dataset: str = "demo", reviewers: pd.DataFrame | None = None, **options) -> None:
        super().__init__(dataset, **options)
        self.reviewers = reviewers


class Best(Callback):
    """Keeps a number of numpy's, as many users' callbacks do."""

    best = np.float64(0.25)

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"] + 1


@pytest.mark.slow
def test_arguments_of_numpy_and_paths_come_back_from_a_checkpoint_and_objects_are_told_of(
    tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO")
    module = Framed(
        reviewers=pd.DataFrame({"a": [1]}),
        max_length=16,
        batch_size=np.int64(64),
        seed=np.int64(1),
        validation_split=np.float64(0.5),
        cache_dir=Path("tokens"),
        loader_kwargs={"worker_init_fn": print},
    )
    model = Weighted(class_weights=np.array([1.0, 3.0]), learning_rate=np.logspace(-5, -3, 3)[1])
    run = trainer(tmp_path, callbacks=[Best()], limit_val_batches=1)
    run.fit(model, module)
    told = [record.message for record in caplog.records if "cannot store" in record.message]
    assert {line.split(" cannot store ")[1].split(" of ")[0] for line in told} == {
        "the argument reviewers",
        "the argument loader_kwargs",
    }
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Weighted.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.class_weights.tolist() == [1.0, 3.0]
    assert loaded.learning_rate == 1e-4
    assert_same(loaded.state_dict(), model.state_dict())
    again = Framed.load_from_checkpoint(tmp_path / "run.ckpt", reviewers=module.reviewers)
    assert (again.batch_size, again.cache_dir, again.validation_split) == (64, Path("tokens"), 0.5)
    best = Best()
    trainer(tmp_path, callbacks=[best], max_epochs=2, limit_val_batches=1).fit(
        model, module, ckpt_path=tmp_path / "run.ckpt"
    )
    assert best.best == 1.25


def test_model_kwargs_beside_a_checkpoint_change_its_configuration_or_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    loaded = SequenceClassifier.load_from_checkpoint(checkpoint, model_kwargs={"hidden_dropout_prob": 0.77})
    assert {part.p for part in loaded.modules() if isinstance(part, torch.nn.Dropout)} >= {0.77}
    with pytest.raises(
        UsageError,
        match="model_kwargs has 'hiden_dropout_prob', which is neither in the configuration of the checkpoin",
    ):
        SequenceClassifier.load_from_checkpoint(checkpoint, model_kwargs={"hiden_dropout_prob": 0.77})


def test_callbacks_that_are_added_beside_a_checkpoint_are_added_once(checkpoint: Path) -> None:
    added = "--trainer.callbacks+=test_checkpointing.Best"
    run = cli("validate", *SHORT, added, f"--ckpt_path={checkpoint}", "--trainer.limit_val_batches=1")
    [best] = [callback for callback in run.trainer.callbacks if isinstance(callback, Best)]
    assert best.best == 0.25  # the checkpoint is of before


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of a folder, by a real server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(command: str, checkpoint: str | Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line with which a command ends that is given a checkpoint."""
    options = ["--trainer.max_epochs=1"] if command == "fit" else []
    monkeypatch.setattr(sys, "argv", ["smartbatch", command, *SHORT, *QUIET, *options, f"--ckpt_path={checkpoint}"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        main()
    return str(stop.value)


@pytest.mark.parametrize(
    ("command", "where"),
    [(command, "file") for command in ("fit", "test", "predict", "export", "load_from_checkpoint")]
    + [("fit", "url"), ("load_from_checkpoint", "url")],
)
def test_no_checkpoint_runs_code(
    command: str, where: str, checkpoint: Path, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "attack": _Attack(tmp_path / "attacked")}, tmp_path / "evil.ckpt")
    path = f"{served}/evil.ckpt" if where == "url" else str(tmp_path / "evil.ckpt")
    if command == "load_from_checkpoint":
        with pytest.raises(ValueError, match="evil.ckpt holds Python objects besides weights") as refused:
            SequenceClassifier.load_from_checkpoint(path, weights_only=False)
        line = f"error: {refused.value}"
    else:
        line = run(command, path, monkeypatch)
    assert line.startswith(f"error: the checkpoint {path} holds Python objects besides weights")
    assert "\n" not in line
    assert not (tmp_path / "attacked").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "attacked").exists()  # the attack is a real one


def test_a_checkpoint_of_a_url_is_loaded_as_the_file_is(checkpoint: Path, served: str, tmp_path: Path) -> None:
    (tmp_path / "good.ckpt").write_bytes(checkpoint.read_bytes())
    by_url, by_file = (SequenceClassifier.load_from_checkpoint(path) for path in (f"{served}/good.ckpt", checkpoint))
    for model in (by_url, by_file):
        model.configure_model()
    assert by_url.label_names == by_file.label_names == ["negative", "positive"]
    content = AtomicCheckpointIO().load_checkpoint(f"{served}/good.ckpt")
    assert content["state_dict"].keys() == torch.load(checkpoint, weights_only=True)["state_dict"].keys()


@pytest.mark.parametrize(
    ("damage", "command"),
    [
        ("cut", "fit"),
        slow("cut", "export"),
        ("empty", "test"),
        slow("text", "predict"),
        ("a git-lfs pointer", "test"),
        ("flipped", "fit"),
        ("flipped", "load_from_checkpoint"),
        ("weights alone", "test"),
        slow("weights alone", "load_from_checkpoint"),
    ],
)
def test_a_damaged_checkpoint_ends_with_one_line(
    damage: str, command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "empty": b"",
        "text": b"no checkpoint at all\n",
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    path = tmp_path / "renamed.ckpt"
    if damage == "weights alone":
        torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], path)
    else:
        path.write_bytes(damaged[damage])
    if command == "load_from_checkpoint":
        with pytest.raises(ValueError, match="is damaged or not a checkpoint") as refused:
            SequenceClassifier.load_from_checkpoint(path)
        line = f"error: {refused.value}"
    else:
        line = run(command, path, monkeypatch)
    assert line.startswith(f"error: the checkpoint {path} is damaged or not a checkpoint: ")
    assert line.endswith("its folder has ['renamed.ckpt'].")
    assert "\n" not in line


def test_a_folder_given_as_a_checkpoint_is_refused_by_the_checkpoints_in_it(tmp_path: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"is a folder, not a file. .*; it has \['best.ckpt', 'last.ckpt'\]\.$"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_a_missing_checkpoint_in_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"runs/best.ckpt does not exist. .*; there is none in '.*runs'\.$"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "runs" / "best.ckpt")


def test_no_damaged_checkpoint_is_loaded_with_other_content(tmp_path: Path) -> None:
    """Bits flipped, bytes inserted and taken out at random places of a small checkpoint."""
    rng = random.Random(1)
    weights = {
        f"layer.{number}": torch.randn(16, generator=torch.Generator().manual_seed(number)) for number in range(8)
    }
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": weights, "global_step": 7}, path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(600):
        path.write_bytes(damaged(whole, rng))
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(path)
        except UsageError:
            refused += 1
            continue
        assert loaded["global_step"] == 7
        assert loaded["state_dict"].keys() == weights.keys()
        assert all(weights[name].equal(weight) for name, weight in loaded["state_dict"].items())
    assert refused > 200


@pytest.mark.parametrize("stage", ["fit", slow("validate"), slow("test"), "predict"])
def test_a_trainer_without_plugins_runs_no_code_of_a_checkpoint_by_url(stage: str, served, tmp_path: Path) -> None:
    attack = _Attack(tmp_path / "attacked")
    torch.save({"state_dict": {}, "attack": attack}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt"):
        getattr(trainer(tmp_path), stage)(
            SequenceClassifier(), SmartBatchDataModule(max_length=24), ckpt_path=f"{served}/a.ckpt"
        )
    assert not (tmp_path / "attacked").exists()
