"""cryoiso: correct poses, independent half-maps and an isotropic map from particles with preferred orientation."""

__version__ = "0.2.0"
