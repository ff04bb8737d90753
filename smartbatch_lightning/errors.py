"""Errors that users can fix: the exception, and how its messages name things and causes."""

import difflib
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

QUOTE_NAMES = "In YAML, put quotes around names that look like numbers, truth values or null, such as '1' and 'no'."

_MIN_SIMILARITY = 0.7  # minimum similarity of two names, as computed by difflib
_MAX_NAMES, _MAX_NAME_LENGTH, _MAX_MESSAGE_LENGTH = 10, 60, 500


class UsageError(ValueError):
    """Input that cannot be used; the message says what was found and what to do.

    The command line prints only the message.
    """


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The name most similar to a misspelt one, ignoring case, as a list; empty if none is similar."""
    by_lower = {one.lower(): one for one in names}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=_MIN_SIMILARITY)]


def did_you_mean(near: Iterable[str]) -> str:
    """A question to append to a message; empty without names."""
    names = " or ".join(near)
    return f" Did you mean {names}?" if names else ""


def did_you_mean_columns(name: str, columns: Iterable[str]) -> str:
    """A hint for a missing column: how to write a list, if the name is several columns, or the most similar column."""
    names, parts = list(columns), [part.strip() for part in name.split(",")]
    if len(parts) > 1 and set(parts) <= set(names):
        return f" For several columns, write '[{', '.join(parts)}]'."
    return did_you_mean(map(repr, nearest(name, names)))


def check_trusted(name: str, error: Exception) -> None:
    """Rejects a model or tokenizer with code of its own, if that is why transformers failed to load it.

    Args:
        name: Name on the Hub, or folder.
        error: The exception raised by loading it without `trust_remote_code`.

    Raises:
        ValueError: It has code of its own.
    """
    if "trust_remote_code" in str(error):
        raise UsageError(
            f"{name!r} comes with its own Python code, which is not run unless you trust it. Read the code, then set "
            "--model.model_kwargs.trust_remote_code=true."
        ) from error


def check_at_least(minimum: int, **arguments: Any) -> None:
    """Rejects arguments that are not whole numbers, or that are below a minimum.

    Raises:
        ValueError: An argument is not a whole number, or is below the minimum.
    """
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UsageError(f"{name} is {value!r}; give a whole number, {minimum} or more.")
        if int(value) < minimum:
            raise UsageError(f"{name} is {value}; give {minimum} or more.")


def join_quoted(names: Iterable[Any]) -> str:
    """Quoted names, separated by commas; only the first of many names, and only both ends of long ones."""
    listed = list(names)
    short = [_shortened(name, _MAX_NAME_LENGTH) if isinstance(name, str) else name for name in listed[:_MAX_NAMES]]
    shown = [*map(repr, short)]
    if len(listed) > _MAX_NAMES:
        shown.append(f"and {len(listed) - _MAX_NAMES:,} more")
    return ", ".join(shown)


def _shortened(text: str, longest: int) -> str:
    """A text; if it is very long, without its middle."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, followed by those that libraries have wrapped in it."""
    while error is not None:
        yield error
        error = error.__cause__


def root_cause_message(error: BaseException) -> str:
    """The root cause of an exception, on one line of at most 500 characters."""
    *_, first = exception_chain(error)
    lines = str(first).strip().splitlines()
    message = f"{type(first).__name__}: {lines[0] if lines else ''}".rstrip(": .")
    return f"{_shortened(message, _MAX_MESSAGE_LENGTH)}."
