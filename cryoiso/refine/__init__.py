"""The native engine's mathematics: likelihood, search, maximisation, reconstruction, the loop over iterations."""
