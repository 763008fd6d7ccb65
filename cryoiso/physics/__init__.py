"""Formulas of image formation, in torch and numpy. No files, no ranks. Sources and tests: docs/formulas.md."""
