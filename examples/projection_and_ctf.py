"""Projections of a map, and what the microscope makes of them.

python examples/projection_and_ctf.py
"""

from __future__ import annotations

import numpy as np
import torch

from cryoiso.physics import ctf, euler_to_matrix, frequency_grid, phantom_map, project

PIXEL_A = 3.0


def main() -> tuple[torch.Tensor, torch.Tensor]:
    density = phantom_map(64, PIXEL_A, resolution_A=8.0)  # a trimer about z, as a DensityMap
    views = torch.as_tensor(euler_to_matrix(rot_deg=np.zeros(3), tilt_deg=[0.0, 45.0, 90.0], psi_deg=np.zeros(3)))
    projections = project(torch.as_tensor(density.data), views)  # (3, 64, 64), centre at pixel 32

    fy, fx = frequency_grid(64, PIXEL_A)  # 1/Å, half-plane of rfft2
    contrast = ctf(fy, fx, defocus_u_A=15_000.0, defocus_v_A=14_500.0, defocus_angle_deg=30.0, voltage_kV=300.0,
                   spherical_aberration_mm=2.7, amplitude_contrast=0.1)  # fmt: skip
    images = torch.fft.irfft2(torch.fft.rfft2(projections) * contrast, s=(64, 64))
    for tilt, before, after in zip((0, 45, 90), projections, images):
        ranges = [f"{image.min():.1f} to {image.max():.1f}" for image in (before, after)]
        print(f"tilt {tilt:2d}°: projection {ranges[0]}, with CTF {ranges[1]}")
    return projections, images


if __name__ == "__main__":
    main()
