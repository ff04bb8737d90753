"""Callbacks for the Lightning Trainer, one per file."""
