"""Misalignment correction: references made isotropic between the iterations of a refinement (Liu et al. 2024)."""
