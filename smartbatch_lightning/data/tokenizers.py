"""The tokenizer of a run: given, named, or the model's."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smartbatch_lightning import demo
from smartbatch_lightning.contract import TextModel
from smartbatch_lightning.errors import UsageError, root_cause_message


def find_tokenizer(
    given: str | PreTrainedTokenizerBase | None, model: TextModel | None, source: str, is_demo: bool, max_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, by itself or by name, else the model's.

    Args:
        given: By the user.
        model: That the Trainer runs, if it says which tokenizer is its own.
        source: Of the texts, for messages.
        is_demo: The texts are the embedded demo's.
        max_length: Tokens of the longest sample there may be.

    Raises:
        ValueError: There is none, it takes fewer tokens, or it is the demo's and the texts are not.
    """
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None and model is None and not is_demo:
        raise UsageError(
            f"no tokenizer is given for {source}, and there is no model that tells its own. Set --data.tokenizer, or "
            "tokenizer= in Python, for example to bert-base-uncased."
        )
    name = given or (model.tokenizer_name if model else "demo")
    if name == "demo" and not is_demo:
        raise UsageError(
            f"the demo's model and tokenizer know few words but the demo's. For {source} set --model.pretrained, or "
            "tokenizer= in Python, for example to bert-base-uncased."
        )
    return load_tokenizer(name, max_length, model.tokenizer_kwargs if model and given is None else {})


def load_tokenizer(name: str, max_length: int, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, and refuses one that takes fewer tokens than samples will have.

    Args:
        name: On the Hub, a folder written by `save_pretrained`, or `demo`.
        max_length: Tokens of the longest sample there may be.
        kwargs: What else `from_pretrained` takes.

    Raises:
        ValueError: There is none, or it takes fewer tokens.
    """
    folder = str(demo.model_dir()) if name == "demo" else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **kwargs)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the tokenizer {name!r} was not found locally or on the Hub: {root_cause_message(error)} "
            "Give the path of a folder written by save_pretrained, or a name on the Hub and a network."
        ) from error
    if max_length > tokenizer.model_max_length:
        raise UsageError(
            f"max_length is {max_length}, but {name} takes {tokenizer.model_max_length} tokens at most. "
            f"Set --data.max_length to {tokenizer.model_max_length} or less."
        )
    return tokenizer
