"""Ranks: who we are, who owns what, how partial sums become sums, how all stop together. The only home of mpi4py."""
