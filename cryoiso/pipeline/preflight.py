"""Everything that can be found wrong with a job before anything is written."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.atomic import disk_full
from cryoiso.io.background import read_patch_grid
from cryoiso.io.shards import read_index
from cryoiso.methods.audit.null_images import crop_px
from cryoiso.methods.auxiliary.particles import require_poolable
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.map_numbers import check_models
from cryoiso.pipeline.stages.post_command import check_template
from cryoiso.pipeline.workflow import CO_REFINEMENTS, folder_stages
from cryoiso.refine.offsets import check_poses

logger = logging.getLogger("cryoiso")


def check_job(inputs: Inputs) -> None:
    """Reads all inputs of a job (of the images only the headers and a sample) and checks that they fit together.

    Raises:
        InputError: the first thing that is wrong.
        UsageError: an unknown workflow, or a stage's settings contradict each other.
    """
    from cryoiso.physics.symmetry import point_group

    job = inputs.job
    folder_stages(job)
    _check_scratch(job.run.scratch)
    engines.require_engine(job)
    point_group(job.sample.symmetry)
    particles, with_auxiliary = inputs.particles(), job.run.workflow in CO_REFINEMENTS
    if job.refine.local_deg is not None or (with_auxiliary and job.auxiliary.poses == "given"):
        particles.require_poses(job.particles.file)
    check_poses(particles, inputs.grid()[0], job.particles.file)
    inputs.reference()
    inputs.mask()
    inputs.truth()
    inputs.truth_map()
    _check_diameter(inputs)
    check_models(job.diagnose, inputs.grid())
    if job.audit.enable:
        require_auditable(job)
        require_background(job.audit.background, *inputs.grid())
    if with_auxiliary:
        if job.auxiliary.post_command:
            check_template(job.auxiliary.post_command)
        if job.auxiliary.noise_group == "raw":
            require_poolable(particles, inputs.grid()[1], job.particles.file)
            _warn_of_cold_pool(job)
    if job.run.workflow in ("realign", "both"):
        _check_realign(job)


def require_auditable(job: Job) -> None:
    """Stops where the controls of a job cannot be run.

    Raises:
        UsageError: another engine than the native one, or a control that the settings do not allow.
        InputError: a file that a control needs is not there.
    """
    if job.refine.engine != "native":
        raise UsageError(
            f"the controls need the native engine, and this job refines with '{job.refine.engine}': noise must be "
            "refined without its own refusal and with a known grey scale, which only the native engine takes",
            code="options-conflict",
        )
    if "other-reference" in job.audit.controls and not job.audit.other_reference:
        raise UsageError(
            "audit.controls has 'other-reference': audit.other_reference is missing", code="option-missing"
        )
    for key in ("other_reference", "background"):
        name = getattr(job.audit, key)
        if name and not Path(name).is_file():
            raise InputError("no such file", file=name, hint=f"Check audit.{key}.", code="file-not-found")


def require_background(file: str, box_px: int, pixel_size_A: float) -> None:
    """Stops where the patches of real background for a control are no stack or smaller than the images.

    Args:
        file: audit.background; "" for none.

    Raises:
        InputError: see ``read_patch_grid`` and ``crop_px``.
    """
    if file:
        grid = read_patch_grid(Path(file))
        crop_px(grid.side_px, grid.pixel_size_A, box_px, pixel_size_A, file)


def _warn_of_cold_pool(job: Job) -> None:
    if job.auxiliary.temperature < 1:
        logger.warning(
            "auxiliary.noise_group = 'raw' at auxiliary.temperature = %g: one noise spectrum serves raw images and "
            "less noisy auxiliary ones, so that the raw ones weigh more than their noise allows; use temperature = 1",
            job.auxiliary.temperature,
        )  # fmt: skip


def _check_scratch(wanted: str) -> None:
    if wanted not in ("", "auto") and not wanted.startswith(("/", "$", "~")):
        raise UsageError(
            f"run.scratch = {wanted!r}: 'auto' or a folder that begins with / or a $VARIABLE is expected",
            code="option-out-of-range",
        )


LEAST_DIAMETER_PX = 4
"""A particle that is smaller shows nothing; the diameter was given in another unit, nm for example."""


def _check_diameter(inputs: Inputs) -> None:
    box, pixel = inputs.grid()
    diameter = inputs.job.sample.diameter_A
    if diameter is not None and diameter > box * pixel:
        raise UsageError(
            f"sample.diameter_A: the box is only {box * pixel:.0f} Å wide (found {diameter:g} Å)",
            code="option-out-of-range",
        )
    if diameter is not None and diameter < LEAST_DIAMETER_PX * pixel:
        raise UsageError(
            f"sample.diameter_A: no particle is that small at {pixel:g} Å per pixel (expected "
            f"{LEAST_DIAMETER_PX * pixel:g} Å or more, found {diameter:g} Å)",
            code="option-out-of-range",
        )


def _check_realign(job: Job) -> None:
    kept_A, lowpass_A = job.realign.keep_lowres_A, job.reference.lowpass_A
    if 0 < kept_A < lowpass_A:
        raise UsageError(
            f"realign.keep_lowres_A = {kept_A:g}: the reference is low-passed at {lowpass_A:g} Å "
            "(reference.lowpass_A), and has nothing finer to keep",
            code="option-out-of-range",
        )


def check_space(inputs: Inputs) -> None:
    """Makes sure that the shards and maps of a run will fit onto the disk.

    Raises:
        DiskFullError: they will not.
        InputError: the folder cannot be written to.
    """
    folder = existing_parent(inputs.folder.path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            "not allowed to write here", file=folder, hint="Choose another folder with --out.", code="not-writable"
        )
    box, _ = inputs.grid()
    images = 0
    if not Path(inputs.job.particles.file).is_dir():  # shards that are given stay where they are
        images = len(inputs.particles()) * box * box * np.dtype(inputs.job.particles.storage).itemsize
    need = int(1.02 * images) + 60 * 4 * box**3
    if shutil.disk_usage(folder).free < need:
        raise disk_full(inputs.folder.path / "01_ingest", need)


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return folder
    return Path("/")


def images_of(inputs: Inputs) -> list[Path]:
    """The files that the particles' images lie in, with absolute paths (a run may be resumed from another folder): the
    shards where the job names a folder of them, else the stacks."""
    particles_path = Path(inputs.job.particles.file)
    if particles_path.is_dir():
        return [
            Path(os.path.abspath(particles_path / str(shard["file"]))) for shard in read_index(particles_path)["shards"]
        ]
    return [Path(os.path.abspath(name)) for name in sorted(set(inputs.particles().stack.tolist()))]
