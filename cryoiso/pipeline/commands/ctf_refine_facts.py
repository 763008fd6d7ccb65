"""What ``ctf_refine.json`` says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.star.columns import Columns
from cryoiso.methods.ctf_refinement.astigmatism import astigmatism_of
from cryoiso.methods.ctf_refinement.tilt_plane import TiltPlane, fit_plane, unshrunken

if TYPE_CHECKING:
    from cryoiso.methods.ctf_refinement.reference import CtfReference
    from cryoiso.methods.ctf_refinement.refine import CtfRefinement
    from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings

PIXEL_COLUMNS = ("rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize")


@dataclass(frozen=True)
class MicrographPositions:
    """Which micrograph each of n particles lies on, and where."""

    names: list[str]
    index: np.ndarray | None
    """(n,) into ``names``; None where the file names no micrographs."""
    position_A: np.ndarray | None
    """(n, 2)."""

    @classmethod
    def of(cls, particles: Particles, file: object) -> MicrographPositions:
        """From the columns rlnMicrographName, rlnCoordinateX and Y; the unit of coordinates is the micrograph's pixel
        size where the file has it, else that of the images."""
        if particles.table is None:
            return cls([], None, None)
        columns = Columns(particles.table, file)
        if not columns.has("rlnMicrographName"):
            return cls([], None, None)
        names, index = np.unique(np.array(columns.text("rlnMicrographName")), return_inverse=True)
        place = None
        if columns.has("rlnCoordinateX", "rlnCoordinateY"):
            pixels = np.stack([columns.number("rlnCoordinateX"), columns.number("rlnCoordinateY")], 1)
            place = pixels * _micrograph_pixel_A(particles, columns, file)[:, None]
        return cls(names.tolist(), index.reshape(-1), place)

    def shown(self, refinement: CtfRefinement, before: Particles) -> dict[str, Any]:
        """What the figure shows: changes; with coordinates, position and defocus about the micrograph's mean."""
        shown: dict[str, Any] = {"change_A": refinement.change_A, "position_A": None, "defocus_A": None}
        if self.index is not None and self.position_A is not None:
            defocus = astigmatism_of(before)[:, 0] + refinement.change_A
            shown["position_A"] = self._centred(self.position_A)
            shown["defocus_A"] = self._centred(defocus[:, None])[:, 0]
        return shown

    def _centred(self, values: np.ndarray) -> np.ndarray:
        assert self.index is not None
        sums = np.zeros((len(self.names), values.shape[1]))
        np.add.at(sums, self.index, values)
        centred: np.ndarray = values - (sums / np.bincount(self.index, minlength=len(self.names))[:, None])[self.index]
        return centred


def _micrograph_pixel_A(particles: Particles, columns: Columns, file: object) -> np.ndarray:
    for name in PIXEL_COLUMNS:
        if columns.has(name):
            return columns.number(name)
        optics = particles.optics_table
        if optics is not None and name in optics.columns:
            of_rows: np.ndarray = Columns(optics, file, "optics").number(name)[particles.optics]
            return of_rows
    return particles.group_values("pixel_size_A")


def all_facts(
    before: Particles,
    refinement: CtfRefinement,
    reference: CtfReference,
    micrographs: MicrographPositions,
    settings: CtfRefinementSettings,
) -> dict[str, Any]:
    """The numbers of ctf_refine.json, but for the files."""
    planes = _planes(before, refinement, micrographs)
    return {
        "settings": asdict(settings),
        "reference": {
            "kind": reference.source, "resolution_A": reference.resolution_A, "last_shell": reference.radius_px,
        },
        "particles": _particle_facts(refinement, settings),
        **{key: value for key, value in refinement.facts.items() if key != "micrograph_fit"},
        "micrograph_fit": _without_lists(refinement.facts.get("micrograph_fit")),
        "micrographs": _micrograph_table(before, refinement, micrographs, planes),
        "tilt_plane": _mean_plane([plane for plane in planes.values() if plane is not None]),
    }  # fmt: skip


def _particle_facts(refinement: CtfRefinement, settings: CtfRefinementSettings) -> dict[str, Any]:
    own, n = refinement.own_change_A, len(refinement.own_change_A)
    change = refinement.change_A
    return {
        "count": n, "prior_sd_A": refinement.prior_sd_A, "prior": "given" if settings.prior_sd_A else "estimated",
        "mean_change_A": float(change.mean()), "rms_change_A": float(np.sqrt((change**2).mean())),
        "median_abs_change_A": float(np.median(np.abs(change))), "rms_own_change_A": float(np.sqrt((own**2).mean())),
        "estimated_error_A": float(np.sqrt((refinement.error_A**2).mean())),
        "at_limit": float(refinement.at_limit.mean()),
        "log_likelihood_gain": float(refinement.gain.sum()),
        "log_likelihood_gain_per_particle": float(refinement.gain.mean()),
    }  # fmt: skip


def _without_lists(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if facts is None else {k: v for k, v in facts.items() if not isinstance(v, list)}


def _planes(
    before: Particles, refinement: CtfRefinement, micrographs: MicrographPositions
) -> dict[int, TiltPlane | None]:
    """Micrograph -> plane of the refined defoci; empty without coordinates or refined particles."""
    if micrographs.index is None or micrographs.position_A is None or refinement.prior_sd_A <= 0:
        return {}
    free = unshrunken(refinement.own_change_A, refinement.fisher, refinement.prior_sd_A)
    defocus = astigmatism_of(before)[:, 0] + refinement.change_A - refinement.own_change_A + free
    planes: dict[int, TiltPlane | None] = {}
    for m in range(len(micrographs.names)):
        here = np.flatnonzero((micrographs.index == m) & ~refinement.at_limit)
        planes[m] = fit_plane(micrographs.position_A[here], defocus[here], refinement.fisher[here])
    return planes


def _micrograph_table(
    before: Particles, refinement: CtfRefinement, micrographs: MicrographPositions, planes: dict[int, TiltPlane | None]
) -> list[dict[str, Any]]:
    if micrographs.index is None:
        return []
    old, change = astigmatism_of(before), refinement.micrograph_change_A
    fit = refinement.facts.get("micrograph_fit") or {}
    rows = []
    for m, name in enumerate(micrographs.names):
        here = np.flatnonzero(micrographs.index == m)
        row: dict[str, Any] = {
            "name": name, "particles": len(here), "mean_defocus_A": float((old[here,
            0] + refinement.change_A[here]).mean()),
            "mean_change_A": float(refinement.change_A[here].mean()),
            "rms_own_change_A": _rms(refinement.own_change_A[here]),
        }  # fmt: skip
        if fit:
            row |= {"change_A": float(change[m, 0]), "error_A": fit["error_A"][m]}
        if "astigmatism_error_A" in fit:
            before_and_after = np.stack([old[here, 1:].mean(0), old[here, 1:].mean(0) + change[m, 1:]])
            row |= {"astigmatism_before_A": _size_A(before_and_after[0]), "astigmatism_A": _size_A(before_and_after[1])}
            row |= {
                "astigmatism_angle_deg": float(
                    np.degrees(0.5 * np.arctan2(before_and_after[1, 1], before_and_after[1, 0])) % 180
                )
            }
            row |= {"astigmatism_error_A": 2 * fit["astigmatism_error_A"][m]}
        plane = planes.get(m)
        rows.append(row | (plane.facts() if plane is not None else {}))
    return rows


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _size_A(vector: np.ndarray) -> float:
    """U - V."""
    return float(2 * np.hypot(*vector))


def _mean_plane(planes: list[TiltPlane]) -> dict[str, Any] | None:
    """Slopes of all micrographs, averaged by their errors: a tilt that all share, as in a tilted collection."""
    if not planes:
        return None
    slope = np.array([plane.slope for plane in planes])
    weight = 1.0 / np.maximum(np.array([plane.slope_error for plane in planes]), 1e-12) ** 2
    mean = (weight * slope).sum(0) / weight.sum(0)
    error = 1.0 / np.sqrt(weight.sum(0))
    count = sum(plane.particles for plane in planes)
    shared = TiltPlane((float(mean[0]), float(mean[1])), (float(error[0]), float(error[1])), count)
    tilts = np.array([plane.tilt_deg for plane in planes])
    return {**shared.facts(), "micrographs": len(planes), "median_tilt_deg": float(np.median(tilts))}
