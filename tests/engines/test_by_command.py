"""Any program as an engine: a stand-in of a few lines, its mistakes, and RELION by command against RELION as engine."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cs_helper import save
from errors_helper import raises_code
from pipeline_helper import SERIAL
from relion_helper import open_mpi
from relion_rules import Rules
from relion_standin import write_program
from relion_twice import refine_twice

from cryoiso.core.config import CommandSection, RefineSection, parse_job
from cryoiso.core.errors import CryoisoError, InputError, MissingError, UsageError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.engines.by_command.by_hand import FilesEngine
from cryoiso.engines.by_command.engine import CommandEngine, require_command
from cryoiso.engines.by_command.template import template_of
from cryoiso.engines.relion.install import find_relion
from cryoiso.io import read_map, read_particles
from cryoiso.io.cistem import read_cistem, read_par, write_cistem, write_par
from cryoiso.io.conventions import to_cryosparc_frame
from cryoiso.io.cs_write import fields_of_particles, structured
from cryoiso.io.sources import ArraySource, StackSource
from cryoiso.methods.auxiliary.corefine import co_refine
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.pipeline.stages.engines import require_engine

PROGRAM = Path(__file__).parents[1] / "helpers" / "command_program.py"
FILES = "{particles} {reference1} {out_particles} {out_half1} {out_half2}"
NO_MAPS = "{particles} {reference} {out_particles} '' ''"


def command(data: Path, how: str = "well", files: str = FILES, before: str = "", **more: object) -> CommandSection:
    """
    Args:
        before: words before the program, which may hold further placeholders.
    """
    return CommandSection(run=f"{before} {sys.executable} -I {PROGRAM} '{how}' {files} {data / 'truth.star'}", **more)


def request(data: Path, out: Path, section: CommandSection, **more: object) -> RefineRequest:
    out.mkdir(exist_ok=True)
    source = StackSource(read_particles(data / "particles.star"))
    settings = RefineSection(engine="command", max_iterations=2, healpix_order=1, padding=1)
    fields = {"symmetry": "C3", "settings": settings, "diameter_A": 140.0, "lowpass_A": 20.0, **more}
    return RefineRequest(source, read_map(data / "truth_map.mrc"), folder=out, program=section, **fields)


def test_poses_and_half_maps_are_taken_over(data, tmp_path):
    """By uid, though the program turned the rows around; half-sets kept; no temporary files."""
    seen = []
    result = CommandEngine().refine(request(data, tmp_path / "o", command(data), on_checkpoint=seen.append))
    truth = read_particles(data / "truth.star", "", ("pose",))
    found = read_particles(tmp_path / "o/particles.star", "", ("pose",))
    assert np.array_equal(found.uid, truth.uid) and np.array_equal(found.half, truth.half)
    assert np.abs(found.rotation - truth.rotation).max() < 1e-7
    one, two = (read_map(tmp_path / f"o/half{h}.mrc").data for h in (1, 2))
    assert not np.array_equal(one, two) and np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.3
    record = json.loads((tmp_path / "o/refine.json").read_text())
    assert record["engine"] == "command" and record["command"]["half_maps"] == "the command"
    assert [r["iteration"] for r in seen] == [1] and result.iterations == record["iterations"]
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.mrcs"))


def test_half_maps_from_its_poses_and_a_reference_per_half(data, tmp_path):
    """Once per half-set and round; the map of true poses agrees with the truth, and round 2 starts from it."""
    with raises_code("placeholder-missing", UsageError, match="reference1"):
        one = command(data, files=NO_MAPS, out_half="", rounds=2)
        CommandEngine().refine(request(data, tmp_path / "o", one))
    per_half = command(data, files=NO_MAPS, before="env HALF={half}", out_half="", rounds=2)
    CommandEngine().refine(request(data, tmp_path / "o", per_half))
    truth = read_map(data / "truth_map.mrc").data
    for half in (1, 2):
        folder = tmp_path / f"o/command/round-02/half{half}"
        given = read_particles(folder / "particles_in.star", "", ("pose",))
        assert set(given.half.tolist()) == {half} and given.rotation is not None
        reference = read_map(folder / "reference_in.mrc").data
        assert fsc(reference, truth)[1:4].min() > 0.8
        assert (tmp_path / f"o/command/round-01/half{half}/done").exists()
    record = json.loads((tmp_path / "o/refine.json").read_text())
    assert [r["iteration"] for r in record["iterations"]] == [1, 2] and record["iterations"][1]["changes_deg"] < 1e-3


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("fail", "command-failed", "the beam was off"),
        ("lose", "relion-particles-lost", "60 were given, 59"),
        ("halves", "command-result-invalid", "half-sets"),
        ("no map", "command-result-invalid", "half1.mrc"),
        ("one map", "half-maps-identical", "one map"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_published(data, tmp_path, how, code, words):
    with raises_code(code, CryoisoError, match=words):
        CommandEngine().refine(request(data, tmp_path / "o", command(data, how)))
    assert not list((tmp_path / "o").glob("*.*"))


def test_silence_ends_it_with_all_that_it_started(data, tmp_path):
    section = command(data, "sleep", timeout_min=0.05)
    with raises_code("command-failed", CryoisoError, match="timeout_min"):
        CommandEngine().refine(request(data, tmp_path / "o", section))
    pids = (tmp_path / "o/command/round-01/pids").read_text().split()
    assert not any(_alive(int(pid)) for pid in pids)


def test_a_resumed_run_keeps_what_is_done_and_refuses_other_inputs(data, tmp_path):
    """The half that had ended is not started again; ``go_on`` continues the other one."""
    base = command(data, files="{particles} {reference} {out_particles} {out_half} ''").run.replace("'", '"')
    line = f"sh -c 'test {{half}} = 1 || test -e again || {{{{ touch again; exit 3; }}}}; exec {base}'"
    section = CommandSection(run=line)
    with raises_code("command-failed", CryoisoError, match="status 3"):
        CommandEngine().refine(request(data, tmp_path / "o", section))
    first = tmp_path / "o/command/round-01/half1"
    before = (first / "done").stat().st_mtime_ns
    with raises_code("checkpoint-of-another-run", InputError, match="symmetry"):
        CommandEngine().refine(request(data, tmp_path / "o", section, resume=True, symmetry="C1"))
    section = section.model_copy(update={"go_on": line})
    again = CommandEngine().refine(request(data, tmp_path / "o", section, resume=True))
    assert (first / "done").stat().st_mtime_ns == before and (tmp_path / "o/half2.mrc").exists()
    twice = CommandEngine().refine(request(data, tmp_path / "o", section, resume=True))
    assert np.array_equal(twice.particles.rotation, again.particles.rotation)


@pytest.mark.slow
def test_a_killed_job_takes_the_program_with_it(data, tmp_path):
    """SIGTERM: exit code 75, nothing left of the program, and the same command goes on."""
    words = ["refine", str(data / "particles.star"), "--ref", str(data / "truth_map.mrc"), "--out", str(tmp_path / "o")]
    words += ["--symmetry", "C3", "--engine", "command", "--command", f"run={command(data, 'sleep').run}"]
    job = subprocess.Popen([sys.executable, "-m", "cryoiso.cli.main", *words], env=SERIAL, stderr=subprocess.PIPE)
    pids = tmp_path / "o/command/round-01/pids"
    end = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().count(" ")):
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert not any(_alive(int(pid)) for pid in pids.read_text().split())


def test_mistakes_are_found_before_anything_runs(data):
    def checked(run: str, **more: object) -> None:
        require_command(CommandSection(run=run, **more), correction=False, co_refinement=False)

    with raises_code("option-missing", UsageError):
        checked("")
    with raises_code("placeholder-unknown", UsageError, match="stak"):
        checked("true {particles} {reference} {stak}")
    with raises_code("placeholder-missing", UsageError, match="reference"):
        checked("true {particles}")
    with raises_code("placeholder-missing", UsageError, match="out_half"):
        checked("true {particles} {reference}", out_half="map.mrc")
    with raises_code("program-missing", MissingError):
        checked("no-such-program {particles} {reference}")
    job = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "refine": {"engine": "command"}}
    both = {"run": {"workflow": "realign"}, "command": {"run": "true {cistem} {reference1} {reference2}"}}
    with raises_code("options-conflict", UsageError, match="rounds"):
        require_engine(parse_job({**job, **both}))
    both["command"] = {"run": "true {cistem} {reference}", "rounds": 2}
    with raises_code("placeholder-missing", UsageError, match="reference1"):
        require_engine(parse_job({**job, **both}))
    assert template_of(CommandSection(run="true {cistem} {reference} {half}")).per_half


class Turned:
    """A correction that leaves its mark."""

    def wants(self, state):
        return True

    def why_not(self, state):
        return ""

    def facts(self):
        return {"halves_share_a_network": False}

    def __call__(self, state, comm):
        return {h: -state.references[h] for h in (1, 2)}, {"applied": True, "resolution": state.resolution_A}


def test_references_are_corrected_between_rounds(data, tmp_path):
    section = command(data, before="env SECOND={reference2}", rounds=2)
    CommandEngine().refine(request(data, tmp_path / "o", section, correction=Turned()))
    first = read_map(tmp_path / "o/command/round-01/half1.mrc").data
    second = read_map(tmp_path / "o/command/round-02/reference1_in.mrc").data
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < -0.3
    history = json.loads((tmp_path / "o/refine.json").read_text())["iterations"]
    assert history[0]["correction"]["applied"] and "correction" not in history[1]


def test_a_co_refinement_gives_half_maps_of_the_raw_particles_alone(data, tmp_path):
    """The auxiliary particles go through the program with their flag, and leave no trace in the half-maps."""
    section = command(data, files=NO_MAPS, before="env HALF={half}", out_half="")
    plain = request(data, tmp_path / "plain", section)
    CommandEngine().refine(plain)
    p = plain.source.particles
    others = ArraySource(np.flip(plain.source.read(np.arange(len(p))), 0), replace(p, uid=p.uid + np.uint64(1)))
    found = co_refine(CommandEngine(), request(data, tmp_path / "joint", section), others, Context(), pooled=True)
    truth = read_particles(data / "truth.star", "", ("pose",))
    assert np.abs(found.raw.rotation - truth.rotation).max() < 1e-7 and len(found.auxiliary) == len(p)
    for name in ("half1.mrc", "half2.mrc"):
        assert (tmp_path / "joint" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    given = read_particles(tmp_path / "joint/command/round-01/half1/particles_in.star", "", ())
    flags = given.table["cryoisoAuxiliary"].tolist()
    assert flags.count("1") == flags.count("0") == (p.half == 1).sum()


def test_a_refinement_by_hand_stops_and_goes_on(data, tmp_path):
    """cryoSPARC's file comes back with other uids, its own names of stacks, and its own frame of D7."""
    base = request(data, tmp_path / "o", CommandSection(), symmetry="D7")
    with raises_code("waiting-for-files", CryoisoError, match="STEPS.md"):
        FilesEngine().refine(base)
    folder = tmp_path / "o/by-hand/round-01"
    given = np.load(folder / "particles_in.cs")
    own = read_particles(folder / "particles_in.star", "", ())
    assert np.array_equal(given["uid"], own.uid) and set(given["blob/shape"].ravel()) == {24}
    with raises_code("waiting-for-files", CryoisoError):
        FilesEngine().refine(replace(base, resume=True))
    truth = read_particles(data / "truth.star", "", ("pose",))
    back = fields_of_particles(replace(own, rotation=to_cryosparc_frame(truth.rotation, "D7"), shift_A=truth.shift_A))
    back["uid"] += np.uint64(7)
    names = [path.decode().rpartition("/")[2] for path in back["blob/path"].tolist()]
    columns = {name: back[name] for name in back.dtype.names}
    columns["blob/path"] = np.array([f"J3/imported/000090334788266266069_{name}".encode() for name in names])
    save(folder / "particles_out.cs", structured(columns)[::-1])
    result = FilesEngine().refine(replace(base, resume=True))
    assert np.abs(result.particles.rotation - truth.rotation).max() < 1e-6
    assert np.abs(result.particles.shift_A - truth.shift_A).max() < 1e-4
    record = json.loads((tmp_path / "o/refine.json").read_text())
    assert record["engine"] == "files" and record["command"]["half_maps"] == "reconstructed from its poses"


def test_cistems_tables(data, tmp_path):
    """Signs and angles as in cisTEM's own export to RELION: rot = phi, origin = -shift, phase shift in radians."""
    p = read_particles(data / "truth.star", "", ("image", "ctf", "pose"))
    p = replace(p, phase_shift_deg=np.full(len(p), 90.0))
    write_cistem(tmp_path / "a.star", p)
    lines = (tmp_path / "a.star").read_text().splitlines()
    labels = [line.split()[0][1:] for line in lines if line.startswith("_")]
    row = dict(zip(labels, next(line for line in lines if line[:2] == "1 ").split(), strict=True))
    table = p.table.iloc[0]
    assert row["cisTEMPositionInStack"] == "1" and float(row["cisTEMPhaseShift"]) == pytest.approx(np.pi / 2, abs=1e-5)
    for label, column, sign in (
        ("cisTEMAnglePhi", "rlnAngleRot", 1), ("cisTEMAngleTheta", "rlnAngleTilt", 1),
        ("cisTEMAnglePsi", "rlnAnglePsi", 1), ("cisTEMXShift", "rlnOriginXAngst", -1),
        ("cisTEMYShift", "rlnOriginYAngst", -1), ("cisTEMDefocus1", "rlnDefocusU", 1),
        ("cisTEMAssignedSubset", "rlnRandomSubset", 1),
    ):  # fmt: skip
        assert float(row[label]) == pytest.approx(sign * float(table[column]), abs=0.006), label
    write_par(tmp_path / "a.par", p)
    for found, limit in ((read_cistem(tmp_path / "a.star"), 1e-5), (read_par(tmp_path / "a.par"), 3e-4)):
        assert np.array_equal(found.position, np.arange(len(p)))
        assert np.abs(found.rotation - p.rotation).max() < limit and np.abs(found.shift_A - p.shift_A).max() < 0.006
    (tmp_path / "bad.par").write_text("C PSI\n1 2 x 4 5 6\n")
    with raises_code("value-not-a-number", InputError):
        read_par(tmp_path / "bad.par")


def test_a_program_that_reads_one_stack_and_cistems_table(data, tmp_path):
    """Its table comes back with the score; images in the stack are those of the half-set, in order."""
    script = tmp_path / "program.sh"
    script.write_text("#!/bin/sh\nset -e\ncp $1 $2\ncp $3 $4\ntest -s $5\ncp $5 kept\n")
    script.chmod(0o755)
    section = CommandSection(
        run=f"{script} {{cistem}} {{out_particles}} {{reference}} {{out_half}} {{stack}} {{half}}",
        out_half="m{half}.mrc",
    )
    given = request(data, tmp_path / "o", section, local_deg=10.0)
    posed = read_particles(data / "truth.star", "", ("image", "ctf", "pose"))
    source = StackSource(posed)
    given = replace(given, source=source, half_references={h: _noisy(given.reference, h) for h in (1, 2)})
    result = CommandEngine().refine(given)
    assert np.abs(result.particles.rotation - posed.rotation).max() < 1e-5
    assert (result.particles.results["cisTEMScore"] == 0).all()
    kept = np.fromfile(tmp_path / "o/command/round-01/half2/kept", "<f4", offset=1024).reshape(-1, 24, 24)
    np.testing.assert_array_equal(kept, source.read(np.flatnonzero(posed.half == 2)))


def test_the_script_for_cistem_answers_refine3ds_questions(data, tmp_path):
    """A stand-in for refine3d notes the answers, and returns the table: 49 of them, at their places."""
    refine3d = tmp_path / "refine3d"
    refine3d.write_text("#!/bin/sh\ncat > answers\ncp $(sed -n 2p answers) $(sed -n 7p answers)\n")
    refine3d.chmod(0o755)
    script = Path(__file__).parents[2] / "launch" / "engines" / "cistem.sh"
    head = script.read_text()
    run = head.split('run = "cistem.sh ')[1].split('"')[0]
    section = CommandSection(run=f"env REFINE3D={refine3d} {script} {run}", out_half="", rounds=2)
    CommandEngine().refine(request(data, tmp_path / "o", section))
    for round_, search in ((1, "Yes"), (2, "No")):
        folder = tmp_path / f"o/command/round-{round_:02d}/half2"
        answers = (folder / "answers").read_text().splitlines()
        assert len(answers) == 49 and answers[0] == str(folder / "particles_in.mrcs")
        assert answers[8:16] == ["C3", "1", "0", "1.0", "7", "500", "0.0", "70"]
        assert answers[33] == search and answers[44:] == ["Yes", "No", "Yes", "No", "4"]


def _noisy(density, seed):
    noise = np.random.default_rng(seed).normal(size=density.data.shape).astype(np.float32)
    return replace(density, data=density.data + 0.1 * density.data.std() * noise)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def two_references(data: Path) -> dict[int, DensityMap]:
    """Of half-set 2 it is shifted by 2 pixels."""
    truth = read_map(data / "truth_map.mrc")
    return {1: truth, 2: replace(truth, data=np.roll(truth.data, 2, axis=0))}


def relion_script(program: str, launcher: str, more: str = "") -> CommandSection:
    """launch/engines/relion.sh with the command line that its head shows."""
    script = Path(__file__).parents[2] / "launch" / "engines" / "relion.sh"
    run = script.read_text().split('run = "relion.sh ')[1].split('"')[0]
    before = f"env RELION={program} 'MPIRUN={launcher}' 'MORE={more}'"
    return CommandSection(run=f"{before} {script} {run}", out_particles="run_data.star",
                          out_half="run_half{half}_class001_unfil.mrc")  # fmt: skip


def test_the_script_for_relion_gives_each_half_its_reference(data, tmp_path):
    """By the stand-in for RELION; versions that would give both halves one reference are refused."""
    own = two_references(data)
    given = request(data, tmp_path / "o", relion_script(write_program(tmp_path), "env RANKS=3"), half_references=own)
    result = CommandEngine().refine(given)
    for half in (1, 2):
        first = read_map(tmp_path / f"o/command/round-01/run_it000_half{half}_class001.mrc").data
        assert np.corrcoef(first.ravel(), own[half].data.ravel())[0, 1] > 0.8
        assert np.array_equal(read_map(result.half_maps[half]).data, first)
    for version in ("3.1.3", "4.0.1", "5.0-beta-3"):
        old = relion_script(write_program(tmp_path, version), "env RANKS=3")
        with raises_code("command-failed", CryoisoError, match="RELION 4.0.2 or later is needed"):
            CommandEngine().refine(request(data, tmp_path / "o", old, half_references=own))


@pytest.mark.slow
@pytest.mark.relion
@pytest.mark.mpi
def test_the_script_for_relion_runs_relion_or_refuses_it(data, tmp_path):
    """Real RELION, whatever is installed: from 4.0.2 on each half starts from its own reference."""
    relion = find_relion()
    more = "--auto_local_healpix_order 1 --sigma_ang 20 --healpix_order 1 --maximum_angular_sampling 30"
    section = relion_script(relion.program, shlex.join(open_mpi()), more)
    given = request(data, tmp_path / "o", section, half_references=two_references(data))
    if not Rules(relion.version).reads_reference_of_half:
        with raises_code("command-failed", CryoisoError, match="RELION 4.0.2 or later is needed"):
            CommandEngine().refine(given)
        return
    assert CommandEngine().refine(given).resolution_A < 40
    first, second = (
        read_map(tmp_path / f"o/command/round-01/run_it000_half{half}_class001.mrc", 7.0).data for half in (1, 2)
    )
    assert np.corrcoef(np.roll(first, 2, axis=0).ravel(), second.ravel())[0, 1] > 0.99


@pytest.mark.slow
@pytest.mark.relion
@pytest.mark.mpi
@pytest.mark.parametrize("co_refined", [False, True])
def test_relion_by_command_is_relion_as_an_engine(data, tmp_path, co_refined):
    """The same options give the same poses and half-maps: what lies around RELION is the same for both."""
    base = request(data, tmp_path, CommandSection())
    others = None
    if co_refined:
        some = np.arange(29, -1, -1)
        p = base.source.particles.take(some)
        others = ArraySource(base.source.read(some), replace(p, uid=p.uid + np.uint64(1)))
    found = refine_twice(base, others)
    assert len(found.angle_deg) == (90 if co_refined else 60)
    assert np.median(found.angle_deg) < 1e-3 and max(found.maps) < 1e-5
