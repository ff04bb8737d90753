"""What is said to whoever sits at the terminal."""

from rich.console import Console
from rich.table import Table


def say(what: str | Table) -> None:
    """Prints a line, which is never wrapped, or a table."""
    Console(soft_wrap=isinstance(what, str), markup=False, highlight=False).print(what)
