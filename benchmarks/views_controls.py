"""Controls of views.py: does the reference speak in the result?

noise_white, noise_coloured     images of pure noise, with the CTFs and the homologue of a set of haemagglutinin
noise_background                real ice without particles: patches of the micrographs of beta-galactosidase, each taken
                                several times, in other places and orientations
omitted, added                  a third of the trimer is missing from the reference; balls are added to it (bias.py)

Noise is refined with the program's refusal switched off (job_process.py). What counts is how much the result resembles
the reference inside its mask, and the resolution that the half-maps claim, beside plain refinement before the change.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bias, particle_sets
from benchmarks.particle_sets import ParticleSet
from benchmarks.score import soft_mask
from benchmarks.views_rows import engine_facts

_NOISE = replace(particle_sets.SETS["one_pole_-15"], invert="no")
CONTROLS: dict[str, ParticleSet] = {
    **{f"noise_{kind}": _NOISE for kind in ("white", "coloured", "background")},
    "omitted": bias.SET,
    "added": bias.SET,
}
PATCHES = Path("particles", "betagal_real_384", "background.mrcs")
PATCH_PIXEL_A = 0.637


def guarded(name: str) -> bool:
    """Whether the refusal of noise stays on."""
    return not name.startswith("noise")


def applies(name: str, row: str) -> bool:
    """Noise has no true poses and no true map; a changed reference is not used where the true map is, and only such a
    set has the unchanged one beside it."""
    if row == "refine whole":
        return name in ("omitted", "added")
    if name not in CONTROLS:
        return True
    return not (row.startswith("oracle") or (row == "true poses" and name.startswith("noise")))


def prepare(name: str, seed: int, data: Path, folder: Path) -> None:
    """The set that the control is made from, then its images or its reference changed.

    Args:
        data: holds models/ and particles/.
    """
    from cryoiso.io.mrc import read_map, write_map

    particle_sets.prepare(CONTROLS[name], seed, data / "models", folder)
    if name == "noise_background":
        _write_background(data / PATCHES, seed, folder)
    elif name.startswith("noise"):
        source = folder / "set"
        source.mkdir(exist_ok=True)
        shutil.copy(folder / "particles.star", source)
        shutil.copy(folder / "particles.mrcs", source)
        bias.make_noise(source, folder, seed, name.removeprefix("noise_"))
        shutil.rmtree(source)
    else:
        shutil.copy(folder / "homologue.mrc", folder / "full.mrc")
        truth, full = (read_map(folder / f"{n}.mrc").data for n in ("signal_map", "full"))
        change = bias.without_third if name == "omitted" else bias.with_balls
        write_map(folder / "homologue.mrc", change(truth, full)[0], CONTROLS[name].pixel_A)
    (folder / "control").write_text(f"{name}\n")


def prepared(name: str, seed: int, folder: Path) -> bool:
    mark = folder / "control"
    return mark.exists() and particle_sets.prepared(CONTROLS[name], seed, folder)


def _write_background(path: Path, seed: int, folder: Path) -> None:
    """Images of real ice on the set's grid: a crop in a random place of a random patch, in a random orientation."""
    import mrcfile

    from cryoiso.core.rng import generator
    from cryoiso.io.mrc import write_stack
    from cryoiso.physics.resample import resample_matrix

    one = CONTROLS["noise_background"]
    with mrcfile.open(path, permissive=True) as file:
        patches = np.asarray(file.data, np.float32)
    size = round(one.box * one.pixel_A / PATCH_PIXEL_A)
    matrix = resample_matrix(size, PATCH_PIXEL_A, one.box, size * PATCH_PIXEL_A / one.box)
    room = patches.shape[1] - size
    rng = generator(seed, "background", 0)
    with write_stack(folder / "particles.mrcs", one.box, one.pixel_A) as stack:
        for _ in range(one.particles):
            patch, y, x, turns, flip = rng.integers(0, (len(patches), room + 1, room + 1, 4, 2))
            crop = np.rot90(patches[patch, y : y + size, x : x + size][:: 1 - 2 * flip], turns)
            image = matrix @ (crop - crop.mean()) @ matrix.T
            stack.append((image / image.std()).astype(np.float32)[None])


def scores(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """What the maps of a row in ``out`` say."""
    from cryoiso.io.mrc import read_map
    from cryoiso.metrics.fsc_curve import fsc, resolution_at

    pixel_A = CONTROLS[name].pixel_A
    half1, half2 = (read_map(out / f"half{h}.mrc", pixel_A).data for h in (1, 2))
    made = (half1 + half2) / 2
    if not name.startswith("noise"):
        truth, full = (read_map(folder / f"{n}.mrc").data for n in ("signal_map", "full"))
        return (bias.omitted_part if name == "omitted" else bias.added_part)(truth, full, made)
    reference = read_map(folder / "homologue.mrc").data
    mask = soft_mask(reference, pixel_A)
    return {
        **bias.likeness(made, reference),
        "half_unmasked_A": resolution_at(fsc(half1, half2), 0.143, len(made), pixel_A),
        "half_masked_A": resolution_at(fsc(half1, half2, mask), 0.143, len(made), pixel_A),
        **engine_facts(out),
    }
