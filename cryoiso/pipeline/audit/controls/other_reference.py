"""A second reference: do both give one map?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.io.mrc import read_map
from cryoiso.methods.audit import likeness
from cryoiso.methods.audit.blocks import block_numbers, bootstrap, summed
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line, Verdict, at_least
from cryoiso.metrics.fsc_curve import fsc, resolution_at, shell_frequencies
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.controls.omitted import refused_sentence
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of
from cryoiso.pipeline.inputs.reference import prepare_reference

NAME, TITLE = "other-reference", "Another reference"


def cases(bench: Bench) -> list[Case]:
    """One, with the second reference laid into the frame of the first."""
    first = bench.run.folder.stage("reference") / products.REFERENCE
    other_reference = prepare_reference(
        Path(bench.job.audit.other_reference), bench.box_px, bench.pixel_size_A, bench.job.reference.lowpass_A,
        resample=True, symmetry=bench.job.sample.symmetry, fit=first, mirror=False,
    )  # fmt: skip
    path = bench.write_reference(NAME, "reference", other_reference.map.data)
    return [Case(NAME, "second", job_of(bench, path))]


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Agreement of the two maps against that of the references, in shells that the initial references did not have."""
    second = outcomes["second"]
    if unchanged.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", refused_sentence(bench, unchanged))
    if second.refused:
        return ControlRecord(NAME, TITLE, "inconclusive", "The images do not match the second reference beyond chance.")
    other = read_map(second.stage("reference") / products.REFERENCE).data
    unchanged_map = unchanged.map()
    two = bench.aligned(second.map(), unchanged_map)
    mask = bench.inside.astype(np.float64)
    x = shell_frequencies(bench.box_px, bench.pixel_size_A).tolist()
    curves = {
        "the two maps": fsc(unchanged_map, two, mask), "the two references": fsc(bench.reference, other, mask),
        "second map and first reference": fsc(two, bench.reference, mask),
        "second map and second reference": fsc(two, other, mask),
    }  # fmt: skip
    at_A = {k: resolution_at(c, 0.5, bench.box_px, bench.pixel_size_A) for k, c in curves.items()}
    band = bench.beyond if bench.beyond.usable else bench.all_shells
    maps = likeness.filtered(unchanged_map, band)[bench.inside]
    others = [likeness.filtered(v, band)[bench.inside] for v in (two, other)]
    numbers = block_numbers(bench.inside, bench.block_px, bench.operations)
    terms = np.concatenate([
        summed(numbers, maps * others[0], maps * maps, others[0] * others[0]),
        summed(numbers, others[0] * others[1], others[0] * others[0], others[1] * others[1]),
    ], 1)  # fmt: skip
    gain = bootstrap(
        terms, lambda t: t[..., 0] / np.sqrt(t[..., 1] * t[..., 2]) - t[..., 3] / np.sqrt(t[..., 4] * t[..., 5]),
        bench.seed, NAME,
    )  # fmt: skip
    verdict = at_least(gain.interval, 0.0)
    sentence = (
        f"Maps from the two references agree to {at_A['the two maps']:.1f} Å (FSC 0.5), the references themselves to "
        f"{at_A['the two references']:.1f} Å, the second map and its own reference to "
        f"{at_A['second map and second reference']:.1f} Å. {advice(verdict, gain.value)}"
    )
    return ControlRecord(
        NAME, TITLE, verdict, sentence,
        measure="correlation of the two maps less that of the second map and its reference, beyond the initial ones",
        number=gain.value, interval=gain.interval, threshold=0.0, details={"resolution_05_A": at_A},
        figure=FigureData(
            "spatial frequency (1/Å)", "FSC", [Line(k, x, c.tolist(), k != "the two maps") for k, c in curves.items()],
            level=0.5, caption="If the images decide, the two maps agree further than each does with its reference.",
        ),
    )  # fmt: skip


def advice(verdict: Verdict, gain: float) -> str:
    """What a verdict means for the map, and what to do.

    Args:
        gain: correlation of the two maps less that of the second map and its reference.
    """
    if verdict == "pass":
        return (
            "Beyond the initial references the second map is nearer to the first map than to its own reference (by "
            f"{gain:.2f}): the images decide."
        )
    compare = f"Interpret only what both maps show; the second is in audit/{NAME}/second."
    if verdict == "fail":
        return (
            "Beyond the initial references the second map is nearer to its own reference than to the first map (by "
            f"{-gain:.2f}): the choice of the reference decides. {compare}"
        )
    return f"Whether the second map is nearer to the first map or to its own reference is not decided. {compare}"
