"""Half-maps from the poses of a RELION STAR or cryoSPARC .cs file, and their FSC.

python examples/reconstruct_from_star.py particles.star C3 maps
"""

from __future__ import annotations

import sys
from pathlib import Path

from cryoiso.io import StackSource, read_particle_file, write_map
from cryoiso.metrics import fsc, resolution_at
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.refine import reconstruct_halves


def main(file: str, symmetry: str, out: str) -> float:
    particles = assign_halves(read_particle_file(file, require=("image", "ctf", "pose")), seed=1)
    source = StackSource(particles)
    maps = reconstruct_halves(source, particles, symmetry=symmetry)  # without a communicator: this process alone
    Path(out).mkdir(parents=True, exist_ok=True)
    for half, density in maps.items():
        write_map(Path(out) / f"half{half}.mrc", density.data, density.pixel_size_A)
    resolution_A = resolution_at(fsc(maps[1].data, maps[2].data), 0.143, source.box_px, maps[1].pixel_size_A)
    print(f"{len(particles)} particles, half-maps agree to {resolution_A:.1f} Å (FSC 0.143, no mask)")
    return resolution_A


if __name__ == "__main__":
    main(*sys.argv[1:4])
