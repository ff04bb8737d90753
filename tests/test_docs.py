"""Every snippet of the README and of the pages in docs runs, in a folder with small files of the names that it uses."""

import csv
import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from helpers import QUIET, ROOT, slow

import smartbatch_lightning
from smartbatch_lightning import demo
from smartbatch_lightning.cli import main

# for what is on the Hub
STAND_INS = {
    "stanfordnlp/imdb": "imdb",
    "bert-base-uncased": str(demo.model_dir()),
    "roberta-base": str(demo.model_dir()),
}
NOT_RUN = Counter(
    {
        "in a fresh environment, by .ci/run": 3,
        "it installs torch": 1,
        "it sets up an environment": 1,
        "classes that are not here": 1,
        "the folder is not here": 1,
        "it needs a GPU; tests/test_benchmarks.py runs these dry": 2,
        "it loads from the Hub; tests/test_glue.py runs these configs": 1,
    }
)


@dataclass(frozen=True)
class Snippet:
    page: str
    language: str
    code: str
    not_run: str | None


def snippets(page: Path) -> list[Snippet]:
    fences = re.findall(
        r"^(?:<!-- not run: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return [Snippet(page.stem, language, code, reason or None) for reason, language, code in fences if language]


SNIPPETS = {
    page.stem: found
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (found := snippets(page))
}
QUICK = ["batching", "data", "models"]
SLOW = [page for page, found in SNIPPETS.items() if page not in QUICK and any(not one.not_run for one in found)]


def with_stand_ins(text: str) -> str:
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    return text


def run(snippet: Snippet, names: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a snippet in the working directory; one whose first line is a comment with a file's name is also saved."""
    code = with_stand_ins(snippet.code)
    if saved_as := re.match(r"# (\w+\.(?:py|yaml))\n", code):
        Path(saved_as[1]).write_text(code)
    if snippet.language == "python":
        exec(compile(code, snippet.page, "exec"), names)
    elif snippet.language == "yaml":
        Path("snippet.yaml").write_text(code)
        with pytest.raises(SystemExit) as end:
            smartbatch(["smartbatch", "fit", "--config=snippet.yaml", "--print_config"], monkeypatch)
        assert not end.value.code
    else:
        for line in code.replace("\\\n", "").splitlines():
            if words := shlex.split(line, comments=True):
                smartbatch(words, monkeypatch)


def smartbatch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0] == "smartbatch", words
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the folder is added
    monkeypatch.setattr(sys, "argv", words)
    main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, configs, a checkpoint and predictions."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [
        {"id": f"r{row}", "review": f"{word} " * (1 + row % 7), "stars": stars, "text": word, "label": stars}
        for row in range(20)
        for word, stars in (("good", 5), ("bad", 1))
    ]
    for name in ("train.csv", "test.csv", "new.csv", "validation.csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    labelled = Dataset.from_list([{"text": row["review"], "label": row["stars"]} for row in rows])
    DatasetDict(train=labelled, test=labelled).save_to_disk(folder / "imdb")
    for config in ROOT.glob("configs/**/*.yaml"):
        copy = folder / config.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(with_stand_ins(config.read_text()))
    [readme] = [snippet.code for snippet in SNIPPETS["README"] if snippet.code.startswith("# reviews.yaml")]
    (folder / "CONFIG.yaml").write_text(with_stand_ins(readme).replace("max_epochs: 5", "max_epochs: 1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start = ["smartbatch", "fit", "--config=CONFIG.yaml", *QUIET]
        smartbatch(start, patch)
        shutil.copy("runs/reviews/best.ckpt", "PATH.ckpt")
        for name in ("predictions", "test"):
            path = f"--predictions.path={name}.parquet"
            columns = "--predictions.columns=[label, text]"
            predict = ["predict", "--config=CONFIG.yaml", "--ckpt_path=PATH.ckpt", "--data.dataset=new.csv"]
            smartbatch(["smartbatch", *predict, path, columns, *QUIET], patch)
    return folder


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:.*but there is no last checkpoint available")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("page", [*QUICK, *map(slow, SLOW)])
def test_every_snippet_of_a_page_runs(page: str, request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in SLOW:
        shutil.copytree(request.getfixturevalue("folder"), tmp_path, dirs_exist_ok=True)
        if page in ("README", "quickstart"):
            shutil.rmtree("runs")
    names: dict[str, object] = {"__name__": page}
    for snippet in SNIPPETS[page]:
        if snippet.not_run is None:
            run(snippet, names, monkeypatch)


def test_the_snippets_that_do_not_run_are_few_and_say_why() -> None:
    everything = [snippet for page in SNIPPETS.values() for snippet in page]
    assert {snippet.language for snippet in everything} == {"bash", "python", "yaml"}
    assert Counter(snippet.not_run for snippet in everything if snippet.not_run) == NOT_RUN
    assert len(everything) - NOT_RUN.total() >= 30


def test_the_tour_of_the_code_has_a_line_for_every_module() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [*Path(smartbatch_lightning.__file__).parent.rglob("*.py"), *ROOT.glob("benchmarks/*.py")]
    assert len(modules) > 80
    assert [str(path) for path in modules if path.name != "__init__.py" and f" {path.name} " not in tour] == []


@pytest.mark.slow
def test_the_command_line_reference_has_every_option_of_data_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    from cli_reference import cli_reference

    page = cli_reference()
    for option in (
        "--data.dataset",
        "--model.pretrained",
        "--trainer.devices",
        "--checkpoint.monitor",
        "--ranks",
        "--config",
    ):
        assert f"\n- `{option}`" in page
