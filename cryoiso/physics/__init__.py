"""Formulas of image formation, in torch and numpy. No files, no ranks. Sources and tests: docs/formulas.md."""

from typing import TYPE_CHECKING

from cryoiso.core.lazy import lazy_exports

if TYPE_CHECKING:
    from cryoiso.physics.backproject import SliceAccumulator
    from cryoiso.physics.contrast_transfer import ctf, ctf_for, frequency_grid, wavelength_A
    from cryoiso.physics.filters import apply_bfactor, apply_radial, highpass, lowpass, power_spectrum, radial_average
    from cryoiso.physics.fit import apply_fit, fit_into
    from cryoiso.physics.fourier_sums import FourierSums
    from cryoiso.physics.masks import circle_mask, mask_diameter_A, soft_mask_from_map, sphere_mask
    from cryoiso.physics.noise import noise_spectrum, normalise_background
    from cryoiso.physics.phantom import phantom_map
    from cryoiso.physics.projection import FourierVolume, project
    from cryoiso.physics.resample import place_map, resample_map
    from cryoiso.physics.simulation import CtfRanges, SimulatedSource, make_particles, simulate
    from cryoiso.physics.so3 import (
        angular_distance_deg,
        euler_to_matrix,
        healpix_directions,
        local_rotations,
        matrix_to_euler,
        random_rotations,
        rotvec_to_matrix,
        so3_grid,
        view_direction,
    )
    from cryoiso.physics.symmetry import in_asymmetric_unit, point_group, symmetrise_rotations, to_asymmetric_unit
    from cryoiso.physics.views import Views, sample_rotations

__all__ = [
    "CtfRanges",
    "FourierSums",
    "FourierVolume",
    "SimulatedSource",
    "SliceAccumulator",
    "Views",
    "angular_distance_deg",
    "apply_bfactor",
    "apply_fit",
    "apply_radial",
    "circle_mask",
    "ctf",
    "ctf_for",
    "euler_to_matrix",
    "fit_into",
    "frequency_grid",
    "healpix_directions",
    "highpass",
    "in_asymmetric_unit",
    "local_rotations",
    "lowpass",
    "make_particles",
    "mask_diameter_A",
    "matrix_to_euler",
    "noise_spectrum",
    "normalise_background",
    "phantom_map",
    "place_map",
    "point_group",
    "power_spectrum",
    "project",
    "radial_average",
    "random_rotations",
    "resample_map",
    "rotvec_to_matrix",
    "sample_rotations",
    "simulate",
    "so3_grid",
    "soft_mask_from_map",
    "sphere_mask",
    "symmetrise_rotations",
    "to_asymmetric_unit",
    "view_direction",
    "wavelength_A",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "backproject": ["SliceAccumulator"],
            "contrast_transfer": ["ctf", "ctf_for", "frequency_grid", "wavelength_A"],
            "filters": ["apply_bfactor", "apply_radial", "highpass", "lowpass", "power_spectrum", "radial_average"],
            "fit": ["apply_fit", "fit_into"],
            "fourier_sums": ["FourierSums"],
            "masks": ["circle_mask", "mask_diameter_A", "soft_mask_from_map", "sphere_mask"],
            "noise": ["noise_spectrum", "normalise_background"],
            "phantom": ["phantom_map"],
            "projection": ["FourierVolume", "project"],
            "resample": ["place_map", "resample_map"],
            "simulation": ["CtfRanges", "SimulatedSource", "make_particles", "simulate"],
            "so3": [
                "angular_distance_deg",
                "euler_to_matrix",
                "healpix_directions",
                "local_rotations",
                "matrix_to_euler",
                "random_rotations",
                "rotvec_to_matrix",
                "so3_grid",
                "view_direction",
            ],
            "symmetry": ["in_asymmetric_unit", "point_group", "symmetrise_rotations", "to_asymmetric_unit"],
            "views": ["Views", "sample_rotations"],
        },
    )
