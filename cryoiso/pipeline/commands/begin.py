"""What a refinement of a single command is begun with, noted in its folder and compared when it is resumed."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core.config import Job
from cryoiso.core.identity import of_map, of_particles
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import identity_file
from cryoiso.io.atomic import make_folder
from cryoiso.refine.identity import ONLY_WHEN


def begin_or_go_on(
    out: Path, job: Job, particles: Particles, reference: DensityMap, mask: DensityMap | None, resume: bool
) -> None:
    """Notes what a refinement is begun with or, where one goes on, makes sure that it is the same, before anything
    of it is overwritten; the engine looks at the images as well (rank 0).

    Raises:
        InputError: it was begun with something else.
    """
    refine = job.refine.model_dump(exclude=set(ONLY_WHEN))
    identity = {
        "particles": of_particles(particles, poses=job.refine.local_deg is not None),
        "symmetry": job.sample.symmetry,
        "diameter_A": job.sample.diameter_A,
        "reference": of_map(reference),
        "lowpass_A": job.reference.lowpass_A,
        "mask": of_map(mask),
        "seed": job.run.seed,
        "settings": refine,
        "correction": {"realign": job.realign.model_dump(), "correct": job.correct.model_dump()}
        if job.run.workflow == "realign" else "none",
    }  # fmt: skip
    if resume and (out / identity_file.FILE).exists():
        identity_file.require_begun_with(out, identity, "refinement")
        return
    make_folder(out)
    identity_file.note(out, identity)
