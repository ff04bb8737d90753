"""The look of all figures, and writing them as PNG or SVG."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

MAIN, SECOND, THIRD = "#3787a8", "#d98e33", "#8a8f98"  # the colours of all figures
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_INK = "#1f2933"  # colour of all text; in a page it is replaced by that of the surrounding text
_STYLE: Any = {
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is not mathematics
    "svg.fonttype": "none",  # text stays text: browsers have fonts for every script
}
_MAX_NAME_LENGTH = 24


@contextmanager
def drawing() -> Iterator[None]:
    """A common style, without warnings about characters missing in matplotlib's font, which browsers have."""
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font|Matplotlib currently does not support")
        yield


@drawing()
def as_svg(figure: Figure) -> str:
    """A figure for a page, with text in the colour of the surrounding text."""
    content = io.StringIO()
    metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(content, format="svg", transparent=True, metadata=metadata)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # names that other figures on the page also have, and that nothing refers to
    return re.sub(r'<g id="[a-zA-Z_]+\d*_?\d+">', "<g>", svg)


@drawing()
def as_png(figure: Figure, path: object) -> None:
    """Writes a figure to a PNG file."""
    figure.savefig(path, format="png", dpi=150)  # type: ignore[arg-type]


def plain(name: str) -> str:
    """A name without special meaning to matplotlib, shortened if it is long."""
    if len(name) > _MAX_NAME_LENGTH:
        name = f"{name[: _MAX_NAME_LENGTH - 3]}..."
    name = " ".join(name.split())
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name  # legends omit names that begin with _
