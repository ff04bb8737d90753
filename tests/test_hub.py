"""Tests of pushing to the Hub and of loading from it, with a local server that answers as the Hub does."""

import base64
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import FAST, cli, trainer
from huggingface_hub import constants

from smartbatch_lightning import SequenceClassifier, SmartBatchDataModule
from smartbatch_lightning.callbacks.model_export import ModelExport
from smartbatch_lightning.data.sources import read_dataset
from smartbatch_lightning.data.tokenizers import load_tokenizer
from smartbatch_lightning.models.source import ModelSource

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits of their files, whose large ones are uploaded before, as Git LFS does it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.refuse: str | None = None  # part of the path of what is refused


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_PUT(self) -> None:
        content = self._body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if self.headers["Authorization"] != "Bearer hf_right" or (hub.refuse and hub.refuse in self.path):
            self._answer({"error": "Forbidden"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            hub.created.append(asked)
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, {})
            self._answer({"url": f"{hub.url}/{name}"}, status)
        elif self.path == "/api/validate-yaml":
            self._answer({})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                (
                    file["path"],
                    "lfs" if file["path"].endswith(".safetensors") and constants.HF_HUB_DISABLE_XET else "regular",
                )
                for file in files
            ]
            self._answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{hub.url}/upload"}}
            self._answer({"transfer": "basic", "objects": [{**one, "actions": upload} for one in objects]})
        elif "/commit/" in self.path:
            header, *files = map(json.loads, body.splitlines())
            hub.messages.append(header["value"]["summary"])
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for file in files:
                value, is_large = file["value"], file["key"] == "lfsFile"
                content = hub.large[value["oid"]] if is_large else base64.b64decode(value["content"])
                hub.repositories[name][value["path"]] = content
            self._answer({"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer({"error": f"{self.path} is not known here"}, 404)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fit(folder: str, repository: str, **options) -> SequenceClassifier:
    export = ModelExport(folder, push_to_hub=repository, **options)
    run, model = trainer(Path(), limit_train_batches=1, limit_val_batches=0, callbacks=[export]), SequenceClassifier()
    run.fit(model, SmartBatchDataModule(max_length=24))
    return model


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.parametrize("large", [True, False])
def test_an_exported_folder_arrives_at_the_hub_byte_for_byte(
    large: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", large)
    fit("reviewer", "us/reviews", private=True, commit_message="The first")
    assert len(files(Path("reviewer"))) >= 5
    assert hub.repositories == {"us/reviews": files(Path("reviewer"))}
    assert bool(hub.large) == large
    assert hub.created[0]["organization"] == "us"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.messages == ["The first"]
    assert f"Pushed the model to {hub.url}/us/reviews" in capsys.readouterr().out
    assert "pipeline('text-classification', 'us/reviews', truncation=True)" in Path("reviewer", "README.md").read_text()


@pytest.mark.slow
def test_the_command_exports_to_the_hub_a_second_time_too(hub: Hub) -> None:
    run = cli("fit", *FAST, "--trainer.limit_val_batches=1")
    checkpoint = run.trainer.checkpoint_callback.best_model_path
    for folder in ("one", "other"):
        cli(
            "export", "--data.max_length=24", f"--ckpt_path={checkpoint}", f"--folder={folder}", "--push_to_hub=reviews"
        )
    assert hub.repositories == {"me/reviews": files(Path("other"))}
    assert hub.messages == ["Upload model"] * 2


def test_what_cannot_be_pushed_is_refused_before_training(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="push_to_hub is 'us/reviews', but no folder is given to export to. Set"):
        ModelExport(push_to_hub="us/reviews")
    for token, repository, message in [
        (
            None,
            "us/reviews",
            "push_to_hub is 'us/reviews', but there is no token .*Log in with `hf auth login`, or set HF_TOKEN",
        ),
        ("hf_wrong", "us/reviews", "the repository cannot be created or written: .*403 Forbidden.* Check its name"),
        ("hf_right", "not a name", "the repository cannot be created or written: HFValidationError: .* Check its name"),
    ]:
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(ValueError, match=message):
            fit("reviewer", repository)
    assert not files(Path("reviewer"))
    assert hub.repositories == {}


def test_a_push_that_fails_leaves_the_folder_and_names_the_command_for_later(hub: Hub) -> None:
    hub.refuse = "/commit/"
    with pytest.raises(
        ValueError, match="the model is in reviewer, .*403 Forbidden.* Push it with `hf upload us/reviews r"
    ):
        fit("reviewer", "us/reviews")
    assert Path("reviewer", "model.safetensors").exists()


def test_without_a_network_what_is_cached_is_loaded_and_what_is_not_is_refused_in_seconds(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path("cache/models--us--base/snapshots", "0" * 40)
    shutil.copytree(base, snapshot)
    Path("cache/models--us--base/refs").mkdir()
    Path("cache/models--us--base/refs/main").write_text("0" * 40)
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    where, started = {"cache_dir": "cache"}, time.monotonic()
    model, fresh = ModelSource("us/base", where, None).load(2, None, None, untrained_needs_labels=True)
    assert len(load_tokenizer("us/base", 24, where)) == model.config.vocab_size
    assert fresh == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="'us/other' was not found locally or on the Hub: Connect.* name on the Hub"):
        trainer(Path()).fit(SequenceClassifier("us/other", model_kwargs=where), SmartBatchDataModule(max_length=24))
    with pytest.raises(ValueError, match="the data set 'us/other' was not found locally or on the Hub: ConnectError"):
        read_dataset("us/other")
    assert time.monotonic() - started < 20  # a single file took 24
    assert not constants.HF_HUB_OFFLINE
