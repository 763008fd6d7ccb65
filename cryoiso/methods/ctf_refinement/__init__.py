"""CTF refinement at fixed poses: defocus, astigmatism and beam tilt by the likelihood of the images.

Zivanov et al. 2018, doi 10.7554/eLife.42166; Zivanov et al. 2020, doi 10.1107/S2052252520000081.
"""
