"""The stages of a run, one file per stage, and what they share."""
