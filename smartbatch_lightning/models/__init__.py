"""How a model takes batches."""
