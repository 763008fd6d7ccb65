"""RELION's relion_refine_mpi as an engine, and its external-reconstruct callback."""
