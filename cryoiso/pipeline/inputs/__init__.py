"""Inputs of a run: half-sets, the reference and the frame that it is aligned to."""
