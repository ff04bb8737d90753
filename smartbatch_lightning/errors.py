"""What a user can mend: the exception, and how its messages list names and tell causes."""

from collections.abc import Iterable, Iterator
from typing import Any


class UsageError(ValueError):
    """Something that was given cannot be used; the message says what was met and what to do.

    The command line shows the message alone.
    """


def listed(names: Iterable[Any]) -> str:
    """Names, quoted, with commas between them."""
    return ", ".join(repr(name) for name in names)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that libraries have wrapped in it."""
    while error is not None:
        yield error
        error = error.__cause__


def cause(error: BaseException) -> str:
    """What happened at the bottom of an exception, on one line."""
    *_, first = causes(error)
    lines = str(first).strip().splitlines()
    return f"{type(first).__name__}: {lines[0] if lines else ''}".rstrip(": .") + "."
