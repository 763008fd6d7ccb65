"""Sections of the report, one subject per file, with its figures beside it."""
