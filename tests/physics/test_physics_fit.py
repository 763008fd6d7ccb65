"""Rigid fitting: known placements are found again, hands are told apart, axes are kept, doubt is admitted.

Oracles: densities of pseudo-atoms, made anew at their transformed coordinates (no interpolation), and superpositions of
atomic models by their sequences.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.metrics.mapmodel import correlation, to_frame
from cryoiso.physics import fit_search as fs
from cryoiso.physics.fit import Placement, apply_fit, fit_about_axis, fit_into, inverted
from cryoiso.physics.phantom import homologue, pseudo_atoms_to_map, trimer
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import angular_distance_deg, random_rotations, rotvec_to_matrix
from cryoiso.physics.symmetry import point_group

BOX, PIXEL = 40, 4.5
Z = np.array([0.0, 0.0, 1.0])


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def turn(axis, deg: float) -> np.ndarray:
    return rotvec_to_matrix(np.radians(deg) * np.asarray(axis, float))[0]


@lru_cache(maxsize=8)
def atoms(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates, weights and widths of a C1, C3 or D2 object; 'relative' is a homologue of the C3 one."""
    coords, weight, sigma = homologue(1) if kind == "relative" else trimer(1)
    if kind in ("C3", "relative"):
        return coords, weight, sigma
    third = len(coords) // 3
    one, weight, sigma = coords[:third] - coords[:third].mean(0), weight[:third], sigma[:third]
    if kind == "C1":
        return one, weight, sigma
    ops = point_group(kind)
    one = one * 0.8 + np.array([17.0, 11.0, 15.0])
    return np.concatenate([one @ op.T for op in ops]), np.tile(weight, len(ops)), np.tile(sigma, len(ops))


def density(
    kind: str, r=None, d=(0, 0, 0), box: int = BOX, pixel: float = PIXEL, hand: int = 1, resolution_A: float = 9.0
) -> DensityMap:
    """The object's exact density after x -> R (hand x) + d."""
    coords, weight, sigma = atoms(kind)
    moved = hand * coords @ (np.eye(3) if r is None else r).T + np.asarray(d)
    return pseudo_atoms_to_map(moved, weight, sigma, box, pixel, resolution_A)


def noisy(clean: DensityMap, sd: float, seed: int = 0) -> DensityMap:
    """White noise of ``sd`` times the standard deviation of the map."""
    noise = rng(seed).standard_normal(clean.data.shape) * sd * clean.data.std()
    return DensityMap((clean.data + noise).astype(np.float32), clean.pixel_size_A)


def misfit(placement: Placement, kind: str, r, d, r2=None, d2=(0, 0, 0), symmetry: str = "C1") -> float:
    """RMS distance in Å of the atoms from where they belong, modulo symmetry: laid from (r, d), wanted at (r2, d2)."""
    coords = atoms(kind)[0]
    laid = placement.points(coords @ r.T + np.asarray(d))
    wanted = coords @ (np.eye(3) if r2 is None else r2).T + np.asarray(d2)
    return min(float(np.sqrt(((laid @ op.T - wanted) ** 2).sum(1).mean())) for op in point_group(symmetry))


# --- moving maps


@pytest.mark.parametrize("box, box_out, pixel_out", [(40, 40, 4.5), (41, 40, 4.5), (40, 37, 5.0), (40, 55, 3.7)])
def test_a_placed_map_is_the_density_of_the_placed_atoms(box, box_out, pixel_out):
    r, d = random_rotations(rng(1), 1)[0], np.array([4.0, -7.0, 5.5])
    limits = {18.0: 0.01} if pixel_out != PIXEL else {9.0: 0.04, 13.5: 0.012, 18.0: 0.003}
    for resolution_A, limit in limits.items():
        start = density("C1", box=box, resolution_A=resolution_A)
        placed = place_map(start.data, PIXEL, r, d, box_out, pixel_out)
        exact = density("C1", r, d, box_out, pixel_out, resolution_A=resolution_A).data
        assert np.linalg.norm(placed - exact) < limit * np.linalg.norm(exact)


def test_the_conventions_are_those_of_to_frame():
    r, d = random_rotations(rng(2), 1)[0], np.array([3.0, 5.0, -6.0])
    start = density("C1", resolution_A=18.0)
    a = apply_fit(start, Placement(r, d, 0.0)).data
    b = to_frame(start.data, r.T, -r.T @ d, PIXEL)
    assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("box", [40, 41])
def test_the_mirror_image_is_that_of_the_atoms(box):
    assert np.allclose(inverted(density("C1", box=box).data), density("C1", box=box, hand=-1).data, atol=1e-5)
    r, d = random_rotations(rng(3), 1)[0], np.array([3.0, -4.0, 2.0])
    placed = apply_fit(density("C1", box=box), Placement(r, d, 0.0, mirrored=True)).data
    assert correlation(placed, density("C1", r, d, box, hand=-1).data) > 0.999


def test_placements_follow_one_another():
    (a, b), (u, v) = random_rotations(rng(4), 2), rng(5).normal(0, 9, (2, 3))
    points = rng(6).normal(0, 30, (5, 3))
    for mirrored in (False, True):
        first, second = Placement(a, u, 0.0), Placement(b, v, 0.0, mirrored)
        assert np.allclose(second.after(first).points(points), second.points(first.points(points)))


# --- the numbers underneath


def small_pair(kind: str = "C1", resolution_A: float = 14.0) -> fs.Pair:
    moving = density(kind, turn(Z, 20), (6, -3, 4), 36, 5.0)
    return fs.make_pair(fs.make_body(moving, resolution_A), density(kind), resolution_A)


def test_samples_are_the_transform_of_the_turned_map():
    """Against the transform summed voxel by voxel; trilinear at padding 2 leaves a few percent."""
    pair = small_pair()
    r = random_rotations(rng(7), 1)
    found = pair.sample(r)[0].numpy()
    padded = np.fft.irfftn(half_space(pair.body), s=(2 * pair.body.fourier.box_px,) * 3, axes=(0, 1, 2))
    inner = np.fft.fftshift(padded)
    coords = (np.indices(inner.shape) - len(inner) // 2)[::-1].reshape(3, -1) * pair.body.pixel_size_A
    near = np.abs(coords).max(0) <= pair.body.fourier.box_px / 2 * pair.body.pixel_size_A
    envelope = np.prod(np.sinc(coords[:, near] / (2 * pair.body.fourier.box_px * pair.body.pixel_size_A)) ** 2, 0)
    values = inner.ravel()[near] * envelope
    rows = rng(8).choice(len(pair.index), 200, replace=False)
    k = pair.index[rows] / pair.side_A @ r[0]
    exact = np.exp(-2j * np.pi * k @ coords[:, near]) @ values
    scale = np.vdot(found[rows], exact) / np.vdot(found[rows], found[rows])
    assert np.linalg.norm(exact - scale * found[rows]) < 0.05 * np.linalg.norm(exact)


def half_space(body: fs.Body) -> np.ndarray:
    """The body's padded transform in numpy's layout, from the grid that is sampled."""
    grid, size = body.fourier.grid.numpy(), 2 * body.fourier.box_px
    h = grid.shape[2] - 1
    low = np.arange(-h + 1, h)
    full = np.zeros((size, size, size // 2 + 1), complex)
    columns = np.arange(min(h, size // 2))
    full[np.ix_(low % size, low % size, columns)] = grid[np.ix_(low + h, low + h, columns)]
    return full


def test_the_best_shift_of_a_rotation_is_found_over_the_whole_box():
    pair = small_pair()
    right = turn(Z, -20)
    shift, score = fs.search(pair, np.stack([right, turn(Z, 70)]), fs.FULL, (False,))[False]
    middle = right @ pair.body.centre_A
    assert np.abs(shift[0] - middle - right @ np.array([-6, 3, -4])).max() < 0.3 * pair.finest_A
    assert score[0] > 0.8 > 0.4 > score[1]
    on_grid = pair.score(np.stack([right, turn(Z, 70)]), shift)
    assert np.allclose(on_grid, score, atol=1e-4), "FFT over all shifts and the sum at one shift"


@pytest.mark.parametrize("mirrored", [False, True])
def test_steps_follow_the_slope_of_the_score(mirrored):
    """J^T residual is proportional to the score's own derivatives."""
    pair = small_pair()
    r, u = random_rotations(rng(9), 1), np.array([[3.0, -2.0, 4.0]])
    free = np.diag([1 / pair.body.radius_A] * 3 + [1.0] * 3)
    score, _, slope = fs._linearised(pair, r, u, mirrored, free)
    assert score[0] == pytest.approx(pair.score(r, u, mirrored)[0], abs=1e-4)
    numeric = []
    for column in 1.5 * np.eye(6):
        ends = [rotvec_to_matrix(s * (free @ column)[:3]) @ r for s in (1, -1)], [u + s * column[3:] for s in (1, -1)]
        up, down = (pair.score(a, b, mirrored)[0] for a, b in zip(*ends, strict=True))
        numeric.append((up - down) / 3)
    assert np.corrcoef(numeric, slope[0])[0, 1] > 0.97


# --- fits


@pytest.mark.parametrize("noise, limit_A", [(0.0, 0.2), (3.0, 1.2)])
def test_a_lost_object_is_found(noise, limit_A):
    """Another grid, any rotation, far shift: 0.2 Å is 0.05 px, and 0.5 degrees at the rim of this object."""
    r, d = random_rotations(rng(10), 1)[0], np.array([12.0, -9.0, 14.0])
    fit = fit_into(density("C1", r, d, 47, 4.0), noisy(density("C1"), noise), resolution_A=13.0)
    assert misfit(fit.best, "C1", r, d) < limit_A
    assert fit.hand == "same" and not fit.ambiguous and fit.score > fit.score_mirror + 0.1
    assert "same hand, clearly" in fit.verdict
    placed = apply_fit(density("C1", r, d, 47, 4.0), fit, BOX, PIXEL)
    assert correlation(placed.data, density("C1").data) > 0.99


def test_a_part_finds_its_place_in_the_whole():
    coords, weight, sigma = atoms("C3")
    part = slice(0, len(coords) // 3)
    r, d = random_rotations(rng(11), 1)[0], np.array([-5.0, 2.0, 7.0])
    moving = pseudo_atoms_to_map(coords[part] @ r.T + d, weight[part], sigma[part], BOX, PIXEL, 9.0)
    fit = fit_into(moving, density("C3"), resolution_A=13.0, symmetry="C3", mirror=False)
    laid = fit.best.points(coords[part] @ r.T + d)
    assert min(np.sqrt(((laid @ op.T - coords[part]) ** 2).sum(1).mean()) for op in point_group("C3")) < 1.0
    assert not fit.on_axes and "does not have the symmetry C3" in fit.verdict and np.isnan(fit.score_mirror)


@pytest.mark.parametrize("symmetry", ["C1", "C3"])
def test_the_other_hand_is_seen_and_not_flipped(symmetry):
    r, d = random_rotations(rng(12), 1)[0], np.array([4.0, 3.0, -5.0])
    moving, target = density(symmetry, r, d), density(symmetry, hand=-1)
    fit = fit_into(moving, target, resolution_A=13.0, symmetry=symmetry)
    assert fit.hand == "mirrored" and "wrong hand" in fit.verdict and not fit.best.mirrored
    assert fit.mirror is not None and fit.score_mirror > 0.95 > fit.score + 0.3
    laid = fit.mirror.points(atoms(symmetry)[0] @ r.T + d)
    wanted = -atoms(symmetry)[0]
    assert min(np.sqrt(((laid @ op.T - wanted) ** 2).sum(1).mean()) for op in point_group(symmetry)) < 0.2
    assert correlation(apply_fit(moving, fit.mirror).data, target.data) > 0.99


def test_what_has_no_hand_leaves_it_undecided():
    blobs = np.array([[0, 0, 0], [45, 0, 0], [0, 30, 0], [-20, -35, 0], [30, 30, 0.0]])  # in one plane
    weight, sigma = np.arange(1.0, 6), np.full(5, 6.0)
    r = random_rotations(rng(13), 1)[0]
    moving = pseudo_atoms_to_map(blobs @ r.T, weight, sigma, BOX, PIXEL, 9.0)
    fit = fit_into(moving, noisy(pseudo_atoms_to_map(blobs, weight, sigma, BOX, PIXEL, 9.0), 0.3), resolution_A=12.0)
    assert fit.hand == "undecided" and "undecided at 12 Å" in fit.verdict
    assert abs(fit.score - fit.score_mirror) < 0.01


def test_pseudo_symmetry_is_told():
    """A C3 object in a frame said to be C1: three places fit equally well."""
    r = random_rotations(rng(14), 1)[0]
    fit = fit_into(density("C3", r), density("C3"), resolution_A=14.0, mirror=False)
    assert fit.ambiguous and fit.runner_up is not None and "Not unique" in fit.verdict and "120°" in fit.verdict
    assert fit.score - fit.optima[2].score < 0.01 < fit.score - (fit.optima[3].score if len(fit.optima) > 3 else 0)


# --- symmetric objects


def test_about_the_axis_only_spin_slide_and_flip_are_free():
    r, d = turn(Z, 47) @ np.diag([1.0, -1.0, -1.0]), 11.0 * Z
    fit = fit_about_axis(density("C3", r, d), density("C3"), resolution_A=13.0, symmetry="C3")
    assert misfit(fit.best, "C3", r, d, symmetry="C3") < 0.1
    assert abs(fit.rotation[2, 2]) == pytest.approx(1, abs=1e-9) and np.abs(fit.shift_A[:2]).max() < 1e-9
    assert fit.hand == "same" and not fit.ambiguous


def axis_of(placement: Placement, r: np.ndarray, d: np.ndarray) -> tuple[float, float]:
    """Tilt in degrees and distance in Å of an object's own z axis after it was moved by (r, d) and fitted."""
    ends = placement.points(np.array([[0, 0, -50.0], [0, 0, 50.0]]) @ r.T + d)
    along = (ends[1] - ends[0]) / 100
    return float(np.degrees(np.arccos(min(1, abs(along[2]))))), float(np.hypot(*ends.mean(0)[:2]))


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_an_axis_that_lies_anywhere_comes_onto_z(noise):
    r, d = random_rotations(rng(15), 1)[0], np.array([6.0, -8.0, 3.0])
    target = noisy(density("C3"), noise)
    fit = fit_into(density("C3", r, d), target, resolution_A=13.0, symmetry="C3", mirror=False)
    tilt, off = axis_of(fit.best, r, d)
    assert fit.on_axes and not fit.off_axis and tilt < 0.1 and off < 0.1, "however noisy the target is"
    assert misfit(fit.best, "C3", r, d, symmetry="C3") < (0.15 if noise == 0 else 1.0)
    assert fit.free is not None and fit.free.score == pytest.approx(fit.score, abs=0.03)


def test_a_homologue_on_its_axis_stays_on_it_and_finds_its_spin():
    spin, slide = turn(Z, 95), 6.0 * Z
    fit = fit_into(density("relative", spin, slide), density("C3"), resolution_A=13.0, symmetry="C3")
    assert fit.on_axes and fit.rotation[2, 2] == pytest.approx(1, abs=1e-6) and np.abs(fit.shift_A[:2]).max() < 1e-6
    total = fit.rotation @ spin
    assert angular_distance_deg(total.T, np.eye(3), point_group("C3"))[0] < 3
    assert abs(fit.shift_A[2] + 6) < 1.5 and fit.hand == "same" and not fit.ambiguous


def test_a_target_off_its_axis_is_doubted():
    r, d = turn((1, 0, 0), 25), np.array([9.0, 0.0, 0.0])
    fit = fit_into(density("C3"), density("C3", r, d), resolution_A=13.0, symmetry="C3", mirror=False)
    assert fit.off_axis and "axes may lie elsewhere" in fit.verdict
    assert fit.free is not None and misfit(fit.free, "C3", np.eye(3), np.zeros(3), r, d) < 40


@pytest.mark.parametrize("start", ["any", "on its axes"])
def test_d2(start):
    r = random_rotations(rng(16), 1)[0] if start == "any" else turn(np.ones(3) / 3**0.5, 120) @ turn(Z, 90)
    d = np.array([5.0, 4.0, -3.0]) if start == "any" else np.zeros(3)
    fit = fit_into(density("D2", r, d), density("D2"), resolution_A=13.0, symmetry="D2", mirror=start == "any")
    assert fit.on_axes and misfit(fit.best, "D2", r, d, symmetry="D2") < 0.15
    assert fit.hand in ("same", "not tried") and not fit.ambiguous and fit.score > 0.95


# --- bad input


def test_what_cannot_be_fitted_is_refused():
    good, flat = density("C1"), DensityMap(np.zeros((32, 32, 32), np.float32), 4.0)
    with raises_code("grid-too-coarse", InputError, match=r"moving map's grid is too coarse.*lower resolution"):
        fit_into(good, good, resolution_A=8.0)
    with raises_code("map-without-density", InputError, match="target map of the fit is empty"):
        fit_into(good, flat, resolution_A=12.0)
    with raises_code("map-without-density", InputError, match="moving map of the fit is empty"):
        fit_into(DensityMap(good.data * np.nan, PIXEL), good, resolution_A=12.0)
    with raises_code("symmetry-unknown", InputError):
        fit_into(good, good, resolution_A=12.0, symmetry="Q3")


# --- real models and a real map


def traces(path) -> list[tuple[list[str], np.ndarray]]:
    """Residues and CA positions of each chain of a trimer, in its C3 frame."""
    from cryoiso.io.models import read_model
    from cryoiso.io.symmetryframe import symmetry_frame

    model = read_model(path)
    frame, point = symmetry_frame(model, "C3")
    chains = [[(res.name, a.pos.tolist()) for res in chain for a in res if a.name == "CA"] for chain in model]
    return [([n for n, _ in c], (np.array([x for _, x in c]) - point) @ frame.T) for c in chains if len(c) > 50]


def matched(a: tuple[list[str], np.ndarray], b: tuple[list[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """CA positions of the residues that a sequence alignment pairs."""
    import gemmi

    found = gemmi.align_string_sequences(a[0], b[0], [], gemmi.AlignmentScoring())
    i = j = 0
    pairs = []
    for count, letter in re.findall(r"(\d+)([MID])", found.cigar_str()):
        n = int(count)
        pairs += [(i + k, j + k) for k in range(n)] if letter == "M" else []
        i, j = i + n * (letter in "MI"), j + n * (letter in "MD")
    rows = np.array(pairs)
    return a[1][rows[:, 0]], b[1][rows[:, 1]]


def spin_by_sequence(moving, target) -> float:
    """Angle about z, modulo 120 degrees, between two trimers in their frames: mean over the chains' superpositions."""
    from cryoiso.io.symmetryframe import superpose

    other = traces(target)[0]
    phases = []
    for chain in traces(moving):
        a, b = matched(chain, other)
        keep = np.ones(len(a), bool)
        for _ in range(4):  # loops that differ do not count
            rotation, shift, _ = superpose(a[keep], b[keep])
            distance = np.linalg.norm(a @ rotation.T + shift - b, axis=1)
            keep = distance < max(2.5, np.median(distance))
        phases += [np.exp(3j * np.arctan2(rotation[1, 0], rotation[0, 0]))] * int(keep.sum())
    return float(np.degrees(np.angle(np.sum(phases))) / 3)


@pytest.mark.parametrize(
    "name, limit_deg", [("6wxb", 0.5), ("1ti8", 2), pytest.param("5hmg", 2, marks=pytest.mark.slow)]
)
def test_haemagglutinin(shared, name, limit_deg):
    """Trimers of other subtypes, turned and shifted at random, against CA atoms superposed by sequence.

    The two chains of 1ti8 superpose at spins 7 degrees apart, so the limit is as good as the answer.
    """
    from cryoiso.io.models import model_to_map

    files = [shared / f"data/models/ha/{n}.pdb.gz" for n in (name, "6wxb")]
    moving, target = (model_to_map(f, 48, 4.7, 11.0, align_symmetry_axis="C3") for f in files)
    r, d = random_rotations(rng(17), 1)[0], np.array([5.0, -7.0, 6.0])
    fit = fit_into(DensityMap(place_map(moving.data, 4.7, r, d), 4.7), target, resolution_A=11.5, symmetry="C3")
    expected = turn(Z, spin_by_sequence(*files))
    assert angular_distance_deg((fit.rotation @ r).T, expected.T, point_group("C3"))[0] < limit_deg
    assert fit.hand == "same" and not fit.ambiguous and fit.on_axes
    if name == "6wxb":
        assert np.linalg.norm(fit.rotation @ d + fit.shift_A) < 0.3 * 4.7
        other = fit_about_axis(moving, DensityMap(inverted(target.data), 4.7), resolution_A=11.5, symmetry="C3")
        assert other.hand == "mirrored"


@pytest.mark.slow
def test_beta_galactosidase_map_and_model(shared):
    """A published map and an atomic model of another group: D2, hand, and the place without interpolation."""
    from cryoiso.io.models import model_to_map
    from cryoiso.io.mrc import read_map

    target = read_map(shared / "data/maps/betagal_relion_tutorial_3.54A_100.mrc")
    moving = model_to_map(shared / "data/models/8bk7.cif.gz", 80, 3.0, 10.0, align_symmetry_axis="D2")
    fit = fit_into(moving, target, resolution_A=12.0, symmetry="D2")
    assert fit.on_axes and fit.hand == "same" and not fit.ambiguous and fit.score > 0.7 > fit.score_mirror + 0.4
    assert fit.free is not None
    assert angular_distance_deg(fit.rotation.T, fit.free.rotation.T, point_group("D2"))[0] < 0.2
    assert fit_into(moving, DensityMap(inverted(target.data), 3.54), resolution_A=12.0).hand == "mirrored"


def test_a_ribosome(shared):
    """C1, larger than a trimer, at 20 Å, in noise of twice its own standard deviation."""
    from cryoiso.io.models import model_to_map

    target = model_to_map(shared / "data/models/4v5a_70S_assembly1.cif.gz", 52, 7.0, 18.0)
    r, d = random_rotations(rng(18), 1)[0], np.array([20.0, -11.0, 8.0])
    moving = DensityMap(place_map(target.data, 7.0, r, d), 7.0)
    fit = fit_into(moving, noisy(target, 2.0), resolution_A=20.0)
    assert angular_distance_deg(fit.rotation @ r, np.eye(3))[0] < 0.5
    assert np.linalg.norm(fit.rotation @ d + fit.shift_A) < 0.3 * 7.0
    assert fit.hand == "same" and not fit.ambiguous
