"""CTF refinement of a particle set: beam tilt, micrographs, particles, and a control with random phases."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.types import HALVES, Particles
from cryoiso.io.sources import SubsetSource
from cryoiso.methods.ctf_refinement.astigmatism import micrograph_slopes, newton_step, with_change
from cryoiso.methods.ctf_refinement.beam_tilt import fit_aberrations, phase_sums, with_aberrations
from cryoiso.methods.ctf_refinement.defocus import errors_A, grid_A, posterior_modes, prior_width_A
from cryoiso.methods.ctf_refinement.defocus_curves import DefocusCurves, defocus_curves
from cryoiso.methods.ctf_refinement.image_model import ImageModel, measured_model
from cryoiso.methods.ctf_refinement.image_pass import ImagePass
from cryoiso.methods.ctf_refinement.reference import CtfReference
from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings
from cryoiso.physics.contrast_transfer import wavelength_A

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from cryoiso.physics.projection import FourierVolume

logger = logging.getLogger("cryoiso")

NEWTON_STEPS = 2
MANY_AT_LIMIT = 0.05


@dataclass(frozen=True)
class CtfRefinement:
    """Refined particles, and what was found on the way."""

    particles: Particles
    change_A: Float[np.ndarray, " n"]
    """Change of each particle's mean defocus, that of its micrograph included."""
    own_change_A: Float[np.ndarray, " n"]
    """Change about its micrograph."""
    micrograph_change_A: Float[np.ndarray, "m 3"]
    """(mean, cos, sin), see ``astigmatism``."""
    error_A: Float[np.ndarray, " n"]
    fisher: Float[np.ndarray, " n"]
    at_limit: Bool[np.ndarray, " n"]
    gain: Float[np.ndarray, " n"]
    prior_sd_A: float
    facts: dict[str, Any]


@dataclass
class _Work:
    """A refinement on its way."""

    source: ImageSource
    reference: CtfReference
    settings: CtfRefinementSettings
    comm: Communicator
    micrograph: Int[np.ndarray, " n"]
    particles: Particles
    volumes: dict[int, FourierVolume] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def images(self) -> ImagePass:
        pixel = self.reference.maps[HALVES[0]].pixel_size_A
        return ImagePass(
            self.source, self.particles, self.volumes, self.reference.radius_px, pixel, self.comm
        )  # fmt: skip

    def grid(self) -> np.ndarray:
        longest = max(wavelength_A(self.particles.groups[g].voltage_kV) for g in np.unique(self.particles.optics))
        return grid_A(self.settings.range_A, longest, self.reference.resolution_A)


def refine_ctf(
    source: ImageSource,
    particles: Particles,
    reference: CtfReference,
    settings: CtfRefinementSettings,
    comm: Communicator,
    micrograph: Int[np.ndarray, " n"] | None = None,
) -> CtfRefinement:
    """Refine the CTFs of particles at their poses (collective; the same result on any number of ranks).

    Args:
        source: images, row for row those of ``particles``, to which no CTF was applied.
        particles: with poses and half numbers.
        reference: a map for each half-set.
        micrograph: (n,) index of each particle's micrograph; None: not known.

    Raises:
        InputError: images that the CTF was applied to, a reference that does not fit the images, no spherical
            aberration where beam tilt is refined.
        Interrupted: stopped by a signal.
    """
    _check(particles, settings, micrograph)
    of = np.zeros(len(particles), np.int64) if micrograph is None else micrograph
    work = _Work(source, reference, settings, comm, of, particles, reference.volumes())
    model = measured_model(work.images())
    if settings.beam_tilt != "none" and _refine_tilt(work, model):
        model = measured_model(work.images())
    changes = np.zeros((int(of.max()) + 1, 3))
    if settings.micrographs != "none":
        changes = _refine_micrographs(work, model)
    curves = defocus_curves(work.images(), model, work.grid())
    result = _refine_particles(work, curves, changes)
    if settings.beam_tilt != "none" and np.any(result.change_A):
        work.particles = result.particles
        _refine_tilt(work, measured_model(work.images()))
        result = replace(result, particles=work.particles)
    facts = {**work.facts, "grey_scale": model.facts(), "control": _control(work)}
    return replace(result, facts=facts)


def _check(particles: Particles, settings: CtfRefinementSettings, micrograph: np.ndarray | None) -> None:
    used = [particles.groups[g] for g in np.unique(particles.optics).tolist()]
    for group in used:
        if group.ctf_applied:
            raise InputError(
                f"the images of optics group {group.number} are {group.ctf_applied.replace('flipped', 'phase-flipped')}"
                " by their CTF, which a refined CTF cannot undo", expected="images as recorded",
                hint="Extract the particles without phase flipping and CTF premultiplication.",
            code="ctf-applied-unsupported")  # fmt: skip
        if settings.beam_tilt != "none" and group.spherical_aberration_mm <= 0:
            raise InputError(
                f"optics group {group.number} has no spherical aberration, without which a beam tilt has no effect",
                expected="rlnSphericalAberration above 0", found=group.spherical_aberration_mm,
            code="value-out-of-range")  # fmt: skip
    if settings.micrographs != "none" and micrograph is None:
        raise InputError(
            "the particles name no micrographs", expected="rlnMicrographName",
            hint="Leave out --micrographs, or add the column.",
        code="star-column-missing")  # fmt: skip


def _refine_tilt(work: _Work, model: ImageModel) -> bool:
    """Add fits to the optics groups that are significant, or that correct an earlier one; whether there was one."""
    trefoil = work.settings.beam_tilt == "trefoil"
    groups, changed = list(work.particles.groups), False
    rows = work.facts.setdefault("optics_groups", {})
    for index, sums in phase_sums(work.images(), model).items():
        fit = fit_aberrations(sums, groups[index], trefoil=trefoil)
        fits = rows.setdefault(str(groups[index].number), [])
        if fit.significant or any(earlier["significant"] for earlier in fits):
            groups[index], changed = with_aberrations(groups[index], fit), True
        fits.append({**fit.facts(), "tilt_mrad": list(groups[index].beam_tilt_mrad)})
    work.particles = replace(work.particles, groups=tuple(groups))
    return changed


def _refine_micrographs(work: _Work, model: ImageModel) -> np.ndarray:
    """(m, 3) changes, which the particles have from here on."""
    count = int(work.micrograph.max()) + 1
    changes = np.zeros((count, 3))
    grid = work.grid()
    curves = defocus_curves(work.images(), model, grid)
    sums = np.zeros((count, len(grid)))
    np.add.at(sums, work.micrograph, curves.values.astype(np.float64))
    width = prior_width_A(sums, grid)
    modes = posterior_modes(sums, grid, width)
    changes[:, 0] = modes.change_A
    fisher = np.bincount(work.micrograph, curves.fisher)
    facts = {"prior_sd_A": width, "at_limit": int(modes.at_limit.sum()), "error_A": errors_A(fisher, width).tolist()}
    _move(work, changes)
    if work.settings.micrographs == "astigmatism":
        for _ in range(NEWTON_STEPS):
            step = newton_step(micrograph_slopes(work.images(), model, work.micrograph), changes)
            changes = changes + step.change_A
            _move(work, step.change_A)
        facts["prior_sd_A"], facts["astigmatism_prior_sd_A"] = step.width_A
        deviation = np.sqrt(np.einsum("mii->mi", step.covariance_A2))
        facts["error_A"], facts["astigmatism_error_A"] = deviation[:, 0].tolist(), deviation[:, 1:].mean(1).tolist()
    work.facts["micrograph_fit"] = facts
    return changes


def _move(work: _Work, changes: np.ndarray) -> None:
    work.particles = with_change(work.particles, changes[work.micrograph])


def _refine_particles(work: _Work, curves: DefocusCurves, changes: np.ndarray) -> CtfRefinement:
    settings, grid = work.settings, work.grid()
    width = 0.0
    if settings.particles:
        width = settings.prior_sd_A or prior_width_A(curves.values, grid)
    modes = posterior_modes(curves.values, grid, width)
    share = float(modes.at_limit.mean())
    if share > MANY_AT_LIMIT and work.comm.rank == 0:
        logger.warning(
            "%.0f %% of the particles ended at the limit of the search, %.0f Å; their defocus may lie beyond it "
            "(--range)", 100 * share, settings.range_A,
        )  # fmt: skip
    own = np.zeros((len(modes.change_A), 3))
    own[:, 0] = modes.change_A
    return CtfRefinement(
        particles=with_change(work.particles, own), change_A=modes.change_A + changes[work.micrograph, 0],
        own_change_A=modes.change_A, micrograph_change_A=changes, error_A=errors_A(curves.fisher, width),
        fisher=curves.fisher, at_limit=modes.at_limit, gain=modes.gain, prior_sd_A=width, facts={},
    )  # fmt: skip


def _control(work: _Work) -> dict[str, Any] | None:
    """The same search of some particles against references of random phases: there is nothing to find."""
    wanted = work.settings.control_particles
    if not work.settings.particles or not wanted:
        return None
    n = len(work.particles)
    rows = np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(np.int64))
    reference = work.reference.with_random_phases(work.settings.seed)
    part = replace(
        work, source=SubsetSource(work.source, rows), reference=reference, particles=work.particles.take(rows),
        volumes=reference.volumes(), facts={},
    )  # fmt: skip
    model = measured_model(part.images(), require_match=False)
    curves = defocus_curves(part.images(), model, work.grid())
    width = prior_width_A(curves.values, work.grid())
    change = posterior_modes(curves.values, work.grid(), width).change_A
    return {
        "particles": len(rows), "grey_scale": model.facts(), "prior_sd_A": width, "mean_change_A": float(change.mean()),
        "mean_error_A": float(change.std() / np.sqrt(len(rows))), "rms_change_A": float(np.sqrt((change**2).mean())),
    }  # fmt: skip
