"""What a compiled, packed training step should take on a GPU, on paper: a model of its time, no measurement.

    python -m benchmarks.paper_model          # the table of docs/gpu.md; needs no GPU

A step is the sum of four parts, each at a rate that was measured on an H200 by `benchmarks.gpu` or is the data sheet's:

- matrix products, in tiles of 128 x 256, of which each of the 132 processors computes one at a time, at 80 % of the
  peak in full waves of tiles
- FlashAttention 2 at 12 % of the peak, since samples of some 254 tokens fill few of its tiles
- what fused kernels read and write: 72 half-precision activations of hidden size a token and layer, as Inductor's
  lowering for a pretended H100 had it (3.6 GB a layer of BERT-base at 32,768 tokens), at the bandwidth of a copy
- AdamW and clipping: 40 bytes a parameter

Utilization counts the operations that are needed, as `training_flops` does, over the peak of 989 TFLOP/s.
"""

import math

from transformers import BertConfig

from benchmarks.gpu import BASE, LARGE
from smartbatch_lightning.models.flops import training_flops

PEAK = 989e12
PROCESSORS, TILE = 132, (128, 256)
OF_PEAK_IN_PRODUCTS, OF_PEAK_IN_ATTENTION = 0.80, 0.12
COPIES = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second
ACTIVATIONS, BYTES_OF_A_PARAMETER = 72, 40
MEAN_LENGTH, MEAN_SQUARE = 254.3, 76_267  # of IMDB's reviews cut at 400 tokens


def product_seconds(rows: int, columns: int, inner: int) -> float:
    """Of one matrix product; a long inner dimension is split where there are few tiles."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    splits = max(1, min(inner // 512, PROCESSORS // tiles))
    waves = math.ceil(tiles * splits / PROCESSORS)
    return waves * 2 * TILE[0] * TILE[1] * (inner / splits) * PROCESSORS / (PEAK * OF_PEAK_IN_PRODUCTS)


def step(sizes: dict[str, int], tokens: int, gpu: str) -> tuple[float, float]:
    """Seconds of a step, and its utilization."""
    hidden, inner, layers = (sizes[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    samples = tokens / MEAN_LENGTH
    products = 0.0
    for inputs, outputs, number in ((hidden, hidden, 4), (hidden, inner, 1), (inner, hidden, 1)):
        forward = product_seconds(tokens, outputs, inputs)
        products += number * (
            forward + product_seconds(tokens, inputs, outputs) + product_seconds(outputs, inputs, tokens)
        )
    config = BertConfig(**sizes)  # type: ignore[arg-type]
    flops = training_flops(config, one_token=True)
    attention = 3.5 * 4 * hidden * samples * MEAN_SQUARE * (layers - 1) / (PEAK * OF_PEAK_IN_ATTENTION)
    parameters = 12 * hidden**2 * layers + config.vocab_size * hidden
    moved = ACTIVATIONS * 2 * hidden * tokens * layers + BYTES_OF_A_PARAMETER * parameters
    # of the last layer what follows keys and values is computed for one token of each sample
    seconds = products * (layers - 5 / 6) + attention + moved / COPIES[gpu]
    return seconds, flops.total(samples, tokens, samples * MEAN_SQUARE) / seconds / PEAK


def main() -> None:
    """Prints the table."""
    print(
        "| tokens a step | BERT | H100: ms | utilization | H200: ms | utilization |\n| ---: | --- "
        + "| ---: " * 4
        + "|"
    )
    for name, sizes in (("base", BASE), ("large", LARGE)):
        for tokens in (4096, 8192, 16_384, 32_768, 65_536):
            cells = (
                f"{1e3 * seconds:.1f} | {100 * share:.0f} %"
                for seconds, share in (step(sizes, tokens, gpu) for gpu in COPIES)
            )
            print(f"| {tokens:,} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
