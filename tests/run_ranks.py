"""One of two ranks that do not have the same data: started by the tests."""

from pathlib import Path

import torch.distributed as dist

from smartbatch_lightning import SmartBatchDataModule

CASES = {
    "same": [{}, {}],
    "seed": [{"seed": 1}, {"seed": 2}],
    "label names": [{"label_names": ["negative", "positive"]}, {"label_names": ["positive", "negative"]}],
    "rows": [{}, {"train_split": "test"}],
}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for case, options in CASES.items():
        data = SmartBatchDataModule(**{"max_length": 16, "seed": 1, **options[rank]})
        data.prepare_data()
        try:
            data.setup("fit")
        except ValueError as error:
            print(f"{case}: refused: {error}")
        else:
            print(f"{case}: agreed")
