"""One refinement by real RELION twice: as the engine, and with the same options by command."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cryoiso.core.config import CommandSection, RelionSection
from cryoiso.core.protocols import ImageSource, RefineRequest
from cryoiso.core.types import Particles
from cryoiso.engines.by_command.engine import CommandEngine
from cryoiso.engines.relion import command as commands
from cryoiso.engines.relion.engine import RelionEngine, _search
from cryoiso.engines.relion.install import find_relion
from cryoiso.io import read_map, read_particles
from cryoiso.methods.auxiliary.corefine import co_refine
from cryoiso.parallel.context import Context
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group


@dataclass(frozen=True)
class Differences:
    """Between the two results."""

    angle_deg: np.ndarray
    """(n,) of every particle"""
    shift_A: np.ndarray
    """(n,)"""
    maps: list[float]
    """largest difference of each half-map over its largest value"""


def section_by_command(request: RefineRequest, section: RelionSection) -> CommandSection:
    """RELION's command lines of the engine, for one that does not converge before ``max_iterations``."""
    relion, limit = find_relion(), request.settings.max_iterations
    search, launch = _search(request, section), commands.launch(section, relion)
    first = commands.first_command(search, request.settings, section, relion)
    last = commands.next_command(
        f"run_it{limit:03d}_optimiser.star", search, section, relion, limit + 1, finish=True
    )  # fmt: skip
    places = {"particles_in.star": "{particles}", "reference_in.mrc": "{unfiltered}"}
    both = [" ".join(places.get(word, word) for word in [*launch, *words]) for words in (first, last)]
    return CommandSection(
        run=f"sh -c '{both[0]} && {both[1]}'", out_particles="run_data.star",
        out_half="run_half{half}_class001_unfil.mrc", name=f"RELION {relion.version}",
    )  # fmt: skip


def refine_twice(request: RefineRequest, auxiliary: ImageSource | None = None) -> Differences:
    """Both ways, in the sub-folders ``engine`` and ``command`` of the request's folder.

    Args:
        request: whose engine and program are replaced.
        auxiliary: particles to co-refine with.
    """
    section = RelionSection()
    as_engine = replace(
        request, settings=request.settings.model_copy(update={"engine": "relion"}), program=section,
        folder=_made(request.folder / "engine"),
    )  # fmt: skip
    by_command = replace(
        request, settings=request.settings.model_copy(update={"engine": "command"}),
        program=section_by_command(as_engine, section), folder=_made(request.folder / "command"),
    )  # fmt: skip
    found: list[Particles] = []
    for engine, given in ((RelionEngine(), as_engine), (CommandEngine(), by_command)):
        if auxiliary is None:
            engine.refine(given)
        else:
            co_refine(engine, given, auxiliary, Context())
        found.append(read_particles(given.folder / "particles.star", "", ("pose",)))
    one, two = found
    assert np.array_equal(one.uid, two.uid) and one.rotation is not None and two.rotation is not None
    assert one.shift_A is not None and two.shift_A is not None
    maps = []
    for half in (1, 2):
        a, b = (read_map(request.folder / f / f"half{half}.mrc").data for f in ("engine", "command"))
        maps.append(float(np.abs(a - b).max() / np.abs(a).max()))
    angle = angular_distance_deg(one.rotation, two.rotation, point_group(request.symmetry))
    return Differences(angle, np.linalg.norm(one.shift_A - two.shift_A, axis=1), maps)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
