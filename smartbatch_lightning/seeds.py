"""The seed of a run: drawn once, the same on every rank, and saved in checkpoints."""

import os

import lightning as L
import torch

_SEED_EVERYTHING = "PL_GLOBAL_SEED"  # where Lightning's `seed_everything` stores its seed


def seed_is_given() -> bool:
    """Whether `seed_everything` was called."""
    return _SEED_EVERYTHING in os.environ


def run_seed(trainer: L.Trainer | None = None) -> int:
    """The seed given to `seed_everything`, else torch's: given to `torch.manual_seed`, or drawn by torch.

    Args:
        trainer: The run's Trainer, if every rank has reached this call, in `setup` or later; all ranks then get rank
            0's seed.
    """
    seed = int(os.environ[_SEED_EVERYTHING]) if seed_is_given() else torch.initial_seed() % 2**32
    return seed if trainer is None else trainer.strategy.broadcast(seed)
