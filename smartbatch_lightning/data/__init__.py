"""From a data set by its name to batches of tensors."""
