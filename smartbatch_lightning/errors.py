"""What a user can mend: the exception, and how its messages list names and tell causes."""

from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """Something that was given cannot be used; the message says what was met and what to do.

    The command line shows the message alone.
    """


def listed(names: Iterable[Any]) -> str:
    """Names, quoted, with commas between them."""
    return ", ".join(repr(name) for name in names)


def cause(error: BaseException) -> str:
    """What happened at the bottom of an exception that libraries have wrapped, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": .") + "."
