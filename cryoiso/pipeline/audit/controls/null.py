"""Noise in place of the images: what the reference, the mask and the workflow make of nothing."""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.methods.audit import likeness
from cryoiso.methods.audit.blocks import Estimate
from cryoiso.methods.audit.extent import has_plain_counterpart, near_poses
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line, Verdict, gravest
from cryoiso.metrics.fsc_curve import fsc, resolution_at, shell_frequencies
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of, with_control
from cryoiso.pipeline.workflow import CO_REFINEMENTS

NAME, TITLE = "null", "Noise instead of images"
ERRORS = 2.0
"""Standard errors that count as a difference."""
CLEAR = 0.1
"""Correlation beyond the initial reference that a map of real particles exceeds: if it can be excluded that the run's
does, the control fails."""

MEASURE = "correlation with the reference, in shells that the initial reference did not have, less that of noise"
MEASURE_WORKFLOW = "correlation of noise with the reference, all shells, less that with a plain refinement"


def cases(bench: Bench) -> list[Case]:
    """The workflow, and a plain refinement where the workflow is more, on the same noise."""
    cases_of_null = [Case(NAME, "workflow", job_of(bench), images="null")]
    if has_plain_counterpart(bench.job):
        cases_of_null.append(Case(NAME, "plain", job_of(bench, plain=True), images="null"))
    return [with_control(case, bench.grey_scale) for case in cases_of_null]


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """The run's likeness to the reference beyond the initial one against that of noise, and that of noise with the
    workflow against that with a plain refinement."""
    noise = outcomes["workflow"].map()
    # a local search around the poses of noise would keep some of what these owe to the reference
    own = _map_of_run(bench) if near_poses(bench.job) or unchanged.refused else unchanged.map()
    gain, first = _beyond(bench, own, noise)
    extra, second = _by_workflow(bench, noise, outcomes)
    halves = [outcomes["workflow"].map(name) for name in products.HALF_MAPS]
    claimed = resolution_at(fsc(*halves), 0.143, bench.box_px, bench.pixel_size_A)
    sentence = _sentence(bench, gain, first) + _workflow_sentence(bench.job, extra, second)
    sentence += f" Half-maps of noise agree to {claimed:.1f} Å (FSC 0.143, without a mask)."
    details = {
        "half_maps_of_noise_A": claimed, "verdict_data": first, "verdict_workflow": second,
        "shells": [bench.beyond.first, bench.beyond.last], "unchanged_was_refused": bool(unchanged.refused),
        "whole": {name: _whole(bench, volume) for name, volume in (("run", own), ("noise", noise))},
        "workflow_less_plain": None if extra is None else [extra.value, extra.low, extra.high],
    }  # fmt: skip
    measure, decisive, threshold = MEASURE, gain, 0.0
    if extra is not None and gravest([first, second]) != first:  # the number is that of the graver verdict
        measure, decisive, threshold = MEASURE_WORKFLOW, extra, ERRORS * extra.error
    return ControlRecord(
        NAME, TITLE, gravest([first, second]), sentence,
        measure=measure, number=decisive.value, interval=decisive.interval, threshold=threshold,
        power=_power(gain, extra), details=details,
        figure=_figure(bench, own, noise, outcomes["plain"].map() if "plain" in outcomes else None, halves),
    )  # fmt: skip


def _power(gain: Estimate, extra: Estimate | None) -> str:
    parts = []
    if np.isfinite(gain.error):
        parts.append(f"A difference above {ERRORS * gain.error:.2f} would have been seen.")
    if extra is not None and np.isfinite(extra.error):
        parts.append(f"Of the workflow, bias above {ERRORS * extra.error:.2f} would have been found.")
    return " ".join(parts)


def _map_of_run(bench: Bench) -> np.ndarray:
    volume: np.ndarray = Outcome(bench.run).map()
    return volume


def _beyond(bench: Bench, own: np.ndarray, noise: np.ndarray) -> tuple[Estimate, Verdict]:
    if not bench.beyond.usable:
        return Estimate(np.nan, np.nan, np.nan, np.nan), "inconclusive"
    gain = likeness.difference(
        own, noise, bench.reference, bench.inside, bench.beyond, bench.seed, bench.operations
    )  # fmt: skip
    if not np.isfinite(gain.error):
        return gain, "inconclusive"
    if gain.value > ERRORS * gain.error:
        return gain, "pass"
    return gain, "fail" if gain.value + ERRORS * gain.error < CLEAR or gain.value <= 0 else "inconclusive"


def _by_workflow(bench: Bench, noise: np.ndarray, outcomes: dict[str, Outcome]) -> tuple[Estimate | None, Verdict]:
    if "plain" not in outcomes:
        return None, "not applicable"
    extra = likeness.difference(
        noise, outcomes["plain"].map(), bench.reference, bench.inside, bench.all_shells, bench.seed, bench.operations
    )  # fmt: skip
    if not np.isfinite(extra.error):
        return extra, "inconclusive"
    return extra, "pass" if extra.value <= ERRORS * extra.error else "fail"


def _whole(bench: Bench, volume: np.ndarray) -> float:
    return likeness.correlation(volume, bench.reference, bench.inside, bench.all_shells, bench.seed).value


def _sentence(bench: Bench, gain: Estimate, verdict: Verdict) -> str:
    lowpass_A = bench.job.reference.lowpass_A
    if not bench.beyond.usable:
        return (
            f"Between the initial reference ({lowpass_A:g} Å) and the resolution of {bench.resolution_A:.1f} Å a box "
            f"of {bench.box_px * bench.pixel_size_A:.0f} Å has too few Fourier shells, so that nothing in the map can "
            "be told from what the reference put there."
        )
    start = f"In the shells beyond {lowpass_A:g} Å, which the initial reference did not have, the map of the particles "
    if verdict == "pass":
        return start + f"resembles the reference more than that of noise does (correlation larger by {gain.value:.2f})."
    if verdict == "fail":
        return start + f"resembles the reference no more than that of noise does (difference {gain.value:.2f})."
    return start + f"cannot be told from that of noise (difference of the correlations {gain.value:.2f})."


def _workflow_sentence(job: Job, extra: Estimate | None, verdict: Verdict) -> str:
    if extra is None:
        return ""
    if verdict == "pass":
        return " Of noise, the workflow makes no more of the reference than a plain refinement does."
    if verdict == "fail":
        return (
            f" Of noise, the workflow makes more of the reference than a plain refinement does (correlation larger by "
            f"{extra.value:.2f}): it adds bias. Do not interpret density that a plain refinement (run.workflow = "
            f'"refine") of the same particles does not show.{_remedy(job)}'
        )
    return " Whether the workflow adds bias could not be measured."


def _remedy(job: Job) -> str:
    if job.run.workflow in CO_REFINEMENTS and job.auxiliary.weight != "measured":
        return ' auxiliary.weight = "measured" gives auxiliary particles no more weight than the images confirm.'
    return ""


def _figure(
    bench: Bench, own: np.ndarray, noise: np.ndarray, plain: np.ndarray | None, halves: list[np.ndarray]
) -> FigureData:
    mask = bench.inside.astype(np.float64)
    x = shell_frequencies(bench.box_px, bench.pixel_size_A).tolist()
    lines = [
        Line("particles and reference", x, fsc(own, bench.reference, mask).tolist()),
        Line("noise and reference", x, fsc(noise, bench.reference, mask).tolist()),
        *(
            []
            if plain is None
            else [Line("noise and reference, plain refinement", x, fsc(plain, bench.reference, mask).tolist())]
        ),
        Line("half-maps of noise", x, fsc(halves[0], halves[1]).tolist(), dashed=True),
    ]
    return FigureData(
        "spatial frequency (1/Å)", "FSC", lines, level=0.0,
        caption="Agreement with the reference of the map from particles and of that from noise, within the reference's "
        f"mask. Beyond {bench.job.reference.lowpass_A:g} Å the initial reference was empty. The dashed curve is what "
        "half-maps of noise claim: both begin with one reference.",
    )  # fmt: skip
