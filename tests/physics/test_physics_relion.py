"""Projection and back-projection against relion_project and relion_reconstruct (3.1.3), stored and run here."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from analytic_helper import correlations, displacements
from ctf_applied_helper import of_kind

from cryoiso.core.types import DensityMap
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.fourier_sums import LEAST_WEIGHT
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import project
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import Projector, SimulatedSource, make_particles
from cryoiso.physics.so3 import euler_to_matrix
from cryoiso.refine.reconstruct import reconstruct_halves


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


# --- relion_project

ODD_BOX_OFFSET_PX = (-1.0, -1.0)
"""Ours minus relion_project's in odd boxes. There RELION 3.1 takes pixel D//2 + 1 for an image's centre, because its
transforms are centred by moving pixels by D//2 both ways. (Its relion_reconstruct does not make a map of odd boxes, not
even of relion_project's own images: FSC -0.9 near Nyquist. Real RELION data are even.) Ours is D//2 for all boxes."""


def against_relion(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Same images but for the known offset in odd boxes."""
    expected = (0.0, 0.0) if theirs.shape[-1] % 2 == 0 else ODD_BOX_OFFSET_PX
    assert np.abs(displacements(theirs, ours) - expected).max() < 0.02
    theirs = np.roll(theirs, (int(expected[1]), int(expected[0])), (1, 2))
    assert correlations(theirs, ours).min() > 0.9999
    assert float(np.vdot(theirs, ours) / np.vdot(theirs, theirs)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "box, kind", [(64, "_centered"), (64, "_shifted"), (65, ""), (65, "_centered"), (65, "_shifted")]
)
def test_stored_images_of_relion_project(shared, box, kind):
    """Of the ribosome map of 65 px, and of that map Fourier-cropped to 64 px about its centre.

    (The plain set of 64 px is left out: its map was cropped off centre by a fraction of a pixel.)
    """
    import mrcfile
    import starfile

    stem = shared / f"data/reference/relion_project_aspire/rln_proj_{box}{kind}"
    table = starfile.read(f"{stem}.star", always_dict=True)["particles"]
    theirs = mrcfile.read(f"{stem}.mrcs")
    rotation = euler_to_matrix(*table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy().T)
    origin = [f"rlnOrigin{a}" if "rlnOriginX" in table else f"rlnOrigin{a}Angst" for a in "XY"]
    shift = table[origin].to_numpy(float)  # pixels and Å alike: the pixel size is 1
    assert (np.abs(shift).max() > 5) == (kind == "_shifted")
    volume = mrcfile.read(shared / "data/maps/aspire_clean70S_65.mrc")
    if box == 64:
        volume = resample_map(volume, 1.0, 64, 65 / 64)
    against_relion(project(tensor(volume), tensor(rotation), tensor(shift)).numpy(), theirs)


@pytest.mark.relion
@pytest.mark.parametrize("with_ctf", [False, True])
@pytest.mark.parametrize("box", [48, 47])
def test_relion_project_makes_the_same_images(shared, tmp_path, box, with_ctf):
    """Shifted, with and without CTF, even and odd boxes, from a real model's map."""
    import mrcfile

    from cryoiso.io.mrc import write_map
    from cryoiso.io.star.write import write_particles

    volume = mrcfile.read(shared / "relion_bench/maps/ha_48.mrc").astype(np.float32)
    volume = np.ascontiguousarray(volume[48 - box :, 48 - box :, 48 - box :])  # pixel 24 becomes pixel box // 2
    particles = make_particles(20, box, 4.5, shift_sd_A=7.0, seed=3)
    write_particles(tmp_path / "poses.star", particles)
    write_map(tmp_path / "map.mrc", volume, 4.5)
    command = ["relion_project", "--i", "map.mrc", "--ang", "poses.star", "--o", "theirs", "--angpix", "4.5"]
    subprocess.run(command + ["--ctf"] * with_ctf, cwd=tmp_path, check=True, capture_output=True)
    ours = Projector(DensityMap(volume, 4.5), with_ctf=with_ctf).images(particles, np.arange(20)).numpy()
    against_relion(ours, mrcfile.read(tmp_path / "theirs.mrcs"))


# --- relion_reconstruct


def relion_map(folder, star, *options: str) -> np.ndarray:
    import mrcfile

    command = ["relion_reconstruct", "--i", str(star), "--o", "theirs.mrc", "--ctf", "--pad", "2", *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return mrcfile.read(folder / "theirs.mrc")


@pytest.mark.relion
def test_relion_reconstruct_makes_the_same_map(tmp_path):
    """Of 1,500 noise-free images, astigmatic CTFs and shifts, half 1: FSC > 0.998 to 0.9 Nyquist, same grey values.

    Odd boxes cannot be compared: relion_reconstruct 3.1 does not make a map of them (see above).
    """
    import mrcfile

    from cryoiso.io.star.write import write_particles

    truth = phantom_map(48, 4.0, 8.8)
    particles = make_particles(1500, 48, 4.0, shift_sd_A=6.0, seed=3, stack="images.mrcs")
    images = SimulatedSource(truth, particles, noise=False).read(np.arange(1500))
    with mrcfile.new(tmp_path / "images.mrcs") as file:
        file.set_data(images)
        file.voxel_size = 4.0
    write_particles(tmp_path / "particles.star", particles)
    theirs = relion_map(tmp_path, "particles.star", "--subset", "1")
    ours = reconstruct_halves(ArraySource(images, particles), particles, Context(), halves=(1,))[1].data
    assert fsc(ours, theirs)[2:22].min() > 0.998
    assert float(np.vdot(theirs, ours) / np.vdot(theirs, theirs)) == pytest.approx(1, abs=0.01)
    with_truth = [fsc(v, truth.data)[1:22] for v in (ours, theirs)]
    assert (with_truth[0] > with_truth[1] - 1e-3).all()


@pytest.mark.relion
@pytest.mark.parametrize("kind", ["flipped", "premultiplied", "both flags"])
def test_relion_takes_flags_for_the_same_as_we_do(tmp_path, kind):
    """Its maps of phase-flipped and premultiplied images equal those of the untouched ones, as ours do.

    RELION hears of flipped images by an option alone; of both flags and its option together it heeds the first.
    """
    import mrcfile

    from cryoiso.io.star.write import write_particles

    particles = make_particles(200, 40, 4.0, shift_sd_A=6.0, seed=3, stack="images.mrcs")
    images = SimulatedSource(phantom_map(40, 4.0, 8.8), particles, noise=False).read(np.arange(200))
    made = []
    for source in (ArraySource(images, particles), of_kind(images, particles, kind)):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        with mrcfile.new(folder / "images.mrcs") as file:
            file.set_data(source.read(np.arange(200)))
            file.voxel_size = 4.0
        write_particles(folder / "particles.star", source.particles)
        option = ["--ctf_phase_flipped"] if source.particles.groups[0].phase_flipped else []
        theirs = relion_map(folder, "particles.star", "--subset", "1", *option)
        made.append((theirs, reconstruct_halves(source, source.particles, Context(), halves=(1,))[1].data))
    # images are rounded to single precision; where the CTF of all is next to zero, RELION and we divide the rounding by
    # a thousandth of a mean weight at the least; how it rounds depends on the processor
    bound = float(np.finfo(np.float32).eps) / LEAST_WEIGHT
    for untouched, changed in zip(*made, strict=True):
        assert np.linalg.norm(changed - untouched) < bound * np.linalg.norm(untouched)


@pytest.mark.relion
@pytest.mark.parametrize("symmetry", ["C1", "C3"])
def test_relion_reconstruct_on_noisy_particles(shared, tmp_path, symmetry):
    """500 haemagglutinin particles of -12 dB with the true poses.

    RELION sets voxels outside the sphere of radius D/2 to their mean; ours are zero there. Where a shell of the grid
    holds several samples a voxel and signal prevails, both maps are the same; beyond, they weigh neighbouring voxels
    differently (RELION iterates its gridding weights), and both are equally near to the truth.
    """
    import mrcfile

    from cryoiso.io.star.read import read_particles

    folder = tmp_path / "sets" / "c12_uniform"
    folder.mkdir(parents=True)
    for name in ("parts.mrcs", "truth.star"):
        (folder / name).symlink_to(shared / "relion_bench/sets/c12_uniform" / name)
    theirs = relion_map(tmp_path, "sets/c12_uniform/truth.star", "--subset", "1", "--sym", symmetry)
    particles = read_particles(folder / "truth.star", project=str(tmp_path))
    images = mrcfile.read(folder / "parts.mrcs")[particles.index]
    source = ArraySource(images, particles)
    ours = reconstruct_halves(source, particles, Context(), symmetry=symmetry, halves=(1,))[1].data
    sphere = np.asarray(sphere_mask(48, 24.0, 3.0))
    curve = fsc(ours, (theirs - np.median(theirs)) * sphere)
    truth = mrcfile.read(shared / "relion_bench/sets/c12_uniform/signal_map.mrc")
    ours_true, theirs_true = fsc(ours, truth)[1:22], fsc(theirs, truth)[1:22]
    signal = int(np.flatnonzero(theirs_true < 0.5)[0])
    assert curve[2:signal].min() > 0.98
    assert curve[2:22].min() > (0.95 if symmetry == "C3" else 0.9)
    assert abs(float(np.mean(ours_true - theirs_true))) < 0.005
