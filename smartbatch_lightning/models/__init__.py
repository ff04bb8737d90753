"""Models, and how they process batches."""
