"""Predicted models: a confidence (pLDDT, 0 to 100) in place of temperature factors, which means the opposite.

Recognised by what the file says of itself, else by its values. Temperature factors are low in the core of a protein and
high at its surface; confidence is the other way round. Rank correlation of the B column with the number of neighbours
within ``NEIGHBOURS_A``, measured: -0.63 to -0.10 on 23 experimental models and +0.14 on one (7.4 Å, half of its values
0), +0.31 and +0.68 on two predicted ones. One cryo-EM model has one value per residue between 60 and 100, as a
prediction would: -0.35.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cryoiso.core.errors import InputError, UsageError

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("cryoiso")

HIGHEST = 100.0
PREDICTED_B_A2 = 50.0
"""Temperature factor of all atoms of a predicted model, which has none."""
NEIGHBOURS_A = 12.0
LIKE_CONFIDENCE, LIKE_TEMPERATURE = 0.2, -0.1
"""Rank correlations with the number of neighbours above and below which values are clearly one or the other."""
FEWEST_RESIDUES, FEWEST_VALUES = 30, 10
"""Needed for a judgement by values."""
ONE_VALUE = 0.99
"""Share of residues whose atoms all have one value, where values alone decide."""
TRACE_ATOMS = ("CA", "C4'", "P")
PROGRAMS = re.compile(r"alphafold|colabfold|esmfold|rosettafold|openfold|omegafold|\bboltz|\bplddt\b", re.IGNORECASE)


@dataclass(frozen=True)
class ModelChoice:
    """What of an atomic model is used."""

    chains: tuple[str, ...] = ()
    """by their names in the file; none: all"""
    assembly: str = "auto"
    """see `cryoiso.io.models.read_model`"""
    confidence: Literal["auto", "yes", "no"] = "auto"
    """whether the B column holds a predicted confidence"""
    min_confidence: float = 50.0
    """residues below it are left out"""
    full_confidence: float = 70.0
    """residues from here on have their full weight, in between it rises linearly from 0"""


@dataclass(frozen=True)
class Residues:
    """What the B column of a model holds, residue by residue."""

    mean: Float[np.ndarray, " n"]
    one_value: Float[np.ndarray, " n"]
    """1 where all atoms of a residue have the same value"""
    correlation: float
    """of value and number of neighbours (Spearman), over residues with a trace atom; NaN for fewer than 30 of them"""


@dataclass(frozen=True)
class Judgement:
    """Whether the B column is a confidence, and why."""

    predicted: bool
    evidence: str
    doubtful: bool = False
    """by values only, or against what the file says"""
    factor: float = 1.0
    """that brings the values to 0 to 100"""


def source_of(structure: Any, path: object, is_pdb: bool) -> tuple[Literal["predicted", "experimental", ""], str]:
    """What a file says of where its model comes from, with the words that say so."""
    import gemmi

    if not is_pdb:
        block = gemmi.cif.read(str(path))[0]
        named = [*block.find_values("_ma_qa_metric.name"), *block.find_values("_ma_qa_metric.type")]
        if any("plddt" in str(name).lower() for name in named):
            return "predicted", "_ma_qa_metric in the file is pLDDT"
    method = dict(structure.info).get("_exptl.method", "")
    if method and "THEORETICAL" not in method.upper():
        return "experimental", f"experiment: {method}"
    if structure.resolution > 0:
        return "experimental", f"resolution of {structure.resolution:g} Å in the file"
    lines = [
        structure.info[key] for key in ("_struct.title", "_struct_keywords.pdbx_keywords") if key in structure.info
    ]
    for line in [*lines, *structure.raw_remarks]:
        if match := PROGRAMS.search(line):
            return "predicted", f"'{match.group(0)}' in the file's header"
    return "", ""


def residues_of(model: Any) -> Residues:
    """Values of the B column of a gemmi.Model, and how they go with the number of neighbours."""
    from scipy.spatial import cKDTree
    from scipy.stats import spearmanr

    means, same, places, values = [], [], [], []
    for chain in model:
        for residue in chain:
            b = [atom.b_iso for atom in residue]
            means.append(float(np.mean(b)))
            same.append(float(max(b) - min(b) < 0.011))
            trace = next((atom for name in TRACE_ATOMS for atom in residue if atom.name == name), None)
            if trace is not None:
                places.append(trace.pos.tolist())
                values.append(means[-1])
    correlation = float("nan")
    if len(values) >= FEWEST_RESIDUES and np.ptp(values) > 0:
        tree = cKDTree(np.array(places))
        neighbours = tree.query_ball_point(np.array(places), NEIGHBOURS_A, return_length=True)
        if np.ptp(neighbours) > 0:
            correlation = float(spearmanr(neighbours, values).statistic)
    return Residues(np.array(means), np.array(same), correlation)


def judge(residues: Residues, source: tuple[str, str], asked: str, path: object) -> Judgement:
    """Whether the B column is a confidence.

    Args:
        source: see ``source_of``. asked: ``ModelChoice.confidence``.

    Raises:
        InputError: it was said to be a confidence, and cannot be one.
    """
    low, high = float(residues.mean.min()), float(residues.mean.max())
    possible, factor = low >= 0 and high <= HIGHEST, 100.0 if 0 < high <= 1 else 1.0
    if asked == "no":
        return Judgement(False, "as set")
    if asked == "yes":
        if not possible:
            raise InputError(
                "the B column holds no confidence", file=path, expected="values of 0 to 100 (or 0 to 1)",
                found=f"{low:g} to {high:g}", hint="Leave reference.confidence (--confidence) at auto.",
                code="model-confidence-invalid",
            )  # fmt: skip
        return Judgement(True, "as set", factor=factor)
    kind, words = source
    numbers = f"correlation with the number of neighbours {residues.correlation:+.2f}"
    if kind == "experimental":
        return Judgement(False, words)
    if kind == "predicted":
        if not possible:
            return Judgement(False, f"{words}, but its B column reaches from {low:g} to {high:g}", doubtful=True)
        if residues.correlation < LIKE_TEMPERATURE:
            return Judgement(False, f"{words}, but its B column is high at the surface ({numbers})", doubtful=True)
        return Judgement(True, words, factor=factor)
    return _by_values(residues, possible, factor, numbers)


def _by_values(residues: Residues, possible: bool, factor: float, numbers: str) -> Judgement:
    distinct = len(np.unique(residues.mean.round(2)))
    alike = possible and residues.one_value.mean() >= ONE_VALUE and distinct >= FEWEST_VALUES
    span = f"{residues.mean.min():g} to {residues.mean.max():g}"
    words = f"one value of {span} per residue, {numbers}; the header says nothing"
    if alike and residues.correlation > LIKE_CONFIDENCE:
        return Judgement(True, words, True, factor)
    undecided = alike and not residues.correlation < LIKE_TEMPERATURE and factor * residues.mean.max() > 50
    return Judgement(False, words if undecided else "nothing in the file says otherwise", undecided)


def select_chains(structure: Any, chains: tuple[str, ...], path: object) -> None:
    """Takes all chains but these out of every MODEL of a gemmi.Structure, in place.

    Raises:
        InputError: no such chain.
    """
    if not chains:
        return
    there = list(dict.fromkeys(chain.name for model in structure for chain in model))
    missing = [name for name in chains if name not in there]
    if missing:
        raise InputError(
            f"no such chain: {', '.join(missing)}", file=path, expected=f"some of: {', '.join(there)}",
            hint="Correct reference.chains (--chains); mmCIF: the names are those of auth_asym_id.",
            code="chain-not-found",
        )  # fmt: skip
    for model in structure:
        for index in reversed(range(len(model))):
            if model[index].name not in chains:
                del model[index]


def use_confidence(model: Any, source: tuple[str, str], choice: ModelChoice, path: object, cut: bool) -> dict[str, Any]:
    """Leaves out what a predicted model is not sure of, and takes its confidences out of the B column, in place.

    Args:
        model: gemmi.Model. Its occupancies become the weights of the residues.
        cut: whether residues are left out and weighted; else only the B column is treated.

    Returns:
        What was found and done, for JSON; the same goes to the log.

    Raises:
        InputError: no residue is as confident as that.
        UsageError: ``full_confidence`` below ``min_confidence``.
    """
    low, full = choice.min_confidence, choice.full_confidence
    if full < low:
        raise UsageError(
            f"reference.full_confidence (--full-confidence) {full:g} is below min_confidence {low:g}",
            code="option-out-of-range",
        )
    residues = residues_of(model)
    verdict = judge(residues, source, choice.confidence, path)
    facts: dict[str, Any] = {
        "b_column": "confidence" if verdict.predicted else "temperature factor", "evidence": verdict.evidence,
    }  # fmt: skip
    if not verdict.predicted:
        if verdict.doubtful:
            logger.warning(
                "%s: the B column is read as temperature factors (%s). If it holds a confidence (pLDDT), set "
                "reference.confidence = 'yes' (--confidence yes)", path, verdict.evidence,
            )  # fmt: skip
        return facts
    confidence = residues.mean * verdict.factor
    _forget_b(model)
    facts |= {"residues": len(confidence), "mean_confidence": round(float(confidence.mean()), 2)}
    if cut and 0 < full <= 1:
        raise UsageError(
            f"reference.full_confidence (--full-confidence) {full:g} is on a scale of 0 to 1: confidences are compared "
            "on the scale of 0 to 100, also those of files with 0 to 1", code="option-out-of-range",
        )  # fmt: skip
    level = logging.WARNING if verdict.doubtful else logging.INFO
    logger.log(level, "%s: the B column is read as predicted confidence (%s)", path, verdict.evidence)
    if not cut:
        return facts
    if 0 < low < 1:
        logger.warning(
            "%s: reference.min_confidence (--min-confidence) is %g on a scale of 0 to 100, so next to nothing is left "
            "out; %g is meant if it is a share of 1", path, low, 100 * low,
        )  # fmt: skip
    if np.ptp(confidence) == 0:
        logger.warning("%s: all residues have the confidence %g: none is left out", path, confidence[0])
        return facts | {"left_out": 0, "weighted": 0}
    weight = np.clip((confidence - low) / (full - low), 0, 1) if full > low else np.ones(len(confidence))
    weight = np.where(confidence < low, 0.0, np.where(confidence >= full, 1.0, weight))
    if not weight.any():
        raise InputError(
            "no residue of the model is as confident as asked", file=path, expected=f"more than {low:g}",
            found=f"at most {confidence.max():g}", hint="Lower reference.min_confidence (--min-confidence).",
            code="model-confidence-invalid",
        )  # fmt: skip
    facts |= {
        "min_confidence": low, "full_confidence": full,
        "left_out": int((weight == 0).sum()), "left_out_residues": ranges(model, weight == 0),
        "weighted": int(((weight > 0) & (weight < 1)).sum()),
        "weighted_residues": ranges(model, (weight > 0) & (weight < 1)),
    }  # fmt: skip
    _weigh(model, weight)
    logger.info("%s: %s", path, words_of(facts))
    return facts


def words_of(facts: dict[str, Any]) -> str:
    """What was done with the residues of a predicted model, in words."""
    text = f"{facts['left_out']} of {facts['residues']} residues below a confidence of {facts['min_confidence']:g}"
    text += " left out"
    text += f" ({facts['left_out_residues']})" if facts["left_out"] else ""
    text += f", {facts['weighted']} below {facts['full_confidence']:g} down-weighted"
    return text + (f" ({facts['weighted_residues']})" if facts["weighted"] else "")


def ranges(model: Any, chosen: np.ndarray) -> str:
    """Residues of a model in words, such as ``A 1-15, 120-130; B 7``.

    Args:
        chosen: (n,) bool, in the order in which residues are read.
    """
    parts, at = [], 0
    for chain in model:
        of_chain = chosen[at : at + len(chain)]
        at += len(chain)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], of_chain.astype(np.int8), [0]])))
        runs = [(str(chain[int(a)].seqid), str(chain[int(b) - 1].seqid)) for a, b in edges.reshape(-1, 2)]
        if runs:
            parts.append(f"{chain.name or '(blank)'} " + ", ".join(a if a == b else f"{a}-{b}" for a, b in runs))
    return "; ".join(parts)


def _forget_b(model: Any) -> None:
    import gemmi

    for chain in model:
        for residue in chain:
            for atom in residue:
                atom.b_iso = PREDICTED_B_A2
                atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)


def _weigh(model: Any, weight: np.ndarray) -> None:
    """Occupancies from the weights of the residues; those of weight 0 go."""
    at = len(weight)
    for chain in reversed(list(model)):
        for index in reversed(range(len(chain))):
            at -= 1
            if weight[at] == 0:
                del chain[index]
                continue
            for atom in chain[index]:
                atom.occ = float(weight[at])
    for index in reversed(range(len(model))):
        if len(model[index]) == 0:
            del model[index]
