"""Every formula of image formation, in torch and numpy. No files, no ranks. See docs/formulas.md for sources and tests."""
