"""Trains in batches that do not fit into the process' memory: started by the tests.

Usage: python tests/run_out_of_memory.py FOLDER
"""

import resource
import sys
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from smartbatch_lightning.cli import main


class Limit(Callback):
    """Leaves the process 500 MB more than it has, and notes the first step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer, pl_module) -> None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 500_000_000, resource.RLIM_INFINITY))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        (self.folder / "stepped").touch()


if __name__ == "__main__":
    folder = sys.argv[1]
    sys.argv[1:] = [
        "fit",
        "--data.batch_size=1000",
        "--data.validation_split=test",
        "--data.batching=random",
        "--trainer.accelerator=cpu",
        "--trainer.num_sanity_val_steps=0",
        f"--trainer.default_root_dir={folder}",
        "--trainer.callbacks=run_out_of_memory.Limit",
        f"--trainer.callbacks.folder={folder}",
    ]
    main()
