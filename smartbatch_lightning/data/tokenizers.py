"""The tokenizer of a run: given, named, or the model's."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from smartbatch_lightning import demo
from smartbatch_lightning.contract import TextModel
from smartbatch_lightning.data.encoding import TextEncoder, tokenized_sample
from smartbatch_lightning.data.tokens import TokenTable
from smartbatch_lightning.errors import UsageError, check_trusted, root_cause_message
from smartbatch_lightning.families import (
    end_token_read,
    input_names,
    pad_token_id,
    padding_side,
    takes_token_types,
    token_types,
)
from smartbatch_lightning.hub import hub_or_cache

_MIN_WORDS = 4  # besides special tokens, as for DNA; a tokenizer without files has at most two


def find_tokenizer(
    given: str | PreTrainedTokenizerBase | None, model: TextModel | None, source: str, is_demo: bool, max_length: int
) -> PreTrainedTokenizerBase:
    """The given tokenizer, as an object or by name, else the model's; set to pad as the model expects.

    Args:
        given: The user's tokenizer or its name, if any.
        model: The Trainer's model, if it names its tokenizer.
        source: Name of the data set, for messages.
        is_demo: Whether the texts are those of the built-in demo.
        max_length: Maximum number of tokens in a sample.

    Raises:
        ValueError: There is no tokenizer, it takes fewer tokens, or it is the demo's and the texts are not.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given if model is None else tokenizer_for_model(given, model.config)
    if given is None and model is None and not is_demo:
        raise UsageError(
            f"no tokenizer is given for {source}, and there is no model to take one from. Set --data.tokenizer, or "
            "tokenizer= in Python, for example to bert-base-uncased."
        )
    name = given or (model.tokenizer_name if model else "demo")
    if name == "demo" and not is_demo:
        raise UsageError(
            f"the demo's model and tokenizer know few words besides the demo's. For {source}, set --model.pretrained, "
            "or tokenizer= in Python, for example to bert-base-uncased."
        )
    tokenizer = load_tokenizer(name, max_length, model.tokenizer_kwargs if model and given is None else {})
    return tokenizer if model is None else tokenizer_for_model(tokenizer, model.config)


def load_tokenizer(name: str, max_length: int, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, and rejects one that takes fewer tokens than samples will have.

    Args:
        name: Name on the Hub, folder written by `save_pretrained`, or `demo`.
        max_length: Maximum number of tokens in a sample.
        kwargs: Other arguments of `from_pretrained`.

    Raises:
        ValueError: There is no tokenizer, it has no vocabulary, or it takes fewer tokens.
    """
    folder = str(demo.model_dir()) if name == "demo" else name
    try:
        with hub_or_cache(folder):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, **{"trust_remote_code": False, **kwargs}
            )
    except Exception as error:  # tokenizers raises plain exceptions
        check_trusted(name, error)
        if (missing := _missing_package(error)) is not None:
            raise UsageError(
                f"the tokenizer {name!r} needs {missing}, which is not installed. Install it, then start again."
            ) from error
        raise UsageError(
            f"the tokenizer {name!r} was not found locally or on the Hub: {root_cause_message(error)} Give a folder "
            "written by save_pretrained or a Hub name, and check the network."
        ) from error
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < _MIN_WORDS:
        raise UsageError(
            f"{name} has no tokenizer, so transformers would create one without a vocabulary. Save the model's "
            "tokenizer there with tokenizer.save_pretrained, or set --data.tokenizer."
        )
    if 0 < tokenizer.model_max_length < max_length:  # XLNet's says -1
        raise UsageError(
            f"max_length is {max_length}, but {name} takes {tokenizer.model_max_length} tokens at most. "
            f"Set --data.max_length to {tokenizer.model_max_length} or less."
        )
    return tokenizer


def _missing_package(error: BaseException | None) -> str | None:
    """The package that transformers lacked to load a tokenizer; None for other errors."""
    while error is not None and not (isinstance(error, ImportError) and error.name):
        error = error.__context__
    if error is None:
        return None
    # without sentencepiece, transformers takes a lone sentencepiece model for one of tiktoken
    return "sentencepiece with protobuf, or tiktoken" if error.name == "tiktoken" else error.name


def tokenizer_for_model(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that pads as a model expects, and returns the inputs that the model takes.

    Args:
        tokenizer: The tokenizer; not changed.
        config: The model's configuration.

    Returns:
        The same tokenizer, or a copy if something has to be changed.

    Raises:
        ValueError: There is no token to pad with.
    """
    pad = pad_token_id(tokenizer, config)
    if pad is None:
        what = "neither a padding token nor an end token"
        if end_token_read(config) is not None:
            what = "no token to pad with except its end token, which the model reads"
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} has {what}. Give the data module a tokenizer with a pad_token "
            "that is in its vocabulary."
        )
    names = list(tokenizer.model_input_names)
    if "token_type_ids" in names and not takes_token_types(config):
        names.remove("token_type_ids")
    if "attention_mask" not in names and "attention_mask" in (input_names(config) or ()):
        names.append("attention_mask")  # without which the exported pipeline would read padding
    wanted = {
        "pad_token": tokenizer.convert_ids_to_tokens(pad),
        "padding_side": padding_side(config),
        "model_input_names": names,
    }
    changed = {name: value for name, value in wanted.items() if getattr(tokenizer, name) != value}
    if not changed:
        return tokenizer
    fitted = copy.deepcopy(tokenizer)
    for name, value in changed.items():
        setattr(fitted, name, value)
        fitted.init_kwargs[name] = value  # otherwise save_pretrained omits what was not given originally
    return fitted


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, trained: Mapping[str, Any]) -> None:
    """Rejects a tokenizer other than the one that a model was trained with.

    Args:
        tokenizer: The tokenizer.
        trained: `TextEncoder.settings` of the training; empty if unknown.
    """
    if trained and trained["sample"] != tokenized_sample(tokenizer):
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path} does not split texts into the same tokens as the one that the "
            "model was trained with. Leave --data.tokenizer and --model.pretrained out, or give those of the training."
        )


def check_tokens(
    table: TokenTable, rows: Sequence[int], *, encoder: TextEncoder, config: PretrainedConfig | None
) -> None:
    """Rejects samples that the model does not take.

    Args:
        table: The samples.
        rows: Their row numbers, for messages.
        encoder: The encoder whose tokenizer, `max_length` and truncation they have to fit.
        config: The model's configuration; None without a model.

    Raises:
        ValueError: A sample has too many tokens, an id is not the tokenizer's, a token type not the model's, or end
            tokens that the model's head reads are missing or too many.
    """
    longest = int(table.lengths.max(initial=0))
    if longest > encoder.max_length and not encoder.truncation.pooling:
        raise UsageError(
            f"tokenize gave {longest} tokens for row {rows[int(table.lengths.argmax())]}, more than max_length, "
            f"{encoder.max_length}. Cut them, or set --data.max_length."
        )
    table.check_ids(encoder.vocabulary_size, None if config is None else token_types(config))
    if config is not None and (end_token := end_token_read(config)) is not None:
        check_end_tokens(table, rows, encoder.tokenizer, end_token, -(-table.lengths // encoder.max_length))


def check_end_tokens(
    table: TokenTable,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    end_token: int,
    windows: NDArray[np.integer],
) -> None:
    """Rejects samples without an end token, or with more of them than others, for example because a text contains one.

    For models whose head needs the same number in all rows of a batch.

    Args:
        table: The samples.
        rows: Their row numbers, for messages.
        tokenizer: The tokenizer, for the names of tokens.
        end_token: The token that the head reads.
        windows: Number of windows of each sample. Shape (num_samples,).

    Raises:
        ValueError: There is such a sample.
    """
    if not len(table):
        return
    counts, name = table.counts(end_token), tokenizer.convert_ids_to_tokens(end_token)
    usual = int(np.bincount(counts // windows).argmax())
    if not usual:
        raise UsageError(
            f"the model reads the last {name!r} of a text, token {end_token}, but the tokenizer adds none. Give the "
            "data module a tokenizer that ends texts with it; or, if it ends them with another token, set "
            "--model.model_kwargs.eos_token_id to that."
        )
    odd = np.flatnonzero((counts != usual * windows) | (counts == 0))
    if len(odd):
        raise UsageError(
            f"the number of {name!r} tokens in row {rows[odd[0]]} (counted from 0) is {counts[odd[0]]}, but {usual} in "
            f"other rows; the model reads the last one, and {len(odd):,} rows are affected. A text that contains the "
            "token has one too many: drop the row, or change the text."
        )
