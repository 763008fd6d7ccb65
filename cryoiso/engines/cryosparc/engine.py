"""cryoSPARC as an engine: particles and a reference go in, a refinement is queued, poses and half-maps come back.

Written from the source of cryosparc-tools 5.0.3 and tested with a stand-in for it; **never run against a real
cryoSPARC**. Its files lie in ``request.folder/cryosparc/round-01``, the uids of its jobs in ``cryosparc.json`` there.
What is common with other programs, from the images to the checks of the result, is that of ``engines.by_command``.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from cryoiso.core.config import CommandSection, CryosparcSection
from cryoiso.core.errors import CryoisoError, UsageError
from cryoiso.core.protocols import Communicator, RefineRequest, RefineResult
from cryoiso.core.types import HALVES, Particles
from cryoiso.engines.by_command import template as names_of
from cryoiso.engines.by_command.engine import Rounds, RoundState
from cryoiso.engines.by_command.input_files import write_inputs
from cryoiso.engines.cryosparc import session, supervise
from cryoiso.engines.cryosparc.errand import Errand, project_of
from cryoiso.engines.cryosparc.frame import in_cryosparcs_frame
from cryoiso.engines.cryosparc.ledger import REFINEMENT, JobLedger
from cryoiso.engines.cryosparc.order import Order
from cryoiso.engines.cryosparc.outputs import MASK, REFERENCE, Shipment
from cryoiso.engines.cryosparc.results import PARTICLES
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal
from cryoiso.physics.filters import lowpass
from cryoiso.physics.symmetry import cryosparc_turn, normalise_name

logger = logging.getLogger("cryoiso")
FIXED = ("refine_symmetry", "refine_gs_resplit")
"""Parameters of the refinement that follow from the job, and which ``cryosparc.params`` must not change."""
NOT_DECIDING = ("lane", "images", "upload", "on_stop", "poll_s", "retry_min")
"""Settings that do not decide what the refinement finds."""
RECORD = "cryosparc.json"


class CryosparcEngine:
    """A refinement in cryoSPARC, which rank 0 queues and follows."""

    name = "cryosparc"

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Refines in cryoSPARC (collective).

        Writes into ``request.folder``: particles.star, half1.mrc, half2.mrc, refine.json and cryosparc/. With
        ``request.resume`` the job that was queued is followed further.

        Raises:
            UsageError: settings that cannot be (``require_cryosparc``).
            InputError: as every engine, or the run to resume was begun with something else.
            MissingError: no cryosparc-tools.
            CryoisoError: cryoSPARC refused something, does not answer, or its result cannot be used.
            Interrupted: stopped by a signal.
        """
        section = request.program if isinstance(request.program, CryosparcSection) else CryosparcSection()
        require_cryosparc(section, correction=request.correction is not None)
        return _Round(request, section, Context() if comm is None else cast(Context, comm)).whole()


class _Round(Rounds):
    place, engine, reader = "cryosparc", "cryosparc", "cryoSPARC"

    def __init__(self, request: RefineRequest, section: CryosparcSection, comm: Context) -> None:
        self.own = section
        self.turned = cryosparc_turn(request.symmetry) is not None
        from_poses = section.half_maps == "reconstruct" or self.turned
        program = CommandSection(
            run="cryosparc {cs} {reference1} {reference2} {out_particles}", out_particles=PARTICLES,
            out_half="" if from_poses else "half{half}.mrc", images=section.images,
        )  # fmt: skip
        super().__init__(replace(request, program=program), comm)
        facts = {name: value for name, value in section.model_dump().items() if name not in NOT_DECIDING}
        self.identity = {**self.identity, "cryosparc": facts}
        self.limit_A = request.lowpass_A
        if request.half_references is not None:
            self.limit_A = max(request.lowpass_A, _shared_A(request))
        self.kind = "local" if request.local_deg is not None else section.job
        if self.kind == "local" and request.mask is None:
            raise UsageError("cryoSPARC's local refinement needs a mask: set sample.mask", code="option-missing")

    def _prepare(self) -> None:
        require_project(self.own)  # before images are copied
        super()._prepare()

    def _first(self) -> RoundState:
        """One reference for both half-sets, as cryoSPARC takes it. Where each has its own, the mean of both, and of it
        only what is coarser than half-sets share anyway."""
        if self.request.half_references is None:
            return super()._first()
        references, limit_A = self._given(), self.limit_A
        mean = lowpass((references[1] + references[2]) / 2, self.request.reference.pixel_size_A, limit_A)
        if self.comm.rank == 0:
            logger.info("cryoSPARC takes one reference for both half-sets: their mean, low-passed to %g Å", limit_A)
        return RoundState(0, dict.fromkeys(HALVES, mean), limit_A)

    def _run(
        self, number: int, half: int, folder: Path, state: RoundState, names: list[str], stop_signal: StopSignal
    ) -> None:
        if on_root(self.comm, self._written, folder, state, names):
            return
        on_root(self.comm, lambda: JobLedger.read(folder / RECORD).mark)  # a damaged record is an error of all ranks
        errand = Errand(self._order(folder), JobLedger.read(folder / RECORD)) if self.comm.rank == 0 else None
        supervise.run(errand, self.comm, stop_signal)
        on_root(self.comm, write_text, folder / "done", "")

    def _written(self, folder: Path, state: RoundState, names: list[str]) -> bool:
        """Writes the files that cryoSPARC gets unless they are there; whether its results are there, too (rank 0)."""
        if (folder / "begun").exists():
            return (folder / "done").exists()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        particles = self._with_split()
        write_inputs(
            folder, self.request, self.template, particles, np.arange(len(particles)), names, state.references, 0,
            with_poses=True,
        )  # fmt: skip
        pixel, symmetry = self.request.reference.pixel_size_A, self.request.symmetry
        write_map(folder / REFERENCE, in_cryosparcs_frame(state.references[1], symmetry), pixel)
        if self.request.mask is not None:
            mask = in_cryosparcs_frame(self.request.mask.data, symmetry).clip(0, 1)
            write_map(folder / MASK, mask, pixel)
        count = np.bincount(self._half(), minlength=3)
        if count[1] != count[2]:
            logger.warning(
                "the half-sets have %d and %d particles; cryoSPARC may leave some out of the larger one, which would "
                "end this stage", count[1], count[2],
            )  # fmt: skip
        write_text(folder / "begun", "")
        return False

    def _with_split(self) -> Particles:
        """The particles with poses: cryoSPARC keeps half-sets beside them. Its global search does not use the poses."""
        particles = self.request.source.particles
        if self.kind == "local":
            particles.require_poses()
        if particles.rotation is not None:
            return particles
        n = len(particles)
        shift = np.zeros((n, 2)) if particles.shift_A is None else particles.shift_A
        return particles.with_poses(np.tile(np.eye(3), (n, 1, 1)), shift)

    def _order(self, folder: Path) -> Order:
        request = self.request
        rows = np.load(folder / names_of.CS, allow_pickle=False)
        files = [(name, folder / name) for name in (REFERENCE, MASK) if (folder / name).exists()]
        ship = Shipment(rows, tuple(files), request.source.box_px, request.reference.pixel_size_A)
        outs = {h: names_of.out_half(self.section, h) for h in HALVES} if self.section.out_half else {}
        title = f"cryoiso: {self.kind} refinement, {request.symmetry}"
        return Order(self.own, self.kind, self._params(), title, folder, ship, outs)

    def _params(self) -> dict[str, Any]:
        request = self.request
        params: dict[str, Any] = {
            "refine_symmetry": normalise_name(request.symmetry), "refine_gs_resplit": False,
            "refine_res_init": self.limit_A,
        }  # fmt: skip
        if request.local_deg is not None:
            params["init_r_extent"] = request.local_deg
        return params | self.own.params

    def _program_facts(self, state: RoundState) -> dict[str, Any]:
        ledger = JobLedger.read(self._folders(state.round)[1] / RECORD)
        return {"cryosparc": {
            "version": ledger.version, "project": self.own.project, "workspace": self.own.workspace, "job": self.kind,
            "jobs": ledger.jobs, "uid": ledger.jobs.get(REFINEMENT, ""), "params": self._params(),
            "half_maps": "cryoSPARC" if self.section.out_half else "reconstructed from its poses",
        }}  # fmt: skip


def _shared_A(request: RefineRequest) -> float:
    """What is coarser, half-sets with a reference of their own share.

    Raises:
        UsageError: nothing.
    """
    shared_A = float(request.settings.join_halves_A)
    if not shared_A:
        raise UsageError(
            "refine.join_halves_A = 0, and each half-set has a reference of its own, which cryoSPARC cannot take",
            code="options-conflict",
        )
    return shared_A


def require_cryosparc(section: CryosparcSection, *, correction: bool) -> None:
    """What can be found wrong before anything runs.

    Raises:
        UsageError: no project or workspace, a parameter that follows from the job, or references to correct between
            iterations.
        MissingError: no cryosparc-tools.
    """
    for key in ("project", "workspace"):
        if not getattr(section, key):
            example = "P3" if key == "project" else "W1"
            raise UsageError(
                f"refine.engine = 'cryosparc' needs cryosparc.{key}, e.g. '{example}'", code="option-missing"
            )
    fixed = [name for name in FIXED if name in section.params]
    if fixed:
        raise UsageError(
            f"cryosparc.params: {fixed[0]} follows from the job (symmetry and half-sets)", code="options-conflict"
        )
    if correction:
        raise UsageError(
            "refine.engine = 'cryosparc' cannot correct references between iterations: its refinement takes one "
            "reference for both half-sets, once. Use native or relion",
            code="options-conflict",
        )
    session.require_library()


def require_project(section: CryosparcSection) -> None:
    """Logs in and looks for project, workspace and lane. A cryoSPARC that does not answer now may do so later.

    Raises:
        CryoisoError: not logged in, or one of them is not there.
    """
    try:
        with session.quiet():
            project_of(session.connect(), section)
    except Exception as error:
        if isinstance(error, CryoisoError) or not session.is_lost(error):
            raise
        logger.warning("cryoSPARC does not answer yet")
