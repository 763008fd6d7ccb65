"""Whether a run folder is intact, and whether a stage gives the same results again."""
