"""The result folder: what EMDB and EMPIAR take, the same bytes every time, and a methods text that claims no more than
was done."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from pipeline_helper import forget_signals, hash_files, use_quick_parts, write_job

from cryoiso import __version__
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import build_header, copy_labelled, read_map, write_map
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records.checksums import read_sums, write_sums
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages.result_folder import ADDITIONAL, COPIED, fill_result, fsc_xml
from cryoiso.report.deposit import ROLES, deposit
from cryoiso.report.methods_text import methods, warnings
from cryoiso.report.surface import contour_level, surface_png


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A finished quick run with its result folder as a real run leaves it; not written to."""
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        job = write_job(data, "deposit.toml", run_title="a title")
        folder = run_job(job, tmp_path_factory.mktemp("runs") / "run", Context(), deposit).path
    forget_signals()
    return folder


def check_fsc_xml(text: str) -> tuple[list[float], list[float]]:
    """EMDB's format: root fsc with three attributes, then coordinates with x and y, numbers and nothing else."""
    root = ET.fromstring(text)
    assert root.tag == "fsc" and set(root.attrib) == {"title", "xaxis", "yaxis"} and len(root) > 1
    assert (root.get("xaxis"), root.get("yaxis")) == ("Resolution (A-1)", "Correlation Coefficient")
    points = []
    for point in root:
        assert point.tag == "coordinate" and not point.attrib and not (point.text or "").strip()
        assert [part.tag for part in point] == ["x", "y"] and not any(len(part) or part.attrib for part in point)
        points.append([float(part.text or "") for part in point])
    x, y = (list(values) for values in zip(*points))
    assert x == sorted(set(x)) and min(x) >= 0 and all(-1 <= v <= 1 for v in y)
    return x, y


# --- the folder


def test_every_file_has_its_place_and_every_place_its_file(run):
    names = {p.name for p in (run / "result").iterdir()}
    described = json.loads((run / "result/deposition.json").read_text())["files"]
    assert set(described) == names and names <= {row[0] for row in ROLES}
    contents = (run / "result/CONTENTS.md").read_text()
    assert all(f"`{name}`" in contents for name in names)
    assert {"image_500x500.png", "METHODS.md", "fsc.xml", "SHA256SUMS"} <= names
    additional = {name for name in names if name.startswith("additional")}
    assert additional == {"additional_local_resolution.mrc"}, "nothing was corrected in this workflow"


def test_half_maps_are_those_of_the_reconstruction(run):
    for name in COPIED:
        assert (run / "result" / name).read_bytes() == (run / "04_reconstruct" / name).read_bytes(), name


def test_fsc_curves_are_what_emdb_takes(run):
    numbers = json.loads((run / "05_diagnose/diagnose.json").read_text())
    for name, key in (("fsc.xml", "fsc_corrected"), ("fsc_unmasked.xml", "fsc_unmasked")):
        x, y = check_fsc_xml((run / "result" / name).read_text())
        assert np.allclose(x, numbers["frequency_invA"], atol=1e-6) and np.allclose(y, numbers[key], atol=1e-6)


def test_fsc_xml_leaves_out_what_is_not_known_and_escapes_its_title():
    x, y = check_fsc_xml(fsc_xml([0.0, 0.1, 0.2], [1.0, None, 0.25], 'a "b" <c> & d'))
    assert (x, y) == ([0.0, 0.2], [1.0, 0.25])
    for bad in ("<fsc/>", '<fsc title="" xaxis="x" yaxis="y"><coordinate><x>0</x></coordinate></fsc>'):
        with pytest.raises(AssertionError):
            check_fsc_xml(bad)


def test_checksums_are_read_by_sha256sum(run, tmp_path):
    sums = read_sums(run / "result/SHA256SUMS")
    assert set(sums) == {p.name for p in (run / "result").iterdir()} - {"SHA256SUMS"}
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=run / "result", capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == len(sums), done.stderr
    (tmp_path / "a").write_text("x")
    before = write_sums(tmp_path).read_bytes()
    assert write_sums(tmp_path).read_bytes() == before


def test_the_same_run_gives_the_same_bytes_whatever_its_title(run, data, tmp_path, monkeypatch):
    use_quick_parts(monkeypatch)
    again = run_job(write_job(data, "other.toml", run_title="another"), tmp_path / "again", Context(), deposit).path
    signals.clear()
    assert hash_files(again) == hash_files(run)


def test_maps_have_headers_that_archives_read(run):
    for path in (run / "result").glob("*.mrc"):
        assert mrcfile.validate(path), path
        with mrcfile.open(path) as file:
            h = file.header
            assert (int(h.mapc), int(h.mapr), int(h.maps), int(h.mode), int(h.ispg)) == (1, 2, 3, 2, 1)
            assert np.allclose(file.voxel_size.tolist(), 7.0) and not any(h.origin.tolist())
            assert [int(h[n]) for n in ("nxstart", "nystart", "nzstart")] == [0, 0, 0]
            assert file.get_labels()[0] == f"cryoiso {__version__}"
            assert not any(re.search(r"\d\d:\d\d|20\d\d", label) for label in file.get_labels())


def test_maps_pass_the_checks_of_the_archive(run, tmp_path):
    """The wwPDB's own program: one box, one pixel size, three different maps, nothing wrong with a header."""
    check = "wwpdb.utils.emdb.checkemupload.checkemupload"
    pytest.importorskip(check, reason="LOUD: no wwpdb-utils-emdb")
    primary, *halves = (run / "result" / name for name in ("map_weighted.mrc", "half1.mrc", "half2.mrc"))
    command = [
        sys.executable,
        "-m",
        check,
        "--primmap",
        primary,
        "--halfmaps",
        *halves,
        "--output",
        tmp_path / "o.json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    found = json.loads((tmp_path / "o.json").read_text())
    assert done.returncode == 0 and "error" not in found, done.stdout
    pairs = [found["half_maps_to_each_other"], *found["primary_map_to_half_maps"]]
    assert len(pairs) == 3
    for pair in pairs:
        facts = pair["map_checks"]
        assert facts == {"identical": False, "same_box_size": True, "same_pixel_size": True, "overlap": True}, pair


def test_nothing_that_is_passed_on_names_a_folder_of_this_machine(run):
    """No file of the result has the path of the run, the job or the images in it, not even inside a header."""
    for path in (run / "result").iterdir():
        content = path.read_bytes()
        for folder in (run, run.parent, Path.home()):
            assert len(str(folder)) < 2 or str(folder).encode() + b"/" not in content, (path, folder)
    script = (run / "result/view.cxc").read_text()
    opened = re.findall(r"^open (\S+) id \d+$", script, re.M)
    assert "map_weighted.mrc" in opened and all((run / "result" / name).exists() for name in opened)
    levels = json.loads((run / "result/deposition.json").read_text())["contour_levels"]
    assert f"level {levels['map_weighted.mrc']:.4g} " in script


def test_corrected_maps_say_that_they_are_additional(run, tmp_path):
    corrected, made = tmp_path / "correct", run / "04_reconstruct"
    corrected.mkdir()
    for name in ADDITIONAL:
        write_map(corrected / name, read_map(made / "map.mrc").data, 7.0)
    numbers = json.loads((run / "05_diagnose/diagnose.json").read_text())
    fill_result(tmp_path / "result", run / "result/particles.star", made, corrected, numbers)
    for name, (to, label) in ADDITIONAL.items():
        assert to.startswith("additional_")
        with mrcfile.open(tmp_path / "result" / to) as file:
            assert label in file.get_labels() and label.startswith("additional map")
        assert mrcfile.validate(tmp_path / "result" / to)
        assert np.array_equal(read_map(tmp_path / "result" / to).data, read_map(corrected / name).data)
    for name in COPIED:
        assert (tmp_path / "result" / name).read_bytes() == (made / name).read_bytes()


def test_a_full_list_of_labels_loses_its_last(tmp_path):
    header = bytearray(build_header((2, 2, 2), 2, 1.0))
    header[220:224] = (10).to_bytes(4, "little")
    (tmp_path / "a.mrc").write_bytes(bytes(header) + bytes(32))
    copy_labelled(tmp_path / "a.mrc", tmp_path / "b.mrc", "the last")
    raw = (tmp_path / "b.mrc").read_bytes()
    assert raw[220:224] == (10).to_bytes(4, "little") and raw[224 + 720 : 224 + 728] == b"the last"
    assert raw[1024:] == bytes(32) and raw[:220] == bytes(header[:220])


# --- the picture


def chunks(png: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        found.setdefault(png[at + 4 : at + 8], png[at + 8 : at + 8 + size])
        at += 12 + size
    return found


def test_picture_is_500_px_and_names_no_program(run):
    png = (run / "result/image_500x500.png").read_bytes()
    found = chunks(png)
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", found[b"IHDR"][:8]) == (500, 500)
    assert not {b"tEXt", b"iTXt", b"zTXt", b"tIME"} & set(found)


def test_surface_shows_the_shape_from_the_side_with_z_upwards():
    """A tall bar along z is tall in the picture, in the middle, lit; around it the page is white."""
    import io

    from matplotlib.image import imread

    bar = np.zeros((32, 32, 32), np.float32)
    bar[5:27, 13:19, 13:19] = 1.0
    image = imread(io.BytesIO(surface_png(DensityMap(bar, 3.0), 0.5)))[..., :3]
    seen = image[:440].min(axis=2) < 0.95
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    assert np.ptp(rows) > 1.8 * np.ptp(columns) and abs(columns.mean() - 250) < 15
    assert image[250, 250, 2] > image[250, 250, 0] and np.allclose(image[5, 5], 1)


def test_contour_level_lies_between_solvent_and_particle():
    rng = np.random.default_rng(3)
    ball = ((np.indices((32,) * 3) - 16) ** 2).sum(0) < 64
    noisy = DensityMap((2.0 * ball + 0.1 * rng.normal(size=ball.shape)).astype(np.float32), 2.0)
    assert 0.8 < contour_level(noisy, ball.astype(float)) < 1.3
    assert 0.5 < contour_level(noisy) < 1.5


# --- the methods text


def facts(workflow: str, **changes: Any) -> dict[str, Any]:
    """What a report knows of a run, as far as the text goes by it."""
    from cryoiso.core.config import parse_job

    settings: dict[str, Any] = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}}
    settings |= {"sample": {"symmetry": "C3"}, "run": {"workflow": workflow}}
    for key, value in changes.pop("job", {}).items():
        part, name = key.split("_", 1)
        settings.setdefault(part, {})[name] = value
    d = {
        "box_px": 64, "pixel_size_A": 2.0, "particles": 1000, "frequency_invA": [k / 128 for k in range(33)],
        "resolution_0143_A": 5.0, "resolution_05_A": 6.5, "resolution_0143_unmasked_A": 5.8, "randomise_from_shell": 16,
        "directional": {"cfar": 0.71, "sphericity": 0.95, "resolution_min_A": 4.8, "resolution_max_A": 5.5},
        "verdict": {"verdict": "fine", "sentence": "No anisotropy beyond noise."}, "notes": [],
    }  # fmt: skip
    data: dict[str, Any] = {
        "job": parse_job(settings).model_dump(), "diagnose": d, "reconstruct": {"padding": 2, "mask": "map",
        "half_counts": [400, 410]}, "ingest": {"particles": 1000, "half_counts": [500, 500], "box_px": 64,
        "pixel_size_A": 2.0, "inverted": True}, "reference": {"source": "model h.cif", "lowpass_A": 30.0},
        "refine": {"engine": "native"}, "iterations": [{"step_deg": 1.9}] * 12,
    }  # fmt: skip
    return {**data, **changes}


ROUND = {
    "round": 1, "train": {"settings": {"steps": 300, "batch": 16, "preset": "small"}},
    "corefine": {"auxiliary": 1000, "moved": {"median_deg": 4.0, "over_20": 0.1}},
}  # fmt: skip
LOOP = [{"name": "refinement", "iterations": [{"applied": False}, {"applied": True}, {"applied": True}]}]
CORRECT = {
    "mode": "paired", "resolution_A": 5.0, "filter_mean": 0.7, "keep_measured": True,
    "settings": {"method": "completion", "preset": "small", "epochs": 10, "sub_maps": 100, "cube_px": 32},
}  # fmt: skip
DONE = {"auxiliary": {"rounds": [ROUND], "local": {"kept": 810, "dropped": 190, "cap": 3.0}}}


def references(text: str) -> int:
    """Every paper is cited, every citation listed; their number."""
    body, listed = text.split("## References")
    cited = {int(n) for group in re.findall(r"\[([\d, ]+)\]", body) for n in group.split(",")}
    assert cited == set(range(1, len(re.findall(r"^\d+\. ", listed, re.M)) + 1)) and listed.count("doi:") == len(cited)
    return len(cited)


def test_a_plain_refinement_claims_nothing_else():
    text = methods(facts("refine"))
    assert "C3 symmetry was imposed" in text and "from 400 and 410 particles (810 together)" in text
    assert "5.00 Å" in text and "falls below 0.143" in text and "inverted" in text and "beyond 8.0 Å" in text
    assert "To be said" not in text and references(text) >= 5
    assert not re.search("auxiliary|autoencoder|anisotropy \\[|RELION|spIsoNet", text)


def test_uneven_views_are_told_with_what_was_done_about_them():
    on = {"refine_regularisation": "uneven", "refine_weighted_fsc": True, "refine_view_density": True,
          "refine_view_axis_odds": 4.0, "refine_view_polarity_floor": 0.1}  # fmt: skip
    text = methods(facts("refine", job=on))
    assert "measured unevenly often; search radius and convergence follow an FSC that counts coefficients" in text
    assert (
        "(one axis favoured over another 4 times at most, and 10 % even views mixed into from which end it is" in text
    )
    off = {**dict.fromkeys(on, False), "refine_regularisation": "mean-weight", "refine_view_axis_odds": 4.0}
    text = methods(facts("refine", job={**off, "refine_view_polarity_floor": 0.1}))
    assert "the mean weight of a shell. C3 symmetry" in text
    assert not re.search("search radius|density of views", text)
    assert "for each micrograph in every iteration" in methods(facts("refine", job={"refine_scale": "group"}))
    assert "near that of its micrograph, in" in methods(facts("refine", job={"refine_scale": "particle"}))
    without = facts("refine")
    without["job"]["refine"] = {"healpix_order": 2}
    assert "signal power" not in methods(without)


def test_relion_is_cited_where_it_was_used():
    refine = {"engine": "relion", "relion": {"version": "3.1.3"}}
    text = methods(facts("refine", refine=refine, job={"refine_engine": "relion"}))
    assert "RELION 3.1.3 [1]" in text and "own engine" not in text and "Scheres, S. H. W. RELION" in text


def test_auxiliary_particles_are_told_with_their_numbers():
    text = methods(facts("auxiliary", **DONE))
    assert "one round" in text and "300 steps of 16 images" in text and "for each half-set" in text
    assert "810 particles with balanced views" in text and "no auxiliary image entered any of the maps" in text
    assert "at most 3 of a direction in each half-set" in text and "of the weight" not in text
    weighed = {"rounds": [{**ROUND, "corefine": {**ROUND["corefine"], "auxiliary_weight_share": 0.8}}]}
    assert "held 80.0 % of the weight in the references" in methods(facts("auxiliary", auxiliary=weighed))
    for confirmed, words in ((True, "first reference."), (False, "which was nothing, so they were left out")):
        found = {"homologue": {"confirmed": confirmed, "rho": []}, "auxiliary_weight_share": 0.0}
        measured = {"rounds": [{**ROUND, "corefine": {**ROUND["corefine"], **found}}]}
        assert words in methods(facts("auxiliary", auxiliary=measured))
    assert "gold standard" not in text and "Zhang, H." in text and references(text)
    shared = facts("auxiliary", **DONE, job={"auxiliary_generators": "shared"})
    assert "no gold standard" in methods(shared) and "trained on both half-sets" in methods(shared)
    noise = methods(facts("auxiliary", **DONE, job={"auxiliary_generators": "white-noise"}))
    assert "no generator was trained" in noise and "autoencoder" not in noise and "white noise" in noise
    coloured = methods(facts("auxiliary", **DONE, job={"auxiliary_generators": "coloured-noise"}))
    assert "Gaussian noise of the particles' spectrum; no generator was trained" in coloured
    assert "auxiliary particles [" not in methods(facts("auxiliary")), "no round was finished"


def test_networks_in_the_loop_are_told_with_their_consequence():
    text = methods(facts("realign", realign=LOOP, correct=CORRECT))
    assert "After 2 iterations" in text and "trained on its map alone" in text and "gold standard" not in text
    assert "additional map" in text and "10 epochs of 100 sub-maps" in text and "it is no half-map" in text
    paired = facts("realign", realign=LOOP, job={"realign_mode": "paired"})
    paired["diagnose"]["notes"] = ["...: the half-map FSC is no gold standard."]
    assert "one network for both half-sets" in methods(paired)
    assert len(warnings(paired)) == 1 and "gold standard" in warnings(paired)[0]
    never = [{"name": "refinement", "iterations": [{"applied": False}]}]
    assert "in no iteration the conditions for it were met" in methods(facts("realign", realign=never))
    alone = methods(facts("realign", correct={**CORRECT, "settings": {"epochs": 0}}))
    assert "solvent constraint alone" in alone and "one network" not in alone


def test_both_and_given_poses():
    text = methods(facts("both", **DONE, realign=LOOP, refine={"engine": "given"}))
    assert "The first poses were taken from the particle file" in text and "After 2 iterations" in text
    assert any("first poses" in said for said in warnings(facts("both", refine={"engine": "given"})))


def test_a_curve_that_never_falls_is_no_resolution():
    data = facts("refine")
    data["diagnose"]["resolution_0143_A"] = 4.0
    assert "at least" in methods(data) and any("pixel size" in said for said in warnings(data))
