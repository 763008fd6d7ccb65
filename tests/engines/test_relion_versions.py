"""The protocol of external reconstruction under the rules of RELION 3.1 to 5.0, by a stand-in for relion_refine_mpi."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from relion_helper import write_task
from relion_standin import write_program

from cryoiso.core.config import RefineSection, RelionSection
from cryoiso.core.errors import CryoisoError, UsageError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap, OpticsGroup, Particles
from cryoiso.engines.relion import callback_standalone, supervise
from cryoiso.engines.relion.engine import RelionEngine
from cryoiso.engines.relion.external import read_task
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context

BOX, PIXEL_A, N = 16, 4.0, 8


def ball() -> DensityMap:
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    return DensityMap(np.exp(-(x**2 + 2 * y**2 + 1.5 * z**2) / 16).astype(np.float32), PIXEL_A)


def particles() -> Particles:
    number = np.arange(N)
    zeros = np.zeros(N)
    group = OpticsGroup(1, "opticsGroup1", PIXEL_A, BOX, 300.0, 2.7, 0.1)
    return Particles(
        uid=number.astype(np.uint64), optics=np.zeros(N, np.int32), groups=(group,), stack=np.full(N, "none.mrcs"),
        index=number, defocus_u_A=zeros + 15000, defocus_v_A=zeros + 15000, defocus_angle_deg=zeros,
        phase_shift_deg=zeros, ctf_bfactor_A2=zeros, ctf_scale=zeros + 1, half=(1 + number % 2).astype(np.int8),
    )  # fmt: skip


class Doubling:
    """A correction that doubles the references: a map's factor is 2 to the number of corrected iterations."""

    def __init__(self, fails_in: int = 0) -> None:
        self.fails_in, self.iterations = fails_in, []

    def wants(self, state):
        return True

    def why_not(self, state):
        return ""

    def facts(self):
        return {}

    def __call__(self, state, comm):
        if state.iteration == self.fails_in:
            raise CryoisoError("the network broke", code="correction-unusable")
        self.iterations.append(state.iteration)
        return {half: 2 * volume for half, volume in state.references.items()}, {"applied": True}


def request(folder, program, correction, *, iterations=3, extra="", **changes) -> RefineRequest:
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).standard_normal((N, BOX, BOX)).astype(np.float32)
    return RefineRequest(
        source=ArraySource(images, particles()), reference=ball(), symmetry="C1", folder=folder,
        settings=RefineSection(max_iterations=iterations), diameter_A=50.0, lowpass_A=20.0, correction=correction,
        program=RelionSection(program=program, launcher="env RANKS={ranks}", extra=extra), **changes,
    )  # fmt: skip


def factors(result) -> list[float]:
    """By what the half-maps are more than the first reference."""
    start = ball().data.ravel()
    return [float(read_map(path).data.ravel() @ start / (start @ start)) for path in result.half_maps.values()]


SLOW = pytest.mark.slow
VERSIONS = [pytest.param("4.0.1", marks=SLOW), pytest.param("4.0.2", marks=SLOW), "3.1.3", "5.0.1"]
"""4.0.0 has the rules of 4.0.1, and 5.0.0 those of 5.0.1."""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_iteration_is_corrected_also_after_a_resume(tmp_path, version):
    program = write_program(tmp_path, version)
    with pytest.raises(CryoisoError, match="the network broke"):
        RelionEngine().refine(request(tmp_path / "out", program, Doubling(fails_in=2)), Context())
    correction = Doubling()
    result = RelionEngine().refine(request(tmp_path / "out", program, correction, resume=True), Context())
    assert correction.iterations == [2, 3]
    assert factors(result) == pytest.approx([8.0, 8.0], rel=0.05)
    assert [record["correction"]["applied"] for record in result.iterations] == [True] * 3
    task = read_task(Path("run_it003_half1_class001_external_reconstruct.star"), tmp_path / "out" / "relion")
    assert task.pixel_size_A == (PIXEL_A if version >= "5" else None) and task.box_px == BOX


@pytest.mark.parametrize("version", ["3.1.3", "5.0.1"])
def test_a_run_that_ended_in_its_last_iteration_goes_on(tmp_path, version):
    """--force_converge leaves an optimiser file from which RELION refuses to continue."""
    program = write_program(tmp_path, version, dies_in=2)
    correction = Doubling()
    with raises_code("relion-failed", CryoisoError, match="out of memory"):
        RelionEngine().refine(request(tmp_path / "out", program, correction, iterations=1), Context())
    optimiser = tmp_path / "out" / "relion" / "run_it001_optimiser.star"
    assert '_rlnModelStarFile2 ""' in " ".join(optimiser.read_text().split())
    given = request(tmp_path / "out", program, correction, iterations=1, resume=True)
    result = RelionEngine().refine(given, Context())
    assert correction.iterations == [1] and factors(result) == pytest.approx([2.0, 2.0], rel=0.05)


@pytest.mark.parametrize("version", VERSIONS[1::2])
def test_with_a_reference_per_half_every_iteration_is_corrected(tmp_path, version):
    """RELION is continued from an iteration 1 that this program made, so its first real iteration is the second."""
    own = {half: ball() for half in (1, 2)}
    correction = Doubling()
    given = request(tmp_path / "out", write_program(tmp_path, version), correction, half_references=own)
    result = RelionEngine().refine(given, Context())
    assert correction.iterations == [2, 3, 4]
    assert factors(result) == pytest.approx([8.0, 8.0], rel=0.05)


@pytest.mark.parametrize("plain", ["1", pytest.param("2", marks=SLOW), "3"])
def test_an_iteration_without_a_call_is_an_error(tmp_path, plain):
    program = write_program(tmp_path, plain_iterations=plain)
    with pytest.raises(CryoisoError, match=rf"5\.0\.1 ended iteration {plain} without calling for the correction"):
        RelionEngine().refine(request(tmp_path / "out", program, Doubling()), Context())
    assert not (tmp_path / "out" / "particles.star").exists()


def test_iterations_that_an_earlier_start_refined_plainly_are_done_again(tmp_path, caplog):
    out, correction = tmp_path / "out", Doubling()
    with raises_code("relion-not-corrected", CryoisoError, match="ended iteration 2 without"):
        RelionEngine().refine(request(out, write_program(tmp_path, plain_iterations="2"), correction), Context())
    assert (out / "relion" / "run_it002_optimiser.star").exists()
    result = RelionEngine().refine(request(out, write_program(tmp_path), correction, resume=True), Context())
    assert correction.iterations == [1, 2, 3] and "iteration 2 of an earlier start" in caplog.text
    assert factors(result) == pytest.approx([8.0, 8.0], rel=0.05)


def test_a_finished_refinement_without_a_call_is_no_result(tmp_path, caplog):
    out, correction = tmp_path / "out", Doubling()
    given = request(out, write_program(tmp_path), correction, iterations=1)
    RelionEngine().refine(given, Context())
    ledger = out / "relion" / "records.json"
    record = json.loads(ledger.read_text())["1"]
    ledger.write_text(json.dumps({"1": {key: value for key, value in record.items() if key != "correction"}}))
    result = RelionEngine().refine(replace(given, resume=True), Context())
    assert correction.iterations == [1, 1] and "iteration 1 of an earlier start" in caplog.text
    assert factors(result) == pytest.approx([2.0, 2.0], rel=0.05)


def test_a_half_that_is_not_called_for_does_not_hold_the_job_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "ONE_HALF_LIMIT_S", 1.0)
    program = write_program(tmp_path, only_half="2")
    with raises_code(
        "relion-half-not-called", CryoisoError, match="called for half 2 of iteration 1 and not for the other"
    ):
        RelionEngine().refine(request(tmp_path / "out", program, Doubling()), Context())


def test_by_hand_a_half_that_stays_away_is_told_of_before_the_time_is_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(callback_standalone, "WARN_AFTER_S", 0.1)
    task = read_task(Path(write_task(tmp_path, 16, 1, 12).name), tmp_path)
    with raises_code("relion-callback-failed", CryoisoError, match="no message 'ready' from"):
        callback_standalone._Meeting(task, 0.8).wait_for("ready")
    assert caplog.text.count("without --sequential_halves_recons") == 1


@pytest.mark.parametrize("extra, words", [
    ("--blush", "never calls the correction"),
    ("--sequential_halves_recons", "each would wait for the other"),
    ("--gpu --external_reconstruct", "set by this program"),
    ("--sym C1", "use sample.symmetry"),
    ("--auto_iter_max 3", "use refine.max_iterations"),
    ("--K 2", "a single reference is refined"),
    ("--skip_align", "would not refine"),
    ("--join_random_halves", "stay independent"),
])  # fmt: skip
def test_options_that_break_the_protocol_are_refused_before_anything_starts(tmp_path, extra, words):
    program = write_program(tmp_path)
    with pytest.raises(UsageError, match=rf"relion\.extra: .*{words}"):
        RelionEngine().refine(request(tmp_path / "out", program, Doubling(), extra=extra), Context())
    assert not (tmp_path / "out" / "relion").exists()


def write_blush(folder: Path, monkeypatch, says: str) -> None:
    """A relion_python_blush on the PATH that leaves the reference as it is, and says this."""
    program = folder / "bin" / "relion_python_blush"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncp reference_in.mrc "${{1%.star}}.mrc"\necho {says}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_blush_is_allowed_where_nothing_is_corrected_and_given_again(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "cryoiso")
    write_blush(tmp_path, monkeypatch, "success")
    given = request(tmp_path / "out", write_program(tmp_path), None, extra="--blush --misspelt 1", iterations=1)
    result = RelionEngine().refine(given, Context())
    assert factors(result) == pytest.approx([1.0, 1.0], rel=1e-6)
    starts = [r.getMessage() for r in caplog.records if "starting RELION" in r.getMessage()]
    assert len(starts) == 2 and all("--blush" in start and "--external_reconstruct" not in start for start in starts)
    assert caplog.text.count("does not know the option --misspelt") == 2  # in both starts


def test_a_blush_that_fails_is_named(tmp_path, monkeypatch):
    write_blush(tmp_path, monkeypatch, "no module named torch")
    given = request(tmp_path / "out", write_program(tmp_path), None, extra="--blush", iterations=1)
    with raises_code("relion-failed", CryoisoError, match="Blush failed: relion_python_blush ./run_it001_half"):
        RelionEngine().refine(given, Context())


def test_blush_of_a_version_that_does_not_have_it_is_warned_of(tmp_path, caplog):
    given = request(tmp_path / "out", write_program(tmp_path, "4.0.2"), None, extra="--blush", iterations=1)
    RelionEngine().refine(given, Context())
    assert "does not know the option --blush" in caplog.text


def test_a_commit_in_the_version_does_not_matter(tmp_path, caplog):
    """As programs say that were built from a checkout."""
    program = write_program(tmp_path, "5.0.1-commit-d476e6")
    correction = Doubling()
    result = RelionEngine().refine(request(tmp_path / "out", program, correction, iterations=1), Context())
    record = json.loads((tmp_path / "out" / "refine.json").read_text())["relion"]
    assert record["version"] == "5.0.1-commit-d476e6" and "--skip_gridding" not in record["command"]
    assert "does not know the option" not in caplog.text
    assert factors(result) == pytest.approx([2.0, 2.0], rel=0.05)
