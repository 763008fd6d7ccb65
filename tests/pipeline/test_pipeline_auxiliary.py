"""The workflow with auxiliary particles, end to end at toy size: files, resume, options, ranks, commands."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from forks_helper import python
from mpi_helper import find_mpirun, mpi_environment
from pipeline_helper import SERIAL, cryoiso, cryoiso_here, hash_files, simulate, write_job

from cryoiso.core.errors import CryoisoError, InputError, MissingError, UsageError
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.context import Context
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages.post_command import arguments, post_process
from cryoiso.report import build

SMALL = {"run_workflow": "auxiliary", "auxiliary_steps": 6, "refine_max_iterations": 2}
BALANCED = {**SMALL, "auxiliary_balance": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, n=60)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A whole run of two rounds."""
    job = write_job(data, "whole.toml", **BALANCED, auxiliary_settle_deg=0.0, auxiliary_export=True)
    return run_job(job, tmp_path_factory.mktemp("runs") / "whole", Context(), report=build).path


def facts(run: Path, stage: str) -> dict:
    (folder,) = run.glob(f"[0-9][0-9]_{stage}")
    return json.loads((folder / f"{stage.split('-')[0]}.json").read_text())


def test_stages_are_numbered_and_leave_what_the_next_ones_need(finished):
    names = sorted(p.name for p in finished.glob("[0-9][0-9]_*"))
    rounds = [f"{what}-{r}" for r in (1, 2) for what in ("train", "generate", "corefine")]
    stages = ["ingest", "reference", "refine", *rounds, "local", "reconstruct", "diagnose"]
    assert names == [f"{i:02d}_{stage}" for i, stage in enumerate(stages, 1)]
    train, generate, corefine = facts(finished, "train-1"), facts(finished, "generate-1"), facts(finished, "corefine-1")
    assert set(train["halves"]) == {"1", "2"} and train["halves"]["1"]["steps"][-1] == 6
    assert len(train["halves"]["1"]["kl_per_layer"][0]) > 3
    assert generate["counts"] == {"1": 30, "2": 30} and "kl_nats" in generate["statistics"]
    assert {h: t["images"] for h, t in generate["transfer"]["halves"].items()} == {"1": 30, "2": 30}
    assert corefine["raw"] == corefine["auxiliary"] == 60 and not corefine["settled"]
    homologue, factor = corefine["homologue"], corefine["auxiliary_factor"]
    assert len(homologue["rho"]) > homologue["first_shell"] > 2 and homologue["confirmed"] == any(homologue["rho"])
    assert any(factor) == homologue["confirmed"] == (corefine["auxiliary_weight_share"] > 0)
    assert facts(finished, "local")["homologue"] == facts(finished, "corefine-2")["homologue"]
    assert facts(finished, "local")["kept"] + facts(finished, "local")["dropped"] == 60
    assert not list(finished.rglob("checkpoint/state*")) or not list(finished.glob("*_train-*/half*"))
    assert (finished / "report.html").read_text().count("auxiliary") > 3
    assert "before" in facts(finished, "diagnose")


def test_the_result_holds_raw_particles_only(finished, data):
    found = read_particle_file(finished / "result/particles.star", "", ("pose",))
    given = read_particle_file(data / "particles.star")
    assert np.array_equal(found.uid, given.uid)
    assert set(found.table["cryoisoBalanced"].astype(int)) <= {0, 1}
    auxiliary = ShardSource(next(finished.glob("*_generate-1"))).particles
    assert not set(auxiliary.uid.tolist()) & set(found.uid.tolist())
    assert not any("auxiliary" in name for name in found.table["rlnImageName"])


def test_exported_stacks_hold_the_shards_images_with_their_poses(finished):
    folder = next(finished.glob("*_generate-1"))
    exported = read_particle_file(folder / "auxiliary.star", str(folder), ("image", "ctf", "pose"))
    shards = ShardSource(folder)
    assert np.array_equal(exported.uid, shards.particles.uid) and np.array_equal(exported.half, shards.particles.half)
    assert set(exported.table["cryoisoAuxiliary"].astype(int)) == {1}
    import mrcfile

    stack = mrcfile.read(folder / "cryoiso_auxiliary_round1_half2.mrcs")
    assert np.allclose(stack, shards.read(np.arange(30, 60)), atol=1e-3)


def test_each_half_is_trained_and_referenced_apart(finished):
    train = next(finished.glob("*_train-2"))
    one, two = ((train / f"generator{h}.npz").read_bytes() for h in (1, 2))
    assert one != two
    maps = [read_map(next(finished.glob("*_corefine-1")) / f"reference{h}.mrc").data for h in (1, 2)]
    assert not np.allclose(*maps, atol=1e-3 * np.abs(maps[0]).max())


def test_a_settled_round_ends_the_rounds(data, tmp_path):
    job = write_job(data, "settled.toml", **SMALL, auxiliary_settle_deg=180.0)
    run = run_job(job, tmp_path / "run", Context(), report=build).path
    assert facts(run, "corefine-1")["settled"]
    assert all(facts(run, f"{what}-2")["skipped"] for what in ("train", "generate", "corefine"))
    last = next(run.glob("*_corefine-1")) / "particles.star"
    assert (run / "result/particles.star").read_bytes() == last.read_bytes()


def test_the_baseline_and_given_poses(data, tmp_path):
    job = write_job(
        data, "white.toml", **BALANCED, auxiliary_generators="white-noise", auxiliary_poses="given",
        auxiliary_rounds=1, particles_file="truth.star", auxiliary_balance_cap=1.05,
    )  # fmt: skip
    run = run_job(job, tmp_path / "run", Context()).path
    given = read_particle_file(data / "truth.star")
    kept = read_particle_file(next(run.glob("*_refine")) / "particles.star")
    assert np.allclose(kept.rotation, given.rotation, atol=1e-6)
    spectrum = facts(run, "generate-1")["statistics"]["power_generated"]
    assert 0.8 < np.median(spectrum[-4:]) < 1.3  # beyond the signal: white noise of variance 1
    local = read_particle_file(next(run.glob("*_local")) / "particles.star", "", ("pose",))
    balanced = local.table["cryoisoBalanced"].astype(int)
    assert facts(run, "local")["dropped"] == (balanced == 0).sum() > 0 and len(local) == len(given)
    job = write_job(data, "none.toml", **SMALL, auxiliary_poses="given")
    with raises_code("poses-missing", InputError):
        run_job(job, tmp_path / "none", Context())


def test_coloured_noise_has_the_spectrum_that_the_last_refinement_estimated(data, tmp_path):
    job = write_job(
        data, "coloured.toml", **SMALL, auxiliary_generators="coloured-noise", auxiliary_rounds=2,
        auxiliary_settle_deg=0.0
    )  # fmt: skip
    run = run_job(job, tmp_path / "run", Context()).path
    (corefined,) = run.glob("*_corefine-1")
    assert len(json.loads((corefined / "engine/refine.json").read_text())["noise_variance"]) == 2
    for round_, path in ((1, next(run.glob("*_refine")) / "refine.json"), (2, corefined / "engine/refine.json")):
        estimated = json.loads(path.read_text())["noise_variance"][:1]
        noise = facts(run, f"train-{round_}")["noise"]
        assert noise["from"] == "refinement" and set(noise["spectra"]) == {"1", "2"}
        assert np.allclose(noise["spectra"]["2"], estimated, atol=1e-5)
        made = facts(run, f"generate-{round_}")
        statistics, transfer = made["statistics"], made["transfer"]
        for half in transfer["halves"].values():
            known = [(v, sd) for v, sd in zip(half["value"], half["sd"], strict=True) if v is not None and sd < 0.2]
            assert len(known) >= 4 and all(abs(v - 1) < 4 * sd + 0.002 for v, sd in known)
        assert np.abs(statistics["log_ratio"][-5:]).max() < 0.25


def test_pooled_particles_share_one_noise_spectrum_and_their_optics_group(data, tmp_path, caplog):
    """At temperature 0 the auxiliary half of the images has no noise: the common spectrum is half of the raw one. The
    next round's noise is still that of the raw images."""
    job = write_job(
        data, "pooled.toml", **SMALL, auxiliary_generators="coloured-noise", auxiliary_rounds=2,
        auxiliary_settle_deg=0.0, auxiliary_export=True, auxiliary_noise_group="raw",
        auxiliary_temperature=0.0,
    )  # fmt: skip
    run = run_job(job, tmp_path / "run", Context()).path
    assert "at auxiliary.temperature = 0: one noise spectrum serves" in caplog.text
    pooled, raw = (
        json.loads(path.read_text())["noise_variance"]
        for path in (next(run.glob("*_corefine-1")) / "engine/refine.json", next(run.glob("*_refine")) / "refine.json")
    )
    assert len(pooled) == len(raw) == 1 and np.allclose(pooled[0][7:-1], 0.5 * np.array(raw[0][7:-1]), rtol=0.15)
    assert np.allclose(facts(run, "train-2")["noise"]["spectra"]["1"], raw, atol=1e-5)
    (given,) = read_particle_file(data / "particles.star").groups
    (group,) = read_particle_file(next(run.glob("*_generate-1")) / "auxiliary.star").groups
    assert (group.name, group.number) == (given.name, given.number)


def test_flipped_images_cannot_be_pooled(data, tmp_path):
    from dataclasses import replace

    from cryoiso.io.star.write import write_particles

    p = read_particle_file(data / "truth.star", "", ("pose",))
    flags = p.optics_table.assign(rlnCtfDataArePhaseFlipped="1")
    star = data / "flipped.star"
    write_particles(star, replace(p.with_ctf_applied("flipped"), optics_table=flags))
    job = write_job(data, "flipped.toml", **SMALL, particles_file=star.name, auxiliary_noise_group="raw")
    with pytest.raises(InputError, match="phase-flipped"):
        run_job(job, tmp_path / "run", Context())
    assert not (tmp_path / "run").exists()


def test_a_killed_training_ends_with_the_same_bits(data, tmp_path):
    changes = {**SMALL, "auxiliary_steps": 40, "auxiliary_rounds": 1}
    job = write_job(data, "killed.toml", **changes)
    done = cryoiso("run", job, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    command = [python(), "-m", "cryoiso.cli.main", "run", str(job), "--out", str(tmp_path / "killed")]
    child = subprocess.Popen(command, env=SERIAL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "killed/journal.jsonl", '"train-1"', child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 75, child.stderr.read()
    done = cryoiso("resume", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert hash_files(tmp_path / "whole") == hash_files(tmp_path / "killed")


def wait_for(path: Path, text: str, child: subprocess.Popen) -> None:
    started = time.monotonic()
    while not (path.exists() and text in path.read_text()):
        assert child.poll() is None and time.monotonic() - started < 120
        time.sleep(0.02)
    time.sleep(0.3)


# --- the user's command


def test_post_processing_runs_on_each_half_and_its_failures_are_told(finished, tmp_path):
    given = next(finished.glob("*_corefine-1")) / "reference1.mrc"
    post_process("cp {input} {output}", given, tmp_path / "post1.mrc", 1, 1)
    assert np.array_equal(read_map(tmp_path / "post1.mrc").data, read_map(given).data)
    with pytest.raises(CryoisoError, match=r"status 3(.|\n)*half 2"):
        post_process(
            "sh -c 'echo half {half}; exit 3' {input} {output}", given, tmp_path / "post2.mrc", 2, 1
        )  # fmt: skip
    with raises_code("post-command-failed", CryoisoError):
        post_process("true {input} {output}", given, tmp_path / "post2.mrc", 2, 1)
    with raises_code("program-missing", MissingError):
        post_process("no-such-program {input} {output}", given, tmp_path / "post2.mrc", 2, 1)
    assert not (tmp_path / "post2.mrc").exists()


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("a {input}", "needs"),
        ("a {input} {output} {moon}", "moon"),
        ("a '{input} {output}", "quotes or backslashes do not close"),
    ],
)
def test_a_bad_post_command_is_found_before_anything_runs(data, tmp_path, template, what):
    job = write_job(data, "post.toml", **SMALL, auxiliary_post_command=template)
    with pytest.raises(UsageError, match=what):
        run_job(job, tmp_path / "run", Context())
    assert not (tmp_path / "run").exists()


def test_post_command_takes_no_shell():
    words = arguments("tool {input} {output}", input="a; rm -rf b", output="c", half=1, round=1, pixel_size=1)
    assert words == ["tool", "a; rm -rf b", "c"]


# --- commands on plain files


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "generators"
    reference = data / "truth_map.mrc"
    done = cryoiso("auxiliary", "train", data / "truth.star", "--ref", reference, "--out", folder, "--steps", 5)
    assert done.returncode == 0, done.stderr
    return folder


def test_coloured_noise_by_commands_is_measured_on_the_images(data, tmp_path):
    done = cryoiso_here(
        "auxiliary", "train", data / "truth.star", "--ref", data / "truth_map.mrc", "--generators", "coloured-noise",
        "--out", tmp_path / "g",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    noise = json.loads((tmp_path / "g/train.json").read_text())["noise"]
    assert noise["from"] == "images"
    for half in "12":  # simulated with white noise; normalisation brings noise and signal together to about 1
        assert np.allclose(np.array(noise["spectra"][half])[0, 3:], 1.0, atol=0.2)
    (given,) = read_particle_file(data / "truth.star").groups
    for kept, name, number in (("own", f"{given.name}_auxiliary", given.number + 1), ("raw", given.name, given.number)):
        made = cryoiso_here(
            "auxiliary", "generate", tmp_path / "g", data / "truth.star", "--count", 20, "--export", "--noise-group",
            kept, "--out", tmp_path / kept,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert json.loads((tmp_path / kept / "generate.json").read_text())["transfer"]["halves"]["1"]["images"] == 10
        exported = read_particle_file(tmp_path / kept / "auxiliary.star")
        assert len(exported) == 20 and [(g.name, g.number) for g in exported.groups] == [(name, number)]


def test_commands_train_and_generate(trained, data, tmp_path):
    assert {p.name for p in trained.iterdir()} >= {"generator1.npz", "generator2.npz", "train.json", "timing.json"}
    arguments = ("auxiliary", "generate", trained, data / "particles.star", "--count", 301, "--export")
    done = cryoiso(*arguments, "--out", tmp_path / "one")
    assert done.returncode == 0 and "301 auxiliary particles" in done.stdout, done.stderr
    assert (tmp_path / "one/auxiliary.star").exists()
    other = cryoiso_here(*arguments, "--seed", 2, "--out", tmp_path / "two")
    assert other.returncode == 0
    assert hash_files(tmp_path / "one") != hash_files(tmp_path / "two")


@pytest.mark.mpi
@pytest.mark.skipif(find_mpirun() is None, reason="LOUD: no mpirun")
def test_generation_gives_the_same_files_on_one_and_three_ranks(trained, data, tmp_path):
    for ranks in (1, 3):
        command = [
            find_mpirun(), "-n", ranks, python(), "-m", "cryoiso.cli.main", "auxiliary", "generate", trained,
            data / "particles.star", "--count", 500, "--export", "--out", tmp_path / str(ranks),
        ]  # fmt: skip
        done = subprocess.run([str(w) for w in command], env=mpi_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert hash_files(tmp_path / "1") == hash_files(tmp_path / "3")


def test_generation_refuses_other_data(trained, tmp_path):
    simulate(tmp_path / "other", n=20, box=26)
    found = cryoiso_here(
        "auxiliary", "generate", trained, tmp_path / "other/particles.star", "--out", tmp_path / "out"
    )  # fmt: skip
    assert found.returncode == 65 and "26 px" in found.stderr and "24 px" in found.stderr
    missing = cryoiso_here("auxiliary", "generate", tmp_path, tmp_path / "other/particles.star", "--out", tmp_path)
    assert missing.returncode == 65 and "[file-not-found]" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_the_micelle_joins_the_reference_of_both_halves(data, tmp_path):
    changes = {**SMALL, "auxiliary_rounds": 1, "auxiliary_generators": "shared"}
    job = write_job(data, "micelle.toml", **changes, micelle_enable=True, micelle_lowpass_A=30.0)
    run = run_job(job, tmp_path / "run", Context()).path
    folder = next(run.glob("*_micelle"))
    assert facts(run, "micelle")["finished"]
    composite = read_map(folder / "composite_half2.mrc").data
    reference = read_map(next(run.glob("*_reference")) / "reference.mrc").data
    inside = read_map(folder / "mask.mrc").data > 0.9
    assert np.corrcoef(composite[inside], reference[inside])[0, 1] > 0.99
    assert (next(run.glob("*_train-1")) / "generator.npz").exists()
