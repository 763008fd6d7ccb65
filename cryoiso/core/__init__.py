"""Vocabulary of the project: types, units, errors, configuration, random numbers, logging, protocols. No files, no
ranks."""
