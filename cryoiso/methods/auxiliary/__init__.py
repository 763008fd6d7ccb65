"""Auxiliary particles (cryoPROS, Zhang et al. 2025, doi 10.1038/s41467-025-59797-w): a generator of images like the raw
ones but with even views, and the co-refinement that uses them."""
