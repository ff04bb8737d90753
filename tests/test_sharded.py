"""Tests of training whose weights and optimizer are sharded over ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import run_sharded
import torch
from helpers import Fork, finish
from run_sharded import LORA
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from smartbatch_lightning import SequenceClassifier, demo

pytestmark = pytest.mark.slow


def train(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What each rank has trained and got."""
    finish(Fork(folder, 2, run_sharded.main, folder, *arguments), folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["full", "shards"])
@pytest.mark.parametrize("options", [{}, {"peft_config": LORA}], ids=["all weights", "LoRA"])
def test_fsdp2_trains_as_ddp_does_and_resumes_exactly(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = train(tmp_path / "ddp", "ddp", None, options)
    whole = train(tmp_path / kind, kind, None, options)
    assert [one["steps"][0] for one in whole] == [one["steps"][0] for one in expected]
    for one, other in zip(whole, expected, strict=True):
        assert [samples for samples, _ in one["steps"]] == [samples for samples, _ in other["steps"]]
        torch.testing.assert_close([loss for _, loss in one["steps"]], [loss for _, loss in other["steps"]])
        torch.testing.assert_close(one["tested"], other["tested"])
    resumed = train(tmp_path / "resumed", kind, tmp_path / kind / "step=3.ckpt", options)
    for one, other in zip(resumed, whole, strict=True):
        assert one == {**other, "steps": other["steps"][3:]}


@pytest.mark.parametrize("kind", ["full", "shards"])
def test_adapters_are_not_resumed_under_fsdp2_in_a_model_with_other_weights(kind: str, tmp_path: Path) -> None:
    train(tmp_path / kind, kind, None, {"peft_config": LORA})
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(demo.model_dir())
    model.bert.pooler.dense.weight.data.add_(1)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(demo.model_dir()).save_pretrained(tmp_path / "other")
    options = {"peft_config": LORA, "pretrained": str(tmp_path / "other")}
    with pytest.raises(AssertionError, match="holds adapters that were trained on weights that"):
        train(tmp_path / "resumed", kind, tmp_path / kind / "step=3.ckpt", options)


def test_a_checkpoint_of_shards_is_refused_where_one_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / ".metadata").touch()
    with pytest.raises(ValueError, match="is a folder of shards, which only the strategy that wrote it can load"):
        SequenceClassifier.load_from_checkpoint(tmp_path / "last.ckpt")


def test_tensor_parallelism_is_refused_with_the_strategy_that_shards_data(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"Use ModelParallelStrategy\(data_parallel_size=2, tensor_parallel_size=1"
    ):
        train(tmp_path, "auto")
