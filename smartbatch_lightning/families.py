"""What families of transformers' sequence classifiers require of padding, token types and texts.

Nearly everything is derived from the configuration. What depends on the family's name is here, each with its reason.
"""

import inspect
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from smartbatch_lightning.errors import UsageError

# Their head reads the last position, even if that is padding. All others read the first position, average the unmasked
# ones, or look for the last token that is not padding.
_PADDED_LEFT = ("xlnet",)

# They add the *word* embedding of a token type, so types of 0 are not the same as no types.
_TYPES_ARE_WORDS = ("ctrl", "gpt2", "gpt_neo", "openai-gpt")

# Their head reads the last end token, and needs the same number of end tokens in all samples of a batch.
_READ_LAST_EOS = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")

# In transformers itself, their result for a text depends on the width of its batch, for these reasons.
_DEPEND_ON_WIDTH = {
    "big_bird": "block-sparse attention, in blocks of the whole width",
    "bigbird_pegasus": "block-sparse attention, in blocks of the whole width",
    "canine": "a reduction of the whole width to a quarter",
    "convbert": "convolutions, which read padding",
    "fnet": "Fourier transforms, which have no mask",
    "funnel": "pooling of neighbouring tokens over the whole width",
    "nystromformer": "landmarks, which are means over the whole width",
    "t5gemma": "a head that reads the token after the last, which the longest text of a batch lacks",
    "t5gemma2": "a head that reads the token after the last, which the longest text of a batch lacks",
    "yoso": "attention by hashing, which convolves over the whole width",
}


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of rows that an embedding table needs; more than the number of tokens if the vocabulary skips ids."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_token_of(config: PretrainedConfig) -> int | None:
    """The token that a model treats as padding; None if its configuration has none."""
    token: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    return token


def pad_token_id(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None) -> int | None:
    """The token to pad with: the one that the model treats as padding, if it is a special token of the tokenizer.

    Otherwise the tokenizer's padding token, its end token or its unknown token, in this order; None if it has none.
    """
    wanted = None if config is None else pad_token_of(config)
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = [wanted] if wanted in special else []
    candidates += [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    unfit = (None, None if config is None else end_token_read(config))  # padding would be read as the end of the text
    return next((int(candidate) for candidate in candidates if candidate not in unfit), None)


def padding_side(config: PretrainedConfig) -> str:
    """The side on which padding changes nothing: usually the right, since positions are counted from the left."""
    return "left" if config.model_type in _PADDED_LEFT else "right"


def input_names(config: PretrainedConfig) -> list[str] | None:
    """Names of a classifier's inputs; None for custom code, whose tokenizer is trusted."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return list(inspect.signature(model_class.forward).parameters)[1:]


def takes_token_types(config: PretrainedConfig) -> bool:
    """Whether a classifier distinguishes the two texts of a pair by `token_type_ids`."""
    if config.model_type in _TYPES_ARE_WORDS or getattr(config, "type_vocab_size", 2) < 2:
        return False
    names = input_names(config)
    return names is None or "token_type_ids" in names


def token_types(config: PretrainedConfig) -> int | None:
    """Number of token types for which a model has embeddings; None if it has no table of them."""
    return getattr(config, "type_vocab_size", None) or None


def end_token_read(config: PretrainedConfig) -> int | None:
    """The end token, if the head reads its last occurrence and needs equally many in all samples; else None.

    Raises:
        ValueError: The head reads the end token, but the configuration does not name it.
    """
    if config.model_type not in _READ_LAST_EOS:
        return None
    if config.eos_token_id is None:
        raise UsageError(
            f"{config.model_type} models read the end token of a text, but the configuration has none. Set "
            "--model.model_kwargs.eos_token_id to the tokenizer's."
        )
    return int(config.eos_token_id)


def depends_on_width(config: PretrainedConfig, max_length: int) -> str | None:
    """Why a text's result depends on the width of its batch, in transformers itself; None if it does not."""
    if (blocks := getattr(config, "num_random_blocks", None)) and (
        config.attention_type == "original_full" or max_length <= (5 + 2 * blocks) * config.block_size
    ):
        return None  # full attention, which BigBird uses for short texts in any case
    for rope in _rotary_settings(config):
        if rope.get("rope_type") == "longrope" and max_length > (limit := rope["original_max_position_embeddings"]):
            return f"rotary frequencies that change for a whole batch if one of its texts has more than {limit} tokens"
    return _DEPEND_ON_WIDTH.get(config.model_type)


def _rotary_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """How a model scales its rotary frequencies, for each type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope, *(of_type for of_type in rope.values() if isinstance(of_type, dict))]


def drop_caches(config: PretrainedConfig) -> None:
    """Makes a model return only logits, by name, without the keys and values or states that only text generation needs.

    The pipeline does so for decoders but not for XLNet, whose states, (length, batch, hidden), it cannot split.
    """
    config.return_dict = True
    for name in ("use_cache", "use_mems_eval", "output_attentions", "output_hidden_states"):
        for part in (config, config.get_text_config()):
            if getattr(part, name, False):
                setattr(part, name, False)


def drop_chunks(config: PretrainedConfig) -> None:
    """Makes layers compute all tokens at once, with the same result; chunks would have to divide the width of a batch.

    In training, activations are stored in any case, so that chunks would save little memory.
    """
    if getattr(config, "chunk_size_feed_forward", None):
        rank_zero_info(
            f"chunk_size_feed_forward is {config.chunk_size_feed_forward} and is set to 0, since not all batches can "
            "be divided into such chunks. The result is the same; --model.gradient_checkpointing=true saves memory."
        )
        config.chunk_size_feed_forward = 0


def check_has_head(config: PretrainedConfig) -> None:
    """Rejects a family that has no classification head.

    Raises:
        ValueError: The family has none.
    """
    remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
        raise UsageError(
            f"transformers has no classification head for {config.model_type} models. Choose a model of a family that "
            "has one."
        )
