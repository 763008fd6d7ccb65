"""What ``init`` proposes: right where the evidence is good, and said to be weak where it is."""

from __future__ import annotations

import json
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from model_helper import assembly, odd
from pipeline_helper import cryoiso_here

from cryoiso.core.config import job_to_toml, parse_job
from cryoiso.core.errors import InputError
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_map, write_stack
from cryoiso.io.star.text import read_blocks, write_blocks
from cryoiso.physics import symmetry_proposal
from cryoiso.pipeline.commands.propose import Proposals, propose
from cryoiso.pipeline.commands.reference_facts import directional_power

PIXEL_A = 4.0


@pytest.fixture(autouse=True)
def few_folds(monkeypatch):
    """Two- and three-fold axes only: the others are tested elsewhere, and take long."""
    monkeypatch.setattr(symmetry_proposal, "propose_symmetry", partial(symmetry_proposal.propose_symmetry, max_fold=3))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """120 images of the phantom, 64 px of 4 Å, and their true map."""
    folder = tmp_path_factory.mktemp("propose") / "set"
    done = cryoiso_here("simulate", "phantom", folder, "--n", 120, "--box", 64, "--pixel-size", 4, "--snr-db=-6")
    assert done.returncode == 0, done.stderr
    return folder


def proposed(star: Path, reference: Path | str = "", images: int = 120, **keys: dict) -> Proposals:
    sections = {"particles": {"file": str(star)}, "reference": {"file": str(reference)}, **keys}
    job = parse_job(sections)
    return propose(read_particle_file(star), job, images, bool(reference), star)


def about(made: Proposals, key: str) -> list[tuple[str, object, str]]:
    return [(one.kind, one.value, one.words) for one in made.found if one.key == key]


def test_everything_fits(sets):
    made = proposed(sets / "particles.star", sets / "truth_map.mrc")
    assert made.extent.diameter_A is not None
    assert 0.9 < made.reference.diameter_A / made.extent.diameter_A < 1.6, "1.03 to 1.50 for seven proteins"
    assert not [one for one in made.found if one.kind == "warning"], made.found
    assert {one.key for one in made.found} >= {"sample.symmetry", "sample.diameter_A", "reference.lowpass_A"}


def test_pixel_sizes_that_do_not_belong_together(sets, tmp_path):
    truth = read_map(sets / "truth_map.mrc")
    write_map(tmp_path / "half.mrc", truth.data, 2 * PIXEL_A)
    made = proposed(sets / "particles.star", tmp_path / "half.mrc")
    ((kind, value, words),) = about(made, "reference.pixel_size_A")
    assert (kind, value) == ("warning", None) and "same box with another pixel size" in words
    assert any(kind == "warning" and "times as wide" in words for kind, _, words in about(made, "sample.diameter_A"))
    blocks = read_blocks(sets / "particles.star")
    blocks[0].columns["rlnImagePixelSize"] = ["9.0"]
    write_blocks(sets / "wide.star", blocks)
    made = proposed(sets / "wide.star", sets / "truth_map.mrc")
    assert any("narrower" in words for _, _, words in about(made, "sample.diameter_A"))
    assert any("headers of the stacks say 4 Å" in words for _, _, words in about(made, "particles.file"))


def test_a_map_on_another_grid(sets, tmp_path):
    truth = read_map(sets / "truth_map.mrc")
    made = proposed(sets / "particles.star", odd(tmp_path / "a.mrc", truth.data[2:62], (PIXEL_A,) * 3))
    assert about(made, "reference.resample")[0][:2] == ("proposed", True)
    assert "64 x 64 x 60 px" in about(made, "reference.resample")[0][2]


def test_without_a_reference_the_images_alone(sets):
    made = proposed(sets / "particles.star")
    ((kind, value, words),) = about(made, "sample.diameter_A")
    assert kind == "note" and value is None and "longest direction is longer" in words
    assert "as the images show it" in about(made, "particles.file")[0][2]
    made = proposed(sets / "particles.star", images=20)
    assert "too few" in about(made, "sample.diameter_A")[0][2]
    assert proposed(sets / "particles.star", images=0).extent is None


def test_a_tight_box(sets, tmp_path):
    big = np.zeros((90, 90, 90), np.float32)
    big[9:81, 20:70, 30:60] = 1.0
    write_map(tmp_path / "big.mrc", big, PIXEL_A)
    made = proposed(sets / "particles.star", tmp_path / "big.mrc", 0)
    assert any(kind == "warning" and "does not fit" in words for kind, _, words in about(made, "particles.file"))


def test_images_that_are_not_there_are_a_warning(sets, tmp_path):
    star = tmp_path / "particles.star"
    star.write_text((sets / "particles.star").read_text())
    made = proposed(star)
    assert [one.kind for one in made.found if "not looked at" in one.words] == ["warning"]


def model_file(folder: Path, group: str) -> Path:
    import gemmi

    structure = gemmi.Structure()
    structure.add_model(assembly(group))
    structure.setup_entities()
    for chain in structure[0]:
        for residue in chain:
            residue[0].b_iso, residue[0].occ = 30.0, 1.0
    structure.make_mmcif_document().write_file(str(folder / "model.cif"))
    return folder / "model.cif"


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [("C1", "proposed", "C4"), ("C4", "note", None), ("C2", "note", None), ("D4", "warning", None)],
)
def test_the_symmetry_of_a_model(sets, tmp_path, given, kind, value):
    made = proposed(sets / "particles.star", model_file(tmp_path, "C4"), 0, sample={"symmetry": given})
    assert about(made, "sample.symmetry")[0][:2] == (kind, value)


def test_one_chain_proposes_nothing(sets, tmp_path):
    made = proposed(sets / "particles.star", model_file(tmp_path, "C1"), 0)
    ((kind, value, words),) = about(made, "sample.symmetry")
    assert (kind, value) == ("note", None) and "says nothing" in words


def test_directional_power_of_a_ball_and_a_rod():
    axis = (np.arange(48) - 24) * 4.0
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    from cryoiso.core.types import DensityMap

    ball = DensityMap(np.exp(-(x**2 + y**2 + z**2) / 800).astype(np.float32), 4.0)
    rod = DensityMap(np.exp(-(x**2 + y**2) / 300 - z**2 / 4000).astype(np.float32), 4.0)
    assert directional_power(ball)[30.0] < 0.05 and directional_power(rod)[30.0] > 0.3


@pytest.mark.parametrize(
    ("name", "finer"), [("7a4m.cif.gz", None), ("pfcrt_hb3_md_start.pdb.gz", 20.0), ("8bk7.cif.gz", None)]
)
def test_the_lowpass_of_real_models(sets, shared_data, name, finer):
    """Apoferritin is round at any resolution; PfCRT, small, shows more at 20 Å; beta-galactosidase enough at 30 Å."""
    made = proposed(sets / "particles.star", shared_data / "models" / name, 0)
    ((kind, value, words),) = about(made, "reference.lowpass_A")
    assert value == finer and (kind == "warning") == (name == "7a4m.cif.gz"), words


def test_comments_of_the_job_file(tmp_path):
    job = parse_job({"particles": {"file": "a.star"}, "reference": {"file": "a.mrc"}})
    text = job_to_toml(job, {"sample.symmetry": ['proposed "C3": ' + "because of this " * 12, "another"]})
    lines = text.splitlines()
    at = lines.index('symmetry = "C1"')
    assert lines[at - 1] == "# -> another" and any(line.startswith('# -> proposed "C3"') for line in lines[:at])
    assert max(map(len, lines)) <= 110 and tomllib.loads(text) == tomllib.loads(job_to_toml(job))


def test_the_command(sets, tmp_path):
    out = tmp_path / "job.toml"
    words = ("init", sets / "particles.star", "--reference", sets / "truth_map.mrc", "--out", out, "--images", "60")
    done = cryoiso_here(*words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["particles"] == 120 and found["images"]["images"] == 60 and found["reference"]["kind"] == "map"
    text = out.read_text()
    assert "# -> " in text and parse_job(tomllib.loads(text)).sample.symmetry == "C1", "nothing of it is set"
    for one in found["proposals"]:
        assert one["words"].split()[0] in text
    with raises_code("file-not-found", InputError):
        from cryoiso.pipeline.commands.reference_facts import ModelChoice, facts_of_reference

        facts_of_reference(tmp_path / "no.mrc", ModelChoice())
    assert cryoiso_here(
        "init", sets / "particles.star", "--reference", "no.mrc", "--out", tmp_path / "b.toml"
    ).returncode
    assert not (tmp_path / "b.toml").exists()


def test_a_stack_with_another_pixel_size_in_its_header(sets, tmp_path):
    blocks = read_blocks(sets / "particles.star")
    columns = blocks[-1].columns
    columns["rlnImageName"] = [f"{i + 1}@stack.mrcs" for i in range(120)]
    write_blocks(tmp_path / "a.star", blocks)
    with write_stack(tmp_path / "stack.mrcs", 64, 2.5) as stack:
        stack.append(np.random.default_rng(1).normal(size=(120, 64, 64)).astype(np.float32))
    made = proposed(tmp_path / "a.star")
    assert any(kind == "warning" and "say 2.5 Å" in words for kind, _, words in about(made, "particles.file"))
    assert made.extent.diameter_A is None, "pure noise"


def test_optics_groups_of_one_pixel_size_are_looked_at_together(sets):
    blocks = read_blocks(sets / "particles.star")
    optics, particles = blocks[0], blocks[1]
    for name, values in optics.columns.items():
        optics.columns[name] = ["2" if name == "rlnOpticsGroup" else value for value in values] + list(values)
    particles.columns["rlnOpticsGroup"] = [str(1 + k % 2) for k in range(len(particles.columns["rlnImageName"]))]
    write_blocks(sets / "groups.star", blocks)
    made = proposed(sets / "groups.star")
    assert made.extent.images == 120 and made.extent.diameter_A is not None


def test_images_of_another_box_than_the_particle_file_says(sets):
    blocks = read_blocks(sets / "particles.star")
    blocks[0].columns["rlnImageSize"] = ["128"]
    write_blocks(sets / "unbinned.star", blocks)
    made = proposed(sets / "unbinned.star", images=10)
    assert [
        words for kind, _, words in about(made, "particles.file") if kind == "warning" and "images have 64 px" in words
    ]


def test_an_empty_reference_map_is_named(sets, tmp_path):
    write_map(tmp_path / "empty.mrc", np.zeros((64, 64, 64), np.float32), PIXEL_A)
    with raises_code("map-without-density", InputError) as error:
        proposed(sets / "particles.star", tmp_path / "empty.mrc", images=0)
    assert "empty.mrc" in str(error.value)


def test_a_missing_reference_has_the_code_of_missing_files(sets):
    done = cryoiso_here("init", sets / "particles.star", "--reference", sets / "none.mrc", "--out", sets / "none.toml")
    assert done.returncode == 65 and "[file-not-found]" in done.stderr and not (sets / "none.toml").exists()


def test_what_comes_next_names_the_comments_and_a_path_that_a_shell_takes(sets, tmp_path):
    truth = read_map(sets / "truth_map.mrc")
    other = odd(tmp_path / "a.mrc", truth.data[2:62], (PIXEL_A,) * 3)
    out = tmp_path / "a job.toml"
    done = cryoiso_here("init", sets / "particles.star", "--reference", other, "--out", out, "--images", 0)
    assert done.returncode == 0, done.stderr
    assert f"Next: look at the comments '# ->' in it, then cryoiso run '{out}'" in done.stdout
