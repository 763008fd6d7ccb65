"""The command ``symmetry`` on plain files."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core import products
from cryoiso.core.errors import UsageError
from cryoiso.core.types import Particles
from cryoiso.io import read_particle_file
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.star.write import write_particles
from cryoiso.physics.symmetry_proposal import MAX_FOLD, Proposal, propose_symmetry
from cryoiso.pipeline.inputs.map_pairs import read_half_maps

FACTS, POSES = "symmetry.json", products.PARTICLES


def symmetry_files(
    map1: Path, map2: Path | None, out: Path, *, particles: Path | None = None, max_fold: int = MAX_FOLD,
    pixel_size_A: float | None = None,
) -> tuple[Proposal, list[Path]]:  # fmt: skip
    """Proposes a point group; writes symmetry.json and, if one was found, the maps and particles in its frame.

    Args:
        map1: any map, or with ``map2`` the first of two half-maps.
        particles: STAR or .cs file with poses in the frame of the maps.
        max_fold: largest n of Cn and Dn.

    Returns:
        The proposal, and the files that were written.

    Raises:
        InputError: unreadable files, maps that are no half-maps of one reconstruction, or no poses.
        UsageError: one of the files to write is one that is read.
    """
    from cryoiso.physics.fit import apply_fit

    if map2 is None:
        maps = [read_map(map1, pixel_size_A)]
    else:
        maps = list(read_half_maps(map1, map2, pixel_size_A)[:2])
    posed = read_particle_file(particles, "", ("pose",)) if particles else None
    targets = [out / file.name for file in (map1, map2) if file is not None]
    sources = [file.resolve() for file in (map1, map2, particles) if file is not None]
    for target in [*targets, out / POSES]:
        if target.resolve() in sources:
            raise UsageError(f"--out {out}: would overwrite {target}, which is read", code="file-exists")
    if len({*targets, out / POSES}) <= len(targets):
        raise UsageError(f"the files to write have one name: {', '.join(t.name for t in targets)}", code="file-exists")
    proposal = propose_symmetry(maps[0], maps[1] if len(maps) > 1 else None, max_fold)
    make_folder(out)
    write_json(out / FACTS, proposal.facts())
    if proposal.group == "C1":
        return proposal, [out / FACTS]
    for target, density in zip(targets, maps, strict=True):
        write_map(target, apply_fit(density, proposal.frame).data, density.pixel_size_A)
    if posed is not None:
        write_particles(out / POSES, _moved(posed, proposal))
        targets.append(out / POSES)
    return proposal, [out / FACTS, *targets]


def _moved(particles: Particles, proposal: Proposal) -> Particles:
    """The particles with poses in the group's frame; their intensities remain."""
    moved = particles.with_poses(*proposal.frame.poses(*particles.require_poses()))
    return moved.with_intensity(particles.signal_scale, particles.noise_level)
