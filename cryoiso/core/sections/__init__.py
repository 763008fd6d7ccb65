"""Sections of the job file, one class each: the only place where keys, defaults, limits and help stand."""
