"""Tests of what is read as a checkpoint: undamaged files that run no code, wherever they are."""

import functools
import http.server
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import QUIET, cli, damaged, trainer

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
        ("cut", "export"),
        ("empty", "test"),
        ("text", "predict"),
        ("a git-lfs pointer", "test"),
        ("flipped", "fit"),
        ("flipped", "load_from_checkpoint"),
        ("weights alone", "test"),
        ("weights alone", "load_from_checkpoint"),
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
        with pytest.raises(ValueError, match="is damaged or no checkpoint") as refused:
            SequenceClassifier.load_from_checkpoint(path)
        line = f"error: {refused.value}"
    else:
        line = run(command, path, monkeypatch)
    assert line.startswith(f"error: the checkpoint {path} is damaged or no checkpoint: ")
    assert line.endswith("in its folder are ['renamed.ckpt'].")
    assert "\n" not in line


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


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_trainer_without_plugins_runs_no_code_of_a_checkpoint_by_url(stage: str, served, tmp_path: Path) -> None:
    attack = _Attack(tmp_path / "attacked")
    torch.save({"state_dict": {}, "attack": attack}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt"):
        getattr(trainer(tmp_path), stage)(
            SequenceClassifier(), SmartBatchDataModule(max_length=24), ckpt_path=f"{served}/a.ckpt"
        )
    assert not (tmp_path / "attacked").exists()
