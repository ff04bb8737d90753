"""Evaluation of a trained model: what it does well, and where it fails."""
