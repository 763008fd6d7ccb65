"""The command ``ctf-refine`` on plain files."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles
from cryoiso.io.atomic import make_folder, require_folder_name, write_json
from cryoiso.io.mrc import read_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.commands.ctf_refine_facts import MicrographPositions, all_facts
from cryoiso.pipeline.inputs.grids import read_mask, require_grid
from cryoiso.pipeline.inputs.map_pairs import read_half_maps
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.inputs.stacks import open_stacks
from cryoiso.pipeline.stages.half_maps import make_mask
from cryoiso.refine.offsets import check_poses

if TYPE_CHECKING:
    from cryoiso.methods.ctf_refinement.reference import CtfReference
    from cryoiso.methods.ctf_refinement.refine import CtfRefinement
    from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings

logger = logging.getLogger("cryoiso")

FACTS = products.facts("ctf_refine")
CHANGE, ERROR = "cryoisoDefocusChange", "cryoisoDefocusError"


@dataclass(frozen=True)
class ReferenceChoice:
    """What the images are compared with.

    Raises:
        UsageError: neither or both of one map and two half-maps, or one map without a resolution.
    """

    ref: Path | None = None
    half_maps: tuple[Path | None, Path | None] = (None, None)
    resolution_A: float | None = None

    def __post_init__(self) -> None:
        is_given = [path is not None for path in self.half_maps]
        if (self.ref is not None) == any(is_given) or any(is_given) != all(is_given):
            raise UsageError(
                "give both half-maps (--half1 and --half2), or one map (--ref) and --resolution", code="option-missing"
            )
        if self.ref is not None and self.resolution_A is None:
            raise UsageError("--ref needs --resolution: the map is low-passed there", code="option-missing")


def ctf_refine_files(
    job: Job, choice: ReferenceChoice, settings: CtfRefinementSettings, out: Path, comm: Context
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refined CTFs of the particles of a file: particles.star and ctf_refine.json in a folder. Collective.

    Nothing is written before all has been computed.

    Returns:
        the facts of ctf_refine.json, and what its figure shows: ``change_A`` (n,), ``position_A`` (n, 2) or None,
        ``defocus_A`` (n,) relative to the micrograph's mean. Empty on ranks other than 0.

    Raises:
        InputError: no such point group, unreadable or unfitting files, no poses, no half-sets, images that the CTF was
            applied to.
        UsageError: particles.star would overwrite the particles that are read.
        Interrupted: stopped by a signal.
    """
    from cryoiso.methods.ctf_refinement.refine import refine_ctf

    comm.device_preference = "cpu"
    comm.install_signal_handlers()
    full, reference, micrographs = on_root(comm, _read, job, choice, out)
    particles = bare(_with_halves(full, reference))
    source = open_stacks(particles, job.particles, comm)
    refinement = refine_ctf(source, particles, reference, settings, comm, micrographs.index)
    written = on_root(comm, _write, full, refinement, reference, micrographs, settings, choice, job, out)
    return written if comm.rank == 0 else ({}, {})


def _read(job: Job, choice: ReferenceChoice, out: Path) -> tuple[Particles, CtfReference, MicrographPositions]:
    section = job.particles
    if Path(section.file).resolve() == (out / products.PARTICLES).resolve():
        raise UsageError(
            f"--out {out}: would overwrite the particles that are read, {section.file}", code="file-exists"
        )
    point_group(job.sample.symmetry)
    particles = read_job_particles(section, ("image", "ctf", "pose"), job.sample.symmetry)
    particles = replace(particles, groups=io_ingest.check_stacks(particles, section.file))
    particles.require_poses(section.file)
    check_poses(particles, particles.first_group.box_px, section.file)
    _require_defocus(particles, section.file)
    reference = _reference(particles, job, choice)
    if choice.ref is None:
        _require_halves(particles, section.file)
    require_folder_name(out)
    logger.info("reference: %s to %.2f Å", reference.source, reference.resolution_A)
    return particles, reference, MicrographPositions.of(particles, section.file)


def _require_defocus(particles: Particles, file: object) -> None:
    bad = ~np.isfinite(np.asarray(particles.defocus_u_A, float) + np.asarray(particles.defocus_v_A, float))
    if bad.any():
        raise InputError(
            "the particles have no CTF", file=file, row=int(np.argmax(bad)) + 1,
            expected="rlnDefocusU, rlnDefocusV, rlnDefocusAngle", hint="Give particles whose CTF was estimated.",
        code="star-column-missing")  # fmt: skip


def _require_halves(particles: Particles, file: object) -> None:
    half = np.zeros(len(particles), np.int8) if particles.half is None else particles.half
    bad = np.flatnonzero((half != 1) & (half != 2))
    if len(bad):
        raise InputError(
            "it is not known which particles are in which half-map", file=file, row=int(bad[0]) + 1,
            expected="rlnRandomSubset 1 or 2 in every row", found=int(half[bad[0]]),
            hint="Give the particles that the half-maps were reconstructed from, or one map with --ref.",
        code="half-set-missing")  # fmt: skip


def _with_halves(particles: Particles, reference: CtfReference) -> Particles:
    """Particles of one reference need no half-sets; those without a number join the first."""
    if reference.source != "map":
        return particles
    half = np.ones(len(particles), np.int8) if particles.half is None else particles.half
    return replace(particles, half=np.where(half == 2, 2, 1).astype(np.int8))


def _reference(particles: Particles, job: Job, choice: ReferenceChoice) -> CtfReference:
    from cryoiso.methods.ctf_refinement.reference import from_half_maps, from_map

    group = particles.first_group
    given_A = job.reference.pixel_size_A
    mask = None
    if job.sample.mask:
        mask = read_mask(Path(job.sample.mask), group.box_px, group.pixel_size_A, job.sample.symmetry).data
    if choice.ref is not None:
        assert choice.resolution_A is not None
        density = read_map(choice.ref, given_A)
        require_grid(density, group.box_px, group.pixel_size_A, choice.ref, "the particles")
        return from_map(density, choice.resolution_A, mask)
    first, second = choice.half_maps
    assert first is not None and second is not None
    half_map1, half_map2, _ = read_half_maps(first, second, given_A)
    require_grid(half_map1, group.box_px, group.pixel_size_A, first, "the particles")
    if mask is None:
        mean = DensityMap((0.5 * (half_map1.data + half_map2.data)).astype(np.float32), half_map1.pixel_size_A)
        mask = make_mask(mean, job.sample.diameter_A)
    return from_half_maps(half_map1, half_map2, mask, choice.resolution_A)


def _write(
    full: Particles, refinement: CtfRefinement, reference: CtfReference, micrographs: MicrographPositions,
    settings: CtfRefinementSettings, choice: ReferenceChoice, job: Job, out: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    facts = {
        "schema": 1, "input": job.particles.file,
        "references": [str(path) for path in (choice.ref, *choice.half_maps) if path is not None],
        **all_facts(full, refinement, reference, micrographs, settings),
    }  # fmt: skip
    refined = replace(
        full, defocus_u_A=refinement.particles.defocus_u_A, defocus_v_A=refinement.particles.defocus_v_A,
        defocus_angle_deg=refinement.particles.defocus_angle_deg, groups=refinement.particles.groups,
    )  # fmt: skip
    results = {CHANGE: refinement.change_A} | ({ERROR: refinement.error_A} if settings.particles else {})
    make_folder(out)
    write_particles(out / products.PARTICLES, refined.with_results(**results))
    write_json(out / FACTS, facts)
    return facts, micrographs.shown(refinement, full)
