"""One of two ranks that do not have the same data: started by the tests.

Usage: python tests/run_ranks.py RANK FILE WHAT
"""

import sys

import torch.distributed as dist

from smartbatch_lightning import SmartBatchDataModule


def main() -> None:
    rank, store, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    options = {
        "same": [{}, {}],
        "seed": [{"seed": 1}, {"seed": 2}],
        "label names": [{"label_names": ["negative", "positive"]}, {"label_names": ["positive", "negative"]}],
        "rows": [{}, {"train_split": "test"}],
    }[what][rank]
    data = SmartBatchDataModule(**{"max_length": 16, "seed": 1, **options})
    data.prepare_data()
    try:
        data.setup("fit")
    except ValueError as error:
        print(f"refused: {error}")
    else:
        print("agreed")


if __name__ == "__main__":
    main()
