"""Controls as a stage of a run and on a finished run: what they leave alone, and what they go on from."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import StopsAt, cryoiso_here, forget_signals, hash_files, quick_report, simulate

from cryoiso.core.config import parse_job
from cryoiso.core.errors import Interrupted
from cryoiso.core.sections.audit import ControlName
from cryoiso.methods.audit import extent
from cryoiso.methods.audit.blocks import Estimate
from cryoiso.parallel.context import Context
from cryoiso.pipeline.audit import images, repeat
from cryoiso.pipeline.audit.command import audit_run
from cryoiso.pipeline.audit.perform import CONTROLS, audit
from cryoiso.pipeline.audit.repeat import Outcome
from cryoiso.pipeline.planning import job_size, workload
from cryoiso.pipeline.records.manifest import job_key
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.reproduce.verify import verify_run
from cryoiso.pipeline.run import do_stage, resume_run, run_job
from cryoiso.pipeline.stages import engines

FEW = {"controls": ["reference", "null", "stability", "leak"], "particles": 50}


def job(**changes):
    data = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}}
    for key, value in changes.items():
        section, name = key.split("_", 1)
        data.setdefault(section, {})[name] = value
    return parse_job(data)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    return simulate(folder, n=60)


@pytest.fixture
def finished(simulated, tmp_path, quick):
    """A finished run without controls."""
    return run_job(simulated, tmp_path / "run", Context(), quick_report).path


def test_every_control_has_an_extent_a_name_in_the_job_file_and_a_module():
    from typing import get_args

    assert list(CONTROLS) == list(extent.EXTENTS) == list(get_args(ControlName))
    assert all(hasattr(module, "cases") and hasattr(module, "record") for module in CONTROLS.values())


def test_controls_leave_the_run_as_it_was(finished):
    before = hash_files(finished)
    sealed = (finished / "seal.json").read_bytes()
    found = audit_run(finished, Context(), FEW, {})
    after = {name: sha for name, sha in hash_files(finished).items() if not name.startswith("audit/")}
    assert after == before and (finished / "seal.json").read_bytes() == sealed
    assert not (finished / "lock.json").exists() and not (finished / "audit" / images.FOLDER).exists()
    verified = verify_run(finished, Context())
    assert not verified.differences
    assert [c["name"] for c in found["controls"]] == list(CONTROLS)
    done = {c["name"]: c["verdict"] for c in found["controls"]}
    assert {done[n] for n in ("omitted", "added", "decoy", "other-reference")} == {"not applicable"}
    assert all(done[n] in ("pass", "fail", "inconclusive") for n in FEW["controls"])
    assert found["particles"] == 50 and found["of"] == 60


def test_warnings_of_a_control_say_that_they_are_about_it(finished, monkeypatch, caplog):
    """Unsettled poses of a repetition say nothing of the run, whose particles the user would take to be meant."""

    def with_warning(*given, **options):
        logging.getLogger("cryoiso").warning("100 %% of %d poses", 50)
        return do_stage(*given, **options)

    monkeypatch.setattr(repeat, "do_stage", with_warning)
    audit_run(finished, Context(), {**FEW, "controls": ["stability"]}, {})
    logging.getLogger("cryoiso").warning("100 %% of the run's")
    *nested, last = (r.getMessage() for r in caplog.records if r.getMessage().endswith(("poses", "run's")))
    assert "audit, stability seed: 100 % of 50 poses" in nested and all(line.startswith("audit, ") for line in nested)
    assert last == "100 %% of the run's"


def test_a_second_start_does_no_refinement_again_and_says_the_same(finished, monkeypatch):
    first = audit_run(finished, Context(), FEW, {})
    monkeypatch.setattr(engines, "engine", lambda name: pytest.fail("a refinement was done again"))
    assert audit_run(finished, Context(), FEW, {}) == first


def test_controls_that_are_run_one_after_the_other_stand_together_if_all_else_is_the_same(finished):
    def verdicts(**changes):
        found = audit_run(finished, Context(), {**FEW, **changes}, {})
        return {c["name"]: c["verdict"] for c in found["controls"] if c["verdict"] != "not applicable"}

    first = verdicts(controls=["reference"])
    both = verdicts(controls=["stability"])
    assert [*both] == ["reference", "stability"] and both["reference"] == first["reference"]
    assert [*verdicts(controls=["leak"], particles=54)] == ["leak"]  # on other particles
    assert [*verdicts(controls=["stability"], particles=54)] == ["stability", "leak"]
    # settings of other controls do not matter, those of their own do
    assert [*verdicts(controls=["added"], particles=54)] == ["added", "stability", "leak"]
    assert [*verdicts(controls=["reference"], particles=54, regions=1)] == ["reference", "stability", "leak"]
    for damaged in ("no json", "[]", '{"controls": 3}'):
        (finished / "audit" / "audit.json").write_text(damaged)
        assert [*verdicts(controls=["reference"])] == ["reference"]


def test_a_stopped_audit_goes_on_where_it_was(finished):
    whole = audit_run(finished, Context(), FEW, {})
    made = hash_files(finished / "audit")
    shutil.rmtree(finished / "audit")
    with pytest.raises(Interrupted):
        audit_run(finished, StopsAt(4), FEW, {})
    forget_signals()
    assert not (finished / "audit" / "audit.json").exists()
    assert audit_run(finished, Context(), FEW, {}) == whole
    assert hash_files(finished / "audit") == made


def test_as_a_stage_they_come_before_the_report_and_change_no_result(simulated, finished, tmp_path):
    text = simulated.read_text()
    with_audit = simulated.parent / "with_audit.toml"
    with_audit.write_text(text + '[audit]\nenable = true\nparticles = 50\ncontrols = ["leak"]\n')
    run = run_job(with_audit, tmp_path / "audited", Context(), quick_report, audit=audit)
    same = {name: sha for name, sha in hash_files(run.path).items() if not name.startswith("audit/")}
    assert same == hash_files(finished)
    stages = [s["name"] for s in json.loads(run.manifest.read_text())["stages"]]
    assert stages[-2:] == ["audit", "report"]
    assert not verify_run(run.path, Context()).differences
    (run.path / "audit" / "audit.json").unlink()
    forget_signals()
    resume_run(run.path, Context(), quick_report, audit=audit)
    assert (run.path / "audit" / "audit.json").exists()


def test_settings_of_the_controls_decide_no_other_stage():
    assert job_key(job()) == job_key(job(audit_enable=True, audit_particles=100))


def test_only_the_native_engine_can_be_audited_and_files_must_be_there(finished):
    with raises_code("file-not-found"):
        audit_run(finished, Context(), {"background": "nowhere.mrcs"}, {})
    with raises_code("option-missing"):
        audit_run(finished, Context(), {"controls": ["other-reference"]}, {})
    with raises_code("job-bad-value"):
        audit_run(finished, Context(), {"controls": ["magic"]}, {})
    from cryoiso.pipeline.preflight import require_auditable

    with raises_code("options-conflict"):
        require_auditable(job(refine_engine="relion"))
    assert not (finished / "audit").exists()


def test_an_unfinished_or_changed_run_is_refused(simulated, tmp_path, quick):
    folder = run_job(simulated, tmp_path / "run", Context(), quick_report, until="refine").path
    forget_signals()
    with raises_code("stage-unfinished"):
        audit_run(folder, Context(), FEW, {})
    resume_run(folder, Context(), quick_report)
    forget_signals()
    (folder / "04_reconstruct" / "map.mrc").write_bytes(b"x")
    with raises_code("run-inputs-changed"):
        audit_run(folder, Context(), FEW, {})


def test_a_refused_decoy_passes_and_a_refused_repetition_decides_nothing(finished, monkeypatch):
    from cryoiso.pipeline.audit.controls import decoy, omitted

    refused = Outcome(None, "the reference does not match the images")  # type: ignore[arg-type]
    assert decoy.record(None, refused, {"fold": refused}).verdict == "pass"  # type: ignore[arg-type]

    class Bench:
        rows = range(50)

    assert omitted.record(Bench(), refused, {}).verdict == "inconclusive"  # type: ignore[arg-type]


def test_a_decoy_that_the_map_follows_passes_if_the_first_control_would_refute_it_and_fails_if_it_would_confirm_it():
    from cryoiso.methods.audit.confirmed import ReferenceCorrelation
    from cryoiso.pipeline.audit.controls import decoy

    def correlation(value: float) -> ReferenceCorrelation:
        return ReferenceCorrelation(value, 0.1 * np.random.default_rng(1).standard_normal(60), 0.3 * value, 16.0)

    assert decoy.verdict_of(52.0, 30.0, None) == "pass"  # parted before what was given of it
    assert decoy.verdict_of(24.0, 30.0, None) == "inconclusive"  # nothing beyond
    for value, verdict, words in (
        (0.15, "pass", "would have refuted it"), (0.9, "fail", "would have confirmed it"),
        (0.35, "inconclusive", "would not have decided"), (float("nan"), "inconclusive", "agree no further"),
    ):  # fmt: skip
        assert decoy.verdict_of(24.0, 30.0, correlation(value)) == verdict
        assert words in decoy._conclusion(verdict, 30.0, correlation(value), 12.0)
    assert "half-maps agree no further" in decoy._conclusion("inconclusive", 30.0, None, 33.0)
    assert "box has too few Fourier shells" in decoy._conclusion("inconclusive", 60.0, None, 4.0)


def test_regions_and_balls_say_what_to_do():
    from cryoiso.pipeline.audit.controls import added, omitted

    assert "The images make this density" in omitted.advice("pass", {"region-1": "pass"}, True)
    mixed = omitted.advice("inconclusive", {"region-1": "pass", "region-3": "fail"}, False)
    assert "of region-3 comes from the reference" in mixed and "region-1" not in mixed
    open_ = omitted.advice("inconclusive", {"region-2": "inconclusive"}, False)
    assert "is not decided" in open_ and "audit.particles" in open_
    assert "audit.particles" not in omitted.advice("inconclusive", {}, True)  # there are no more
    some, little = Estimate(0.2, 0.1, 0.3, 0.05), Estimate(0.11, -0.02, 0.24, 0.066)
    assert "below 30 %" in added.advice("inconclusive", some, True)
    assert "at most 24 %" in added.advice("pass", little, True)  # what may be left is said
    assert "11 % (-2 to 24 %) is left" in added._sentence(little)
    nothing = Estimate(np.nan, np.nan, np.nan, np.nan)
    assert added._sentence(nothing) == "" and "not resemble" in added.advice("inconclusive", nothing, True)


def test_one_network_for_both_half_sets_is_a_leak_whatever_the_half_maps_say():
    from cryoiso.pipeline.audit.controls.leak import shared_networks

    shared = {"auxiliary_generators": "shared", "realign_mode": "paired"}
    assert len(shared_networks(job(run_workflow="both", **shared))) == 2
    assert len(shared_networks(job(run_workflow="auxiliary", **shared))) == 1
    assert shared_networks(job(run_workflow="refine", **shared)) == []
    assert shared_networks(job(run_workflow="both")) == []


@pytest.mark.parametrize("name", ["refine", "auxiliary", "realign", "both"])
def test_the_plan_knows_what_the_controls_cost(name):
    wanted = job(run_workflow=name, audit_enable=True)
    problem = job_size.Problem(wanted, 50_000, 64, 4.0, 150.0)
    work = workload.stages(problem, 1, workload.Assumed(), "cpu")
    gemm = {stage: units.get("gemm", 0.0) for stage, units in work.items()}
    whole = sum(gemm.values()) - gemm["audit"]
    assert 0.8 < gemm["audit"] / whole < 2.2  # at most about twice the run
    bare = workload.stages(
        job_size.Problem(job(run_workflow=name), 50_000, 64, 4.0, 150.0), 1, workload.Assumed(), "cpu"
    )
    assert {k: v for k, v in work.items() if k != "audit"} == bare
    assert [s.name for s in job_size.disk(problem)][-3] == "audit"


def test_particles_are_as_many_as_twice_the_run_allows_within_limits():
    assert extent.particles_of(job(), 400) == 400
    assert extent.particles_of(job(), 1200) == extent.LEAST
    assert extent.particles_of(job(), 10**6) == extent.MOST
    assert extent.particles_of(job(audit_particles=200), 700) == 200


def test_the_command_says_verdicts_and_ends_with_1_where_one_fails(finished, monkeypatch):
    from cryoiso.pipeline.audit import command

    verdicts = {"verdict": "fail", "particles": 50, "of": 60, "workflow": "refine", "controls": []}
    monkeypatch.setattr(command, "audit_run", lambda *a, **k: verdicts)
    (finished / "audit").mkdir()
    (finished / "audit" / "audit.json").write_text(json.dumps(verdicts))
    done = cryoiso_here("audit", finished)
    assert done.returncode == 1 and done.stdout.startswith("fail: 50 of 60 particles"), done.stderr
    assert (finished / "audit" / "audit.html").exists()


def test_folders_of_controls_are_runs_of_their_own(finished):
    audit_run(finished, Context(), {**FEW, "controls": ["leak"]}, {})
    nested = RunFolder(finished / "audit" / "leak" / "noise")
    assert nested.journal.exists() and nested.resolved.exists() and nested.stage("reconstruct").is_dir()
    assert not (finished / "audit" / "arms").exists()  # nothing is compared with it


def test_regions_and_balls_share_their_repetitions(simulated, finished, monkeypatch):
    from cryoiso.pipeline.audit import arms

    done = []
    plain = arms._case
    monkeypatch.setattr(arms, "_case", lambda bench, name, job: done.append(name) or plain(bench, name, job))
    names = {"controls": ["omitted", "added"], "particles": 50}
    found = {c["name"]: c for c in audit_run(finished, Context(), names, {})["controls"]}
    assert done == ["unchanged", "region-1", "region-2", "region-1"]  # asked for twice, refined once
    places = [place for place in (finished / "audit" / "arms").iterdir() if place.is_dir()]
    assert sorted(place.name for place in places) == ["region-1", "region-2", "unchanged"]
    assert set(found["omitted"]["details"]["omega"]) == {"region-1", "region-2"}
    assert all(found[name]["verdict"] != "not applicable" for name in names["controls"])


def test_repetitions_that_differ_by_more_than_the_limit_decide_nothing():
    from cryoiso.methods.audit.omega import Matched
    from cryoiso.pipeline.audit.controls import omitted

    def region(floor: float) -> Matched:
        some = Estimate(floor, floor - 0.05, floor + 0.05, 0.02)
        return Matched(some, some, Estimate(0.0, -0.05, 0.05, 0.02), np.ones((8, 3)))

    small = Estimate(0.0, -0.05, 0.05, 0.02)
    for floor, verdict in ((0.1, "pass"), (0.45, "inconclusive")):
        found = {"region-1": region(0.02), "region-2": region(floor)}
        sound = omitted.is_sound(found)
        assert omitted.verdict_of(small, {"region-1": "pass"}, not sound) == verdict
        sentence = omitted._sentence(found, small, {"region-1": "pass"}, False, 0)
        assert ("The images make this density" in sentence) == sound
        assert ("too much to decide" in sentence) == (not sound)
    # noise, of which more than half depends on the reference in any case: the sentence says what the verdict says
    large, found = Estimate(0.56, 0.39, 0.77, 0.1), {"region-1": region(0.28), "region-2": region(-0.08)}
    judged = {"region-1": "inconclusive", "region-2": "inconclusive"}
    assert omitted.verdict_of(large, judged, not omitted.is_sound(found)) == "fail"
    sentence = omitted._sentence(found, large, judged, False, 0)
    assert "comes from the reference" in sentence and "too much to decide" not in sentence
    alone = Matched(small, Estimate(np.nan, np.nan, np.nan, np.nan), small, np.ones((8, 3)))
    assert omitted.is_sound({"region-1": alone})  # without a matched control Omega counts whole


@pytest.mark.parametrize("name", ["refine", "auxiliary"])
def test_repetitions_are_counted(name):
    wanted = job(run_workflow=name)
    counts = extent.repetitions(wanted, 1000)
    plain = name == "refine"
    # null, decoy, another seed; of other workflows the two regions and the one with nothing changed as well
    assert counts["same", 1000] == 3 + 3 * (not plain) and counts["local", 1000] == (3 if plain else 1)
    assert counts["same", extent.LEAK_PARTICLES] == 1 and counts.get(("plain", 1000), 0) == (not plain)
    assert extent.repetitions(wanted, 1000, ["added"])["local" if plain else "same", 1000] == 2
    assert extent.repetitions(wanted, 200, ["leak"]) == {("same", 200): 1}
