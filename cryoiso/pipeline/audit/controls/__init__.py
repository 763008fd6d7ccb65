"""One control per module: ``cases`` (what is run) and ``record`` (what came of it)."""
