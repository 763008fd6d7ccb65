"""Batch scripts: filling, submitting, and the wall time of the job."""
