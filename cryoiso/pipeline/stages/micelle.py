"""The density around a protein, from particles with poses and a homologue: files in, files out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import Interrupted, UsageError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.io.mrc import write_map
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.inputs.grids import read_mask
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.inputs.reference import model_choice, prepare_reference
from cryoiso.pipeline.inputs.stacks import open_stacks

if TYPE_CHECKING:
    from cryoiso.methods.micelle.protein import ProteinMask
    from cryoiso.methods.micelle.recover import HalfMicelle, MicelleSettings, Recovery

logger = logging.getLogger("cryoiso")
CHECKPOINT = Path("checkpoint") / "micelle.npz"
HOMOLOGUE_A = 10.0
"""An atomic homologue is drawn at half this resolution or coarser; a map is taken as it is."""


@dataclass(frozen=True)
class MaskChoice:
    """How the protein is told from the rest."""

    threshold: float | None = None
    """On the homologue low-passed as ``protein.MASK_LOWPASS_A`` says; None: found by itself."""
    file: Path | None = None
    """A mask of the user instead."""


def micelle_files(
    job: Job,
    choice: MaskChoice,
    settings: MicelleSettings,
    out: Path,
    comm: Context,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Micelle and composite reference from the poses of a particle file, its images read in place. Collective.

    Returns:
        what micelle.json says, on rank 0 (elsewhere empty).

    Raises:
        InputError: unreadable or unfitting files, no poses, nothing outside the mask, a homologue not in the images.
        Interrupted: stopped by a signal; checkpoint and current maps are there.
    """
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    if choice.file is not None and choice.threshold is not None:
        raise UsageError(
            "--mask and --threshold exclude each other: the threshold makes the mask", code="options-conflict"
        )
    particles, homologue, mask = on_root(comm, _read, job, choice, out)
    source = open_stacks(particles, job.particles, comm)
    return write_micelle(source, particles, homologue, mask, settings, out, comm, resume=resume)


def _read(job: Job, choice: MaskChoice, out: Path) -> tuple[Particles, DensityMap, ProteinMask]:
    from cryoiso.methods.micelle.protein import checked_mask, protein_mask
    from cryoiso.physics.symmetry import point_group

    section = job.particles
    point_group(job.sample.symmetry)
    particles = read_job_particles(section, ("image", "ctf", "pose"), job.sample.symmetry)
    particles = replace(particles, groups=io_ingest.check_stacks(particles, section.file))
    group = particles.first_group
    file = Path(job.reference.file)
    reference = prepare_reference(
        file, group.box_px, group.pixel_size_A, max(HOMOLOGUE_A, 2 * group.pixel_size_A),
        map_pixel_size_A=job.reference.pixel_size_A, resample=job.reference.resample, symmetry=job.sample.symmetry,
        model=model_choice(job.reference),
    )  # fmt: skip
    if choice.file is not None:
        mask_map = read_mask(choice.file, group.box_px, group.pixel_size_A, job.sample.symmetry)
        mask = checked_mask(np.clip(mask_map.data, 0, 1), group.pixel_size_A, file=choice.file)
    else:
        mask = protein_mask(reference.map, choice.threshold, file)
    make_folder(out)
    logger.info("homologue: %s; %s", reference.source, _words(mask))
    return bare(assign_halves(particles, job.run.seed, section.file)), reference.map, mask


def _words(mask: ProteinMask) -> str:
    at = "given mask" if mask.threshold is None else f"mask above {mask.threshold:.4g}"
    return f"{at} holds {mask.volume_A3:.0f} Å^3, as {mask.facts()['mask_mass_kDa']} kDa of protein do"


def write_micelle(
    source: ImageSource,
    particles: Particles,
    homologue: DensityMap,
    mask: ProteinMask,
    settings: MicelleSettings,
    folder: Path,
    comm: Context,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Recovers the micelle of both half-sets and writes all files of it. Collective.

    Writes mask.mrc, micelle_half1.mrc, micelle_half2.mrc ((1 - M) V_M), composite_half1.mrc, composite_half2.mrc
    (g M V_homo + (1 - M) V_M), composite.mrc, their mean and the next refinement's reference, and micelle.json; also
    where a signal stopped it.

    Args:
        source, particles, homologue, mask, settings, resume: as for ``recover_micelle_halves``.
        folder: exists already.

    Raises:
        InputError, Interrupted: as ``micelle_files``.
    """
    from cryoiso.methods.micelle.recover import recover_micelle_halves

    def tell(half: int, record: dict[str, Any]) -> None:
        logger.info("half %d, iteration %d: residual %.1e", half, record["iteration"], record["residual"])

    recovery = recover_micelle_halves(
        source, particles, homologue, mask, comm, settings, device=comm.device(),
        checkpoint_file=folder / CHECKPOINT, resume=resume, on_iteration=tell,
    )  # fmt: skip
    facts = on_root(comm, _write, recovery, particles, homologue, mask, settings, folder)
    if recovery.stopped:
        raise Interrupted(f"stopped by a signal while {recovery.stopped}; the maps so far are kept")
    return facts


def _write(
    recovery: Recovery,
    particles: Particles,
    homologue: DensityMap,
    mask: ProteinMask,
    settings: MicelleSettings,
    folder: Path,
) -> dict[str, Any]:
    pixel = homologue.pixel_size_A
    write_map(folder / products.MASK, mask.data, pixel)
    composites = []
    for half, result in recovery.halves.items():
        composite = composite_reference(result, homologue, mask)
        composites.append(composite)
        write_map(folder / products.micelle_half(half), result.micelle, pixel)
        write_map(folder / products.composite_half(half), composite, pixel)
    write_map(folder / products.COMPOSITE, np.asarray(sum(composites) / len(composites), np.float32), pixel)
    facts = {
        "finished": not recovery.stopped,
        "particles": len(particles),
        "symmetry": settings.symmetry,
        "lowpass_A": settings.lowpass_A,
        "diameter_A": settings.diameter_A,
        "prior_sd": settings.prior_sd,
        "tolerance": settings.tolerance,
        **mask.facts(),
        "grid": recovery.grid,
        "agreement_of_halves": agreement_of_halves(recovery),
        "halves": {str(half): result.facts() for half, result in recovery.halves.items()},
    }
    write_json(folder / products.facts("micelle"), facts)
    for half, result in recovery.halves.items():
        last = result.history[-1]
        logger.info(
            "half %d: grey scale %.4g +- %.1g, residual %.1e after %d iterations%s", half, result.grey_scale,
            result.grey_scale_error, last["residual"], last["iteration"],
            "" if result.converged or recovery.stopped else " (not converged: raise --max-iterations)",
        )  # fmt: skip
    logger.info("the micelles of both half-sets correlate by %.3f", facts["agreement_of_halves"])
    return facts


def composite_reference(result: HalfMicelle, homologue: DensityMap, mask: ProteinMask) -> np.ndarray:
    """g M V_homo + (1 - M) V_M: (D, D, D) float32, on the grey scale of the images."""
    composite: np.ndarray = (result.grey_scale * mask.data * homologue.data + result.micelle).astype(np.float32)
    return composite


def agreement_of_halves(recovery: Recovery) -> float:
    """Correlation coefficient of both half-sets' micelles, where either has any."""
    first, second = (recovery.halves[h].micelle.astype(np.float64) for h in (1, 2))
    where = (first != 0) | (second != 0)
    spread = first[where].std() * second[where].std() if where.any() else 0.0
    return round(float(np.corrcoef(first[where], second[where])[0, 1]), 4) if spread > 0 else 0.0
