"""What the families of transformers' sequence classifiers want of padding, of token types and of the text.

Nearly everything is found out from the configuration. What is known by name stands here, each with its reason.
"""

import inspect
from typing import Any

from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from smartbatch_lightning.errors import UsageError

# Their head reads the last position, whatever stands there. All others read the first one, take the mean of what is
# not masked, or look for the last token that is not padding.
_PADDED_LEFT = ("xlnet",)

# They add the *word* embedding of a token type, so that types of 0 are something else than none.
_TYPES_ARE_WORDS = ("ctrl", "gpt2", "gpt_neo", "openai-gpt")

# Their head reads the last end token, and wants as many of these in every sample of a batch.
_READ_LAST_EOS = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")

# What they compute of a text depends on the width of its batch, in transformers itself: by what of them.
_DEPEND_ON_WIDTH = {
    "big_bird": "block-sparse attention, in blocks of the whole width",
    "bigbird_pegasus": "block-sparse attention, in blocks of the whole width",
    "canine": "a reduction of the whole width to a quarter",
    "convbert": "convolutions, which read what is padded",
    "fnet": "Fourier transforms, which have no mask",
    "funnel": "pooling of neighbouring tokens over the whole width",
    "nystromformer": "landmarks, which are means over the whole width",
    "t5gemma": "a head that reads the token after the last, which the longest text of a batch lacks",
    "t5gemma2": "a head that reads the token after the last, which the longest text of a batch lacks",
    "yoso": "attention by hashing, which convolves over the whole width",
}


def setting(of: PretrainedConfig, name: str, default: Any = None) -> Any:
    """A value of a configuration, which not every family has."""
    return getattr(of, name, default)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a table of embeddings needs; more than a tokenizer has tokens where its vocabulary leaves out ids."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_token_of(config: PretrainedConfig) -> int | None:
    """The token that a model takes for padding; None where its configuration has none."""
    token: int | None = setting(config.get_text_config(), "pad_token_id")
    return token


def pad_token_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None) -> int | None:
    """The token to pad with: what a model's head looks for, where the tokenizer has it for a special token.

    Else the tokenizer's own, else its end token, or its token for unknown words; None where it has none of these.
    """
    wanted = None if config is None else pad_token_of(config)
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = [wanted] if wanted in special else []
    candidates += [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return next((int(candidate) for candidate in candidates if candidate is not None), None)


def padding_side(config: PretrainedConfig) -> str:
    """The side on which padding changes nothing: a decoder reads from the left, and counts positions from there."""
    return "left" if config.model_type in _PADDED_LEFT else "right"


def takes_token_types(config: PretrainedConfig) -> bool:
    """Whether a classifier tells the two texts of a pair apart by `token_type_ids`."""
    if config.model_type in _TYPES_ARE_WORDS or setting(config, "type_vocab_size", 2) < 2:
        return False
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True  # code of one's own, whose tokenizer is trusted
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return "token_type_ids" in inspect.signature(model_class.forward).parameters


def reads_last_eos(config: PretrainedConfig) -> bool:
    """Whether the head reads the last end token, and wants as many of these in all samples."""
    return config.model_type in _READ_LAST_EOS


def depends_on_width(config: PretrainedConfig, max_length: int) -> str | None:
    """What makes the result of a text depend on how wide its batch is, in transformers itself; None where nothing."""
    if (blocks := setting(config, "num_random_blocks")) and (
        config.attention_type == "original_full" or max_length <= (5 + 2 * blocks) * config.block_size
    ):
        return None  # BigBird's full attention, which it takes for shorter texts in any case
    return _DEPEND_ON_WIDTH.get(config.model_type)


def drop_caches(config: PretrainedConfig) -> None:
    """Lets a model give out logits alone, without the keys and values or the states that only generating text wants.

    The pipeline asks decoders for none, but not XLNet, whose states, (length, batch, hidden), it cannot take apart.
    """
    for name in ("use_cache", "use_mems_eval"):
        if setting(config.get_text_config(), name):
            setattr(config.get_text_config(), name, False)


def check_has_head(config: PretrainedConfig) -> None:
    """Refuses a family that has no classification head.

    Raises:
        ValueError: It is one.
    """
    remote = "AutoModelForSequenceClassification" in (setting(config, "auto_map") or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
        raise UsageError(
            f"transformers has no classification head for {config.model_type} models. Choose a model of a family that "
            "has one."
        )
