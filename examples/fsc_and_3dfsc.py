"""FSC and 3DFSC of two half-maps, one of whose directions was measured badly.

python examples/fsc_and_3dfsc.py [half1.mrc half2.mrc]
"""

from __future__ import annotations

import sys

import numpy as np

from cryoiso.io import read_map
from cryoiso.metrics import conical_fsc, fsc, fsc3d, resolution_at, resolved_region, sphericity, transform
from cryoiso.physics import phantom_map


def noisy_halves(box_px: int = 48, pixel_size_A: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """A phantom with noise that is ten times stronger within 45° of z."""
    signal, rng = phantom_map(box_px, pixel_size_A, resolution_A=9.0).data, np.random.default_rng(1)
    k = np.fft.fftfreq(box_px)
    z, y, x = np.meshgrid(k, k, np.fft.rfftfreq(box_px), indexing="ij")
    factor = np.where(np.abs(z) > np.hypot(y, x), 10.0, 1.0)
    made = []
    for _ in range(2):
        noise = np.fft.irfftn(np.fft.rfftn(rng.normal(size=signal.shape)) * factor, s=signal.shape, axes=(0, 1, 2))
        made.append((signal + 0.3 * signal.std() * noise).astype(np.float32))
    return made[0], made[1]


def main(files: list[str]) -> dict[str, float]:
    pixel_A = 4.0
    if files:
        one, two = (read_map(file) for file in files)
        half1, half2, pixel_A = one.data, two.data, one.pixel_size_A
    else:
        half1, half2 = noisy_halves()
    box = len(half1)
    curve = fsc(half1, half2)  # (D//2+1,), one number per shell
    volume = fsc3d(half1, half2, cone_deg=20.0)  # (D, D, D), one number per coefficient
    cones = conical_fsc(transform(half1), transform(half2), box, pixel_A)
    found = {
        "resolution_A": resolution_at(curve, 0.143, box, pixel_A),
        "sphericity": sphericity(resolved_region(volume, pixel_A)),
        "cfar": cones.cfar,
    }
    for name, value in found.items():
        print(f"{name:14s} {value:.2f}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
