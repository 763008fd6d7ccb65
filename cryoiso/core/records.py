"""The JSON records of a run that one package writes and another reads, key by key.

All keys may be absent where a record is read: files of runs that were interrupted, or begun with an older version, lack
some. None is JSON's null, for a number that could not be had.
"""

from __future__ import annotations

from typing import Any, TypedDict, TypeVar

Curve = list[float | None]


class HomologueRecord(TypedDict):
    """How far a first iteration's raw particles confirm the homologue (``refine.homologue.HomologueCorrelation``)."""

    confirmed: bool
    deviation: float
    """Correlation beyond the first reference, in standard deviations of noise."""
    first_shell: int
    first_A: float
    """Resolution of the first compared shell."""
    correlation: list[float]
    rho: list[float]
    inverse_power: list[float]


class IterationRecord(TypedDict, total=False):
    """One iteration of a refinement, in ``refine.json`` and in a checkpoint."""

    iteration: int
    resolution_A: float
    resolution_unmasked_A: float
    resolution_weighted_A: float
    cfar: float | None
    search_resolution_A: float
    step_deg: float
    uncertainty_deg: float
    """Median angular spread of the posteriors, at least half the step."""
    changes_deg: float
    shift_sd_A: float
    at_shift_limit: float
    max_probability_mean: float
    log_likelihood: float
    auxiliary_weight_share: float
    """Of the references' weight; only with auxiliary particles."""
    auxiliary_factor: list[float]
    """By shell, on the weight of the auxiliary particles (mean of both half-sets); only where it was measured."""
    homologue_precision: list[float]
    """By shell, in units of 1/tau^2 (mean of both half-sets); only where it was measured."""
    homologue: HomologueRecord
    """Of the first iteration; only where the weight of auxiliary particles is measured."""
    scale_sd: float
    """Standard deviation of the raw images' scales; only where they are estimated."""
    seconds: float
    correction: dict[str, Any]
    """What a correction in the loop says of this iteration; its own words."""


class ClassIterationRecord(TypedDict, total=False):
    """One iteration of a classification, in ``classify.json`` and in a checkpoint."""

    iteration: int
    resolution_A: Curve
    """Of each class; null where a class is empty."""
    changed: float
    """Share of the particles that changed class."""
    occupancy: list[float]
    search_resolution_A: float
    log_likelihood: float
    class_probability_mean: float
    junk: float
    """Share of images without a particle; only where they are searched for."""
    step_deg: float
    """Only where poses are searched."""
    seconds: float


class RefineRecord(TypedDict, total=False):
    """``refine.json``."""

    engine: str
    symmetry: str
    diameter_A: float | None
    resolution_A: float
    particles: int
    iterations: list[IterationRecord]
    noise_variance: list[Curve]
    """By optics group and shell; null where a shell is empty."""
    view_density: dict[str, Any]
    intensity: dict[str, Any]
    """Spread of the images' scales and noise levels, and their means by view; only where they are estimated."""
    junk: dict[str, Any]
    """Share, count, and particles of every viewing cone before and after; only with ``refine.junk``."""
    empty_shells: list[dict[str, Any]]
    local_deg: float
    moved: dict[str, Any]
    correction: dict[str, Any]
    relion: dict[str, Any]
    """How the program was run."""
    command: dict[str, Any]
    """The same of an engine by command."""
    cryosparc: dict[str, Any]
    """The same of cryoSPARC: project, uids of its jobs, parameters."""


class CurvesRecord(TypedDict, total=False):
    """FSC of two half-maps, and what follows from it."""

    frequency_invA: list[float]
    fsc_unmasked: Curve
    fsc_masked: Curve
    fsc_randomised: Curve
    fsc_corrected: Curve
    randomise_from_shell: int | None
    data_to_A: float | None
    """Where the half-maps end; None: they reach to Nyquist."""
    resolution_0143_A: float
    resolution_05_A: float
    resolution_0143_masked_A: float
    resolution_0143_unmasked_A: float


class EvidenceRecord(TypedDict):
    """A number that a verdict rests on."""

    name: str
    value: float | None
    threshold: float | None
    says: str


class VerdictRecord(TypedDict):
    """The verdict on a reconstruction."""

    verdict: str
    sentence: str
    advice: str
    evidence: list[EvidenceRecord]


class ReferenceRecord(TypedDict, total=False):
    """``reference.json``."""

    source: str
    lowpass_A: float
    diameter_A: float
    box_px: int
    pixel_size_A: float
    fit: dict[str, Any]
    model: dict[str, Any]
    """Of an atomic model: chains, what the B column holds, residues left out (``io.confidence``)."""
    map: dict[str, Any]
    """Of a map: box, voxel, axes and origin of the file."""


class DiagnoseRecord(CurvesRecord, total=False):
    """``diagnose.json``. What needs poses or the truth is there where these are known."""

    schema: int
    box_px: int
    pixel_size_A: float
    symmetry: str
    directional: dict[str, Any]
    particles: int
    half_counts: list[int]
    posterior: dict[str, Any]
    views: dict[str, Any]
    sampling: dict[str, Any]
    pose_errors: dict[str, Any]
    map_to_truth: dict[str, Any]
    true_poses: dict[str, Any]
    symmetry_proposal: dict[str, Any]
    """Point group that the half-maps have, if it was asked for (``physics.symmetry_proposal``)."""
    verdict: VerdictRecord
    emdb_flags: list[dict[str, Any]]
    """See `cryoiso.methods.assess.emdb_flags`."""
    local_resolution: dict[str, Any]
    """See `cryoiso.metrics.windowed_fsc`."""
    model: dict[str, Any]
    """See `cryoiso.methods.assess.model_map`."""
    notes: list[str]
    before: DiagnoseRecord
    """Of what the run began with, or of another run that is shown beside it."""


class JournalLine(TypedDict, total=False):
    """A line of ``journal.jsonl``, as far as anybody but its writer reads it."""

    time: str
    event: str
    stage: str
    seconds: float
    outputs: dict[str, str]


_Iteration = TypeVar("_Iteration", IterationRecord, ClassIterationRecord)


def without_times(history: list[_Iteration]) -> list[_Iteration]:
    """Copies without timings, for files that are compared bit by bit."""
    kept = [record.copy() for record in history]
    for record in kept:
        record.pop("seconds", None)
    return kept
