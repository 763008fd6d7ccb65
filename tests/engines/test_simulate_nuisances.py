"""Nuisances of simulated sets: each one measured on the images, against what the truth says of them."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from nuisance_helper import FLAT, both
from scipy import stats

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, OpticsGroup
from cryoiso.physics.contrast_transfer import wavelength_A
from cryoiso.physics.nuisances.settings import Ice, Junk, Micrographs, Neighbours, Nuisances, Optics
from cryoiso.physics.nuisances.shape import Outline, blob, inside, without_part
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import CtfRanges, SimulatedSource, make_particles
from cryoiso.physics.so3 import view_direction
from cryoiso.physics.views import GivenViews, Views

LAM = wavelength_A(300.0)


@pytest.fixture(scope="module")
def small() -> DensityMap:
    return phantom_map(40, 4.5, 12.0)


@pytest.fixture(scope="module")
def wide() -> DensityMap:
    """The same in a box that neighbours fit into."""
    return phantom_map(120, 4.5, 12.0)


def scores(values: np.ndarray) -> np.ndarray:
    return stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))


def slope(images: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """(n,): least-squares factor of each image on the one without the nuisance."""
    return (images * plain).sum((1, 2)) / (plain * plain).sum((1, 2))


def test_without_any_switch_images_are_the_same_bits(small):
    b = both(small, 20, Nuisances(), shift_sd_A=4.0)
    np.testing.assert_array_equal(b.source.read(b.rows), b.plain.read(b.rows))
    for name in ("defocus_u_A", "ctf_scale", "ctf_bfactor_A2", "rotation", "shift_A", "optics"):
        np.testing.assert_array_equal(getattr(b.source.truth.given, name), getattr(b.plain.particles, name))


EVERYTHING = Nuisances(
    Neighbours(0.5, 1.0),
    Ice((200.0, 800.0)),
    Micrographs(3, False, True, 4000.0, 10.0, 50.0, 200.0, 100.0, (0.0, 80.0), 0.2, 0.1),
    Optics(2, (0.4, 0.1), 0.2),
    Junk({"empty": 0.2, "pair": 0.2}),
)


def test_images_depend_neither_on_order_nor_on_blocks(small):
    b = both(small, 40, EVERYTHING, shift_sd_A=5.0)
    whole = b.source.read(b.rows)
    for rows in (np.array([7]), np.array([39, 0, 7]), np.arange(30, 34)):
        np.testing.assert_allclose(b.source.read(rows), whole[rows], atol=5e-6)
    again = both(small, 40, EVERYTHING, shift_sd_A=5.0)
    np.testing.assert_array_equal(again.source.read(b.rows), whole)
    pieces = [images for _, images in b.source.blocks((40, 4.5), 7)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=5e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"ice": Ice((300.0, 500.0))},
        {"junk": Junk({"empty": 0.4})},
        {"micrographs": Micrographs(defocus_error_sd_A=500.0, scale_sd=0.3)},
        {"optics": Optics(3, beam_tilt_sd_mrad=1.0)},
        {"neighbours": Neighbours(1.0)},
    ],
)
def test_one_nuisance_leaves_poses_noise_and_the_others_alone(small, changed):
    few = replace(EVERYTHING, neighbours=Neighbours(0.3), ice=Ice())
    one, other = (both(small, 30, s, shift_sd_A=5.0).source for s in (few, replace(few, **changed)))
    np.testing.assert_array_equal(one.particles.rotation, other.particles.rotation)
    noise = [
        (s.read(np.arange(30)) - s.signal(np.arange(30))) / s.truth.noise_scale[:, None, None] for s in (one, other)
    ]
    np.testing.assert_allclose(*noise, atol=2e-5)
    if "neighbours" not in changed and "junk" not in changed:
        np.testing.assert_array_equal(one.truth.copies.position_A, other.truth.copies.position_A)
    if "micrographs" not in changed and "ice" not in changed:
        np.testing.assert_array_equal(one.truth.signal_scale, other.truth.signal_scale)


# --- neighbours and pairs


def test_centre_of_mass_of_a_neighbour_is_where_the_truth_says(wide):
    settings = Nuisances(Neighbours(0.12, 1.2))
    b = both(wide, 100, settings, ctf=FLAT, shift_sd_A=10.0, noise=None)
    copies, pixel = b.source.truth.copies, wide.pixel_size_A
    extra = b.source.read(b.rows) - b.plain.read(b.rows)
    where = np.indices(wide.data.shape)[::-1] - 60
    com = (where * wide.data).sum((1, 2, 3)) / wide.data.sum() * pixel  # x, y, z of the object's own
    y, x = (np.indices((120, 120)) - 60) * pixel
    seen = 0
    for row in b.rows:
        index = np.flatnonzero(copies.row == row)
        if len(index) != 1 or np.abs(copies.position_A[index[0], :2]).max() > 190:
            continue
        mass = extra[row].sum(dtype=np.float64)
        assert mass == pytest.approx(0.99 * wide.data.sum(dtype=np.float64), rel=0.02)
        found = np.array([(x * extra[row]).sum(), (y * extra[row]).sum()]) / mass
        expected = copies.position_A[index[0], :2] + (copies.rotation[index[0]] @ com)[:2]
        np.testing.assert_allclose(found, expected, atol=0.5 * pixel)
        seen += 1
    assert seen >= 3


def test_neighbours_keep_their_distance_and_number(small):
    diameter = Outline.of(small).diameter_A
    assert 100 < diameter < 150  # the phantom reaches 135 Å across
    b = both(small, 4000, Nuisances(Neighbours(0.05, 1.2)))
    copies = b.source.truth.copies
    assert np.linalg.norm(copies.position_A, axis=1).min() >= 1.2 * diameter
    side = small.box_px * small.pixel_size_A + diameter
    corners = _area_of_square_outside(side / 2, 1.2 * diameter)
    assert len(copies) == pytest.approx(4000 * 0.05 * corners / diameter**2, rel=0.25)
    dense = both(small, 60, Nuisances(Neighbours(3.0, 0.8))).source.truth.copies
    for row in range(60):
        p = dense.position_A[dense.row == row, :2]
        gaps = np.linalg.norm(p[:, None] - p[None], axis=2)[np.triu_indices(len(p), 1)]
        assert len(p) >= 3 and gaps.min() >= 0.8 * diameter


def _area_of_square_outside(half: float, radius: float) -> float:
    x = np.linspace(-half, half, 2001)
    return float((np.hypot(*np.meshgrid(x, x)) > radius).mean() * (2 * half) ** 2)


def test_a_neighbour_that_leaves_the_image_does_not_come_back_at_the_other_side(small):
    """Copies centred beyond the right edge reach in from there; the left part of the image stays as it was."""
    b = both(small, 300, Nuisances(Neighbours(0.3, 0.9)), ctf=FLAT, noise=None)
    copies = b.source.truth.copies
    alone = np.flatnonzero(np.bincount(copies.row, minlength=300) == 1)
    right = [r for r in alone if copies.position_A[copies.row == r, 0][0] > 100]
    assert len(right) >= 3
    rows = np.array(right)
    extra = b.source.read(rows) - b.plain.read(rows)
    # the interpolation leaves some per cent of the largest value around an object
    assert np.abs(extra[:, :, :14]).max() < 0.03 * b.plain.read(rows).max()
    assert np.abs(extra[:, :, 30:]).max() > 0.2 * b.plain.read(rows).max()


def test_two_stuck_together_touch(wide):
    outline = Outline.of(wide)
    b = both(wide, 40, Nuisances(junk=Junk({"pair": 0.5})), ctf=FLAT, noise=None)
    truth, p = b.source.truth, b.plain.particles
    assert set(truth.kind) == {"pair", "particle"}
    np.testing.assert_array_equal(np.unique(truth.copies.row), np.flatnonzero(truth.kind == "pair"))
    for row, second, position in zip(truth.copies.row, truth.copies.rotation, truth.copies.position_A, strict=True):
        along = position / np.linalg.norm(position)
        first_end = (outline.corners_A @ p.rotation[row].T @ along).max()
        second_start = ((outline.corners_A @ second.T + position) @ along).min()
        assert first_end == pytest.approx(second_start, abs=1e-6)
    extra = (b.source.read(b.rows) - b.plain.read(b.rows)).sum((1, 2), dtype=np.float64)
    whole = 0.99 * wide.data.sum(dtype=np.float64)
    np.testing.assert_allclose(extra[truth.kind == "pair"], whole, rtol=0.05)
    np.testing.assert_allclose(extra[truth.kind == "particle"], 0, atol=1e-3 * whole)


# --- junk


def test_shares_and_looks_of_junk(small):
    settings = Nuisances(junk=Junk({"broken": 0.1, "empty": 0.2, "other": 0.3}))
    objects = {"broken": [without_part(small, 0.4, np.array([1.0, 0, 0]))], "other": [blob(small, 12.0)]}
    b = both(small, 2000, settings, ctf=FLAT, noise=None, objects=objects)
    kind = b.source.truth.kind
    for name, share in {"broken": 0.1, "empty": 0.2, "other": 0.3, "particle": 0.4}.items():
        assert np.mean(kind == name) == pytest.approx(share, abs=0.04)
    rows = np.arange(60)
    images, plain = b.source.read(rows), b.plain.read(rows)
    assert not images[kind[:60] == "empty"].any()
    np.testing.assert_array_equal(images[kind[:60] == "particle"], plain[kind[:60] == "particle"])
    ratio = images.sum((1, 2)) / plain.sum((1, 2))
    np.testing.assert_allclose(ratio[kind[:60] == "broken"], 0.6, atol=0.05)
    np.testing.assert_allclose(ratio[kind[:60] == "other"], 1.0, atol=0.1)


def test_a_cut_takes_one_side(small):
    broken = without_part(small, 0.3, np.array([0, 0, 1.0]))
    lost = small.data - broken.data
    where = inside(small)
    assert lost[where].sum() / small.data[where].sum() == pytest.approx(0.3, abs=0.03)
    z = np.indices(lost.shape)[0] - 20
    assert (z * lost)[where].sum() / lost[where].sum() > (z * broken.data)[where].sum() / broken.data[where].sum() + 10


def test_a_broken_model_lacks_whole_chains(shared):
    from cryoiso.io.models import model_to_map
    from cryoiso.pipeline.commands.simulation_inputs import objects

    path = str(shared / "data/models/ha/6wxb.pdb.gz")
    volume = model_to_map(path, 48, 4.5, 10.0)
    made = objects(volume, path, Junk({"broken": 0.1, "other": 0.1}, 0.33), "", 10.0, 1)
    assert len(made["broken"]) == 2 and np.abs(made["broken"][0].data - made["broken"][1].data).max() > 0.1
    for broken in made["broken"]:
        assert broken.data.sum() / volume.data.sum() == pytest.approx(0.67, abs=0.12)
        assert broken.data.min() > volume.data.min() - 1e-6
    assert made["other"][0].data.sum() == pytest.approx(volume.data.sum(), rel=0.05)


# --- ice, scale, B-factor


@pytest.mark.parametrize("correlation", [0.0, 0.8, -0.5])
def test_thickness_follows_the_view(small, correlation):
    settings = Nuisances(ice=Ice((200.0, 800.0), correlation), micrographs=Micrographs(100))
    b = both(small, 6000, settings, views=Views("preferred", poles=2))
    m = b.source.truth.micrographs
    side = np.arccos(np.abs(view_direction(b.plain.particles.rotation)[:, 2]))
    assert np.corrcoef(scores(side), scores(m.thickness_A[m.of]))[0, 1] == pytest.approx(correlation, abs=0.04)
    assert set(np.bincount(m.of)) == {60}
    assert stats.kstest((m.thickness_A - 200) / 600, "uniform").pvalue > 1e-3


def test_thick_ice_has_less_contrast_and_more_noise(small):
    ice = Ice((200.0, 1000.0), 0.5, mean_free_path_A=2000.0, noise_share=0.4)
    b = both(small, 300, Nuisances(ice=ice, micrographs=Micrographs(5)))
    m = b.source.truth.micrographs
    signal, images = b.source.signal(b.rows), b.source.read(b.rows)
    found = slope(signal, b.plain.signal(b.rows))
    for k, thickness in enumerate(m.thickness_A):
        on_it = m.of == k
        np.testing.assert_allclose(found[on_it], np.exp(-(thickness - 600) / 2000), rtol=1e-3)
        assert (images - signal)[on_it].var() == pytest.approx(0.6 + 0.4 * thickness / 600, rel=0.02)
    thin, thick = np.argmin(m.thickness_A), np.argmax(m.thickness_A)
    ratio = found[m.of == thin].mean() / found[m.of == thick].mean()
    assert ratio == pytest.approx(np.exp((m.thickness_A[thick] - m.thickness_A[thin]) / 2000), rel=1e-3)


def test_scales_scatter_per_micrograph_and_per_particle(small):
    b = both(small, 400, Nuisances(micrographs=Micrographs(40, scale_sd=0.3, particle_scale_sd=0.1)))
    truth = b.source.truth
    found = np.log(slope(b.source.signal(b.rows), b.plain.signal(b.rows)))
    np.testing.assert_allclose(found, np.log(truth.signal_scale), atol=1e-4)
    between = np.array([found[truth.micrographs.of == k].mean() for k in range(40)])
    within = found - between[truth.micrographs.of]
    assert between.std() == pytest.approx(0.3, rel=0.35) and within.std() == pytest.approx(0.1, rel=0.15)
    np.testing.assert_array_equal(truth.given.ctf_scale, 1.0)


def test_bfactor_damps_the_signal(small):
    b = both(small, 60, Nuisances(micrographs=Micrographs(3, bfactor_A2=(50.0, 200.0))))
    m = b.source.truth.micrographs
    with_b, without = (torch.fft.rfft2(torch.from_numpy(s.signal(b.rows))).abs().numpy() for s in (b.source, b.plain))
    s2 = (np.fft.fftfreq(40, 4.5)[:, None] ** 2 + np.fft.rfftfreq(40, 4.5)[None] ** 2)[None]
    expected = np.exp(-0.25 * m.bfactor_A2[m.of][:, None, None] * s2)
    strong = without > 0.01 * without.max()
    np.testing.assert_allclose(
        (with_b / np.where(strong, without, 1))[strong], (expected + 0 * without)[strong], rtol=0.01
    )
    assert m.bfactor_A2.min() >= 50 and m.bfactor_A2.max() <= 200 and not b.source.truth.given.ctf_bfactor_A2.any()


# --- micrographs and defocus


def test_defocus_of_a_tilted_stage_is_a_plane(small):
    settings = Nuisances(micrographs=Micrographs(4, False, True, 3000.0, stage_tilt_deg=30.0))
    b = both(small, 400, settings)
    truth = b.source.truth
    m, columns = truth.micrographs, truth.columns()
    for k in range(4):
        on_it = np.flatnonzero(m.of == k)
        assert len(set(truth.given.defocus_u_A[on_it])) == 1
        x, y = (columns[f"rlnCoordinate{a}"][on_it] * 4.5 for a in "XY")
        design = np.stack([x, y, np.ones(len(x))], 1)
        fit, residual, *_ = np.linalg.lstsq(design, truth.particles.defocus_u_A[on_it], rcond=None)
        assert residual[0] < 1e-6
        assert np.hypot(*fit[:2]) == pytest.approx(np.tan(np.radians(30)), rel=1e-9)
        assert np.degrees(np.arctan2(fit[1], fit[0])) % 360 == pytest.approx(m.tilt_axis_deg[k])
        middle = fit @ [1500, 1500, 1]
        assert middle == pytest.approx(truth.given.defocus_u_A[on_it[0]])
        assert x.min() >= 0 and x.max() <= 3000
    # the images have the true defocus: those of a set that states it
    known = replace(truth.particles)
    images = SimulatedSource(small, known, 3, noise=False).read(b.rows)
    np.testing.assert_array_equal(b.source.signal(b.rows), images)


def test_defocus_errors_stand_in_the_particle_file_alone(small):
    settings = Nuisances(micrographs=Micrographs(50, defocus_error_sd_A=300.0, defocus_error_shared_sd_A=600.0))
    b = both(small, 5000, settings)
    truth = b.source.truth
    np.testing.assert_array_equal(truth.particles.defocus_u_A, b.plain.particles.defocus_u_A)
    error = truth.given.defocus_u_A - truth.particles.defocus_u_A
    np.testing.assert_allclose(truth.given.defocus_v_A - truth.particles.defocus_v_A, error)
    of = truth.micrographs.of
    shared = np.array([error[of == k].mean() for k in range(50)])
    assert shared.std() == pytest.approx(600, rel=0.3) and (error - shared[of]).std() == pytest.approx(300, rel=0.05)
    np.testing.assert_allclose(truth.columns()["cryoisoDefocusError"], error)
    known = both(small, 50, replace(settings, known=True)).source.truth
    assert known.given is known.particles


# --- optics groups


def test_beam_tilt_is_the_phase_of_coma(small):
    b = both(small, 30, Nuisances(micrographs=Micrographs(2), optics=Optics(2, (6.0, -4.0), 2.0)), noise=None)
    p = b.source.particles
    cross = torch.fft.rfft2(torch.from_numpy(np.fft.ifftshift(b.source.read(b.rows), (1, 2))).double()).numpy()
    cross *= np.conj(np.fft.rfft2(np.fft.ifftshift(b.plain.read(b.rows), (1, 2))))
    fy, fx = np.fft.fftfreq(40, 4.5)[:, None], np.fft.rfftfreq(40, 4.5)[None]
    for g, group in enumerate(p.groups):
        tilt = np.array(group.beam_tilt_mrad) * 1e-3
        assert np.abs(tilt * 1e3 - [6, -4]).max() < 6
        expected = -2 * np.pi * 2.7e7 * LAM**2 * (fx**2 + fy**2) * (tilt[0] * fx + tilt[1] * fy)
        found = cross[p.optics == g].sum(0)
        strong = np.abs(found) > 1e-3 * np.abs(found).max()
        strong[:, [0, -1]] = strong[20] = False
        off = np.angle(found * np.exp(-1j * expected))[strong]
        assert np.abs(off).max() < 0.02 and np.abs(np.angle(found))[strong].max() > 0.2
    assert {g.beam_tilt_mrad for g in b.source.truth.given.groups} == {(0.0, 0.0)}


@pytest.mark.relion
def test_relion_takes_the_beam_tilt_out_again(small, tmp_path):
    """relion_reconstruct on tilted images gives the object if told our tilt, and not if told the opposite one."""
    import mrcfile

    from cryoiso.io.star.write import write_particles

    b = both(small, 1000, Nuisances(optics=Optics(1, (30.0, -18.0))), noise=None)
    with mrcfile.new(tmp_path / "particles.mrcs") as file:
        file.set_data(b.source.read(b.rows))
        file.voxel_size = 4.5
    true = b.source.particles
    maps = []
    for sign in (1, -1):
        tilt = tuple(sign * t for t in true.groups[0].beam_tilt_mrad)
        told = replace(true, groups=(replace(true.groups[0], beam_tilt_mrad=tilt),))
        write_particles(tmp_path / "told.star", told)
        run = ["relion_reconstruct", "--i", "told.star", "--o", f"map{sign}.mrc", "--ctf", "--pad", "2"]
        subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
        maps.append(mrcfile.read(tmp_path / f"map{sign}.mrc"))
    curves = [_fsc(v, small.data) for v in maps]
    assert curves[0][2:17].min() > 0.99
    assert curves[1][14:17].max() < 0.6


def _fsc(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from cryoiso.metrics.fsc_curve import fsc

    return np.asarray(fsc(a, b))


def test_grids_of_optics_groups_have_the_same_dose(small):
    """A pixel of side p has noise of variance 1 and a signal that is p times the integral along the beam."""
    settings = Nuisances(optics=Optics(grids=((36, 5.4), (60, 3.0))))
    b = both(small, 900, settings, ctf=FLAT, noise=None)  # 9 micrographs, dealt out to three groups
    integral = small.data.sum(dtype=np.float64) * 4.5**3
    assert b.source.grids == [(40, 4.5), (36, 5.4), (60, 3.0)]
    for grid in b.source.grids:
        rows = b.source.rows_of_grid(grid)
        assert len(rows) == 300
        images = b.source.read(rows[:5])
        assert images.shape == (5, grid[0], grid[0])
        total = images.sum((1, 2), dtype=np.float64) * grid[1]  # of p^2 pixels of p times the integral
        np.testing.assert_allclose(total, 0.99 * integral / 4.5**2, rtol=0.06)  # gridding: some per cent at k = 0
    with pytest.raises(InputError, match="several sizes"):
        b.source.read(np.array([0, 100]))


# --- views and CTFs of files


def test_views_of_a_list_come_with_their_ctfs(small):
    given = make_particles(200, 40, 4.5, views=Views("preferred"), seed=8)
    names = np.array([f"m{i // 20}" for i in range(200)])
    views = GivenViews(view_direction(given.rotation), "CTF row")
    settings = Nuisances(micrographs=Micrographs(from_ctf=True), ice=Ice((200.0, 600.0)))
    b = both(small, 500, settings, ctf=given, views=views, names=names)
    p, m = b.source.particles, b.source.truth.micrographs
    rows = [np.flatnonzero(given.defocus_u_A == d)[0] for d in p.defocus_u_A]
    np.testing.assert_allclose(view_direction(p.rotation), view_direction(given.rotation)[rows], atol=1e-9)
    np.testing.assert_array_equal(m.names[m.of], names[rows])
    in_plane = np.arctan2(p.rotation[:, 1, 2], -p.rotation[:, 0, 2]) / (2 * np.pi) % 1
    assert stats.kstest(in_plane, "uniform").pvalue > 1e-3
    with pytest.raises(InputError, match="no micrographs"):
        both(small, 10, settings, ctf=given)


def test_a_set_with_optics_groups_of_its_own_takes_no_further_ones(small):
    given = make_particles(10, 40, 4.5, seed=8)
    groups = (*given.groups, OpticsGroup(2, "second", 4.5, 40, 200.0, 1.4, 0.07, beam_tilt_mrad=(0.5, 0.1)))
    given = replace(given, groups=groups, optics=np.arange(10, dtype=np.int32) % 2)
    with pytest.raises(InputError, match="of their own"):
        both(small, 10, Nuisances(optics=Optics(2)), ctf=given)
    truth = both(small, 50, Nuisances(optics=Optics(beam_tilt_mrad=(1.0, 0.0))), ctf=given).source.truth
    assert [g.beam_tilt_mrad for g in truth.particles.groups] == [(1.0, 0.0), (1.5, 0.1)]
    assert [g.beam_tilt_mrad for g in truth.given.groups] == [(0.0, 0.0), (0.5, 0.1)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Neighbours(-1), lambda: Neighbours(1, 0), lambda: Ice((0, 100)), lambda: Ice((300, 200)),
        lambda: Ice(view_correlation=1.2), lambda: Ice(noise_share=2), lambda: Micrographs(0),
        lambda: Micrographs(stage_tilt_deg=85), lambda: Micrographs(scale_sd=-0.1), lambda: Optics(0),
        lambda: Micrographs(bfactor_A2=(20.0, 10.0)), lambda: Optics(grids=((4, 1.0),)),
        lambda: Junk({"broken": 0.6, "empty": 0.6}), lambda: Junk({"dust": 0.1}), lambda: Junk({"pair": -0.1}),
        lambda: Micrographs(height_sd_A=-1), lambda: GivenViews(np.empty((0, 3))),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_an_object_larger_than_a_groups_box_is_refused(small):
    with pytest.raises(InputError, match="does not fit the box of optics group 2"):
        both(small, 10, Nuisances(optics=Optics(grids=((16, 4.5),))), ctf=CtfRanges())
