"""Exports a trained classifier as an ordinary `transformers` folder, which does not need this package."""

import copy
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor
from transformers import PreTrainedModel

from smartbatch_lightning.console import echo, printable
from smartbatch_lightning.data.datamodule import SmartBatchDataModule
from smartbatch_lightning.errors import UsageError, join_quoted
from smartbatch_lightning.families import depends_on_width
from smartbatch_lightning.hub import create_repository, push_folder
from smartbatch_lightning.models.adapters import is_quantized
from smartbatch_lightning.models.classifier import SequenceClassifier
from smartbatch_lightning.models.finite import check_weights
from smartbatch_lightning.models.head import find_output_layer, rescale_logits
from smartbatch_lightning.storage import check_writable, write_into
from smartbatch_lightning.tasks import SingleLabelClassification
from smartbatch_lightning.tasks.standardization import STANDARDIZATION_FIELDS, Standardization
from smartbatch_lightning.tasks.thresholds import THRESHOLDS_FILE

_SAMPLES, _MAX_DIFFERENCE = 4, 1e-5  # for checking that an exported model predicts in the original units
_MARK = "with smartbatch-lightning"  # identifies the model card of an export
_PIPELINE_LIMITS = {  # what a pipeline cannot do, by truncation
    "head_tail": "For texts of more than {} tokens, the model was trained on the beginning and the end, but a pipeline "
    "reads only the beginning; `smartbatch predict` reads both.",
    "windows": "For texts of more than {} tokens, the model was trained on overlapping windows, but a pipeline reads "
    "only the first one; `smartbatch predict` reads all.",
}
_MODEL_SETTINGS = (
    *("learning_rate", "adam_epsilon", "weight_decay", "optimizer", "lr_scheduler", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "layer_decay", "head_learning_rate", "freeze_embeddings", "freeze_layers"),
    *("class_weights", "pos_weight", "label_smoothing", "focal_gamma", "gradient_checkpointing", "peft_config"),
)


def export_model(
    model: SequenceClassifier,
    data: SmartBatchDataModule,
    folder: str | Path,
    metrics: dict[str, float] | None = None,
    command: str | None = None,
    *,
    adapter: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> None:
    """Exports a model: weights as safetensors, the configuration with class names, the tokenizer and a model card.

    `transformers.pipeline("text-classification", folder, truncation=True)` gives the same results as `predict`: the
    tokenizer's maximum length is set to the data's `max_length`, and its truncation side to that of `truncation`. With
    `head_tail` or `windows`, the pipeline reads only the beginning of long texts, and the card says so. The mean and
    deviation of standardized targets are folded into the last layer, so that outputs are in the original units.
    Adapters are merged into the weights.

    Args:
        model: A trained, built model.
        data: The data module it was trained on; its tokenizer and settings are written.
        folder: Folder to export to.
        metrics: Metrics by name, for the card.
        command: The command that trained the model, for the card.
        adapter: Write only the adapters and the head, as peft does, with the configuration in the subfolder `config`.
        push_to_hub: Hub repository to upload the folder to, such as `me/reviewer`; created if it does not exist.
        private: Make the repository private if it is created; None for the owner's setting.
        commit_message: Commit message for the upload.

    Raises:
        ValueError: As for `check_exportable`, `check_export_folder`, `create_repository` and `push_folder`; or the data
            has labels that the model does not have, the model is wrapped, weights are not finite, the disk is full, or
            the mean of standardized targets cannot be folded into the last layer.
    """
    assert model.model is not None, "a model is exported after it has been built"
    check_exportable(model, data, adapter)
    if not {*(names := data.label_names or [])} <= {*model.task.label_names}:
        raise UsageError(
            f"the data has the labels {join_quoted(names)}, but the model was trained on other data, with "
            f"{join_quoted(model.task.label_names)}. Pass its training config with --config, or the same --data "
            "options; they determine the exported max_length."
        )
    if not isinstance(model.model, PreTrainedModel):
        raise UsageError(
            f"the model is wrapped in {type(model.model).__name__}, whose save_pretrained leaves out the class names. "
            "Unwrap it first; for peft: model.model = model.model.merge_and_unload()."
        )
    check_export_folder(folder)
    folder = Path(folder)
    repo_id = None if push_to_hub is None else create_repository(push_to_hub, private)
    check_weights(
        model.model.state_dict().values(),
        f"nothing is written to {folder}",
        "Train again, or use an earlier checkpoint.",
    )
    tokenizer = copy.deepcopy(data.tokenizer)  # with the tokens that were added to it
    tokenizer.model_max_length = data.max_length
    tokenizer.truncation_side = data.truncation_in_use.side or "right"
    tokenizer.init_kwargs["truncation_side"] = tokenizer.truncation_side  # otherwise it is not saved
    card = _card(model, data, repo_id or folder.resolve().name, metrics or {}, command, adapter)
    exported = _exported_model(model, data, adapter)

    def write(tmp_folder: Path) -> None:
        exported.save_pretrained(tmp_folder)
        if adapter:  # in a subfolder: next to an adapter, transformers would look for all weights
            config = copy.deepcopy(exported.config)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # else transformers expects quantized pretrained weights
            config.save_pretrained(tmp_folder / "config")
        tokenizer.save_pretrained(tmp_folder)
        card.save(tmp_folder / "README.md")

    write_into(folder, write, outdated=[THRESHOLDS_FILE])  # chosen for other weights
    echo(f"Wrote the model to {folder}")
    if (truncation := data.truncation_in_use).side is None:
        echo(_PIPELINE_LIMITS[truncation.truncation].format(data.max_length))
    if repo_id is not None:
        push_folder(folder, repo_id, commit_message)


def _exported_model(model: SequenceClassifier, data: SmartBatchDataModule, adapter: bool) -> Any:
    """The model to write, or a changed copy on the CPU: adapters merged or separate, targets in the original units."""
    assert model.model is not None
    exported: Any = model.model
    standardization = Standardization.from_fields(exported.config.to_dict())
    if model.adapters is not None:
        exported = model.adapters.for_saving([] if adapter else _sample_inputs(data))
    elif standardization is not None:
        exported = copy.deepcopy(exported).cpu()
    if standardization is not None:
        _fold(exported, standardization, _sample_inputs(data))
    return exported


def _fold(model: PreTrainedModel, standardization: Standardization, inputs: list[dict[str, Tensor]]) -> None:
    """Changes a model's last layer so that it predicts targets in the original units.

    Raises:
        ValueError: The layer has no bias, or does not produce the logits.
    """
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        expected = standardization.restore_tensor(torch.cat([model(**one).logits for one in inputs]))
        rescale_logits(model, standardization.std, standardization.mean)
        logits = torch.cat([model(**one).logits for one in inputs])
    tolerance = _MAX_DIFFERENCE * (expected.abs() + expected.new_tensor(standardization.std))
    if not ((logits - expected).abs() <= tolerance).all():
        raise UsageError(
            "the mean and deviation of standardized targets cannot be folded into the last layer of "
            f"{type(model).__name__}: its outputs would differ by {(logits - expected).abs().max():g}. Train with "
            "--data.standardize_targets=false."
        )
    for name in STANDARDIZATION_FIELDS:
        delattr(model.config, name)


def _sample_inputs(data: SmartBatchDataModule) -> list[dict[str, Tensor]]:
    """A few of the data's texts as model inputs, each as its own batch."""
    rows = data.splits[data.used_splits[0]].select_columns(data.text_columns).with_format("arrow")[:_SAMPLES]
    options: dict[str, Any] = {"truncation": True, "max_length": data.max_length, "return_tensors": "pt"}
    texts = data.text_encoder.texts(rows)
    inputs = [data.tokenizer(*([text] if isinstance(text, str) else text), **options) for text in texts]
    return [one for one in inputs if one["input_ids"].shape[1]]


def check_exportable(module: Any, datamodule: Any, adapter: bool) -> None:
    """Rejects a model that `export_model` cannot write.

    Raises:
        ValueError: This is not a `SequenceClassifier` trained on a `SmartBatchDataModule`; its adapters are missing, or
            cannot be written or merged as requested; or the mean of standardized targets cannot be folded into its last
            layer.
    """
    if not isinstance(module, SequenceClassifier) or not isinstance(datamodule, SmartBatchDataModule):
        raise UsageError(
            "only a SequenceClassifier trained on a SmartBatchDataModule can be exported, but this run has "
            f"{type(module).__name__} and {type(datamodule).__name__}. Call save_pretrained on the model and the "
            "tokenizer instead."
        )
    if adapter and module.peft_config is None:
        raise UsageError(
            "adapter is true, but the model has no adapters. Leave adapter out, or train with --model.peft_config."
        )
    if adapter and (module.peft_config or {}).get("use_dora"):
        raise UsageError(
            "transformers does not load DoRA's magnitudes from an adapter folder, so its results would be wrong. Leave "
            "adapter out, and the adapters are merged into the weights."
        )
    if module.adapters is not None and not adapter and is_quantized(module.model):
        raise UsageError(
            "adapters cannot be merged losslessly into 8-bit or 4-bit weights. Export only the adapters with "
            "adapter=true."
        )
    if module.model is not None and Standardization.from_fields(module.model.config.to_dict()) is not None:
        find_output_layer(module.model)


def check_export_folder(folder: str | Path) -> None:
    """Rejects a folder that cannot be written, or whose README.md was not written by an export."""
    check_writable(folder, "Give another folder.")
    card = Path(folder) / "README.md"
    if card.exists() and _MARK not in card.read_text(errors="replace"):
        raise UsageError(f"{card} was not written by an export and would be replaced. Move it, or give another folder.")


def _card(
    model: SequenceClassifier,
    data: SmartBatchDataModule,
    name: str,
    metrics: dict[str, float],
    command: str | None,
    adapter: bool,
) -> ModelCard:
    assert model.model is not None
    pretrained = Path(model.pretrained).name if Path(model.pretrained).is_dir() else model.pretrained
    splits = data.text_data().evaluation_splits
    evaluated = {name: value for name, value in metrics.items() if name.startswith(("val_", "test_"))}
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=pretrained if adapter else None,
        pipeline_tag="text-classification",
        model_name=name.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=data.source,
                dataset_name=data.source,
                dataset_split=", ".join(splits[metric.partition("_")[0]]),
                metric_type=metric.partition("_")[2],
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in evaluated.items()
        ],
    )
    truncation = data.truncation_in_use
    width = ", padding='max_length'" if depends_on_width(model.model.config, data.max_length) else ""
    all_scores = "" if isinstance(model.task, SingleLabelClassification) else ", top_k=None"
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_escaped(name.rpartition('/')[2])}",
        f"{_escaped(pretrained)} fine-tuned on {_escaped(data.source)} {_MARK}, to predict "
        f"{_escaped(model.task.description)}.",
        *([] if model.adapters is None else [_escaped(str(model.adapters))]),
        _code("python", _usage(name, f"truncation=True{width}{all_scores}", data.max_length, adapter)),
        *([] if truncation.side else [_PIPELINE_LIMITS[truncation.truncation].format(data.max_length)]),
        "## Metrics",
        _table("metric", {name: f"{value:.4f}" for name, value in evaluated.items()}) if evaluated else "Not measured.",
        "## Settings",
        _table("setting", _settings(model, data)),
    ]
    if command:
        sections += ["## Command", _code("bash", command)]
    return ModelCard("\n\n".join(sections) + "\n")


def _settings(model: SequenceClassifier, data: SmartBatchDataModule) -> dict[str, Any]:
    """The settings that a model was trained with, by name."""
    settings: dict[str, Any] = {"max_length": data.max_length, **data.truncation_in_use.to_dict(), **asdict(data.spec)}
    settings |= {name: model.hparams[name] for name in _MODEL_SETTINGS if model.hparams.get(name) is not None}
    trainer = data.trainer
    if trainer is not None and trainer.global_step:  # this Trainer has trained the model
        settings |= {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": trainer.precision,
            "gradient_clip_val": trainer.gradient_clip_val,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "world_size": trainer.world_size,
        }
    return settings


def _usage(name: str, options: str, max_length: int, adapter: bool) -> str:
    """Example code that gives the same results as `predict`."""
    if not adapter:
        return (
            "from transformers import pipeline\n\n"
            f"classify = pipeline('text-classification', {name!r}, {options})  # at {max_length} tokens"
        )
    return (
        "from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline\n\n"
        f"config = AutoConfig.from_pretrained({name!r}, subfolder='config')  # with the names of the classes\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({name!r}, config=config)\n"
        f"classify = pipeline('text-classification', model, tokenizer={name!r}, {options})  # at {max_length} tokens"
    )


def _table(heading: str, values: dict[str, Any]) -> str:
    lines = [f"| {_escaped(name)} | {_escaped(str(value))} |" for name, value in values.items()]
    return "\n".join([f"| {heading} | value |", "| --- | --- |", *lines])


def _escaped(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    special = r"[\\`*{}\[\]<>|#~&$]|\b_|_\b"  # an underscore within a word means nothing
    return re.sub(f"({special})", r"\\\1", " ".join(printable(text).split()))


def _code(language: str, lines: str) -> str:
    """A code block, fenced by more consecutive backticks than it contains."""
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", lines)), 3)
    return f"{fence}{language}\n{printable(lines)}\n{fence}"
