"""Predicted models: recognised by header or values, never mixed up with temperature factors, cut where not sure."""

from __future__ import annotations

import logging
from pathlib import Path

import gemmi
import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.confidence import PREDICTED_B_A2, ModelChoice, judge, residues_of
from cryoiso.io.models import load_model, loaded_model_to_map, model_to_map, positions, read_model

TITLE = "TITLE     ALPHAFOLD MONOMER V2.0 PREDICTION FOR A PROTEIN (P00000)\n"
EXPDTA = "EXPDTA    ELECTRON MICROSCOPY\n"
SIDE, TAIL = 4, 12


def fold(path: Path, values: list[float] | None = None, header: str = "", chain: str = "A") -> Path:
    """A ball of 64 residues with a tail of 12 that sticks out; the B column high in the core, low in the tail."""
    grid = np.stack(np.meshgrid(*[np.arange(SIDE) * 5.0] * 3, indexing="ij"), -1).reshape(-1, 3) - 7.5
    tail = np.stack([10 + 5.0 * np.arange(TAIL), np.zeros(TAIL), np.zeros(TAIL)], 1)
    ball = 98 - 1.2 * np.linalg.norm(grid, axis=1)
    given = [*ball, *np.linspace(65, 30, TAIL)] if values is None else values
    structure = gemmi.Structure()
    model, one = gemmi.Model(1), gemmi.Chain(chain)
    for number, (place, b) in enumerate(zip(np.concatenate([grid, tail]), given, strict=True), start=1):
        residue = gemmi.Residue()
        residue.name, residue.seqid = "ALA", gemmi.SeqId(number, " ")
        for k, name in enumerate(("N", "CA", "C")):
            atom = gemmi.Atom()
            atom.name, atom.element = name, gemmi.Element(name[0])
            atom.pos, atom.b_iso, atom.occ = gemmi.Position(*(place + np.array([0, 0, k - 1.0]))), float(b), 1.0
            residue.add_atom(atom)
        one.add_residue(residue)
    model.add_chain(one)
    structure.add_model(model)
    structure.setup_entities()
    if path.suffix == ".cif":
        document = structure.make_mmcif_document()
        loop = document[0].init_loop("_ma_qa_metric.", ["id", "mode", "name", "type"])
        loop.add_row(["1", "local", "pLDDT", "pLDDT"])
        document.write_file(str(path))
    else:
        path.write_text(header + structure.make_minimal_pdb())
    return path


def sure(path: Path, **choice: object) -> dict:
    return load_model(path, ModelChoice(**choice))[1]


@pytest.mark.parametrize("name", ["a.pdb", "a.cif"])
def test_what_a_prediction_is_not_sure_of_is_left_out_and_said(tmp_path, caplog, name):
    path = fold(tmp_path / name, header=TITLE)
    with caplog.at_level(logging.INFO, "cryoiso"):
        model, facts = load_model(path)
    confidence = np.linspace(65, 30, TAIL)
    assert facts["b_column"] == "confidence" and (facts["residues"], facts["left_out"]) == (76, (confidence < 50).sum())
    assert facts["left_out_residues"] == "A 70-76" and facts["weighted_residues"] == "A 65-69"
    weights = [chain[0].occ for residue in model for chain in residue][-5:]
    np.testing.assert_allclose(weights, (confidence[:5] - 50) / 20, atol=1e-3)
    assert {a.b_iso for c in model for r in c for a in r} == {PREDICTED_B_A2}
    assert "left out (A 70-76)" in caplog.text and not [r for r in caplog.records if r.levelname == "WARNING"]


def test_density_follows_the_weights_and_not_the_b_column(tmp_path):
    """A temperature factor of 95 would blur the core more than the tail."""
    path = fold(tmp_path / "a.pdb", header=TITLE)
    whole = model_to_map(fold(tmp_path / "b.pdb", [50.0] * 76, EXPDTA), 72, 2.0, 8.0, centre=False)
    kept = model_to_map(path, 72, 2.0, 8.0, centre=False)
    ball = (slice(None), slice(None), slice(0, 38))
    assert np.abs(kept.data - whole.data)[ball].max() < 5e-3 * whole.data.max()
    at = np.rint([36, 36, 36 + (10 + 5.0 * 2) / 2]).astype(int)  # (z, y, x) of residue 67, confidence 58.6
    assert kept.data[tuple(at)] == pytest.approx(0.43 * whole.data[tuple(at)], rel=0.15)
    assert kept.data[36, 36, 36 + 30] < 0.01 * whole.data[36, 36, 36 + 30]


def test_a_loaded_model_stays_as_it_is(tmp_path):
    model = load_model(fold(tmp_path / "a.pdb"))[0]
    before = positions(model)[0].copy()
    first = loaded_model_to_map(model, "a", 72, 2.0, 8.0)
    np.testing.assert_array_equal(positions(model)[0], before)
    np.testing.assert_array_equal(first.data, loaded_model_to_map(model, "a", 72, 2.0, 8.0).data)


def test_without_a_header_the_values_decide_with_a_warning(tmp_path, caplog):
    facts = sure(fold(tmp_path / "a.pdb"))
    assert facts["b_column"] == "confidence" and facts["left_out"] == 7 and "neighbours +" in facts["evidence"]
    assert "WARNING" in caplog.text
    surface = [100 - b for b in _values(fold(tmp_path / "a.pdb"))]
    assert sure(fold(tmp_path / "b.pdb", surface)) | {"atoms": 0} == {
        "chains": [], "atoms": 0, "b_column": "temperature factor", "evidence": "nothing in the file says otherwise",
    }  # fmt: skip


def _values(path: Path) -> list[float]:
    return [r[0].b_iso for c in gemmi.read_structure(str(path))[0] for r in c]


def test_an_experiment_is_believed_whatever_its_values(tmp_path):
    facts = sure(fold(tmp_path / "a.pdb", header=EXPDTA + "REMARK   3 STARTING MODEL: ALPHAFOLD\n"))
    assert facts["b_column"] == "temperature factor" and "ELECTRON MICROSCOPY" in facts["evidence"]
    assert "left_out" not in facts


def test_a_header_that_its_values_contradict_is_not_believed(tmp_path, caplog):
    """As after a program turned the confidence of a predicted model into temperature factors."""
    turned = [1.5 * (100 - b) for b in _values(fold(tmp_path / "a.pdb"))]
    facts = sure(fold(tmp_path / "b.pdb", turned, TITLE))
    assert facts["b_column"] == "temperature factor" and "--confidence yes" in caplog.text
    facts = sure(fold(tmp_path / "c.pdb", [4 * b for b in turned], TITLE))
    assert facts["b_column"] == "temperature factor" and "reaches from" in facts["evidence"]


def test_one_value_everywhere_says_nothing(tmp_path, caplog):
    facts = sure(fold(tmp_path / "a.pdb", [0.0] * 76, TITLE))
    assert facts["left_out"] == 0 and "all residues have the confidence 0" in caplog.text


def test_the_user_decides(tmp_path):
    path = fold(tmp_path / "a.pdb", header=TITLE)
    assert sure(path, confidence="no")["b_column"] == "temperature factor"
    experiment = fold(tmp_path / "b.pdb", header=EXPDTA)
    assert sure(experiment, confidence="yes")["left_out"] == 7
    of_one = fold(tmp_path / "c.pdb", [round(b / 100, 2) for b in _values(path)], TITLE)
    assert sure(of_one)["left_out"] == 7, "0 to 1, as some programs have it"
    hard = sure(path, min_confidence=60, full_confidence=60)
    assert (hard["left_out"], hard["weighted"]) == (10, 0)


def test_clear_errors(tmp_path):
    path = fold(tmp_path / "a.pdb", header=TITLE)
    with raises_code("model-confidence-invalid", InputError, match="at most 9"):
        sure(path, min_confidence=99.5, full_confidence=100)
    with raises_code("option-out-of-range", UsageError):
        sure(path, min_confidence=80)
    with raises_code("model-confidence-invalid", InputError, match="0 to 100"):
        sure(fold(tmp_path / "b.pdb", [140.0 + i for i in range(76)]), confidence="yes")
    with raises_code("chain-not-found", InputError, match="expected some of: A"):
        sure(path, chains=("A", "B"))


def test_chains_and_the_assembly_of_what_is_left(shared_data):
    ring = shared_data / "models/1oel_groel.pdb.gz"
    model, facts = load_model(ring, ModelChoice(("A", "C")))
    assert [chain.name for chain in model] == ["A1", "C1", "A2", "C2"] and facts["chains"] == ["A", "C"]
    assert [chain.name for chain in load_model(ring, ModelChoice(("C",), "none"))[0]] == ["C"]
    crop = shared_data / "maps/emd_30342_chainA_7cec_A.cif"  # its assembly of one operator names chains that are gone
    assert [chain.name for chain in read_model(crop)] == ["A"]


def test_no_experimental_model_is_taken_for_a_prediction_by_its_values(shared_data):
    """6WXB has one value of 60 to 100 per residue, as predictions have."""
    files = [*shared_data.glob("models/*.gz"), *shared_data.glob("models/ha/*.gz")]
    assert len(files) > 20
    correlations = []
    for file in files:
        found = residues_of(read_model(file, "none"))
        assert not judge(found, ("", ""), "auto", file).predicted, file
        correlations.append(found.correlation)
    assert np.nanmean(np.array(correlations) < -0.05) > 0.85


def test_thresholds_on_a_scale_of_1_are_not_taken_for_percent(tmp_path, caplog):
    path = fold(tmp_path / "a.pdb", header=TITLE)
    with raises_code("option-out-of-range", UsageError):
        load_model(path, ModelChoice(min_confidence=0.5, full_confidence=0.7))
    load_model(path, ModelChoice(min_confidence=0.7))
    assert "70 is meant" in caplog.text
