"""Anisotropy correction: a 3D U-Net that learns from a map itself what its weak directions lack.

Self-supervised (spIsoNet, Nat. Methods 2024, doi 10.1038/s41592-024-02505-1): the network's output, filtered like the
data, must give the data; and whatever the network makes of a map, it must make again of that map turned and filtered.
"""
