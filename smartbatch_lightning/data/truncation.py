"""Truncation: what to keep of texts with more tokens than a model takes at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from smartbatch_lightning.errors import UsageError, check_at_least, join_quoted

_Token = TypeVar("_Token")
_OPTIONS = {
    "head": (),
    "tail": (),
    "head_tail": ("head_tokens",),
    "windows": ("stride", "max_windows", "window_pooling"),
}
_POOLINGS = ("mean", "max")


@dataclass(frozen=True)
class Truncation:
    """What to keep of texts with more tokens than a model takes at once.

    Args:
        truncation: `head` keeps the beginning, `tail` the end, `head_tail` both (Sun et al., *How to Fine-Tune BERT for
            Text Classification?*, 2019); `windows` splits the text into overlapping windows, the last of which may be
            shorter.
        head_tokens: Tokens that `head_tail` keeps from the beginning; by default a quarter of `max_length`.
        stride: Tokens that a window shares with the previous one; by default a quarter of `max_length`.
        max_windows: Maximum number of windows per text; the rest is cut.
        window_pooling: How the logits of a text's windows become one prediction: `mean`, the default, or `max`.

    Raises:
        ValueError: An option is out of range, or does not belong to this truncation.
    """

    truncation: str = "head"
    head_tokens: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    window_pooling: str | None = None

    def __post_init__(self) -> None:
        if self.truncation not in _OPTIONS:
            raise UsageError(f"truncation is {self.truncation!r}; choose one of {join_quoted(_OPTIONS)}.")
        for name, value in self.to_dict().items():
            if name != "truncation" and name not in _OPTIONS[self.truncation]:
                of = next(kind for kind, names in _OPTIONS.items() if name in names)
                raise UsageError(f"{name} is {value!r}, but truncation is {self.truncation!r}; set that to {of!r}.")
        for name, least in (("head_tokens", 0), ("stride", 0), ("max_windows", 1)):
            if getattr(self, name) is not None:
                check_at_least(least, **{name: getattr(self, name)})
        if self.window_pooling not in (None, *_POOLINGS):
            raise UsageError(f"window_pooling is {self.window_pooling!r}; choose one of {join_quoted(_POOLINGS)}.")

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "Truncation":
        """`tail` if the tokenizer truncates on the left, else `head`."""
        return cls("tail" if tokenizer.truncation_side == "left" else "head")

    def check_columns(self, text_columns: Sequence[str], text_separator: str | None) -> None:
        """Rejects text pairs unless their beginnings or ends are kept."""
        if self.side is None and len(text_columns) == 2 and text_separator is None:
            raise UsageError(
                f"truncation is {self.truncation!r}, but text pairs can only be cut on one side, the longer text "
                "first. Set truncation to head or tail; or join the two with --data.text_separator."
            )

    def to_dict(self) -> dict[str, Any]:
        """The options that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def settings(self, max_length: int) -> str:
        """The options that are set, and `max_length`, as text for messages."""
        return ", ".join(f"{name} {value}" for name, value in {"max_length": max_length, **self.to_dict()}.items())

    @property
    def pooling(self) -> str | None:
        """How the logits of a text's windows become one prediction; None without windows."""
        return self.window_pooling or "mean" if self.truncation == "windows" else None

    @property
    def side(self) -> str | None:
        """The side on which texts are cut, `right` or `left`; None if it is not just one side."""
        return {"head": "right", "tail": "left"}.get(self.truncation)

    def pieces(self, tokens: Sequence[_Token], room: int, max_length: int) -> tuple[list[Sequence[_Token]], int]:
        """Cuts the tokens of a text that does not fit.

        Args:
            tokens: The text's tokens, without special tokens.
            room: How many of them a model takes at once.
            max_length: The same, including special tokens.

        Returns:
            The pieces to keep, several only with windows, and the number of tokens in none of them.

        Raises:
            ValueError: The options need more tokens than there is room for.
        """
        number, lost = len(tokens), len(tokens) - room
        if room < 1:
            raise UsageError(
                f"max_length is {max_length}, but {max_length - room} tokens are special tokens. Set --data.max_length "
                f"to {max_length - room + 1} or more."
            )
        if self.truncation == "head":
            return [tokens[:room]], lost
        if self.truncation == "tail":
            return [tokens[number - room :]], lost
        if self.truncation == "head_tail":
            head = self._option_within("head_tokens", room, max_length)
            return [[*tokens[:head], *tokens[number - room + head :]]], lost
        stride = self._option_within("stride", room - 1, max_length)
        step = room - stride
        starts = range(0, number - stride, step)[: self.max_windows]
        return [tokens[start : start + room] for start in starts], max(0, number - starts[-1] - room)

    def _option_within(self, name: str, most: int, max_length: int) -> int:
        value = getattr(self, name)
        if value is None:
            return min(max_length // 4, most)
        if value > most:
            raise UsageError(
                f"{name} is {value}, but with max_length {max_length} it can be {most} at most. Lower it, or raise "
                "--data.max_length."
            )
        return int(value)
