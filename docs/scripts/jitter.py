"""Draws what jitter costs and gains on IMDB: SMARTBATCH_IMDB_DIR=... PYTHONPATH=. python docs/scripts/jitter.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.common import BATCH_SIZE, imdb_lengths
from benchmarks.planning import PEER, measure, peer_sampler, spec_of
from smartbatch_lightning import BatchPlan, plan_epoch

EPOCHS = range(10)
JITTERS = (0, 0.6, 0.8, 1, 1.5, 2, 3, 4)


def main() -> None:
    """Writes the figure beside the pages, and prints its points."""
    lengths = imdb_lengths()
    offsets = np.append(np.arange(0, len(lengths), BATCH_SIZE), len(lengths))
    peer = peer_sampler(lengths)
    plans = {
        f"jitter {j:g}": [plan_epoch(lengths, spec_of("smart", j), epoch=epoch) for epoch in EPOCHS] for j in JITTERS
    }
    plans["tutorial"] = [plan_epoch(lengths, spec_of("tutorial"), epoch=epoch) for epoch in EPOCHS]
    plans[PEER] = [BatchPlan(np.array(list(peer)), offsets) for _ in EPOCHS]
    points = {}
    for name, drawn in plans.items():
        tokens, overlap = measure(drawn, lengths)
        points[name] = (100 * (tokens / lengths.sum() - 1), 100 * overlap)
        print(f"{name}: padding {points[name][0]:.2f} %, batch overlap {points[name][1]:.1f} %")

    figure, axes = plt.subplots(figsize=(7, 4))
    frontier = [points[f"jitter {jitter:g}"] for jitter in JITTERS]
    axes.plot(*zip(*frontier, strict=True), "o-", color="#2a7f8e", label="smart")
    for jitter, point in zip(JITTERS, frontier, strict=True):
        if jitter in (0, 1, 2, 4):
            axes.annotate(f"jitter {jitter}", point, xytext=(6, 6), textcoords="offset points")
    for (name, point), color in zip(list(points.items())[len(JITTERS) :], ("#d1782f", "#7a5ea8"), strict=True):
        axes.plot(*point, "s", color=color, label=name)
    axes.set(xlabel="padding, % of the real tokens", ylabel="batch overlap, %", yscale="log")
    axes.set_yticks([2, 5, 10, 20, 40], ["2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(Path(__file__).parents[1] / "jitter.png", bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main()
