"""Mathematics of the native engine: likelihood, search, maximisation, reconstruction, the loop over iterations."""
