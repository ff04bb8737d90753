"""The terminal: the command that was run, and printing lines and tables."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def command_line() -> str:
    """The command that was run."""
    return _command(sys.argv[1:])


def resume_command(checkpoint: str) -> str:
    """The command that was run, with a checkpoint to resume from."""
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and argument.partition("=")[0] != "--ckpt_path":
            kept.append(argument)
        skip = argument == "--ckpt_path"  # its value is next
    return _command([*kept, f"--ckpt_path={checkpoint}"])


def _command(arguments: list[str]) -> str:
    """A command line: a program on the PATH by its name, a script as `python` and its path as given."""
    program = Path(sys.argv[0]).name
    started = [program] if shutil.which(program) and not program.endswith(".py") else ["python", sys.argv[0]]
    return shlex.join([*started, *arguments])


def echo(what: str | Table) -> None:
    """Prints a line or a table, without wrapping or truncating it."""
    console = Console(soft_wrap=isinstance(what, str), markup=False, highlight=False)
    if isinstance(what, Table):
        natural = Measurement.get(console, console.options.update(max_width=1000), what).maximum
        console.width = max(console.width, natural)
    console.print(printable(what) if isinstance(what, str) else what)


def printable(text: str) -> str:
    """Text with control characters, which could manipulate a terminal, written as escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def table_of(rows: list[dict[str, str]], title: str | None = None) -> Table:
    """A table with a column for each key, the first aligned to the left; headers have one word per line."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in rows[0]:
        justify = "right" if table.columns else "left"
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=True, vertical="bottom")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(printable, row.values()))
    return table
