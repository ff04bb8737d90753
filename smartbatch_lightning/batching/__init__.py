"""Which samples make a batch: numpy alone."""
