"""Any refinement program as an engine: a command line gets particles and references, and leaves poses and half-maps.

It runs in ``request.folder/command/round-NN`` (in ``half1`` and ``half2`` below it where it runs once per half-set).
Nothing that it leaves is used before all of it was checked. With several rounds the half-maps of one are the references
of the next, corrected in between where a correction was asked for.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import CommandSection
from cryoiso.core.errors import UsageError
from cryoiso.core.identity import Identity
from cryoiso.core.protocols import Communicator, HalfMaps, RefineRequest, RefineResult
from cryoiso.core.records import IterationRecord, RefineRecord
from cryoiso.core.types import HALVES, Particles
from cryoiso.engines.by_command import supervise, take_over
from cryoiso.engines.by_command.input_files import write_inputs
from cryoiso.engines.by_command.template import require_reference_per_half, template_of, words_of
from cryoiso.engines.relion.engine import check
from cryoiso.engines.relion.images import image_names
from cryoiso.engines.relion.serve import corrected
from cryoiso.io import checkpoint, identity_file
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.io.sources import SubsetSource
from cryoiso.io.star.write import write_particles
from cryoiso.metrics.fsc_curve import fsc, resolution_at
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal, side_by_side
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.filters import apply_radial, lowpass
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.identity import of_request
from cryoiso.refine.reconstruct import reconstruct_halves

logger = logging.getLogger("cryoiso")
NOT_DECIDING = ("go_on", "name", "timeout_min", "limit_min", "site_launcher", "rounds")
"""Settings that do not decide what a round finds."""


class CommandEngine:
    """A program of the user's, started by rank 0."""

    name = "command"

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Runs the command in every round (collective).

        Writes into ``request.folder``: particles.star, half1.mrc, half2.mrc, refine.json, command/ and, for the
        correction if there is one, correction/. With ``request.resume`` finished rounds are kept, and the next one is
        continued with ``command.go_on`` where that is given, else started again.

        Raises:
            UsageError: the command lacks a placeholder, or there is one round and a correction between rounds.
            InputError: as every engine, or the run to resume was begun with something else.
            MissingError: no such program.
            CryoisoError: it failed, took too long, or left something that cannot be used.
            Interrupted: stopped by a signal; the program is gone.
        """
        return Rounds(request, Context() if comm is None else cast(Context, comm)).whole()


@dataclass
class RoundState:
    """After a round; the same on every rank."""

    round: int
    references: dict[int, np.ndarray]
    resolution_A: float
    poses: take_over.Poses | None = None
    maps: dict[int, np.ndarray] = field(default_factory=dict)
    history: list[IterationRecord] = field(default_factory=list)


class Rounds:
    """Rounds of a program of somebody's; the same on every rank."""

    place, engine, reader = "command", "command", "the command"
    """Folder of its files, name of the engine, and the program in messages."""

    def __init__(self, request: RefineRequest, comm: Context) -> None:
        section = request.program
        self.section: CommandSection = section if isinstance(section, CommandSection) else CommandSection()
        self.request, self.comm = request, comm
        check(request)
        self.template = template_of(self.section)
        require_rounds(self.section, request.correction is not None)
        if request.half_references is not None or self.section.rounds > 1:
            require_reference_per_half(self.template, "references come from the half-sets")
        self.folder = request.folder.absolute() / self.place
        self.state_file = self.folder / "state.npz"
        identity = of_request(request, request.diameter_A, ordered=True)
        facts = {k: v for k, v in self.section.model_dump().items() if k not in NOT_DECIDING}
        self.identity: Identity = {**identity, "command": facts}

    def whole(self) -> RefineResult:
        comm, request, section = self.comm, self.request, self.section
        on_root(comm, self._prepare)
        names: list[str] = []
        if not self.template.one_stack:
            names = image_names(
                request.source, self.folder, section.images, comm, resume=request.resume, reader=self.reader
            )
        state = on_root(comm, self._load) or self._first()
        with side_by_side(comm) as stop_signal:
            while state.round < section.rounds:
                state = self._next(state, names, stop_signal)
                on_root(comm, self._save, state)
                if comm.rank == 0 and request.on_checkpoint:
                    request.on_checkpoint(state.history[-1])
        result = self._result(state)
        on_root(comm, self._publish, state, result)
        return result

    def _prepare(self) -> None:
        fresh = not self.request.resume
        if fresh:
            for name in (self.place, "correction"):
                shutil.rmtree(self.request.folder / name, ignore_errors=True)
        begun = self.folder.exists()
        if begun:
            identity_file.require_begun_with(self.folder, self.identity, "refinement by command")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.request.correction is not None:
            (self.request.folder / "correction").mkdir(exist_ok=True)
        if not begun:
            identity_file.note(self.folder, self.identity)

    def _first(self) -> RoundState:
        request = self.request
        pixel = request.reference.pixel_size_A
        filtered = {h: lowpass(volume, pixel, request.lowpass_A) for h, volume in self._given().items()}
        return RoundState(0, filtered, request.lowpass_A)

    def _given(self) -> dict[int, np.ndarray]:
        """Half -> reference that the refinement begins with."""
        own = self.request.half_references or dict.fromkeys(HALVES, self.request.reference)
        return {half: np.asarray(own[half].data, np.float32) for half in HALVES}

    def _next(self, state: RoundState, names: list[str], stop_signal: StopSignal) -> RoundState:
        """One round (collective)."""
        comm, number = self.comm, state.round + 1
        folders = self._folders(number)
        for half in dict.fromkeys(folders.values()):  # once where one run serves both
            which = [h for h, folder in folders.items() if folder == half]
            self._run(number, which[0] if len(which) == 1 else 0, half, state, names, stop_signal)
        poses = on_root(comm, self._poses, folders, names)
        posed = self._posed(poses)
        on_root(comm, take_over.require_possible, posed, self.request.source.box_px, folders[1])
        if on_root(comm, self._has_maps, folders):
            maps = on_root(comm, take_over.returned_maps, folders, self.section, self.request)
        else:
            maps = self._reconstructed(posed)
        return self._judged(number, state, poses, maps)

    def _has_maps(self, folders: dict[int, Path]) -> bool:
        """Whether half-maps come from the program."""
        return bool(self.section.out_half)

    def _folders(self, number: int) -> dict[int, Path]:
        """Half -> where the program runs for it."""
        folder = self.folder / f"round-{number:02d}"
        return {half: folder / f"half{half}" if self.template.per_half else folder for half in HALVES}

    def _run(
        self, number: int, half: int, folder: Path, state: RoundState, names: list[str], stop_signal: StopSignal
    ) -> None:
        section = self.section
        line, done = on_root(self.comm, self._begin, number, half, folder, state, names)
        if done:
            return
        words = words_of(
            line, section, self.request, folder, round_=number, half=half, resolution_A=state.resolution_A
        )  # fmt: skip
        limits = {"silence_s": 60 * section.timeout_min, "limit_s": 60 * section.limit_min}
        supervise.run(supervise.CommandStart(words, folder, section.site_launcher, **limits), self.comm, stop_signal)
        on_root(self.comm, write_text, folder / "done", "")

    def _begin(self, number: int, half: int, folder: Path, state: RoundState, names: list[str]) -> tuple[str, bool]:
        """The command line to start now, and whether this run has ended well before (rank 0)."""
        if (folder / "done").exists():
            return "", True
        if (folder / "begun").exists() and self.section.go_on:
            return self.section.go_on, False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source = self.request.source
        rows = np.arange(len(source.particles))
        if half:
            rows = np.flatnonzero(self._half() == half)
        particles = source.particles if state.poses is None else self._posed(state.poses)
        write_inputs(
            folder, self.request, self.template, particles, rows, names, state.references, half,
            with_poses=state.poses is not None or self.request.local_deg is not None,
            unfiltered=self._given() if number == 1 else None,
        )  # fmt: skip
        write_text(folder / "begun", "")
        return self.section.run, False

    def _half(self) -> np.ndarray:
        return cast(np.ndarray, self.request.source.particles.half)

    def _poses(self, folders: dict[int, Path], names: list[str]) -> take_over.Poses:
        """What the program returned, in the order of the source (rank 0)."""
        particles, out, symmetry = self.request.source.particles, self.section.out_particles, self.request.symmetry
        if not self.template.per_half:
            return take_over.returned_poses(folders[1] / out, particles, names, symmetry)
        rows = [np.flatnonzero(self._half() == half) for half in HALVES]
        parts = [
            take_over.returned_poses(
                folders[h] / out, particles.take(r), [names[i] for i in r] if names else [], symmetry
            )
            for h, r in zip(HALVES, rows, strict=True)
        ]
        order = np.argsort(np.concatenate(rows), kind="stable")
        shared = set(parts[0].columns) & set(parts[1].columns)
        return take_over.Poses(
            np.concatenate([part.rotation for part in parts])[order],
            np.concatenate([part.shift_A for part in parts])[order],
            {name: np.concatenate([part.columns[name] for part in parts])[order] for name in sorted(shared)},
        )

    def _posed(self, poses: take_over.Poses) -> Particles:
        return self.request.source.particles.with_poses(poses.rotation, poses.shift_A)

    def _reconstructed(self, posed: Particles) -> dict[int, np.ndarray]:
        """Half-maps of the raw particles (collective)."""
        request, comm = self.request, self.comm
        source: Any = request.source
        if request.auxiliary is not None:
            source, posed = SubsetSource(source, ~request.auxiliary), posed.take(~request.auxiliary)
        half_maps = reconstruct_halves(
            source, posed, comm, symmetry=request.symmetry, padding=request.settings.padding, device=comm.device(),
            pixel_size_A=request.reference.pixel_size_A,
        )  # fmt: skip
        all_maps = {half: comm.bcast(half_maps[half], root_of_half(half, comm.size)) for half in HALVES}
        return {half: np.asarray(density.data, np.float32) for half, density in all_maps.items()}

    def _judged(
        self, number: int, state: RoundState, poses: take_over.Poses, maps: dict[int, np.ndarray]
    ) -> RoundState:
        """Resolution, references of the next round, and the record (collective)."""
        request = self.request
        pixel, box = request.reference.pixel_size_A, request.source.box_px
        curve = fsc(maps[1], maps[2])
        resolution = resolution_at(curve, 0.143, box, pixel)
        record: IterationRecord = {"iteration": number, "resolution_A": resolution}
        if state.poses is not None:
            moved = angular_distance_deg(state.poses.rotation, poses.rotation, point_group(request.symmetry))
            record["changes_deg"] = float(np.mean(moved))
        references = self._references(maps, curve, box * pixel)
        if number < self.section.rounds and request.correction is not None:
            references, facts = corrected(self._half_maps(number, maps, references, curve, resolution),
                                          request.correction, self.comm)  # fmt: skip
            record["correction"] = facts
        if self.comm.rank == 0:
            logger.info("round %d of %d: resolution %.2f Å", number, self.section.rounds, resolution)
        return RoundState(number, references, resolution, poses, maps, [*state.history, record])

    def _references(self, maps: dict[int, np.ndarray], curve: np.ndarray, extent_A: float) -> dict[int, np.ndarray]:
        """Half -> Wiener-filtered half-map, FSC of a half-map being SSNR / (1 + SSNR); zero from the first shell below
        0.143; both the same inside ``join_halves_A``, as in the other engines."""
        weight = np.clip(curve, 0.0, 1.0)
        below = np.flatnonzero(curve < 0.143)
        if len(below):
            weight[below[0] :] = 0
        joined = self.request.settings.join_halves_A
        shells = np.arange(len(weight))
        inside = weight * (shells <= (extent_A / joined if joined else -1))
        common = apply_radial((maps[1] + maps[2]) / 2, inside)
        return {half: (apply_radial(maps[half], weight - inside) + common).astype(np.float32) for half in HALVES}

    def _half_maps(self, number: int, maps: dict[int, np.ndarray], references: dict[int, np.ndarray],
                   curve: np.ndarray, resolution_A: float) -> HalfMaps:  # fmt: skip
        request = self.request
        return HalfMaps(
            iteration=number, maps=maps, references=references, pixel_size_A=request.reference.pixel_size_A, fsc=curve,
            resolution_A=resolution_A, step_deg=0.0, folder=request.folder / "correction",
            mask=None if request.mask is None else request.mask.data, initial=self._given(),
        )  # fmt: skip

    def _save(self, state: RoundState) -> None:
        poses = cast(take_over.Poses, state.poses)
        arrays = {"rotation": poses.rotation, "shift_A": poses.shift_A}
        arrays |= {f"column {name}": values for name, values in poses.columns.items()}
        for half in HALVES:
            arrays |= {f"reference{half}": state.references[half], f"half{half}": state.maps[half]}
        values = {"round": state.round, "resolution_A": state.resolution_A, "history": state.history}
        checkpoint.save(self.state_file, arrays, values, self.identity)

    def _load(self) -> RoundState | None:
        state = checkpoint.load_same(self.state_file, self.identity, "refinement by command")
        if state is None:
            return None
        arrays, values = state
        columns = {k.removeprefix("column "): v for k, v in arrays.items() if k.startswith("column ")}
        poses = take_over.Poses(arrays["rotation"], arrays["shift_A"], columns)
        logger.info("refinement by command goes on after round %d", values["round"])
        return RoundState(
            values["round"], {h: arrays[f"reference{h}"] for h in HALVES}, values["resolution_A"], poses,
            {h: arrays[f"half{h}"] for h in HALVES}, values["history"],
        )  # fmt: skip

    def _result(self, state: RoundState) -> RefineResult:
        poses = cast(take_over.Poses, state.poses)
        particles = self._posed(poses).with_results(**poses.columns)
        files = {half: self.request.folder / products.half_map(half) for half in HALVES}
        return RefineResult(particles, files, state.history, state.resolution_A)

    def _program_facts(self, state: RoundState) -> dict[str, Any]:
        """What refine.json says of the program."""
        section = self.section
        made_by = "the command" if self._has_maps(self._folders(state.round)) else "reconstructed from its poses"
        return {"command": {"name": section.name, "run": section.run, "rounds": section.rounds, "half_maps": made_by}}

    def _publish(self, state: RoundState, result: RefineResult) -> None:
        request = self.request
        for half, path in result.half_maps.items():
            write_map(path, state.maps[half], request.reference.pixel_size_A)
        write_particles(request.folder / products.PARTICLES, result.particles)
        summary: RefineRecord = {
            "engine": self.engine,
            **self._program_facts(state),  # type: ignore[typeddict-item]
            "symmetry": request.symmetry,
            "diameter_A": request.diameter_A,
            "resolution_A": result.resolution_A,
            "particles": len(result.particles),
            "iterations": result.iterations,
        }
        if request.local_deg is not None:
            summary["local_deg"] = request.local_deg
        if request.correction is not None:
            summary["correction"] = request.correction.facts()
        write_text(request.folder / products.facts("refine"), json.dumps(summary, indent=1) + "\n")
        shutil.rmtree(self.folder / "images", ignore_errors=True)
        for stack in self.folder.rglob("*.mrcs"):
            stack.unlink()


def require_rounds(section: CommandSection, correction: bool) -> None:
    """
    Raises:
        UsageError: references are to be corrected between rounds, and there is one.
    """
    if correction and section.rounds < 2:
        raise UsageError(
            "command.rounds = 1: references are corrected between rounds; 2 or more are needed", code="options-conflict"
        )


def require_command(section: CommandSection, *, correction: bool, co_refinement: bool) -> None:
    """What can be found wrong with a command before anything runs.

    Raises:
        UsageError: no command, or a placeholder is missing.
        MissingError: no such program.
    """
    from cryoiso.core.commands import split_command
    from cryoiso.core.errors import MissingError

    template = template_of(section)
    require_rounds(section, correction)
    if correction or co_refinement or section.rounds > 1:
        require_reference_per_half(template, "references come from the half-sets")
    program = split_command(section.run, "command.run")[0]
    if "{" not in program and shutil.which(program) is None:
        raise MissingError(f"{program} is not on the PATH (command.run)", code="program-missing")
