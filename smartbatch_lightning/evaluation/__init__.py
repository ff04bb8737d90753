"""Evaluation of a trained model: how well it does, where, and where it does not."""
