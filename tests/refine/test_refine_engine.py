"""The native engine as a whole, on small simulated sets with known poses."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from mixed_helper import two_microscopes
from mpi_helper import run_mpi

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import Particles
from cryoiso.engines.native import NativeEngine
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.fsc_curve import fsc, resolution_at
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.parallel.context import Context
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.phantom import phantom_map, pseudo_atoms_to_map, trimer
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import SimulatedSource, simulate
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine import batches, maximise, search
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.likelihood import local_scores_torch, with_magnification

BOX, PIXEL_A, DIAMETER_A = 32, 6.0, 145.0


@pytest.fixture(scope="module")
def trimers() -> SimulatedSource:
    """240 images of -5 dB of the C3 phantom."""
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 240, snr_db=-5.0, shift_sd_A=5.0, seed=3))


def small_set() -> ArraySource:
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 120, snr_db=-3.0, shift_sd_A=4.0, seed=9))


@pytest.fixture(scope="module")
def few() -> ArraySource:
    """120 images of -3 dB, for what needs no good poses."""
    return small_set()


def in_memory(source: SimulatedSource) -> ArraySource:
    held = ArraySource(source.read(np.arange(len(source))), source.particles)
    held.truth = source.volume
    return held


def blind(source):
    """The same images without their poses, as a search over all views usually gets them."""
    other = copy.copy(source)
    other.particles = replace(source.particles, rotation=None, shift_A=None)
    return other


def request_for(source, folder: Path | None, symmetry: str = "C3", reference=None, **settings) -> RefineRequest:
    section = RefineSection(**{"healpix_order": 2, "max_iterations": 4, **settings})
    reference = reference or source.truth
    return RefineRequest(
        blind(source), reference, symmetry, folder, section, seed=1, diameter_A=DIAMETER_A, lowpass_A=40.0
    )


def errors_of(particles: Particles, truth: Particles, symmetry: str):
    return pose_errors(
        particles.rotation, truth.rotation, symmetry, align="axis" if symmetry != "C1" else True,
        shift_estimated_A=particles.shift_A, shift_true_A=truth.shift_A,
    )  # fmt: skip


# --- it works


def test_poses_and_maps_of_a_trimer(trimers, tmp_path):
    """From the truth low-passed at 40 Å: median error 3.5 degrees (a pixel is 4.7 at the edge), 12.8 Å of 12."""
    seen = []
    request = replace(request_for(trimers, tmp_path), on_checkpoint=seen.append)
    result = NativeEngine().refine(request, Context())
    errors = errors_of(result.particles, trimers.particles, "C3")
    assert errors.median_deg < 4.5 and errors.fraction_over(20) < 0.03 and errors.median_shift_A < 1.2
    halves = [read_map(result.half_maps[h]) for h in (1, 2)]
    assert halves[0].pixel_size_A == PIXEL_A
    curve = fsc(halves[0].data + halves[1].data, trimers.truth.data)
    assert resolution_at(curve, 0.5, BOX, PIXEL_A) < 13.5 and curve[1:9].min() > 0.97
    whole = (halves[0].data + halves[1].data) / 2
    assert float(np.vdot(trimers.truth.data, whole) / np.vdot(whole, whole)) == pytest.approx(1, abs=0.15)
    # what it says of itself
    record = result.iterations[-1]
    assert result.resolution_A == record["resolution_A"] < 14
    assert [r["iteration"] for r in seen] == list(range(1, len(result.iterations) + 1))
    summary = json.loads((tmp_path / "refine.json").read_text())
    assert summary["particles"] == 240 and len(summary["iterations"]) == len(seen)
    check_particles_file(tmp_path / "particles.star", result.particles)
    noise = np.array(summary["noise_variance"])[0]
    np.testing.assert_allclose(noise[3:15], 1, rtol=0.1)
    names = {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()}
    assert names == {
        "particles.star", "half1.mrc", "half2.mrc", "refine.json", "timing.json", "checkpoint/state.npz",
        "checkpoint/state.previous.npz",
    }  # fmt: skip


def check_particles_file(file: Path, expected: Particles) -> None:
    from cryoiso.io import read_particle_file

    written = read_particle_file(file)
    np.testing.assert_allclose(written.rotation, expected.rotation, atol=1e-6)
    np.testing.assert_allclose(written.shift_A, expected.shift_A, atol=1e-5)
    np.testing.assert_array_equal(written.uid, expected.uid)
    np.testing.assert_array_equal(written.half, expected.half)
    for name in ("rlnLogLikeliContribution", "rlnMaxValueProbDistribution", "cryoisoPoseEntropy"):
        assert name in written.table and np.isfinite(written.table[name].astype(float)).all()


def test_an_asymmetric_particle(tmp_path):
    """The trimer without one of its heads, C1."""
    atoms = trimer(1)
    keep = np.ones(len(atoms.coords_A), bool)
    keep[: len(keep) // 3] = atoms.coords_A[: len(keep) // 3, 2] < 20
    truth = pseudo_atoms_to_map(*(a[keep] for a in atoms), BOX, PIXEL_A, 14.0)
    source = in_memory(simulate(truth, 160, snr_db=-3.0, shift_sd_A=5.0, seed=3))
    result = NativeEngine().refine(request_for(source, tmp_path, "C1", max_iterations=3), Context())
    errors = errors_of(result.particles, source.particles, "C1")
    assert errors.median_deg < 5.5 and errors.fraction_over(20) < 0.08


def test_two_optics_groups_of_different_pixel_size_and_beam_tilt(tmp_path):
    """Both groups get good poses, shifts in their own Å, and noise spectra of their own."""
    tilt = (25.0, -10.0)  # turns phases by 1 rad at 12 Å
    source = two_microscopes(120, BOX, PIXEL_A, 5.2, snr_db=-3.0, shift_sd_A=7.0, beam_tilt_mrad=tilt)
    result = NativeEngine().refine(request_for(source, tmp_path, max_iterations=3), Context())
    for group in (0, 1):
        rows = source.particles.optics == group
        estimated, true = result.particles.take(rows), source.particles.take(rows)
        errors = errors_of(estimated, true, "C3")
        assert errors.median_deg < 4.5 and errors.median_shift_A < 1.2
        near = errors.shift_errors_A < 5
        slope = np.vdot(true.shift_A[near], estimated.shift_A[near]) / np.vdot(true.shift_A[near], true.shift_A[near])
        assert slope == pytest.approx(1, abs=0.05)


def test_what_does_not_fit_is_refused(trimers, tmp_path):
    small = replace(trimers.truth, data=trimers.truth.data[2:, 2:, 2:])
    with raises_code("box-mismatch", InputError):
        NativeEngine().refine(request_for(trimers, tmp_path, reference=small), Context())
    one_half = ArraySource(trimers.read(np.arange(240)), replace(trimers.particles, half=np.ones(240, np.int8)))
    one_half.truth = trimers.truth
    with raises_code("half-set-empty", InputError, match="half-set 2 is empty"):
        NativeEngine().refine(request_for(one_half, tmp_path), Context())
    assert list(tmp_path.iterdir()) == []


# --- halves do not mix


@pytest.mark.parametrize("join_halves_A", [0.0, 40.0])
def test_half_sets_are_independent(few, join_halves_A):
    """From one model, half 1's sums, raw map and poses have the same bits whatever the images of half 2 are.

    (Later iterations share the FSC, and below ``join_halves_A`` the sums.)
    """
    half = few.particles.half
    run = Refinement(request_for(few, None, join_halves_A=join_halves_A), Context(), "cpu", DIAMETER_A)
    model = initial_model(run, 40.0)
    images = few.read(np.arange(120))
    noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    changed = ArraySource(np.where((half == 2)[:, None, None], noise, images), few.particles)
    changed.truth = few.truth
    other_run = Refinement(request_for(changed, None, join_halves_A=join_halves_A), Context(), "cpu", DIAMETER_A)
    one, other = run.step(model), other_run.step(model)
    np.testing.assert_array_equal(one.half_maps[1], other.half_maps[1])
    np.testing.assert_array_equal(one.rotation[half == 1], other.rotation[half == 1])
    np.testing.assert_array_equal(one.shift_A[half == 1], other.shift_A[half == 1])
    assert np.abs(one.half_maps[2] - other.half_maps[2]).max() > 0.01 * np.abs(one.half_maps[2]).max()
    assert not np.array_equal(one.rotation[half == 2], other.rotation[half == 2])


def test_each_half_searches_its_own_reference(few):
    """Another reference of half 2 changes half 2 and leaves the bits of half 1; and the other way round."""
    half = few.particles.half
    run = Refinement(request_for(few, None), Context(), "cpu", DIAMETER_A)
    model = initial_model(run, 40.0)
    before = run.step(model)
    for changed, same in ((1, 2), (2, 1)):
        mirrored = {**model.references, changed: np.ascontiguousarray(model.references[changed][:, :, ::-1])}
        after = run.step(replace(model, references=mirrored))
        np.testing.assert_array_equal(after.half_maps[same], before.half_maps[same])
        np.testing.assert_array_equal(after.rotation[half == same], before.rotation[half == same])
        moved = angular_distance_deg(after.rotation, before.rotation, point_group("C3"))[half == changed]
        assert np.median(moved) > 5


# --- the same bits on any number of ranks, and after an interruption

RANKS_SCRIPT = """
import logging
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_refine_engine as t
from cryoiso.parallel.context import get_context
logging.basicConfig(level=logging.INFO)
t.refine_in_small_batches(Path(sys.argv[2]), get_context(), int(sys.argv[3]))
"""


def refine_in_small_batches(folder: Path, comm, ranks: int) -> None:
    """Three iterations with four batches a half-set, and a reconstruction from the final poses."""
    from cryoiso.io.mrc import write_map
    from cryoiso.refine.reconstruct import reconstruct_halves

    if comm.size != ranks:
        raise RuntimeError(f"{comm.size} ranks instead of {ranks}")
    batches.BATCH_IMAGES = 16
    source = small_set()
    request = replace(request_for(source, folder, max_iterations=3, healpix_order=1), resume=True)
    result = NativeEngine().refine(request, comm)
    found = reconstruct_halves(source, result.particles, comm, symmetry="C3")
    for half, volume in found.items():
        if volume is not None:
            write_map(folder / f"reconstructed{half}.mrc", volume.data, volume.pixel_size_A)


def contents(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file but the timings; an archive by its arrays, since zip files carry dates."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".npz":
            arrays = np.load(file)
            data = b"".join(k.encode() + arrays[k].tobytes() for k in sorted(arrays.files))
        elif file.is_file() and file.name != "timing.json":
            data = file.read_bytes()
        else:
            continue
        found[file.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.mpi
def test_one_two_and_three_ranks_give_the_same_bits(tmp_path):
    """Half-maps, poses, checkpoints and reconstructions; with three ranks no two have the same share."""
    here = str(Path(__file__).parent)
    for n in (1, 2, 3):
        run_mpi(n, ["-c", RANKS_SCRIPT, here, tmp_path / str(n), str(n)])
    one = contents(tmp_path / "1")
    assert {"half1.mrc", "half2.mrc", "particles.star", "reconstructed1.mrc", "checkpoint/state.npz"} <= set(one)
    assert one["half1.mrc"] != one["half2.mrc"]
    assert contents(tmp_path / "2") == one
    assert contents(tmp_path / "3") == one


class StoppingContext(Context):
    """Somebody sends SIGTERM after so many questions whether to stop."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def require_same_bits(request_in: Callable[[Path], RefineRequest], script: str, folder: Path) -> None:
    """On two ranks, and killed after its first iteration, stopped and resumed, as on one rank without interruption.

    Args:
        request_in: a request by the folder of its results; on 2 ranks ``script`` makes it in sys.argv[2].
    """
    NativeEngine().refine(request_in(folder / "1"), Context())
    run_mpi(2, ["-c", script, str(Path(__file__).parent), folder / "2"])
    assert contents(folder / "2") == contents(folder / "1")

    class Killed(Exception):
        pass

    def kill(record) -> None:
        if record["iteration"] == 1:
            raise Killed

    request = request_in(folder / "resumed")
    with pytest.raises(Killed):
        NativeEngine().refine(replace(request, on_checkpoint=kill), Context())
    with pytest.raises(Interrupted):
        NativeEngine().refine(replace(request, resume=True), StoppingContext(after=2))
    NativeEngine().refine(replace(request, resume=True), Context())
    assert contents(folder / "resumed") == contents(folder / "1")


def test_resuming_gives_the_same_bits(few, tmp_path):
    """Killed right after a checkpoint, and stopped by a signal in the middle of the next iteration."""
    iterations = {"max_iterations": 3, "healpix_order": 1}
    straight = NativeEngine().refine(request_for(few, tmp_path / "straight", **iterations), Context())

    class Killed(Exception):
        pass

    def kill(record) -> None:
        if record["iteration"] == 1:
            raise Killed

    request = request_for(few, tmp_path / "resumed", **iterations)
    with pytest.raises(Killed):
        NativeEngine().refine(replace(request, on_checkpoint=kill), Context())
    with pytest.raises(Interrupted, match="what was found so far is kept"):
        NativeEngine().refine(replace(request, resume=True), StoppingContext(after=1))
    assert not (tmp_path / "resumed" / "half1.mrc").exists()
    seen = []
    resumed = NativeEngine().refine(replace(request, resume=True, on_checkpoint=seen.append), Context())
    assert [r["iteration"] for r in seen] == [2, 3]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    np.testing.assert_array_equal(resumed.particles.rotation, straight.particles.rotation)
    # a finished refinement that is resumed does nothing and gives the same
    again = NativeEngine().refine(replace(request, resume=True, on_checkpoint=kill), Context())
    np.testing.assert_array_equal(again.particles.rotation, straight.particles.rotation)


# --- the other implementation of the heavy steps


def torch_scores(white, volume, particle, rotation, shift_px, spacing_px, together=1):
    rotation = with_magnification(rotation, white.magnification)
    return local_scores_torch(white, volume, particle, rotation, shift_px, spacing_px)


def agree(one, other, particles: Particles) -> None:
    """Two iterations from one model, up to rounding: almost all poses the same, and the maps."""
    moved = angular_distance_deg(one.rotation, other.rotation, point_group("C3"))
    assert np.mean(moved > 0.05) < 0.02
    for half in (1, 2):
        assert fsc(one.half_maps[half], other.half_maps[half])[1:15].min() > 0.999
    np.testing.assert_allclose(one.sigma2[:, 1:14], other.sigma2[:, 1:14], rtol=1e-3)
    name = "rlnLogLikeliContribution"
    np.testing.assert_allclose(one.columns[name], other.columns[name], atol=0.1)
    assert len(particles) == len(moved)


def test_an_iteration_in_plain_torch_is_the_same(few, monkeypatch):
    """What a GPU runs, here on the CPU: slices, scores and insertion without the numba kernels."""
    run = Refinement(request_for(few, None), Context(), "cpu", DIAMETER_A)
    model = run.step(initial_model(run, 40.0))  # from then on views have a prior
    one = run.step(model)
    used = []
    monkeypatch.setattr(FourierVolume, "slices", lambda *a: used.append("slices") or FourierVolume.slices_torch(*a))
    monkeypatch.setattr(SliceAccumulator, "insert", lambda *a: used.append("in") or SliceAccumulator.insert_torch(*a))
    monkeypatch.setattr(search, "local_scores", lambda *a, together: used.append("scores") or torch_scores(*a))
    monkeypatch.setattr(maximise, "model_terms", lambda *a: used.append("terms") or maximise.model_terms_torch(*a))
    other = run.step(model)
    assert {"slices", "in", "scores", "terms"} <= set(used)
    agree(one, other, few.particles)


@pytest.mark.gpu
def test_an_iteration_on_a_gpu_is_the_same(few):
    run = Refinement(request_for(few, None), Context(), "cpu", DIAMETER_A)
    model = initial_model(run, 40.0)
    there = Refinement(request_for(few, None), Context(), "cuda", DIAMETER_A)
    agree(run.step(model), there.step(model), few.particles)
    assert torch.cuda.is_available()
