"""Simulated particle sets: views, CTFs, noise, signal-to-noise ratio, independence of blocks, and the command."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
import typer
from errors_helper import raises_code
from scipy import stats
from typer.testing import CliRunner

from cryoiso.cli.simulate_cmd import simulate as simulate_command
from cryoiso.core.errors import CryoisoError, InputError, UsageError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import DensityMap, OpticsGroup, Particles
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.fourier import images_to_fourier
from cryoiso.physics.noise import noise_spectrum
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import (
    CtfRanges,
    SimulatedSource,
    image_to_background_db,
    make_particles,
    simulate,
)
from cryoiso.physics.so3 import fibonacci_sphere, view_direction
from cryoiso.physics.views import Views, sample_rotations

N = 20_000
UIDS = np.arange(N, dtype=np.uint64)


@pytest.fixture(scope="module")
def small() -> DensityMap:
    return phantom_map(40, 4.5, 12.0)


def tilts(views: Views, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    d = view_direction(sample_rotations(views, UIDS, seed))
    return np.degrees(np.arccos(np.clip(d[:, 2], -1, 1))), d


def test_uniform_views_are_uniform():
    rotation = sample_rotations(Views(), UIDS, 1)
    identity = rotation @ rotation.transpose(0, 2, 1)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(3), identity.shape), atol=1e-12)
    d = view_direction(rotation)
    for axis in ([0, 0, 1], [1, 0, 0], [0.6, 0, 0.8]):
        assert stats.kstest((d @ axis + 1) / 2, "uniform").pvalue > 1e-3
    in_plane = np.arctan2(rotation[:, 1, 2], -rotation[:, 0, 2]) / (2 * np.pi) % 1
    assert stats.kstest(in_plane, "uniform").pvalue > 1e-3
    azimuth = np.arctan2(d[:, 1], d[:, 0]) / (2 * np.pi) % 1
    assert abs(np.corrcoef(azimuth, in_plane)[0, 1]) < 0.03 and abs(np.corrcoef(d[:, 2], in_plane)[0, 1]) < 0.03


def test_preferred_views():
    tilt, _ = tilts(Views("preferred", fraction=0.85, cone_deg=30, sigma_deg=12))
    assert np.mean(tilt < 30) == pytest.approx(0.85, abs=0.01)
    top = tilt[tilt < 30]
    assert stats.kstest(stats.rayleigh.cdf(top, scale=12) / stats.rayleigh.cdf(30, scale=12), "uniform").pvalue > 1e-3
    z = np.cos(np.radians(tilt[tilt > 30]))
    assert stats.kstest((z + 1) / (1 + np.cos(np.radians(30))), "uniform").pvalue > 1e-3


def test_preferred_views_of_two_poles_and_of_a_side():
    tilt, _ = tilts(Views("preferred", fraction=0.9, cone_deg=30, poles=2))
    assert np.mean(tilt < 30) == pytest.approx(0.45, abs=0.015) == pytest.approx(np.mean(tilt > 150), abs=0.02)
    _, d = tilts(Views("preferred", fraction=1.0, cone_deg=20, sigma_deg=None, pole_tilt_deg=90, pole_rot_deg=60))
    cosine = d @ [np.cos(np.pi / 3), np.sin(np.pi / 3), 0]
    edge = np.cos(np.radians(20))
    assert cosine.min() >= edge - 1e-9
    assert stats.kstest((cosine - edge) / (1 - edge), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("retained", [1.0, 0.5, 0.1, 0.0])
def test_retained_fraction_of_side_views(retained):
    tilt, _ = tilts(Views("retained", retained=retained, cone_deg=45))
    side = (tilt > 45) & (tilt < 135)
    top_area, side_area = 1 - np.cos(np.pi / 4), np.cos(np.pi / 4)
    assert np.mean(side) == pytest.approx(retained * side_area / (top_area + retained * side_area), abs=0.01)
    if retained == 1:
        assert stats.kstest((np.cos(np.radians(tilt)) + 1) / 2, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("cone", [10, 30, 45])
def test_missing_cone_is_missing_and_nothing_else(cone):
    """Coverage counted in Fourier space: a direction k is measured where some view is perpendicular to it."""
    _, d = tilts(Views("missing-cone", cone_deg=cone))
    k = fibonacci_sphere(400)
    width = np.sin(np.radians(1.0))
    count = np.array([(np.abs(d @ direction) < width).sum() for direction in k])
    polar = np.degrees(np.arccos(np.abs(k[:, 2])))
    assert count[polar < cone - 1.01].max() == 0
    assert count[polar > cone + 1.5].min() > 0
    assert (d[:, 2] > 0).mean() == pytest.approx(0.5, abs=0.02)


def test_a_pose_depends_on_its_uid_alone():
    views = Views("preferred", poles=2)
    whole = sample_rotations(views, UIDS, 5)
    pick = np.array([77, 3, 19_999])
    np.testing.assert_array_equal(sample_rotations(views, UIDS[pick], 5), whole[pick])
    assert not np.allclose(sample_rotations(views, UIDS[:5], 6), whole[:5])


@pytest.mark.parametrize(
    "bad",
    [{"mode": "sideways"}, {"fraction": 1.1}, {"retained": -1}, {"poles": 3}, {"cone_deg": 90}, {"sigma_deg": -2}],
)
def test_bad_views_are_refused(bad):
    with pytest.raises(InputError):
        Views(**bad)


def test_metadata_of_a_set():
    p = make_particles(3001, 32, 2.0, ctf=CtfRanges((8000.0, 12000.0), astigmatism_A=300.0), shift_sd_A=5.0, seed=3)
    assert len(set(p.uid.tolist())) == 3001
    mean, diff = (p.defocus_u_A + p.defocus_v_A) / 2, p.defocus_u_A - p.defocus_v_A
    assert stats.kstest((mean - 8000) / 4000, "uniform").pvalue > 1e-3
    assert stats.kstest(diff / 300, "uniform").pvalue > 1e-3
    assert stats.kstest(p.shift_A.ravel() / 5, "norm").pvalue > 1e-3
    assert abs(int((p.half == 1).sum()) - int((p.half == 2).sum())) == 1
    # a larger set begins with the smaller one, whatever else there is
    more = make_particles(5000, 32, 2.0, ctf=CtfRanges((8000.0, 12000.0), astigmatism_A=300.0), shift_sd_A=5.0, seed=3)
    for name in ("uid", "defocus_u_A", "rotation", "shift_A"):
        np.testing.assert_array_equal(getattr(more, name)[:3001], getattr(p, name))


def test_ctfs_from_given_particles_keep_rows_together():
    given = make_particles(50, 100, 1.0, seed=9)
    groups = (given.groups[0], OpticsGroup(7, "second", 1.3, 100, 200.0, 1.4, 0.07, beam_tilt_mrad=(0.5, 0.1)))
    given = Particles(**{**vars(given), "groups": groups, "optics": np.arange(50, dtype=np.int32) % 2})
    p = make_particles(400, 32, 2.0, ctf=given, seed=4)
    assert {g.pixel_size_A for g in p.groups} == {2.0} and {g.box_px for g in p.groups} == {32}
    assert p.groups[1].voltage_kV == 200.0 and p.groups[1].beam_tilt_mrad == (0.5, 0.1)
    rows, drawn = (
        set(zip(x.optics.tolist(), x.defocus_u_A, x.defocus_v_A, x.defocus_angle_deg, strict=True)) for x in (given, p)
    )
    assert drawn <= rows and len(drawn) > 45


def test_images_do_not_depend_on_order_or_block(small):
    source = simulate(small, 40, snr_db=-5, noise="coloured", shift_sd_A=6, seed=2)
    assert isinstance(source, ImageSource)
    whole = source.read(np.arange(40))
    assert whole.shape == (40, 40, 40) and whole.dtype == np.float32
    for rows in (np.array([7]), np.array([39, 0, 7]), slice(30, 34)):
        np.testing.assert_allclose(source.read(rows), whole[rows], atol=5e-6)
    np.testing.assert_allclose(np.concatenate(list(source.blocks(7))), whole, atol=5e-6)
    part = SimulatedSource(source.volume, source.particles.take([5, 33]), 2, source.spectrum)
    np.testing.assert_allclose(part.read(np.arange(2)), whole[[5, 33]], atol=5e-6)


@pytest.mark.parametrize("kind", ["white", "coloured"])
@pytest.mark.parametrize("snr_db", [-14.0, 0.0])
def test_signal_to_noise_ratio_and_spectrum(small, snr_db, kind):
    source = simulate(small, 400, snr_db=snr_db, noise=kind, seed=3)
    rows = np.arange(400)
    signal, images = source.signal(rows), source.read(rows)
    noise = images - signal
    assert noise.var() == pytest.approx(1, abs=0.02)
    measured = 10 * np.log10(np.mean(signal.var((1, 2))) / noise.var())
    assert measured == pytest.approx(snr_db, abs=0.25)  # other uniform views than those the scale was made with
    assert source.measured()["snr_dB"] == pytest.approx(measured, abs=0.3)
    power = images_to_fourier(torch.from_numpy(noise)).abs().square().mean(0)[1:15, 5:12]
    ky, kx = np.meshgrid(np.arange(1, 15), np.arange(5, 12), indexing="ij")
    expected = np.interp(np.hypot(ky, kx), np.arange(21), noise_spectrum(40, kind))
    np.testing.assert_allclose(power.mean(), expected.mean(), rtol=0.02)
    if kind == "coloured":
        assert np.corrcoef(power.ravel(), expected.ravel())[0, 1] > 0.9


def test_noise_of_different_images_and_seeds_is_independent(small):
    a = simulate(small, 30, snr_db=-20, seed=3)
    b = simulate(small, 30, snr_db=-20, seed=4)
    na, nb = (s.read(np.arange(30)) - s.signal(np.arange(30)) for s in (a, b))
    c = np.corrcoef(np.concatenate([na, nb]).reshape(60, -1))
    assert np.abs(c - np.eye(60)).max() < 0.15


def test_signal_is_the_shifted_projection_times_its_ctf(small):
    """Against a projection made in real space by rotating the map, CTF and shift applied by numpy."""
    from scipy.ndimage import affine_transform

    source = simulate(small, 6, snr_db=None, shift_sd_A=8.0, seed=5)
    p, box = source.particles, small.box_px
    ours = source.read(np.arange(6))
    for i in range(6):
        # value at image-frame point x is V(A^T x); arrays are z, y, x
        matrix = p.rotation[i].T[::-1, ::-1]
        centre = np.full(3, box // 2)
        rotated = affine_transform(small.data, matrix, centre - matrix @ centre, order=3)
        transform = np.fft.rfft2(np.fft.ifftshift(rotated.sum(0)))
        ky, kx = np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None]
        phase = np.exp(2j * np.pi * (kx * p.shift_A[i, 0] + ky * p.shift_A[i, 1]) / 4.5)  # content at minus the origin
        ctf = ctf_for(p, [i], dtype=torch.float64)[0].numpy()
        image = np.fft.fftshift(np.fft.irfft2(transform * phase * ctf, s=(box, box)))
        assert np.corrcoef(image.ravel(), ours[i].ravel())[0, 1] > 0.998


def test_paper_signal_to_noise_number():
    rng = np.random.default_rng(0)
    pure = rng.standard_normal((200, 48, 48))
    assert image_to_background_db(pure, 20) == pytest.approx(0, abs=0.05)
    x = np.arange(48) - 24
    disc = np.hypot(*np.meshgrid(x, x)) < 18
    signal = disc * rng.standard_normal((200, 48, 48)) * 2
    expected = 10 * np.log10(1 + signal.var((1, 2)).mean())
    assert image_to_background_db(pure + signal + 3, 20) == pytest.approx(expected, abs=0.1)


def test_nothing_to_simulate(small):
    flat = DensityMap(np.ones((16, 16, 16), np.float32) * 0, 3.0)
    with raises_code("map-without-density", InputError, match="constant"):
        simulate(flat, 5)
    with raises_code("option-out-of-range", InputError, match="at least 1"):
        simulate(small, 0)


def command(*arguments: object) -> None:
    """Runs the command in this process; its errors come out as they are."""
    app = typer.Typer()
    app.command()(simulate_command)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_command_writes_a_set_that_reads_back(tmp_path):
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map
    from cryoiso.io.stack import StackReader

    out = tmp_path / "a" / "b"
    command("phantom", out, "--n", 60, "--box", 40, "--pixel-size", 4.5, "--mode", "preferred", "--seed", 3)
    given, truth = read_particle_file(out / "particles.star"), read_particle_file(out / "truth.star")
    assert given.rotation is None and given.half is None and len(given) == 60
    assert truth.rotation is not None and set(truth.half.tolist()) == {1, 2}
    np.testing.assert_array_equal(given.uid, truth.uid)
    assert given.groups[0].pixel_size_A == 4.5 and given.groups[0].box_px == 40
    # the same set made in memory: images, poses and CTFs agree
    source = simulate(phantom_map(40, 4.5, 2.5 * 4.5, seed=3), 60, views=Views("preferred"), shift_sd_A=4.0, seed=3)
    np.testing.assert_allclose(truth.rotation, source.particles.rotation, atol=1e-7)
    np.testing.assert_allclose(truth.shift_A, source.particles.shift_A, atol=1e-6)
    np.testing.assert_allclose(given.defocus_u_A, source.particles.defocus_u_A, atol=1e-5)
    stack = read_particle_file(out / "truth.star").stack[0]
    with StackReader() as reader:
        images = reader.read(stack, np.arange(60))
    np.testing.assert_allclose(images, source.read(np.arange(60)), atol=5e-6)
    np.testing.assert_allclose(read_map(out / "truth_map.mrc").data, source.volume.data, rtol=1e-6)
    facts = json.loads((out / "simulation.json").read_text())
    assert facts["settings"]["seed"] == 3 and facts["settings"]["symmetry"] == "C3"
    assert facts["symmetry_correlation"] > 0.99
    assert facts["measured"]["snr_dB"] == pytest.approx(source.measured()["snr_dB"], abs=1e-3)


def test_command_takes_maps_and_ctfs_of_another_set(tmp_path):
    from cryoiso.io import read_particle_file

    grid = ("--box", 40, "--pixel-size", 4.5)
    command("phantom-homologue", tmp_path / "one", "--n", 20, *grid, "--noise", "none", "--halves")
    assert read_particle_file(tmp_path / "one" / "particles.star").half is not None
    command(
        tmp_path / "one" / "truth_map.mrc", tmp_path / "two", "--n", 30, "--box", 50, "--pixel-size", 4.0,
        "--ctf-from", tmp_path / "one" / "particles.star", "--with-poses", "--mode", "missing-cone",
        "--noise", "coloured",
    )  # fmt: skip
    one, two = (read_particle_file(tmp_path / d / "particles.star") for d in ("one", "two"))
    assert set(two.defocus_u_A) <= set(one.defocus_u_A) and two.rotation is not None
    assert two.groups[0].box_px == 50 and two.groups[0].pixel_size_A == 4.0


def test_command_refuses_what_is_wrong(tmp_path):
    with raises_code("file-not-found", InputError):
        command("nothing.mrc", tmp_path)
    with raises_code("choice-unknown", InputError):
        command("phantom", tmp_path, "--mode", "up")
    with raises_code("model-exceeds-box", InputError):
        command("phantom", tmp_path, "--box", 20)
    with raises_code("symmetry-unknown", CryoisoError):
        command("phantom", tmp_path, "--symmetry", "Q", "--n", 2)
    (tmp_path / "truth.star").write_text("precious")
    with raises_code("file-exists", UsageError):
        command("phantom", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["truth.star"]


@pytest.mark.relion
def test_relion_projects_the_same_images_from_our_truth(tmp_path):
    """relion_project on truth.star and truth_map.mrc gives our noise-free images, CTF and shifts included."""
    import mrcfile

    command("phantom", tmp_path, "--n", 12, "--box", 48, "--pixel-size", 4, "--noise", "none", "--shift-sd", 7)
    relion = [
        "relion_project",
        "--i",
        "truth_map.mrc",
        "--ang",
        "truth.star",
        "--o",
        "theirs",
        "--angpix",
        "4",
        "--ctf",
    ]
    subprocess.run(relion, cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = (mrcfile.read(tmp_path / f"{n}.mrcs") for n in ("particles", "theirs"))
    for a, b in zip(ours, theirs):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999
        assert float((a * b).sum() / (b * b).sum()) == pytest.approx(1, abs=0.01)
