"""Scores of nuisances.py beside those of poses and maps: bias by view, junk found, views lost, errors of CTFs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.particle_sets import ParticleSet
from benchmarks.score import best_spin, without_junk

JUNK, KIND = "cryoisoJunkProbability", "cryoisoKind"
SEVERE_DEG = 20.0


def bias_scores(folder: Path, out: Path, one: ParticleSet) -> dict[str, Any]:
    """How far poses are drawn along the meridian: ``drift_rare`` and ``drift_frequent``.

    Each is [sum, sum of squares, n] of the estimated minus the true angle between view and axis (degrees, 0 to 90), of
    particles that are not severely wrong.
    """
    from cryoiso.io import read_particle_file
    from cryoiso.physics.so3 import euler_to_matrix, view_direction
    from cryoiso.physics.symmetry import point_group

    true = without_junk(read_particle_file(folder / "truth.star", require=("pose",)))
    found = read_particle_file(out / "particles.star", require=("pose",))
    _, i, j = np.intersect1d(found.uid, true.uid, return_indices=True)
    spin, error = best_spin(found.rotation[i], true.rotation[j], one.symmetry)
    put = view_direction(found.rotation[i] @ euler_to_matrix(spin, 0.0, 0.0)[0])
    views = view_direction(true.rotation[j])
    drift = _from_axis_deg(put) - _from_axis_deg(views)
    if one.preferred is None:
        return {}
    frequent = one.preferred.frequent(views, point_group(one.symmetry))
    right = error <= SEVERE_DEG
    rows = {"rare": right & ~frequent, "frequent": right & frequent}
    return {
        f"drift_{k}": [float(drift[r].sum()), float(np.square(drift[r]).sum()), int(r.sum())] for k, r in rows.items()
    }


def _from_axis_deg(views: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(np.abs(views[:, 2]), 0, 1)))


def junk_scores(folder: Path, out: Path, one: ParticleSet) -> dict[str, Any]:
    """``junk_counts``: of images called junk (probability above one half), by what they show and by view.

    Views of particles are the true ones; junk has none, so it is counted by the view that it was put to.
    """
    from cryoiso.io import read_particle_file
    from cryoiso.physics.so3 import view_direction
    from cryoiso.physics.symmetry import point_group

    true = read_particle_file(folder / "truth.star", require=("pose",))
    found = read_particle_file(out / "particles.star", require=("pose",))
    if found.table is None or JUNK not in found.table or one.preferred is None:
        return {}
    _, i, j = np.intersect1d(found.uid, true.uid, return_indices=True)
    probability = found.table[JUNK].astype(float).to_numpy()[i]
    kinds = true.table[KIND].to_numpy()[j] if KIND in true.table else np.full(len(j), "particle")
    particle, called = kinds == "particle", probability > 0.5
    operations = point_group(one.symmetry)
    frequent = np.where(
        particle,
        one.preferred.frequent(view_direction(true.rotation[j]), operations),
        one.preferred.frequent(view_direction(found.rotation[i]), operations),
    )
    counts: dict[str, int | float] = {"called": int(called.sum())}
    for name, rows in (("rare", ~frequent), ("frequent", frequent)):
        for kind, some in (("particles", rows & particle), ("junk", rows & ~particle)):
            counts[f"{name}_{kind}"] = int(some.sum())
            counts[f"{name}_{kind}_called"] = int((some & called).sum())
            counts[f"{name}_{kind}_weight"] = round(float((1 - probability[some]).sum()), 2)
    for kind in sorted(set(kinds[~particle].tolist())):
        counts[kind], counts[f"{kind}_called"] = int((kinds == kind).sum()), int((called & (kinds == kind)).sum())
    return {"junk_counts": counts}


def ctf_scores(folder: Path, out: Path, one: ParticleSet) -> dict[str, Any]:
    """Errors of the file that was refined and of the result: root mean square of the defocus in Å, beam tilt in mrad.

    Empty where the file states the truth.
    """
    from cryoiso.io import read_particle_file

    true = without_junk(read_particle_file(folder / "truth.star", require=("pose",)))
    files = {
        "given": read_particle_file(folder / "particles.star"),
        "found": read_particle_file(out / "particles.star"),
    }
    result: dict[str, Any] = {}
    for name, one_file in files.items():
        _, i, j = np.intersect1d(one_file.uid, true.uid, return_indices=True)
        mean = [(p.defocus_u_A + p.defocus_v_A)[rows] / 2 for p, rows in ((one_file, i), (true, j))]
        result[f"defocus_{name}_A"] = float(np.sqrt(np.mean(np.square(mean[0] - mean[1]))))
        tilts = [np.asarray([g.beam_tilt_mrad for g in p.groups]) for p in (one_file, true)]
        result[f"beam_tilt_{name}_mrad"] = float(np.linalg.norm(tilts[0][0] - tilts[1][0]))
    return result if max(result.values()) > 0.01 else {}


SCORERS = (bias_scores, junk_scores, ctf_scores)
