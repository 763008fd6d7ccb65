"""The diameter that plans go by: from a model on a coarse grid, and that of the run within a voxel of it."""

from __future__ import annotations

from pathlib import Path

import gemmi
import pytest
from model_helper import assembly

from cryoiso.core.config import parse_job
from cryoiso.parallel.context import Context
from cryoiso.pipeline import job_inputs
from cryoiso.pipeline.job_inputs import COARSE_BOX_PX, Inputs
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.workflow import folder_stages

PIXEL_A = 1.0


@pytest.fixture
def model(tmp_path) -> Path:
    structure = gemmi.Structure()
    structure.add_model(assembly("C3", spread_A=10.0))
    structure.setup_entities()
    structure.write_minimal_pdb(str(tmp_path / "model.pdb"))
    return tmp_path / "model.pdb"


def inputs_of(model: Path, box_px: int, monkeypatch, **sample) -> tuple[Inputs, list[int]]:
    """Inputs with particles of that box, and the boxes in which references are made."""
    job = parse_job({"particles": {"file": "-"}, "reference": {"file": str(model)}, "sample": sample})
    inputs, boxes = Inputs(job, RunFolder(model.parent, folder_stages(job)), Context()), []
    monkeypatch.setattr(inputs, "grid", lambda: (box_px, PIXEL_A))
    prepare = job_inputs.prepare_reference
    monkeypatch.setattr(
        job_inputs, "prepare_reference", lambda file, box, *a, **k: boxes.append(box) or prepare(file, box, *a, **k)
    )
    return inputs, boxes


def test_coarse_and_fine_agree(model, monkeypatch):
    box_px = 192
    inputs, boxes = inputs_of(model, box_px, monkeypatch)
    coarse_A = PIXEL_A * box_px / COARSE_BOX_PX
    assert inputs.expected_diameter_A() == pytest.approx(inputs.reference().diameter_A, abs=2 * coarse_A)
    assert boxes == [COARSE_BOX_PX, box_px]
    assert inputs.expected_diameter_A() == inputs.reference().diameter_A and boxes == [COARSE_BOX_PX, box_px]


def test_small_boxes_make_the_reference_itself(model, monkeypatch):
    inputs, boxes = inputs_of(model, COARSE_BOX_PX, monkeypatch)
    assert inputs.expected_diameter_A() == inputs.reference().diameter_A and boxes == [COARSE_BOX_PX]


def test_a_stated_diameter_needs_no_reference(model, monkeypatch):
    inputs, boxes = inputs_of(model, 768, monkeypatch, diameter_A=120.0)
    assert inputs.expected_diameter_A() == 120.0 and boxes == []
