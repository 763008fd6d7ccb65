"""A refinement by hand in another program, cryoSPARC first of all: files to import, a page of steps, and the way back.

Where the program would run, the files are written and everything stops; once its result lies beside them, ``--resume``
takes it over as that of a program.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from cryoiso.core.config import CommandSection
from cryoiso.core.errors import CryoisoError
from cryoiso.core.protocols import Communicator, RefineRequest, RefineResult
from cryoiso.engines.by_command import take_over
from cryoiso.engines.by_command import template as names_of
from cryoiso.engines.by_command.engine import Rounds, RoundState
from cryoiso.engines.by_command.input_files import write_inputs
from cryoiso.engines.by_command.template import out_half
from cryoiso.io.atomic import write_text
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal

OUT = ("particles_out.cs", "particles_out.star", "particles_out.par")
STEPS = "STEPS.md"
SETTINGS = {"run": "by-hand {particles} {cs} {reference1} {reference2}", "go_on": ""}
MAPS = "half{half}.mrc"


class FilesEngine:
    """A refinement that somebody does by hand."""

    name = "files"

    def refine(self, request: RefineRequest, comm: Communicator | None = None) -> RefineResult:
        """Writes the files of a round, or takes over its result (collective).

        Raises:
            CryoisoError: the result is not there yet (code ``waiting-for-files``), or cannot be used.
            InputError: as every engine.
        """
        command_section = request.program if isinstance(request.program, CommandSection) else CommandSection()
        section = command_section.model_copy(update={**SETTINGS, "out_half": command_section.out_half or MAPS})
        comm = Context() if comm is None else cast(Context, comm)
        return _ByHand(replace(request, program=section), comm).whole()


class _ByHand(Rounds):
    place, engine = "by-hand", "files"

    def _run(
        self, number: int, half: int, folder: Path, state: RoundState, names: list[str], stop_signal: StopSignal
    ) -> None:
        on_root(self.comm, self._require_result, number, folder, state, names)

    def _require_result(self, number: int, folder: Path, state: RoundState, names: list[str]) -> None:
        if _result(folder) is not None:
            return
        if not (folder / STEPS).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            particles = self.request.source.particles if state.poses is None else self._posed(state.poses)
            write_inputs(
                folder, self.request, self.template, particles, np.arange(len(particles)), names, state.references, 0,
                with_poses=state.poses is not None or self.request.local_deg is not None,
            )  # fmt: skip
            write_text(folder / STEPS, steps(self.request, self.section, state, number))
        raise CryoisoError(
            f"round {number} is to be refined by hand: the files and the steps are in {folder} ({STEPS}). Put its "
            f"poses there as {OUT[0]} or {OUT[1]}, then give the same command with --resume ('cryoiso resume' for a "
            "run)",
            code="waiting-for-files",
        )

    def _poses(self, folders: dict[int, Path], names: list[str]) -> take_over.Poses:
        file = cast(Path, _result(folders[1]))
        return take_over.returned_poses(file, self.request.source.particles, names, self.request.symmetry)

    def _has_maps(self, folders: dict[int, Path]) -> bool:
        return all((folders[half] / out_half(self.section, half)).exists() for half in (1, 2))


def _result(folder: Path) -> Path | None:
    """The poses that came back."""
    return next((folder / name for name in OUT if (folder / name).is_file()), None)


def steps(request: RefineRequest, section: CommandSection, state: RoundState, number: int) -> str:
    """What to do, as a page."""
    pixel, same = request.reference.pixel_size_A, request.half_references is None and number == 1
    maps = " and ".join(f"`{out_half(section, half)}`" for half in (1, 2))
    reference = (
        f"`{names_of.REFERENCE}`, which both half-sets start from" if same else
        f"`{names_of.reference_of(1)}` and `{names_of.reference_of(2)}`: **one per half-set**. A program that takes "
        "one reference for both must refine the half-sets apart (rlnRandomSubset, alignments3D/split)"
    )  # fmt: skip
    return f"""# Round {number}: a refinement by hand

{len(request.source.particles):,} particles of {request.source.box_px} px of {pixel:g} Å, symmetry {request.symmetry}.

| file | |
|---|---|
| `{names_of.PARTICLES}` | particles for RELION, cisTEM and others: images, CTF, half-sets (rlnRandomSubset), uids |
| `{names_of.CS}` | the same for cryoSPARC |
| reference | {reference}. Low-passed to {state.resolution_A:.3g} Å |

1. Import particles and reference. Protein is white in the images (cryoSPARC: data sign 1).
2. Refine with symmetry {request.symmetry} and independent half-sets. **Keep the half-sets of the file**: other ones are
   refused, because references of this program belong to them.
3. Copy the poses here as `{OUT[0]}` (cryoSPARC: the exported .cs file of the particles) or `{OUT[1]}` (RELION, cisTEM).
   Every particle must be in it once: particles are matched by uid, else by the names of their images. If the fields
   alignments3D or blob are in a passthrough file, copy that here too, with passthrough_particles in its name.
4. If you like, copy the unregularised half-maps here as {maps}, on the same grid. Otherwise they are reconstructed from
   the poses.
5. Give the same command with `--resume`, or `cryoiso resume RUN`.
"""
