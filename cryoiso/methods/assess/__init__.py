"""Judging a result: what its numbers allow to say."""
