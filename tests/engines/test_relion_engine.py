"""Real RELION as an engine: served by waiting ranks, killed, resumed, co-refined, and by hand with our program."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from pipeline_helper import cryoiso
from relion_helper import HOOK, finish, job_of, refine, relion_by_hand, relion_processes, start, wait_until

from cryoiso.core.config import RefineSection, RelionSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.engines.relion.engine import RelionEngine
from cryoiso.engines.relion.files import Star
from cryoiso.engines.relion.result import final_files
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map
from cryoiso.io.shards import ShardSource
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group

pytestmark = [pytest.mark.relion, pytest.mark.mpi]


@pytest.fixture(scope="module")
def served(data, tmp_path_factory):
    """A whole run on two ranks, its callbacks served by them."""
    out = tmp_path_factory.mktemp("served") / "out"
    said = refine(2, job_of(data), out, "leave")
    return out, said


def test_a_refinement_gives_poses_half_maps_and_a_record(served, data):
    out, said = served
    given, found = (read_particle_file(f, "", ("pose",) * (f.parent == out)) for f in
                    (data / "particles.star", out / "particles.star"))  # fmt: skip
    assert np.array_equal(found.uid, given.uid) and np.array_equal(found.half, given.half)
    assert list(found.table["rlnImageName"]) == list(given.table["rlnImageName"])
    peak = found.table["rlnMaxValueProbDistribution"].astype(float)
    assert ((peak > 0) & (peak <= 1)).all() and "rlnLogLikeliContribution" in found.table
    truth = read_particle_file(data / "truth.star", "", ("pose",))
    error = angular_distance_deg(found.rotation, truth.rotation, point_group("C3"))
    assert np.median(error) < 35  # two coarse iterations of 60 particles; random poses would be at 75
    record = json.loads((out / "refine.json").read_text())
    assert record["engine"] == "relion" and record["relion"]["version"] and record["particles"] == 60
    assert [r["iteration"] for r in record["iterations"]] == [1, 2]
    assert all(r["correction"]["ranks"] == 2 and r["resolution_A"] > 0 for r in record["iterations"])
    assert "iteration 2 begins, resolution" in said and not relion_processes(out / "relion")


def test_half_maps_are_those_that_relion_made_without_a_prior(served):
    out, _ = served
    for half in (1, 2):
        made = read_map(out / f"half{half}.mrc")
        theirs = read_map(final_files(out / "relion" / "run")[f"half{half}"], 7.0)
        assert np.array_equal(made.data, theirs.data) and made.pixel_size_A == pytest.approx(7.0)


def test_the_correction_sees_relions_maps_resolution_and_sampling(served):
    out, _ = served
    with np.load(out / "correction" / "state2.npz") as state:
        assert float(state["step"]) == 30.0 and bool(state["mask"])
        maps = [state["map1"], state["map2"]]
        assert np.corrcoef(state["map1"].ravel(), state["reference1"].ravel())[0, 1] > 0.7
        ours, theirs = fsc(*maps, None), state["fsc"]
        assert np.abs(ours[2:7] - theirs[2:7]).max() < 0.15  # theirs before the corners go and with low shells joined
        model = Star.read(out / "relion" / "run_it002_half1_model.star")
        assert float(state["resolution"]) < 60 and model.number("model_general", "rlnPixelSize") == 7.0
    arrays = [f.name for f in (out / "relion").iterdir() if "_data_real" in f.name or "_weight" in f.name]
    assert arrays == []  # gigabytes an iteration


def test_a_correction_that_does_nothing_changes_nothing(data, tmp_path):
    """RELION with its own relion_external_reconstruct and with our program: the same files, poses and maps."""
    by = {"theirs": None, "ours": HOOK}
    for label, hook in by.items():
        done = relion_by_hand(data, tmp_path / label, hook)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    tables = [Star.read(tmp_path / label / "run_it002_data.star") for label in by]
    for name in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"):
        assert tables[0].column("particles", name) == tables[1].column("particles", name)
    likelihoods = [table.numbers("particles", "rlnLogLikeliContribution") for table in tables]
    np.testing.assert_allclose(*likelihoods, rtol=1e-6)
    for half in (1, 2):
        maps = [read_map(tmp_path / label / f"run_it002_half{half}_class001.mrc", 7.0).data for label in by]
        assert np.abs(maps[0] - maps[1]).max() < 1e-6 * np.abs(maps[0]).max()


@pytest.mark.slow
def test_by_hand_both_halves_meet_for_the_correction(data, tmp_path):
    """Two processes that RELION starts at the same moment; and files of a broken-off job lie in their way."""
    out = tmp_path / "out"
    (job := tmp_path / "job.toml").write_text(
        '[particles]\nfile = "x.star"\n[reference]\nfile = "x.mrc"\n[realign]\nstart_step_deg = 60\nepochs = 1\n'
        '[correct]\npreset = "small"\nsub_maps = 2\ncube_px = 16\nbatch = 2\n'
    )
    out.mkdir()
    for half, other in ((1, 2), (2, 1)):
        note = {"stage": "ready", "token": f"old{half}", "heard": f"old{other}", "star": "x", "maps": "x"}
        (out / f"run_it001_half{half}_class001_cryoiso_meeting.json").write_text(json.dumps(note))
    done = relion_by_hand(data, out, [*HOOK, "--job", str(job)], "--auto_iter_max", "1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "references corrected" in said and (out / "correction").is_dir()
    assert not list(out.glob("*meeting*")) and not list(out.glob("*.npz"))


def gone_within(folder, limit_s):
    wait_until(lambda: not relion_processes(folder), limit_s)


FAILURES = [("fail", "the network broke"), pytest.param("nan", "cannot be used", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind, words", FAILURES)
def test_a_failing_correction_ends_all_with_its_error(data, tmp_path, kind, words):
    began = time.monotonic()
    status, said = finish(start(2, job_of(data), tmp_path / "out", kind))
    assert status == 1 and said.count("error:") == 1 and words in said and time.monotonic() - began < 40
    gone_within(tmp_path / "out" / "relion", 6)
    assert not (tmp_path / "out" / "particles.star").exists()


def test_a_killed_rank_takes_relion_with_it(data, tmp_path):
    status, _ = finish(start(2, job_of(data), tmp_path / "out", "die"))
    assert status != 0
    gone_within(tmp_path / "out" / "relion", 10)


def test_a_killed_relion_is_one_clear_error(data, tmp_path):
    process = start(2, job_of(data), tmp_path / "out", "hold")
    wait_until((tmp_path / "out-holding").exists)
    victims = relion_processes(tmp_path / "out" / "relion")
    assert len(victims) >= 3
    os.kill(victims[-1], signal.SIGKILL)
    began = time.monotonic()
    status, said = finish(process)
    assert status == 1 and said.count("error:") == 1 and time.monotonic() - began < 10, said
    assert "while its references were corrected" in said
    gone_within(tmp_path / "out" / "relion", 10)


def test_relions_own_error_is_shown(data, tmp_path):
    job = job_of(data, extra="--solvent_mask no_such_mask.mrc")
    status, said = finish(start(1, job, tmp_path / "out", "plain"))
    assert status == 1 and said.count("error:") == 1 and "RELION ended with status" in said and "run.log" in said
    assert "no_such_mask.mrc" in said


def test_stop_and_resume(data, tmp_path):
    """A signal in the second iteration; resume continues after the first, and stale results are not taken."""
    out = tmp_path / "out"
    process = start(2, job_of(data), out, "hold")
    wait_until((tmp_path / "out-holding").exists)
    os.kill(int((tmp_path / "out-pid1").read_text()), signal.SIGTERM)
    status, said = finish(process)
    assert status == 75, said
    assert (out / "relion" / "run_it001_optimiser.star").exists()
    assert not (out / "relion" / "run_it002_optimiser.star").exists()
    (out / "relion" / "run_it002_half1_class001.mrc").write_bytes(b"half-written")
    said = refine(2, job_of(data), out, "leave", "--resume")
    assert "--continue run_it001_optimiser.star" in said
    record = json.loads((out / "refine.json").read_text())
    assert [r["iteration"] for r in record["iterations"]] == [1, 2]
    assert all(r["correction"]["applied"] and "seconds" not in r["correction"] for r in record["iterations"])
    again = refine(1, job_of(data), out, "leave", "--resume")  # all is done: nothing is started
    assert "starting RELION" not in again


def test_a_rank_that_is_not_the_first_can_stop_a_sleeping_job(data, tmp_path):
    out = tmp_path / "out"
    process = start(2, job_of(data), out, "never")
    wait_until(lambda: relion_processes(out / "relion"))
    os.kill(int((tmp_path / "out-pid1").read_text()), signal.SIGUSR1)
    status, said = finish(process)
    assert status == 75 and said.count("stopped by a signal") == 1, said
    gone_within(out / "relion", 6)


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    assert cryoiso("ingest", data / "particles.star", folder).returncode == 0
    return folder


def request_of(shards, data, folder, **changes):
    folder.mkdir(exist_ok=True)
    return RefineRequest(
        source=ShardSource(shards), reference=read_map(data / "truth_map.mrc"), symmetry="C3", folder=folder,
        settings=RefineSection(healpix_order=1, max_iterations=1, padding=1, shift_range_A=14.0), diameter_A=140.0,
        lowpass_A=20.0, program=RelionSection(), **changes,
    )  # fmt: skip


def test_co_refined_particles_come_back_by_uid(shards, data, tmp_path):
    """Raw and auxiliary particles: flag, optics groups, micrographs and order; rows map back whatever RELION does."""
    from cryoiso.methods.auxiliary.corefine import co_refine
    from cryoiso.methods.auxiliary.particles import both_halves

    request = request_of(shards, data, tmp_path / "out")
    raw = request.source
    extra = ShardSource(shards)
    some = raw.particles.take(np.arange(59, 29, -1))
    uid = some.uid + np.uint64(1)
    extra.particles = replace(some, uid=uid, stack=np.full(30, "made_up.mrcs"),
                              rotation=np.tile(np.eye(3), (30, 1, 1)), shift_A=np.zeros((30, 2)))  # fmt: skip
    extra.read = lambda rows: raw.read(np.arange(59, 29, -1)[rows])
    found = co_refine(RelionEngine(), request, extra, Context())
    assert np.array_equal(found.raw.uid, raw.particles.uid) and np.array_equal(found.auxiliary.uid, uid)
    written = Star.read(tmp_path / "out" / "relion" / "run_data.star")
    assert sorted(written.column("particles", "cryoisoAuxiliary")) == ["0"] * 60 + ["1"] * 30
    assert len(written.column("optics", "rlnOpticsGroup")) == 2
    # the same image twice, in the same half-set: RELION finds nearly the same pose for both
    twins = angular_distance_deg(found.raw.rotation[59:29:-1], found.auxiliary.rotation, point_group("C3"))
    assert np.median(twins) < 1.0
    assert both_halves  # the module of real auxiliaries imports


def test_each_half_starts_from_its_own_reference(shards, data, tmp_path):
    """RELION has one --ref; the references of iteration 0 are put into its files instead, from which it continues."""

    class Unchanged:
        def wants(self, state):
            return True

        def facts(self):
            return {}

        def __call__(self, state, comm):
            return {half: volume.copy() for half, volume in state.references.items()}, {"applied": True}

    truth = read_map(data / "truth_map.mrc")
    own = {1: truth, 2: replace(truth, data=np.roll(truth.data, 2, axis=0))}
    request = request_of(shards, data, tmp_path / "out", half_references=own, correction=Unchanged())
    result = RelionEngine().refine(request, Context())
    (record,) = result.iterations
    assert record["iteration"] == 2 and record["correction"]["applied"]
    maps = {h: read_map(result.half_maps[h]).data for h in (1, 2)}
    shift = {s: np.corrcoef(np.roll(maps[1], s, axis=0).ravel(), maps[2].ravel())[0, 1] for s in range(-3, 4)}
    assert max(shift, key=lambda s: shift[s]) in (1, 2)  # a shared reference gives 0


def test_the_last_iteration_can_be_done_again(shards, data, tmp_path):
    """RELION was stopped in it, and has changed the file from which it is to continue."""
    request = request_of(shards, data, tmp_path / "out")
    first = RelionEngine().refine(request, Context())
    folder = tmp_path / "out" / "relion"
    optimiser = folder / "run_it001_optimiser.star"
    assert Star.read(optimiser).text("optimiser_general", "rlnModelStarFile2").strip('"') == ""
    for file in final_files(folder / "run").values():
        file.unlink()
    again = RelionEngine().refine(replace(request, resume=True), Context())
    assert final_files(folder / "run")["data"].exists() and optimiser.exists()
    np.testing.assert_array_equal(again.particles.rotation, first.particles.rotation)


def test_a_local_search_stays_near_the_given_poses(shards, data, tmp_path):
    truth = read_particle_file(data / "truth.star", "", ("pose",))
    request = request_of(shards, data, tmp_path / "out", local_deg=9.0)
    request.source.particles = request.source.particles.with_poses(truth.rotation, truth.shift_A)
    result = RelionEngine().refine(request, Context())
    moved = angular_distance_deg(result.particles.rotation, truth.rotation, point_group("C3"))
    assert np.median(moved) < 9 and moved.max() < 40
    sampling = Star.read(tmp_path / "out" / "relion" / "run_it001_sampling.star")
    assert sampling.number("sampling_general", "rlnHealpixOrder") >= 3
    record = json.loads((tmp_path / "out" / "refine.json").read_text())
    assert record["moved"]["largest_deg"] == pytest.approx(float(moved.max()), rel=1e-6)
