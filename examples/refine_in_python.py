"""A refinement step by step, as one would write it in a notebook: simulate, refine, compare with the truth.

python examples/refine_in_python.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cryoiso.core import RefineRequest, RefineSection
from cryoiso.engines import NativeEngine
from cryoiso.metrics import pose_errors
from cryoiso.physics import phantom_map, simulate


def main(particles: int = 200, iterations: int = 3) -> float:
    # a trimer about z, 36 px of 5 Å, and images of it with CTF and noise
    truth = phantom_map(36, 5.0, resolution_A=11.0)
    source = simulate(truth, particles, snr_db=-6.0, seed=2)
    known = source.particles

    with TemporaryDirectory() as folder:
        request = RefineRequest(
            source=source,
            reference=truth,  # low-passed at 40 Å before the first iteration
            symmetry="C3",
            folder=Path(folder),
            settings=RefineSection(healpix_order=2, max_iterations=iterations),
            lowpass_A=40.0,
            on_checkpoint=lambda r: print(
                f"iteration {r['iteration']}: {r['resolution_A']:.1f} Å, step {r['step_deg']:.1f}°"
            ),
        )
        result = NativeEngine().refine(request)

    errors = pose_errors(result.particles.rotation, known.rotation, "C3", align="axis")
    print(f"median pose error {errors.median_deg:.1f}°, wrong by more than 20°: {errors.fraction_over(20):.1%}")
    return errors.median_deg


if __name__ == "__main__":
    main()
