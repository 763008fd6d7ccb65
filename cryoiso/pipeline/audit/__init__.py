"""Controls of a run: its own workflow repeated on a subset of its particles with one thing changed."""
