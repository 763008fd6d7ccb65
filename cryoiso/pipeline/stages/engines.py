"""The one place where the pipeline meets the parts that it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cryoiso.core.config import ClassifySection, Job
from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import Communicator, Engine, ImageSource, ReferenceCorrection, RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.pipeline.workflow import CO_REFINEMENTS, starts_a_program


def engine(name: str) -> Engine:
    """The refinement engine of this name.

    Raises:
        UsageError: no such engine.
    """
    if name == "native":
        from cryoiso.engines.native import NativeEngine

        return NativeEngine()
    if name == "relion":
        from cryoiso.engines.relion.engine import RelionEngine

        return RelionEngine()
    if name == "command":
        from cryoiso.engines.by_command.engine import CommandEngine

        return CommandEngine()
    if name == "files":
        from cryoiso.engines.by_command.by_hand import FilesEngine

        return FilesEngine()
    if name == "cryosparc":
        from cryoiso.engines.cryosparc.engine import CryosparcEngine

        return CryosparcEngine()
    known = "native, relion, cryosparc, command, files"
    raise UsageError(f"unknown engine '{name}' (known: {known})", code="choice-unknown")


def require_engine(job: Job) -> None:
    """Stops before any work where the engine's program or its launcher is not there.

    Raises:
        MissingError: no RELION, no mpirun that belongs to it, or no program of the command's name.
        UsageError: settings that the program cannot be started with.
        CryoisoError: not logged in to cryoSPARC, or it has no such project.
    """
    if starts_a_program(job) and job.refine.junk:
        raise UsageError("refine.junk: native engine only", code="options-conflict")
    if starts_a_program(job) and job.refine.relax_symmetry:
        raise UsageError("refine.relax_symmetry: native engine only", code="options-conflict")
    if starts_a_program(job) and job.refine.image_mask != "none":
        raise UsageError(
            "refine.image_mask: native engine only; RELION masks with zeros (--zero_mask)", code="options-conflict"
        )
    if job.refine.engine == "command":
        from cryoiso.engines.by_command.engine import require_command

        require_command(
            job.command, correction=correction(job) is not None, co_refinement=job.run.workflow in CO_REFINEMENTS
        )
    if job.refine.engine == "files":
        from cryoiso.engines.by_command.engine import require_rounds

        require_rounds(job.command, correction(job) is not None)
    if job.refine.engine == "cryosparc":
        from cryoiso.engines.cryosparc.engine import require_cryosparc, require_project

        require_cryosparc(job.cryosparc, correction=correction(job) is not None)
        balanced = job.run.workflow in CO_REFINEMENTS and job.auxiliary.balance
        if (balanced or job.refine.local_deg is not None or job.cryosparc.job == "local") and not job.sample.mask:
            way_out = ", or auxiliary.balance = false" if balanced else ""
            raise UsageError(
                f"cryoSPARC's local refinement needs a mask: set sample.mask{way_out}", code="option-missing"
            )
        require_project(job.cryosparc)
    if job.refine.engine == "relion":
        from cryoiso.engines.relion.command import launch
        from cryoiso.engines.relion.extra import extra_words
        from cryoiso.engines.relion.install import find_relion

        extra_words(job.relion.extra, correction=correction(job) is not None or job.relion.tau2 != "relion")
        launch(job.relion, find_relion(job.relion.program))


def correction(job: Job) -> ReferenceCorrection | None:
    """What corrects the references between the iterations of this job's workflow; None: nothing does."""
    if job.run.workflow not in ("realign", "both"):
        return None
    return map_correction(job)


def map_correction(job: Job) -> ReferenceCorrection:
    """The correction as the job's [realign] and [correct] describe it, whatever its workflow."""
    from cryoiso.methods.misalignment.correction import MapCorrection

    return MapCorrection(job.realign, job.correct, job.run.seed)


def reconstructor() -> Callable[..., Any]:
    """``refine.reconstruct.reconstruct_halves``."""
    from cryoiso.refine.reconstruct import reconstruct_halves

    return reconstruct_halves


def full_reconstructor() -> Callable[..., Any]:
    """``refine.full_map.reconstruct_full``."""
    from cryoiso.refine.full_map import reconstruct_full

    return reconstruct_full


def reference_reconstructor() -> Callable[..., Any]:
    """``refine.reconstruct.reconstruct_references``."""
    from cryoiso.refine.reconstruct import reconstruct_references

    return reconstruct_references


def class_request(
    base: RefineRequest, settings: ClassifySection, maps: tuple[DensityMap, ...], auxiliary: ImageSource | None = None
) -> Any:
    """``refine.classes.model.ClassRequest``, with auxiliary particles as further ones of the classes' maps."""
    from cryoiso.io.sources import JoinedSource
    from cryoiso.refine.classes.model import ClassRequest

    if auxiliary is None:
        return ClassRequest(base, settings, maps)
    raw = base.source.particles
    flags = np.arange(len(raw) + len(auxiliary.particles)) >= len(raw)
    joined = replace(base, source=JoinedSource(base.source, auxiliary), auxiliary=flags)
    return ClassRequest(joined, settings, maps, raw)


def check_classes(request: Any) -> None:
    """``engines.classify.check_classes``."""
    from cryoiso.engines import classify as engine

    engine.check_classes(request)


def classify(request: Any, comm: Communicator) -> None:
    """``engines.classify.classify``."""
    from cryoiso.engines import classify as engine

    engine.classify(request, comm)
