"""Arguments at random: each combination trains every sample once an epoch, or ends in one line.

`pytest -m slow tests/test_arguments.py` tries 400, of which 40 on two ranks, in about a quarter of an hour on two cores.
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from helpers import diaries

from smartbatch_lightning import demo

ROWS, ONE_RANK, TWO_RANKS, TOGETHER = 60, 360, 40, 20

VALUES = {
    "data.batch_size": ["1", "3", "8", "64", "1000", "0", "-1", "2.5", "null", "many"],
    "data.max_tokens_per_batch": ["null", "24", "100", "10", "0", "-5", "100000", "1e3"],
    "data.batching": ["smart", "tutorial", "random", "sorted", "os.getcwd", "no.such.thing"],
    "data.padding": ["longest", "max_length", "packed", "none"],
    "data.jitter": ["auto", "0", "1", "2.5", "inf", "nan", "-1", "much"],
    "data.pad_to_multiple_of": ["1", "8", "7", "64", "0", "-8"],
    "data.max_length": ["3", "16", "24", "2", "0", "-1", "512", "513", "100000", "null"],
    "data.seed": ["0", "7", "-1", "1099511627776", "null", "x"],
    "data.num_workers": ["0", "1", "-1", "1.5"],
    "data.pin_memory": ["true", "false", "null", "2"],
    "data.loader_kwargs": ["{}", "{timeout: 5}", "{shuffle: true}", "{no_such: 1}", "{prefetch_factor: 2}", "null"],
    "data.validation_split": ["auto", "0.5", "0", "nan", "1.5", "-0.1", "1e-9", "0.999", "test", "nosplit", "null",
                              "[test]", "[]", "[test,test]", "true", "1"],
    "data.test_split": ["test", "nosplit", "[test]", "[]", "''"],
    "data.train_split": ["train", "test", "nosplit", "''"],
    "data.predict_split": ["null", "train", "nosplit"],
    "data.label_names": ["[negative,positive]", "[positive,negative]", "[]", "[a]", "[a,a]", "[a,b,c]", "null", "[1,0]"],
    "data.label_column": ["label", "text", "nolabel", "''"],
    "data.text_columns": ["text", "label", "[text]", "[text,text]", "[]", "[text,text,text]", "notext"],
    "data.problem_type": ["single_label_classification", "regressionn", "os.getcwd"],
    "data.dataset_config": ["null", "sst2"],
    "data.cache_dir": ["null", "/proc/none"],
    "model.learning_rate": ["0.001", "0", "-1", "nan", "inf", "1e-30"],
    "model.adam_epsilon": ["1e-8", "0", "-1", "nan"],
    "model.weight_decay": ["0", "0.1", "-1", "nan", "inf"],
    "model.warmup_steps": ["0", "5", "100000", "-1", "1.5"],
    "model.warmup_ratio": ["0", "0.5", "1", "2", "nan", "-0.1"],
    "model.optimizer": ["null", "torch.optim.SGD", "torch.optim.LBFGS", "os.getcwd", "{class_path: torch.optim.SGD, "
                        "init_args: {lr: 0.1, momentum: 0.9}}", "{class_path: torch.optim.SGD, init_args: {no_such: 1}}"],
    "model.lr_scheduler": ["linear", "cosine", "constant", "inverse_sqrt", "warmup_stable_decay", "cosine_with_min_lr",
                           "reduce_lr_on_plateau", "greedy", "none", "torch.optim.lr_scheduler.CosineAnnealingLR",
                           "{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 1e-3}}", "{}", "null"],
    "model.lr_scheduler_kwargs": ["{}", "null", "{num_cycles: 2}", "{monitor: val_f1, mode: max}", "{no_such: 1}"],
    "model.layer_decay": ["1", "0.9", "0", "1.5", "nan", "-1", "x"],
    "model.head_learning_rate": ["null", "1e-3", "0", "-1", "nan"],
    "model.freeze_embeddings": ["true", "false", "2"],
    "model.freeze_layers": ["0", "1", "2", "100", "-1", "0.5"],
    "model.gradient_checkpointing": ["true", "false"],
    "model.num_labels": ["null", "2", "3", "0", "-1", "1"],
    "model.model_kwargs": ["{}", "{hidden_dropout_prob: 0.2}", "{no_such: 1}", "{attn_implementation: eager}",
                           "{attn_implementation: nothing}", "{dtype: float16}", "{hidden_dropout_prob: 7}", "null"],
    "model.compile": ["false", "no-such-mode"],
    "trainer.accumulate_grad_batches": ["1", "2", "7", "0", "-1"],
    "trainer.gradient_clip_val": ["null", "1.0", "0", "-1", "nan"],
    "trainer.precision": ["32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed", "16-true", "8"],
    "trainer.limit_val_batches": ["0", "1", "1.0", "2", "-1"],
    "trainer.val_check_interval": ["1.0", "0.5", "2", "0", "1000"],
    "trainer.log_every_n_steps": ["1", "0", "50", "-1"],
    "trainer.max_epochs": ["1", "0", "-1.5"],
    "stop_on_signal.every_n_steps": ["1", "3", "0", "-1", "1.5"],
    "stop_on_signal.requeue_signal": ["SIGUSR1", "USR1", "SIGKILL"],
    "memory_check.enabled": ["true", "false"],
    "export_model.folder": ["null", "exported", "/proc/none"],
    "predictions.path": ["predictions.csv", "predictions.xlsx"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of sixty reviews."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, rows in (("train", ROWS), ("test", 20)):
        reviews = load_dataset("parquet", data_files=str(demo.data_dir() / f"{split}.parquet"), split="train")
        reviews.select(range(rows)).to_parquet(folder / f"{split}.parquet")
    return [
        f"--data.dataset={{train: {folder / 'train.parquet'}, test: {folder / 'test.parquet'}}}",
        f"--model.pretrained={demo.model_dir()}",
        "--data.max_length=24",
        "--data.validation_split=test",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.callbacks+=run_to_be_killed.Diary",
    ]


def arguments(rng: random.Random) -> list[str]:
    chosen = rng.sample(sorted(VALUES), rng.randint(1, 4))
    return [f"--{name}={rng.choice(VALUES[name])}" for name in chosen]


def fault(command: list[str], folder: Path, exit_status: int, printed: str, ranks: int) -> str | None:
    """What is wrong with how a run ended: it has trained every row once, or was refused in one line."""
    told = " ".join(argument for argument in command if argument.partition("=")[0][2:] in VALUES)
    if "Traceback" in printed:
        return f"{told}: {printed.strip().splitlines()[-1]}"
    if exit_status:
        refused = any(re.match(r"^(\S+: )?error: ", line) for line in printed.splitlines())
        return None if refused else f"{told}: exit status {exit_status}: {printed[-300:]}"
    trained = Counter(row for rank in range(ranks) for run in diaries(folder, rank) for _, _, ids in run for row in ids)
    given = dict(argument[2:].split("=", 1) for argument in command)
    if given["trainer.max_epochs"] == "0":
        return f"{told}: trained" if trained else None
    rows = 20 if given.get("data.train_split") == "test" else ROWS
    held_out = {"0.5": 0.5, "auto": 0.1}.get(given["data.validation_split"], 0)
    if given["data.validation_split"] in ("1e-9", "0.999"):  # at least a sample of each label stays on either side
        held_out = 1 - len(trained) / rows
    if set(trained.values()) != {1} or max(trained) >= rows or len(trained) != round(rows * (1 - held_out)):
        return f"{told}: {len(trained)} rows trained, {sum(trained.values())} times"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("group", range(ONE_RANK // TOGETHER))
def test_arguments_at_random_train_every_sample_once_or_are_refused_in_one_line(group, base, tmp_path: Path) -> None:
    """Many in one process, which costs less; each in a folder of its own."""
    rng = random.Random(group)
    script = "\n".join(
        [
            "import contextlib, os, sys, traceback, smartbatch_lightning.cli as cli, torch",
            "torch.set_num_threads(1)",
            "for line in open(sys.argv[1]).read().splitlines():",
            "    folder, *arguments = line.split(chr(31))",
            "    os.makedirs(folder); os.chdir(folder); sys.argv = ['smartbatch', 'fit', *arguments]",
            "    os.environ.pop('PL_GLOBAL_SEED', None)",
            "    with open('log.txt', 'w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):",
            "        code = 0",
            "        try: cli.main()",
            "        except SystemExit as stop: code = stop.code",
            "        except BaseException: code = 1; traceback.print_exc()",
            "        if isinstance(code, str): print(code); code = 1",
            "    open('code.txt', 'w').write(str(code or 0))",
        ]
    )
    tried = {
        tmp_path / str(number): [*base, f"--trainer.callbacks.folder={tmp_path / str(number)}", *arguments(rng)]
        for number in range(TOGETHER)
    }
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "lines.txt").write_text("\n".join("\x1f".join([str(f), *args]) for f, args in tried.items()))
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "lines.txt")]
    subprocess.run(command, env=environment, check=True, timeout=500, cwd=tmp_path)
    faults = [
        fault(given, folder, int((folder / "code.txt").read_text()), (folder / "log.txt").read_text(), 1)
        for folder, given in tried.items()
    ]
    assert not any(faults), "\n".join(filter(None, faults))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(TWO_RANKS))
def test_arguments_at_random_on_two_ranks(seed: int, base, tmp_path: Path) -> None:
    given = [
        *base,
        f"--trainer.callbacks.folder={tmp_path}",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        *arguments(random.Random(1000 + seed)),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [str(Path(sys.executable).parent / "smartbatch"), "fit", *given]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    found = fault(given, tmp_path, run.returncode, run.stdout + run.stderr, 2)
    assert found is None, found
