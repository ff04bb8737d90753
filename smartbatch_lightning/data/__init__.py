"""From the name of a data set to batches of tensors."""
