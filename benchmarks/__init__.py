"""Side by side with peers, in one run: `python -m benchmarks.planning`, `.input` and `.accuracy`, from the root."""
