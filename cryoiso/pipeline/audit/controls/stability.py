"""Poses searched anew: do they stay where they are?"""

from __future__ import annotations

import numpy as np

from cryoiso.core import products
from cryoiso.io import read_particle_file
from cryoiso.methods.audit.agreement import in_frame_of, shared
from cryoiso.methods.audit.extent import LOCAL_DEG, near_poses
from cryoiso.methods.audit.record import ControlRecord, FigureData, Line, at_least, gravest
from cryoiso.metrics.fsc_curve import fsc, resolution_at
from cryoiso.pipeline.audit import arms
from cryoiso.pipeline.audit.bench import Bench, with_new_halves
from cryoiso.pipeline.audit.repeat import Case, Outcome, job_of

NAME, TITLE = "stability", "Poses searched anew"
WITHIN_DEG = 10.0
STAY = {"local": 0.8, "seed": 0.6}
"""Least shares of poses that stay: of a local search around the final ones, and of a refinement from the start with
another seed and other half-sets."""
EDGES_DEG = np.array([0, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 90, 180.0])


def cases(bench: Bench) -> list[Case]:
    """The workflow with another seed and other half-sets, and a local search of all poses from the run's own map; of a
    plain refinement the matched control is a local search, from the reference."""
    seed = job_of(bench)
    seed.run.seed = bench.seed + 1
    halves = with_new_halves(bench.particles, seed.run.seed)
    again = Case(NAME, "seed", seed, particles=halves, identity="other half-sets")
    return [again] if near_poses(bench.job) else [arms.local_case(bench), again]


def record(bench: Bench, unchanged: Outcome, outcomes: dict[str, Outcome]) -> ControlRecord:
    """Share of poses that stay within 10 degrees, and the resolution."""
    shares, lines, parts, verdicts = {}, [], [], []
    before = bench.posed.require_poses()[0]
    searched = outcomes if "local" in outcomes else {"local": unchanged, **outcomes}
    for name, outcome in searched.items():
        if outcome.refused:
            verdicts.append("inconclusive")
            parts.append({"local": "the local search was refused", "seed": "the repetition was refused"}[name])
            continue
        after = in_frame_of(_poses(bench, outcome), before, bench.operations)
        share, error, moved = shared(before, after, bench.operations, WITHIN_DEG)
        halves = [outcome.map(half) for half in products.HALF_MAPS]
        reached = resolution_at(fsc(halves[0], halves[1]), 0.143, bench.box_px, bench.pixel_size_A)
        shares[name] = {"share": share, "error": error, "median_deg": float(np.median(moved)), "half_maps_A": reached}
        verdicts.append(at_least((share - 2 * error, share + 2 * error), STAY[name]))
        below: list[float | None] = [float((moved <= edge).mean()) for edge in EDGES_DEG]
        what = {"local": f"local search within {LOCAL_DEG:.0f}°", "seed": "other seed and half-sets"}[name]
        lines.append(Line(what, EDGES_DEG.tolist(), below))
        parts.append(
            f"{100 * share:.0f} % of the poses stay within {WITHIN_DEG:.0f}° ({what}; half-maps to {reached:.1f} Å)"
        )
    first = shares.get("local") or shares.get("seed")
    return ControlRecord(
        NAME, TITLE, gravest(verdicts), "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + ".",  # type: ignore[arg-type]
        measure=f"share of poses that stay within {WITHIN_DEG:.0f}° in a local search from the final ones",
        number=first["share"] if first else None,
        interval=(first["share"] - 2 * first["error"], first["share"] + 2 * first["error"]) if first else None,
        threshold=STAY["local"], details=shares,
        figure=FigureData(
            "pose moved by at most (°)", "share of particles", lines, level=None,
            caption="Poses that are searched anew should stay. That they stay does not make them right: wrong poses "
            "that the map has grown used to stay as well.",
        ) if lines else None,
    )  # fmt: skip


def _poses(bench: Bench, outcome: Outcome) -> np.ndarray:
    """(n, 3, 3) of the subset, in its order."""
    particles = read_particle_file(outcome.poses(), bench.job.particles.project, ("pose",))
    if len(particles) == len(bench.rows):
        order = np.argsort(particles.uid, kind="stable")
        rows = order[np.searchsorted(particles.uid[order], bench.particles.uid)]
    else:
        rows = np.arange(len(particles))
    return particles.require_poses()[0][rows]
