"""Micelle recovery: the threshold that is found, bad input, stop signals, ranks, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from micelle_helper import BOX, PIXEL_A, correlation_at_20, recover, trimer, trimers
from mpi_helper import run_mpi
from pipeline_helper import StopsAt, cryoiso_here, hash_files

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError, Interrupted
from cryoiso.core.types import DensityMap
from cryoiso.io.models import model_to_map, positions, read_model
from cryoiso.io.mrc import read_map, write_map, write_stack
from cryoiso.io.sources import ArraySource
from cryoiso.io.star.write import write_particles
from cryoiso.methods.micelle import protein
from cryoiso.methods.micelle.protein import PROTEIN_DALTON_A3, filtered, half_height, protein_mask
from cryoiso.methods.micelle.recover import MicelleSettings
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.pipeline.stages.micelle import write_micelle

RNG = np.random.default_rng(4)


# --- threshold and mask


def model_map(shared_data: Path, name: str, symmetry: str, box: int, pixel_A: float, resolution_A: float):
    file = shared_data / "models" / name
    dry_A3 = float(positions(read_model(file))[1].sum()) / PROTEIN_DALTON_A3
    return model_to_map(file, box, pixel_A, resolution_A, align_symmetry_axis=symmetry), dry_A3


@pytest.mark.parametrize("name, symmetry", [("7l2i.cif.gz", "C4"), ("ha/6wxb.pdb.gz", "C3")])
@pytest.mark.parametrize("box, pixel_A, resolution_A", [(64, 3.0, 6.0), (64, 3.0, 10.0), (48, 4.0, 8.0)])
def test_the_threshold_found_encloses_the_protein(shared_data, name, symmetry, box, pixel_A, resolution_A):
    """The mask holds 1.1 to 1.5 times the dry volume of the atoms (crevices fill at 10 Å) and nearly all their mass."""
    volume, dry_A3 = model_map(shared_data, name, symmetry, box, pixel_A, resolution_A)
    mask = protein_mask(volume)
    level = filtered(volume) > mask.threshold
    assert 1.1 < level.sum() * pixel_A**3 / dry_A3 < 1.5
    assert (volume.data * mask.data).sum() > 0.9 * volume.data.sum()
    scaled = protein_mask(DensityMap(13 * volume.data, pixel_A))
    assert scaled.threshold == pytest.approx(13 * mask.threshold, rel=1e-5)
    assert np.array_equal(scaled.data > 0.5, mask.data > 0.5)


def test_the_threshold_does_not_depend_on_box_offset_or_noise():
    small, large = (filtered(phantom_map(box, 5.0, 12.0)) for box in (32, 44))
    level = half_height(small)
    assert half_height(large) == pytest.approx(level, rel=0.02)
    assert half_height(small + 3.0) - 3.0 == pytest.approx(level, rel=1e-3)
    noise = filtered(DensityMap(RNG.normal(0, 0.05 * small.max(), small.shape).astype(np.float32), 5.0))
    assert half_height(small + noise) == pytest.approx(level, rel=0.05)


def test_half_height_keeps_the_volume_of_a_blurred_ball():
    ball = np.asarray(sphere_mask(48, 14.0), np.float32)
    blurred = np.asarray(lowpass(ball, 1.0, 8.0))
    assert (blurred > half_height(blurred)).sum() == pytest.approx(ball.sum(), rel=0.05)


def test_masks_that_cannot_be_are_refused():
    with raises_code("mask-empty", InputError, match=r"homo\.mrc: the mask would be empty"):
        protein_mask(trimer(), threshold=1e6, file="homo.mrc")
    with raises_code("mask-fills-box", InputError, match=r"no room for a micelle.*threshold"):
        protein_mask(trimer(), threshold=-1e6)
    with raises_code("map-without-density", InputError, match="above the solvent"):
        protein_mask(DensityMap(np.zeros((24, 24, 24), np.float32), 5.0))
    with raises_code("mask-fills-box", InputError):
        protein.checked_mask(np.ones((24, 24, 24), np.float32), 5.0)


@pytest.mark.parametrize("case", ["inverted", "one half"])
def test_what_does_not_fit_is_refused(case):
    source, _ = trimers(60)
    if case == "inverted":
        with raises_code("homologue-not-in-images", InputError, match=r"homologue is not in the images.*frame"):
            recover(source, DensityMap(-trimer().data, PIXEL_A), mask=protein_mask(trimer()))
    else:
        alone = replace(source.particles, half=np.ones(60, np.int8))
        with raises_code("half-set-empty", InputError, match="half-set 2 is empty"):
            recover(ArraySource(source.read(np.arange(60)), alone))


# --- stops, ranks, files


@pytest.mark.parametrize("asked, while_", [(3, "reading images"), (10, "solving")])
def test_a_stop_leaves_maps_and_a_checkpoint_and_the_rest_is_the_same(tmp_path, asked, while_):
    """Six batches are read in two halves; then one question an iteration."""
    source, detergent = trimers(600)
    mask = protein_mask(trimer())
    folder, file = tmp_path, tmp_path / "checkpoint" / "micelle.npz"
    settings = MicelleSettings("C3")
    arguments = source, source.particles, trimer(), mask, settings, folder
    with pytest.raises(Interrupted, match=f"{while_}; the maps so far are kept"):
        write_micelle(*arguments, StopsAt(asked))
    facts = json.loads((folder / "micelle.json").read_text())
    assert file.exists() and facts["finished"] is False
    partial = read_map(folder / "micelle_half1.mrc").data
    assert correlation_at_20(partial, detergent, mask.data, PIXEL_A) > 0.7
    write_micelle(*arguments, Context(), resume=True)
    uninterrupted = recover(source)
    for half in (1, 2):
        assert np.array_equal(read_map(folder / f"micelle_half{half}.mrc").data, uninterrupted.halves[half].micelle)
    assert json.loads((folder / "micelle.json").read_text())["finished"] is True
    assert not file.exists()


def test_a_checkpoint_of_another_job_is_refused(tmp_path):
    source, _ = trimers(600)
    file = tmp_path / "micelle.npz"
    assert recover(source, comm=StopsAt(3), checkpoint_file=file).stopped
    with raises_code("checkpoint-of-another-run", InputError):
        recover(source, checkpoint_file=file, resume=True, lowpass_A=30.0)
    moved = replace(source.particles, shift_A=source.particles.shift_A + 1)
    with raises_code("checkpoint-of-another-run", InputError):
        recover(ArraySource(source.read(np.arange(600)), moved), checkpoint_file=file, resume=True)


def test_a_stop_before_anything_was_read_says_so():
    with pytest.raises(Interrupted, match="before there was anything"):
        recover(trimers(60)[0], comm=StopsAt(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Particles with poses, stack and homologue as files."""
    folder = tmp_path_factory.mktemp("files")
    source, _ = trimers(300)
    with write_stack(folder / "particles.mrcs", BOX, PIXEL_A) as stack:
        stack.append(source.read(np.arange(300)))
    named = replace(source.particles, stack=np.full(300, str(folder / "particles.mrcs")))
    write_particles(folder / "particles.star", named)
    write_particles(folder / "unposed.star", replace(named, rotation=None, shift_A=None))
    write_map(folder / "homologue.mrc", trimer().data, PIXEL_A)
    write_map(folder / "coarse.mrc", phantom_map(24, 8.0, 18.0).data, 8.0)
    write_map(folder / "mask.mrc", protein_mask(trimer()).data, PIXEL_A)
    return folder


def options(folder: Path, out: Path, **changes) -> list[object]:
    named = {"--ref": folder / "homologue.mrc", "--out": out, "--symmetry": "C3", "--device": "cpu", **changes}
    return ["micelle", folder / "particles.star", *(x for pair in named.items() for x in pair if x is not None)]


@pytest.mark.mpi
def test_ranks_and_runs_give_the_same_files(files, tmp_path):
    """The command line, on 1, 2 and 3 ranks: every byte the same."""
    hashes = []
    for n in (1, 2, 3):
        out = tmp_path / f"{n}"
        done = run_mpi(n, ["-m", "cryoiso.cli.main", *map(str, options(files, out))])
        assert done.stdout.count("composite.mrc") == 1
        hashes.append(hash_files(out))
    assert hashes[0] == hashes[1] == hashes[2]
    names = {"mask.mrc", "composite.mrc", "micelle.json"} | {f"{k}_half{h}.mrc" for k in ("micelle", "composite")
             for h in (1, 2)}  # fmt: skip
    assert set(hashes[0]) == names


def test_the_command_says_what_it_did(files, tmp_path):
    done = cryoiso_here(*options(files, tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "a" / "micelle.json").read_text())
    assert facts["threshold"] == pytest.approx(half_height(filtered(trimer())), rel=1e-4)
    assert facts["agreement_of_halves"] > 0.8
    for half in ("1", "2"):
        history = facts["halves"][half]["history"]
        assert history[-1]["residual"] <= 1e-3 and facts["halves"][half]["iterations"] == len(history) - 1
    maps = [read_map(tmp_path / "a" / f"composite_half{h}.mrc").data.astype(np.float64) for h in (1, 2)]
    np.testing.assert_allclose(read_map(tmp_path / "a" / "composite.mrc").data, (maps[0] + maps[1]) / 2, atol=1e-6)
    given = cryoiso_here(*options(files, tmp_path / "b", **{"--mask": files / "mask.mrc"}))
    assert given.returncode == 0, given.stderr
    same = [read_map(tmp_path / k / "micelle_half1.mrc").data for k in "ab"]
    np.testing.assert_allclose(same[0], same[1], atol=1e-4 * np.abs(same[0]).max())


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"--threshold": 1e9}, EXIT_INPUT, ["homologue.mrc", "mask would be empty"]),
        ({"--threshold": 1.0, "--mask": "mask.mrc"}, EXIT_USAGE, ["exclude each other"]),
        ({"--mask": "coarse.mrc"}, EXIT_INPUT, ["coarse.mrc", "box"]),
        ({"--ref": "coarse.mrc"}, EXIT_INPUT, ["coarse.mrc", "--resample"]),
        ({"--ref": "none.mrc"}, EXIT_INPUT, ["none.mrc", "no such reference"]),
        ({"--symmetry": "C0"}, EXIT_INPUT, ["C0"]),
    ],
)
def test_bad_input_gets_one_clear_message(files, tmp_path, changes, code, words):
    changes = {k: files / v if str(v).endswith(".mrc") else v for k, v in changes.items()}
    done = cryoiso_here(*options(files, tmp_path / "out", **changes))
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1 and [w for w in words if w not in done.stderr] == [], done.stderr
    assert not (tmp_path / "out").exists()


def test_particles_without_poses_are_refused(files, tmp_path):
    done = cryoiso_here("micelle", files / "unposed.star", *options(files, tmp_path / "out")[2:])
    assert done.returncode == EXIT_INPUT and "rlnAngleRot" in done.stderr, done.stderr
