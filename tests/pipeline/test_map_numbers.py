"""Settings of what is measured beside FSC and directions: checked before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from errors_helper import raises_code

from cryoiso.core.config import DiagnoseSection, parse_job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.pipeline.jobfile import with_absolute_paths
from cryoiso.pipeline.planning.job_size import DISK
from cryoiso.pipeline.records.manifest import input_files, job_key
from cryoiso.pipeline.stages.map_numbers import AUTO_BOX_PX, check_models, wants_local_resolution

GRID = (64, 2.0)


def job(**section):
    return parse_job({"particles": {"file": "a.star"}, "reference": {"file": "b.mrc"}, "diagnose": section})


def test_models_are_read_before_the_run_starts(tmp_path):
    check_models(DiagnoseSection(), GRID)
    with raises_code("file-not-found", InputError):
        check_models(DiagnoseSection(model=str(tmp_path / "gone.cif")), GRID)
    (tmp_path / "not.pdb").write_text("nothing\n")
    with raises_code("model-malformed", InputError):
        check_models(DiagnoseSection(model=str(tmp_path / "not.pdb")), GRID)
    with raises_code("options-conflict", UsageError):
        check_models(DiagnoseSection(compare_model="b.cif"), GRID)


@pytest.mark.parametrize(("window_A", "good"), ((None, True), (64.0, True), (4.0, False), (65.0, False)))
def test_the_window_fits_the_box(window_A, good):
    section = DiagnoseSection(local_window_A=window_A)
    if good:
        check_models(section, GRID)
    else:
        with raises_code("option-out-of-range", UsageError):
            check_models(section, GRID)


def test_local_resolution_is_measured_where_it_is_quick_or_wanted():
    at = {(choice, box): wants_local_resolution(DiagnoseSection(local_resolution=choice), box)
          for choice in ("auto", "yes", "no") for box in (AUTO_BOX_PX, AUTO_BOX_PX + 1)}  # fmt: skip
    assert [at[c, AUTO_BOX_PX] for c in ("auto", "yes", "no")] == [True, True, False]
    assert [at[c, AUTO_BOX_PX + 1] for c in ("auto", "yes", "no")] == [False, True, False]


def test_models_are_inputs_of_the_run():
    found = with_absolute_paths(job(model="m.cif", compare_model="n.cif"), Path("/here"))
    assert found.diagnose.model == "/here/m.cif" and Path("/here/n.cif") in input_files(found)
    assert job_key(found) != job_key(with_absolute_paths(job(), Path("/here")))


def test_the_plan_counts_the_map():
    class Size:
        map_bytes, box_px = 4 * 64**3, 64

    sizes = []
    for choice in ("yes", "no"):
        Size.job = job(local_resolution=choice)
        sizes.append(DISK["diagnose"]("diagnose", Size))
    assert sizes[0].bytes - sizes[1].bytes == Size.map_bytes and sizes[0].files - sizes[1].files == 1
