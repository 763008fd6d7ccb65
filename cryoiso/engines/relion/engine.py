"""RELION as an engine: particles and reference into its files, its auto-refinement, and its result out of them.

RELION runs in ``request.folder/relion``. Where a correction is wanted, or another regularisation than its own, its
external-reconstruct callback comes to the ranks that wait (``supervise``, ``serve``); otherwise RELION is left alone.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryoiso.core.config import RelionSection
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.protocols import Communicator, RefineRequest, RefineResult
from cryoiso.core.types import HALVES
from cryoiso.engines.process import clean_environment
from cryoiso.engines.relion import command as commands
from cryoiso.engines.relion import result as results
from cryoiso.engines.relion.callback import VARIABLE
from cryoiso.engines.relion.continuation import name_half_models
from cryoiso.engines.relion.extra import extra_words
from cryoiso.engines.relion.files import PARTS, complete_iterations, read_sampling, remove_iterations_after
from cryoiso.engines.relion.identity import identity_of
from cryoiso.engines.relion.images import all_flipped, image_names, relion_source, write_input
from cryoiso.engines.relion.install import Relion, find_relion
from cryoiso.engines.relion.serve import Setting
from cryoiso.engines.relion.supervise import RelionStart, run
from cryoiso.io import identity_file
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.subtomograms import SubtomogramSource
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal, side_by_side
from cryoiso.physics.filters import lowpass
from cryoiso.refine.offsets import check_poses
from cryoiso.refine.schedule import expected_iterations

logger = logging.getLogger("cryoiso")
KEPT_ITERATIONS = 3
"""RELION's files of so many iterations stay, so that one that was cut off can be done without."""
PARTICLES, REFERENCE, MASK = "particles_in.star", "reference_in.mrc", "mask_in.mrc"


class RelionEngine:
    """RELION's gold-standard auto-refinement, started by rank 0."""

    name = "relion"

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Runs relion_refine_mpi until it converges or ``max_iterations`` are over (collective).

        Writes into ``request.folder``: particles.star, half1.mrc, half2.mrc (unregularised), refine.json, relion/ and,
        for the correction if there is one, correction/. With ``request.resume`` it goes on after RELION's last complete
        iteration.

        Raises:
            InputError: a half-set is empty, box or pixel size of references and particles differ, a local search has
                no poses to start from, or RELION's run to resume was begun with something else.
            MissingError: no RELION, or no launcher for it.
            CryoisoError: RELION failed, or the correction did.
            Interrupted: stopped by a signal; RELION is gone.
        """
        return _Refinement(request, Context() if comm is None else cast(Context, comm)).whole()


@dataclass(frozen=True)
class _Next:
    """What is to be started now."""

    command: list[str] | None
    """None: all is done"""
    state: str
    """words that differ where something was achieved"""


class _Refinement:
    def __init__(self, request: RefineRequest, comm: Context) -> None:
        check(request)
        self.request, self.comm = request, comm
        self.section: RelionSection = request.program if request.program is not None else RelionSection()
        self.relion: Relion = on_root(comm, find_relion, self.section.program)
        self.folder = request.folder.absolute() / "relion"
        self.root = self.folder / commands.OUTPUT
        self.n = len(request.source.particles)
        self.own = request.half_references is not None
        self.first = 2 if self.own else 1
        """number of the first iteration, see ``_place_half_references``"""
        self.search = _search(request, self.section)

    def whole(self) -> RefineResult:
        comm, request = self.comm, self.request
        on_root(comm, commands.launch, self.section, self.relion)
        on_root(comm, extra_words, self.section.extra, correction=self.search.callback)
        on_root(comm, self._prepare_folders)
        if isinstance(request.source, SubtomogramSource):
            names = request.source.volumes
        else:
            names = image_names(request.source, self.folder, self.section.images, comm, resume=request.resume)
        on_root(comm, self._write_inputs, names)
        _release_gpu()
        with side_by_side(comm) as stop_signal:
            self._all_starts(stop_signal)
        return on_root(comm, self._finish, names).of(request.source.particles)

    def _all_starts(self, stop_signal: StopSignal) -> None:
        before = ""
        while True:
            step = on_root(self.comm, self._next, not before)
            if step.command is None:
                return
            if step.state == before:
                raise CryoisoError(
                    f"RELION ended without a result ({step.state}). See {self.folder / 'run.log'}", code="relion-failed"
                )
            before = step.state
            on_root(self.comm, _announce, step.command)
            run(self._start(step.command), self.comm, stop_signal)

    def _prepare_folders(self) -> None:
        fresh = not self.request.resume
        identity = identity_of(self.request, self.section, self.search.diameter_A)
        begun = not fresh and any(self.folder.glob(f"{commands.OUTPUT}_*"))
        if begun:
            identity_file.require_begun_with(self.folder, identity, "RELION run")
        for name in ("relion", "correction") if self.request.correction is not None else ("relion",):
            if fresh:
                shutil.rmtree(self.request.folder / name, ignore_errors=True)
            (self.request.folder / name).mkdir(parents=True, exist_ok=True)
        if not begun:
            identity_file.note(self.folder, identity)

    def _write_inputs(self, names: list[str]) -> None:
        request, folder = self.request, self.folder
        source, local = request.source, request.local_deg is not None
        if isinstance(source, SubtomogramSource):
            source.write(folder / PARTICLES, source.particles, with_poses=local)
        else:
            originals = relion_source(source).particles
            write_input(folder / PARTICLES, originals, names, with_poses=local, box_px=source.box_px)
        write_map(folder / REFERENCE, request.reference.data, request.reference.pixel_size_A)
        if request.mask is not None:
            write_map(folder / MASK, request.mask.data.clip(0, 1), request.reference.pixel_size_A)

    def _next(self, at_start: bool) -> _Next:
        """What to do from what there is (rank 0)."""
        done = self._corrected(complete_iterations(self.root, self.n), at_start)
        if done == [0] and self.own:
            self._place_half_references()
            done = [0, 1]
        if done and results.is_finished(self.root, self.n, done[-1]):
            return _Next(None, "finished")
        if not done or done[-1] == 0:
            self._forget_after(-1)
            words = commands.first_command(self.search, self.request.settings, self.section, self.relion)
            if self.own:
                words[words.index("--auto_iter_max") + 1] = "0"
            return _Next(self._launched(words), "nothing yet")
        last, limit = done[-1], self.request.settings.max_iterations + self.first - 1
        self._forget_after(last)
        finish = last >= limit
        optimiser = Path(f"{self.root}_it{last:03d}_optimiser.star")
        name_half_models(optimiser)
        words = commands.next_command(
            optimiser.name, self.search, self.section, self.relion,
            max(limit, last + 1) if finish else limit, finish=finish,
        )  # fmt: skip
        return _Next(self._launched(words), f"{last} iterations{', finishing' if finish else ''}")

    def _corrected(self, done: list[int], at_start: bool) -> list[int]:
        """Of the complete iterations those up to the first that should have been corrected and was not.

        Raises:
            CryoisoError: it is one that RELION has done just now.
        """
        if not self.search.callback or not done:
            return done
        missing = self._ledger().without_callback(done[-1])
        if not missing:
            return done
        if not at_start:
            raise self._not_called(missing[0])
        logger.warning(
            "iteration%s %s of an earlier start: RELION did not call for the correction; done again from there",
            "s" if len(missing) > 1 else "", ", ".join(map(str, missing)),
        )  # fmt: skip
        self._forget_after(missing[0] - 1)  # with the final maps, which came of them
        return [iteration for iteration in done if iteration < missing[0]]

    def _not_called(self, iteration: int) -> CryoisoError:
        return CryoisoError(
            f"RELION {self.relion.version} ended iteration {iteration} without calling for the correction or "
            f"regularisation of its references. See {self.folder / 'run.log'}: RELION must support "
            f"--external_reconstruct, and {VARIABLE} must reach all its processes (relion.launcher).",
            code="relion-not-corrected",
        )

    def _forget_after(self, iteration: int) -> None:
        remove_iterations_after(self.root, iteration)
        self._ledger().forget_after(iteration)

    def _ledger(self) -> results.IterationLedger:
        return results.IterationLedger(self.root, self.first)

    def _launched(self, words: list[str]) -> list[str]:
        exported = (VARIABLE,) if self.search.callback else ()
        return [*commands.launch(self.section, self.relion, exported), *words]

    def _place_half_references(self) -> None:
        """RELION takes one reference for both halves, but it continues from files that name one for each.

        So what it wrote as iteration 0, from the reference of half 1, becomes an iteration 1 that ended with each
        half's own reference. (It does not continue from iteration 0.)
        """
        for part in PARTS:
            source, target = (Path(f"{self.root}_it{iteration:03d}_{part}") for iteration in (0, 1))
            if part.endswith(".star"):
                text = source.read_text(encoding="utf-8").replace("_it000_", "_it001_")
                write_text(target, re.sub(r"(?m)^(_rlnCurrentIteration\s+)0\b", r"\g<1>1", text))
        for half, half_reference in (self.request.half_references or {}).items():
            filtered = lowpass(half_reference.data, half_reference.pixel_size_A, self.request.lowpass_A)
            write_map(Path(f"{self.root}_it001_half{half}_class001.mrc"), filtered, half_reference.pixel_size_A)

    def _start(self, command: list[str]) -> RelionStart:
        site = commands.uses_site_launcher(self.section)
        return RelionStart(
            command=command,
            folder=self.folder,
            environment=lambda extra: clean_environment(extra, keep_allocation=site),
            setting=self._setting() if self.search.callback else None,
            elsewhere=site,
            silence_s=60.0 * self.section.timeout_min,
            step_of=self._step_of,
            piece_of=self._piece_of,
            iteration_began=self._iteration_began,
            note=lambda iteration, facts: self._ledger().note_callback(iteration, facts),
        )

    def _setting(self) -> Setting:
        request = self.request
        own = request.half_references or dict.fromkeys(HALVES, request.reference)
        return Setting(
            correction=request.correction,
            folder=request.folder / "correction",
            pixel_size_A=request.reference.pixel_size_A,
            dimensions=3 if self.search.three_dimensional else 2,
            iterative=False,
            mask=None if request.mask is None else request.mask.data,
            initial={half: own[half].data for half in HALVES},
            tau2=self.section.tau2,
        )

    def _step_of(self, iteration: int) -> float | None:
        """Sampling of an iteration as of the one before it, whose file is there while RELION calls."""
        try:
            return read_sampling(Path(f"{self.root}_it{iteration - 1:03d}_sampling.star")).step_deg
        except InputError:
            return None

    def _piece_of(self, iteration: int, last: bool) -> tuple[int, int]:
        """As ``RelionStart`` expects it: the iterations expected of any engine, and the one that joins the halves."""
        done = max(iteration - self.first, 0)
        last = last or done >= self.request.settings.max_iterations
        return done, done + 1 if last else expected_iterations(done, self.request.settings) + 1

    def _iteration_began(self, iteration: int) -> None:
        """The iteration before is over: its record is kept, and the files of those long ago go (rank 0)."""
        if iteration <= self.first:
            return
        if self.search.callback and self._ledger().without_callback(iteration - 1):
            raise self._not_called(iteration - 1)
        record = self._ledger().note_iterations(iteration - 1)
        results.remove_early_iterations(self.root, iteration - KEPT_ITERATIONS)
        if self.request.on_checkpoint:
            self.request.on_checkpoint(record or {"iteration": iteration - 1})

    def _finish(self, names: list[str]) -> results.Found:
        return results.publish(self.request, self._ledger(), names, self._summary())

    def _summary(self) -> dict[str, Any]:
        first = commands.first_command(self.search, self.request.settings, self.section, self.relion)
        return commands.summary(self._launched(first), self.relion)


def _announce(command: list[str]) -> None:
    logger.info("starting RELION: %s", commands.shown(command))


def _search(request: RefineRequest, section: RelionSection) -> commands.Search:
    source, reference = request.source, request.reference
    own = request.half_references is not None
    return commands.Search(
        particles=PARTICLES,
        reference=REFERENCE,
        pixel_size_A=reference.pixel_size_A,
        box_px=source.box_px,
        count=len(source.particles),
        symmetry=request.symmetry,
        diameter_A=request.diameter_A or 0.9 * source.box_px * reference.pixel_size_A,
        lowpass_A=request.lowpass_A,
        seed=request.seed,
        mask=MASK if request.mask is not None else "",
        local_deg=request.local_deg,
        on_scale=own,
        callback=request.correction is not None or section.tau2 != "relion",
        three_dimensional=isinstance(source, SubtomogramSource),
        ctf=not isinstance(source, SubtomogramSource) or source.has_ctf,
        phase_flipped=all_flipped(source.particles),
        premultiplied=any(source.particles.groups[k].ctf_premultiplied for k in set(source.particles.optics.tolist())),
    )


def check(request: RefineRequest) -> None:
    """
    Raises:
        InputError: something that RELION would fail at, or do without a word.
    """
    source, reference = request.source, request.reference
    for label, map_key in ((" of half-set 1", 1), (" of half-set 2", 2), ("", None)):
        own = reference if map_key is None else (request.half_references or {}).get(map_key, reference)
        if own.box_px != source.box_px or abs(own.pixel_size_A / reference.pixel_size_A - 1) > 0.01:
            raise InputError(
                f"the reference{label} is on another grid than the particles",
                expected=f"{source.box_px} px of {reference.pixel_size_A:g} Å",
                found=f"{own.box_px} px of {own.pixel_size_A:g} Å",
                hint="Use 'cryoiso reference' to bring it to the particles' grid.",
                code="grid-mismatch",
            )
    if request.half_references is not None and set(request.half_references) != set(HALVES):
        raise InputError("each half-set needs a reference of its own", expected=HALVES, code="arrays-do-not-fit")
    if request.local_deg is not None:
        source.particles.require_poses()
    check_poses(source.particles, source.box_px)
    half = source.particles.half
    for h in HALVES:
        if half is None or not (half == h).any():
            raise InputError(
                f"half-set {h} is empty",
                hint="Both half-sets need particles: check rlnRandomSubset.",
                code="half-set-empty",
            )


def _release_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
