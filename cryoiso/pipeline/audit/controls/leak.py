"""Noise whose half-sets share nothing: do the half-maps agree all the same?"""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import extent, regions
from cryoiso.methods.audit.agreement import Independence, independence
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of, with_control
from cryoiso.pipeline.inputs.standard_frame import symmetrised
from cryoiso.pipeline.workflow import CO_REFINEMENTS

NAME, TITLE = "leak", "Independence of the half-sets"
TOTAL = 3.0
"""Sum of the standardised FSC over the root of the number of shells: beyond it a weak leak in all shells is seen."""


def cases(bench: Bench) -> list[Case]:
    """The workflow on noise, with a random reference for each half-set and without the common frame of the half-sets:
    all that they share by design is gone."""
    job = job_of(bench)
    job.refine.join_halves_A = 0.0
    job.refine.solvent_mask = False  # maps of noise have no particle that a mask could be made from
    paths = []
    for half in HALVES:
        noise_map = DensityMap(regions.noise_reference(bench.reference, bench.seed, half), bench.pixel_size_A)
        even = symmetrised(noise_map, bench.job.sample.symmetry).data
        data = regions.with_spectrum_of(even, bench.reference)
        paths.append(bench.write_reference(NAME, f"reference{half}", data))
    case = Case(NAME, "noise", job, images="leak", last="correct")
    return [with_control(case, bench.grey_scale, (paths[0], paths[1]))]


def shared_networks(job: Job) -> list[str]:
    """Settings by which one network sees both half-sets before their half-maps are made."""
    networks = []
    if job.run.workflow in CO_REFINEMENTS and job.auxiliary.generators == "shared":
        networks.append('auxiliary.generators = "shared"')
    if job.run.workflow in ("realign", "both") and job.realign.correct and job.realign.mode == "paired":
        networks.append('realign.mode = "paired"')
    return networks


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """FSC of the half-maps, and of the corrected ones where each has a network of its own, in standard errors."""
    outcome = outcomes["noise"]
    halves = [outcome.map(name) for name in products.HALF_MAPS]
    agreements = {"half-maps": _of(bench, halves)}
    by_design = ""
    if outcome.context.folder.has("correct"):
        corrected = [read_map(outcome.stage("correct") / products.corrected_half(h)).data for h in HALVES]
        if bench.job.correct.mode == "independent":
            agreements["corrected half-maps"] = _of(bench, corrected)
        else:
            by_design = " The corrected half-maps share a network (correct.mode = paired), and no FSC belongs to them."
    leaks = [
        name for name, agreement in agreements.items() if agreement.z.max() > agreement.limit or agreement.total > TOTAL
    ]
    name, worst = max(agreements.items(), key=lambda pair: float(pair[1].z.max()))
    images = min(len(bench.rows), extent.LEAK_PARTICLES)
    sentence = f"Half-maps of {images} images of noise, which share nothing, agree within chance in all shells."
    if leaks:
        sentence = f"Half-maps of {images} images of noise, which should share nothing, agree: the "
        sentence += f"{' and the '.join(leaks)} of one half-set contain information of the other."
    networks = shared_networks(bench.job)
    if networks:
        sentence = f"One network saw both half-sets ({', '.join(networks)}): their FSC is no gold standard. " + sentence
    strongest, length_A = float(worst.z.max()), bench.box_px * bench.pixel_size_A
    return ControlRecord(
        NAME, TITLE, "fail" if leaks or networks else "pass", sentence + by_design,
        measure=f"largest FSC of any shell in its standard errors ({name})", number=strongest,
        threshold=worst.limit,
        power=f"An FSC above {float(np.median(worst.error) * worst.limit):.2f} in one shell would have been seen.",
        details={
            "shared_networks": networks, "measured_leak": leaks,
            **{k: {"largest_z": float(o.z.max()), "total": o.total, "limit": o.limit} for k, o in agreements.items()},
        },
        figure=FigureData(
            "spatial frequency (1/Å)", "FSC / standard error",
            [Line(k, (o.shells / length_A).tolist(), o.z.tolist()) for k, o in agreements.items()],
            level=worst.limit, caption="Agreement of half-maps that were made of noise and began with references of "
            "their own, in standard errors: independent half-maps stay below the line.",
        ),
    )  # fmt: skip


def _of(bench: Bench, halves: list[np.ndarray]) -> Independence:
    return independence(halves[0], halves[1], len(bench.operations), bench.box_px // 2 - 1)
