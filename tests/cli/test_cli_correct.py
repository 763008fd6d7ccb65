"""``cryoiso correct`` on files: outputs, words about what is no resolution, and who opens which half-map."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from correct_helper import BOX, PIXEL, SIZES, task_of
from forks_helper import python
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here

from cryoiso.core.config import CorrectSection
from cryoiso.io.mrc import read_map, write_map
from cryoiso.methods.anisotropy.filter import band, filtered, missing_cone, radii
from cryoiso.methods.anisotropy.inferred import measured_share, measured_share_fourier
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.pipeline.stages.correct import CorrectionFiles, _correct_alone, correct_files
from cryoiso.pipeline.stages.isolated_process import apart

OPTIONS = ["--cube", 16, "--sub-maps", 4, "--batch", 2, "--epochs", 1]


@pytest.fixture
def halves(tmp_path) -> dict[int, Path]:
    """Noisy half-maps of the phantom without a cone of 30 degrees about z."""
    cone = missing_cone(BOX, 30.0)
    truth = filtered(np.asarray(phantom_map(BOX, PIXEL).data, np.float32), cone)
    rng = np.random.default_rng(3)
    paths = {}
    for half in (1, 2):
        noise = filtered(rng.normal(size=truth.shape).astype(np.float32), cone)
        paths[half] = tmp_path / f"in{half}.mrc"
        write_map(paths[half], truth + 0.3 * truth.std() * noise, PIXEL)
    return paths


@pytest.mark.parametrize("mode", ["paired", "independent"])
def test_two_half_maps_give_a_map_and_say_what_of_it_was_measured(halves, tmp_path, mode):
    out = tmp_path / "out"
    correct_files(task_of(halves, out, mode=mode), Context())
    maps = {name: read_map(out / f"{name}.mrc") for name in ("corrected_half1", "corrected_half2", "corrected_map")}
    mean = (maps["corrected_half1"].data + maps["corrected_half2"].data) / 2
    np.testing.assert_allclose(maps["corrected_map"].data, mean, atol=1e-5 * np.abs(mean).max())
    share, fourier = (read_map(out / name).data for name in ("measured.mrc", "measured_fourier.mrc"))
    assert share.min() >= 0 and share.max() <= 1 and fourier.min() >= 0 and fourier.max() <= 1
    facts = json.loads((out / "correct.json").read_text())
    assert facts["mode"] == mode and set(facts["training"]) == ({"both"} if mode == "paired" else {"1", "2"})
    assert any("not a resolution" in note for note in facts["notes"])
    assert any("not independent" in note for note in facts["notes"]) == (mode == "paired")
    assert len(facts["fsc_half_maps"]) == len(facts["agreement_of_network_outputs_not_a_resolution"]) == BOX // 2 + 1
    assert not [key for key in facts if key.startswith("resolution") and key != "resolution_A"]
    assert not list(out.glob("inferred*"))


def test_share_of_what_was_measured():
    """A place that only data filled, one that only the network filled, and one that both did, with equal power."""
    one = np.zeros((24, 24, 24), np.float32)
    data, made = one.copy(), one.copy()
    data[12, 12, 6] = made[12, 12, 18] = data[12, 6, 12] = made[12, 6, 12] = 2.0
    share = measured_share(data, made, 1.5)
    assert share[12, 12, 6] > 0.999 and share[12, 12, 18] < 0.001 and abs(share[12, 6, 12] - 0.5) < 1e-5
    wave = np.sin(2 * np.pi * 5 * np.arange(24) / 24).astype(np.float32)
    fourier = measured_share_fourier(one + wave, one + wave[:, None])
    assert fourier[12, 12, 17] > 0.99 and fourier[12, 17, 12] < 0.01
    np.testing.assert_allclose(fourier[1:, 1:, 1:], fourier[1:, 1:, 1:][::-1, ::-1, ::-1], atol=1e-5)


def test_what_was_measured_stays_as_it_was(halves, tmp_path):
    """Where the filter is 1, corrected and given half-maps have the same coefficients."""
    out = tmp_path / "out"
    correct_files(
        CorrectionFiles(halves, out, CorrectSection(**SIZES, resolution_A=19.2), missing_cone_deg=30.0), Context()
    )
    whole = read_map(out / "filter.mrc").data > 0.999
    radius = np.linalg.norm(np.indices((BOX,) * 3) - BOX // 2, axis=0)
    whole &= radius < BOX * PIXEL / 19.2 - 2
    for half, path in halves.items():
        given, made = (
            np.fft.fftshift(np.fft.fftn(read_map(p).data)) for p in (path, out / f"corrected_half{half}.mrc")
        )
        assert np.abs(made - given)[whole].max() < 1e-4 * np.abs(given).max()
        assert np.abs(made - given)[~whole & (radius < 8)].max() > 1e-3 * np.abs(given).max()


def opened_by(task: CorrectionFiles, limit_A: float) -> set[str]:
    """Names of all files that the correction of one half opened."""
    seen: set[str] = set()
    sys.addaudithook(lambda event, args: seen.add(os.path.basename(str(args[0]))) if event == "open" else None)
    _correct_alone(task, limit_A, False)
    return seen


def test_the_process_that_corrects_half_2_needs_and_opens_no_half_1(halves, tmp_path):
    out = tmp_path / "out"
    correct_files(task_of(halves, out, mode="independent"), Context())
    made = (out / "corrected_half2.mrc").read_bytes()
    halves[1].unlink()
    alone = CorrectionFiles({2: halves[2]}, out, CorrectSection(**SIZES, mode="independent"), seed=2, of_a_pair=True)
    limit_A = json.loads((out / "correct.json").read_text())["resolution_A"]
    seen = apart(opened_by, alone, limit_A)
    assert "in2.mrc" in seen and "in1.mrc" not in seen
    assert (out / "corrected_half2.mrc").read_bytes() == made


RANKS = """
import os, sys
from pathlib import Path
seen = set()
sys.addaudithook(lambda event, args: seen.add(os.path.basename(str(args[0]))) if event == "open" else None)
sys.path.insert(0, sys.argv[1])
import test_cli_correct as t
from cryoiso.parallel.context import get_context
if __name__ == "__main__":
    comm = get_context()
    halves = {h: Path(sys.argv[2]) / f"in{h}.mrc" for h in (1, 2)}
    t.correct_files(t.task_of(halves, Path(sys.argv[2]) / "ranks", mode="independent"), comm)
    print("rank", comm.rank, sorted(seen & {"in1.mrc", "in2.mrc"}))
"""


@pytest.mark.mpi
def test_of_two_ranks_each_opens_its_own_half(halves, tmp_path):
    correct_files(task_of(halves, tmp_path / "one", mode="independent"), Context())
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    text = run_mpi(2, [script, str(Path(__file__).parent), tmp_path]).stdout
    assert "rank 0 ['in1.mrc']" in text and "rank 1 ['in2.mrc']" in text
    for half in (1, 2):
        one, two = (read_map(tmp_path / d / f"corrected_half{half}.mrc").data for d in ("one", "ranks"))
        np.testing.assert_allclose(two, one, atol=1e-4 * np.abs(one).max())


def test_bad_input_is_one_sentence_and_leaves_nothing(halves, tmp_path):
    def fails(*arguments: object) -> str:
        done = cryoiso_here("correct", *arguments, "--out", tmp_path / "bad")
        assert done.returncode in (2, 65) and "Traceback" not in done.stderr
        assert not (tmp_path / "bad" / "correct.json").exists()
        return done.stderr

    assert "missing-cone" in fails(halves[1])
    assert "no such file" in fails(halves[1], tmp_path / "none.mrc")
    write_map(tmp_path / "small.mrc", np.zeros((16,) * 3, np.float32), PIXEL)
    assert "another grid" in fails(halves[1], tmp_path / "small.mrc")
    assert "exclude" in fails(halves[1], halves[2], "--missing-cone", 30, "--filter", halves[1])


@pytest.mark.parametrize("mode", ["paired", "independent"])
def test_stopped_and_resumed_gives_the_same_bits(halves, tmp_path, mode):
    options = [halves[1], halves[2], "--mode", mode, *OPTIONS[:2], "--sub-maps", 30, *OPTIONS[4:]]
    cryoiso_here("correct", *options, "--out", tmp_path / "straight")
    command = [python(), "-m", "cryoiso.cli.main", "correct", *map(str, options), "--out", tmp_path / "cut"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    while process.poll() is None and not list((tmp_path / "cut").glob("training_*")):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode in (0, 75)
    cryoiso_here("correct", *options, "--out", tmp_path / "cut", "--resume")
    for name in ("corrected_map.mrc", "corrected_half1.mrc", "corrected_half2.mrc"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_half_maps_without_anything_in_common_are_named(tmp_path, caplog):
    rng = np.random.default_rng(8)
    paths = {half: tmp_path / f"noise{half}.mrc" for half in (1, 2)}
    for path in paths.values():
        write_map(path, rng.normal(size=(BOX,) * 3).astype(np.float32), PIXEL)
    correct_files(task_of(paths, tmp_path / "out", epochs=0), Context())
    notes = json.loads((tmp_path / "out" / "correct.json").read_text())["notes"]
    assert any("nothing to correct" in note for note in notes)
    assert "in one frame?" in caplog.text


def test_nothing_is_invented_from_noise(tmp_path):
    """Corrected up to any resolution and with a filter that lacks a cone, noise comes out as it went in."""
    rng = np.random.default_rng(9)
    paths = {half: tmp_path / f"noise{half}.mrc" for half in (1, 2)}
    for path in paths.values():
        write_map(path, rng.normal(size=(BOX,) * 3).astype(np.float32), PIXEL)
    task = task_of(paths, tmp_path / "out", mode="independent", resolution_A=2.3 * PIXEL)
    correct_files(replace(task, missing_cone_deg=40.0), Context())
    seen = read_map(tmp_path / "out" / "filter.mrc").data[radii(BOX) >= 2]
    notes = json.loads((tmp_path / "out" / "correct.json").read_text())["notes"]
    assert seen.min() == 1 and any("nothing finer than" in note for note in notes)
    given, made = ([read_map(folder / f"{name}{h}.mrc").data for h in (1, 2)] for folder, name in (
        (tmp_path, "noise"), (tmp_path / "out", "corrected_half")))  # fmt: skip
    shells = slice(2, int(BOX / 2.3) - 1)
    np.testing.assert_allclose(fsc(*made)[shells], fsc(*given)[shells], atol=1e-3)


def test_signal_is_inferred_only_as_far_as_the_half_maps_agree(halves, tmp_path):
    """Beyond the shell where noise takes over the filter is 1; below it is what was given."""
    for half, path in halves.items():
        rng = np.random.default_rng(half)
        signal_A, data = BOX * PIXEL / 6, read_map(path).data
        noise = rng.normal(size=data.shape).astype(np.float32) * data.std()
        data = filtered(data, band(BOX, PIXEL, signal_A)) + filtered(noise, 1 - band(BOX, PIXEL, signal_A))
        write_map(path, data, PIXEL)
    task = task_of(halves, tmp_path / "out", epochs=0, resolution_A=2.3 * PIXEL)
    correct_files(replace(task, missing_cone_deg=30.0), Context())
    made, given = read_map(tmp_path / "out" / "filter.mrc").data, missing_cone(BOX, 30.0)
    np.testing.assert_array_equal(made[radii(BOX) < 4], given[radii(BOX) < 4])
    assert made[radii(BOX) >= 10].min() == 1
