"""What simulated particles have in common with real ones: neighbours, ice, junk, errors of the CTF, real noise.

``settings`` says what is switched on, ``truth`` draws it, ``source`` makes the images. All draws depend on (seed, uid)
or (seed, micrograph) and on the nuisance alone: switching one on leaves the poses, the noise and all other nuisances as
they are, so that sets with and without it can be compared particle by particle.
"""
