"""Callbacks of the Lightning Trainer, one file each."""
