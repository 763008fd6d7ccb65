"""Networks and their losses: pure torch, no files and no ranks."""
