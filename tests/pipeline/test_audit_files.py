"""Controls that need a file of the user: a second reference, and patches of real background."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import forget_signals, quick_report, simulate, write_cube, write_job

from cryoiso.core.errors import CryoisoError
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.context import Context
from cryoiso.pipeline.audit import images, perform
from cryoiso.pipeline.audit.command import audit_run
from cryoiso.pipeline.run import run_job

BOX, PIXEL_A = 24, 7.0


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("audited"), n=60, box=BOX, pixel_size=PIXEL_A)


@pytest.fixture
def finished(simulated, tmp_path, quick):
    """A finished run without controls."""
    return run_job(simulated, tmp_path / "run", Context(), quick_report).path


def write_patches(path: Path, seed: int, side_px: int = 60, pixel_A: float = 3.5, number: int = 5) -> Path:
    """Patches of white noise."""
    patches = np.random.default_rng(seed).standard_normal((number, side_px, side_px)).astype(np.float32)
    with write_stack(path, side_px, pixel_A) as stack:
        stack.append(patches)
    return path


def controls(found: dict) -> dict[str, dict]:
    return {control["name"]: control for control in found["controls"]}


def test_patches_take_the_place_of_the_images_and_other_patches_of_the_same_name_are_another_control(
    finished, tmp_path, monkeypatch
):
    kept: list[np.ndarray] = []
    make = images.null

    def keep(bench, inputs, purpose):
        made = make(bench, inputs, purpose)
        kept.append(ShardSource(made.folder).read(np.arange(50)))
        return made

    monkeypatch.setattr(perform.pictures, "null", keep)
    settings = {"controls": ["null"], "particles": 50, "background": str(write_patches(tmp_path / "ice.mrcs", 1))}
    state = finished / "audit" / "null" / "workflow" / "03_refine" / "state.json"
    found = controls(audit_run(finished, Context(), settings, {}))
    first = state.read_text()
    assert found["null"]["verdict"] in ("pass", "fail", "inconclusive") and kept[0].shape == (50, BOX, BOX)
    assert np.allclose(kept[0].mean((1, 2)), 0, atol=1e-2) and np.allclose(kept[0].std((1, 2)), 1, atol=1e-2)
    assert len(np.unique(kept[0][:, 3, 4])) == 50  # of five patches, no two images alike
    audit_run(finished, Context(), settings, {})
    assert state.read_text() == first
    # what was found with them stands beside a control that has none
    beside = audit_run(finished, Context(), {"controls": ["reference"], "particles": 50}, {})
    assert controls(beside)["null"] == found["null"] and "background" in beside["settings"]
    write_patches(tmp_path / "ice.mrcs", 2)
    audit_run(finished, Context(), settings, {})
    assert state.read_text() != first and not np.allclose(kept[0], kept[-1])


def test_patches_that_are_too_small_or_without_a_pixel_size_are_refused_before_anything_is_done(
    simulated, finished, tmp_path
):
    small = write_patches(tmp_path / "small.mrcs", 1, side_px=40)
    without = write_patches(tmp_path / "without.mrcs", 1, pixel_A=1e-9)
    stack = bytearray(without.read_bytes())
    stack[40:52] = bytes(12)  # the cell
    without.write_bytes(stack)
    broken = write_patches(tmp_path / "broken.mrcs", 1)
    stack = bytearray(broken.read_bytes())
    stack[1024:1028] = np.float32(np.nan).tobytes()
    broken.write_bytes(stack)
    for file, code in ((small, "box-mismatch"), (without, "pixel-size-missing"), (broken, "image-unusable")):
        with raises_code(code):
            audit_run(finished, Context(), {"controls": ["null"], "particles": 50, "background": str(file)}, {})
        forget_signals()
    assert not list((finished / "audit").glob("null/*"))
    # of a job, before its first stage
    job = write_job(simulated.parent, "with_patches.toml", audit_enable=True, audit_background=str(small))
    job.write_text(job.read_text().replace('"True"', "true"))
    with raises_code("box-mismatch"):
        run_job(job, tmp_path / "refused", Context(), quick_report, audit=perform.audit)
    assert not (tmp_path / "refused" / "03_refine").exists()


def test_a_second_reference_is_brought_into_the_frame_and_grid_of_the_first(finished, tmp_path):
    second = write_cube(tmp_path / "second.mrc", 32, 5.5)
    settings = {"controls": ["other-reference"], "particles": 50, "other_reference": str(second)}
    found = controls(audit_run(finished, Context(), settings, {}))
    control = found["other-reference"]
    assert control["verdict"] in ("pass", "fail", "inconclusive") and control["number"] is not None
    assert {line["label"] for line in control["figure"]["lines"]} >= {"the two maps", "the two references"}
    assert set(control["details"]["resolution_05_A"]) == {line["label"] for line in control["figure"]["lines"]}
    assert {n for n, c in found.items() if c["verdict"] != "not applicable"} == {"other-reference"}
    made = finished / "audit" / "other-reference"
    assert (made / "reference.mrc").exists() and (made / "second" / "04_reconstruct").is_dir()
    assert json.loads((made / "control.json").read_text()) == control
    first = (made / "second" / "03_refine" / "state.json").read_text()
    assert controls(audit_run(finished, Context(), settings, {})) == found
    assert (made / "second" / "03_refine" / "state.json").read_text() == first


def test_what_a_second_reference_shows_is_said():
    from cryoiso.pipeline.audit.controls.other_reference import advice

    assert "(by 0.20): the images decide" in advice("pass", 0.2)
    failed = advice("fail", -0.3)
    assert "(by 0.30): the choice of the reference decides" in failed and "audit/other-reference/second" in failed
    assert "is not decided" in advice("inconclusive", 0.01)


def test_a_second_reference_that_is_no_map_is_refused_by_name(finished, tmp_path):
    second = tmp_path / "second.mrc"
    second.write_bytes(b"no map")
    with pytest.raises(CryoisoError, match=r"second\.mrc"):
        audit_run(finished, Context(), {"controls": ["other-reference"], "other_reference": str(second)}, {})
