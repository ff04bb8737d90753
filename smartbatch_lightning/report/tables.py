"""Tables of a report for the terminal."""

import textwrap
from collections.abc import Sequence

from rich.table import Table

from smartbatch_lightning.batching.jitter import JitterPoint
from smartbatch_lightning.console import table_of
from smartbatch_lightning.report.measure import Split, StrategyCost

_LINES_PER_TEXT = 5
_WIDTH_OF_TEXT = 78
_WIDTH_OF_CLASSES = 60

STRATEGIES_LEGEND = (
    "* as configured.\nBatch overlap: fraction of a sample's batch that is batched with it again in the next epoch.\n"
    "Expected speed-up over fixed padding: estimated from the operations of linear layers and attention.\n"
    "Balance: slowest rank over the mean. Largest batch: samples x width, or samples: tokens if packed."
)


def example(label: str, text: str) -> str:
    """The first lines of a sample."""
    lines = textwrap.wrap(text, _WIDTH_OF_TEXT, max_lines=_LINES_PER_TEXT, placeholder=" ...")
    return "\n".join([f"[{label}]", *(f"  {line}" for line in lines), ""])


def splits(of: Sequence[Split], max_length: int) -> Table:
    """Samples, tokens and classes of each split."""
    return table_of(
        [
            {
                "split": split.name,
                "samples": f"{split.samples:,}",
                "real tokens": f"{split.tokens:,}",
                "tokens per sample": f"{split.mean_length:,.0f}",
                f"cut at {max_length}": f"{split.truncated:.1%}",
                "tokens cut": f"{split.lost_tokens:.1%}",
                "classes": _shortened(split.classes),
            }
            for split in of
        ]
    )


def strategies(of: Sequence[StrategyCost], ranks: int) -> Table:
    """Cost of each strategy; `STRATEGIES_LEGEND` explains the columns."""
    return table_of(
        [
            {
                "batching, padding": one.name + (" *" if one.is_configured else ""),
                "batches": f"{one.batches:,}",
                "tokens": f"{one.tokens:,}",
                "padding over real": f"{one.padding_ratio:.2%}",
                "less than fixed": f"{one.savings_vs_fixed:.1%}",
                "batch overlap": f"{one.batch_overlap:.1%}",
                "expected speed-up": f"{one.expected_speedup:.2f}",
                f"balance {ranks} ranks": "-" if one.balance is None else f"{one.balance:.3f}",
                "largest batch": ("{:,}: {:,}" if one.packed else "{:,} x {:,}").format(*one.largest_batch),
            }
            for one in of
        ]
    )


def frontier(of: Sequence[JitterPoint], chosen: float) -> Table:
    """Padding and batch overlap of `smart` by jitter; the chosen one is marked."""
    return table_of(
        [
            {
                "smart, jitter": f"{point.jitter:g}" + (" *" if point.jitter == chosen else ""),
                "padding over real": f"{point.padding_ratio:.2%}",
                "batch overlap": f"{point.batch_overlap:.1%}",
            }
            for point in of
        ]
    )


def _shortened(classes: dict[str, int]) -> str:
    """As many classes as fit into a cell."""
    shown: list[str] = []
    for name, count in classes.items():
        one = f"{name if len(name) <= 30 else name[:27] + '...'} {count:,}"
        if len(", ".join([*shown, one])) > _WIDTH_OF_CLASSES:
            return ", ".join([*shown, f"{len(classes) - len(shown)} more"])
        shown.append(one)
    return ", ".join(shown) or "-"
