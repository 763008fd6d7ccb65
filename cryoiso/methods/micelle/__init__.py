"""Micelle recovery: the density outside the protein, from particles with poses and a homologue of the protein.

min over g and V_M of sum_i |C_i P_i (g M V_homo + (1 - M) V_M) - x_i|^2, with M a mask of the homologue (ReconDisMic of
cryoPROS, doi 10.1038/s41467-025-59797-w, Methods), by preconditioned conjugate gradients.

One pass over the images gives back-projected sums, a right-hand side and a weight; from then on an iteration is masks
and Fourier transforms of a volume.
"""
