"""Side by side with peers, in one run: `python -m benchmarks.planning`, `.input` and so on, from the root."""
