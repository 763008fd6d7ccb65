"""What RELION gets to read: a particle STAR file, and image stacks where the originals will not do.

A row of what RELION writes is known by its image's name, so the order in which RELION writes rows, and columns that it
may leave out, do not matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import Particles
from cryoiso.io.atomic import write_text
from cryoiso.io.imagenames import distinct
from cryoiso.io.mrc import write_stack
from cryoiso.io.sources import RestoredSource, as_recorded
from cryoiso.io.stack import StackReader
from cryoiso.io.star.write import write_particles
from cryoiso.io.subtomograms import SubtomogramSource
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import chunk_bounds, owned_chunks

logger = logging.getLogger("cryoiso")

STACK_BYTES, MOST_STACKS = 2**28, 40
"""Exported images come in stacks of 256 MiB, or larger ones where there would be too many."""
SAMPLE = 32
SUFFIXES = (".mrcs", ".mrc", ".st")
SECTIONS = {"RELION": "relion", "cryoSPARC": "cryosparc"}
"""Program -> its section of the job file."""
KEPT_RESULTS = ("cryoisoAuxiliary", "rlnMicrographName")


def image_names(
    source: ImageSource, folder: Path, which: str, comm: Context, *, resume: bool = False, reader: str = "RELION"
) -> list[str]:
    """(n,) names ``000001@/path/stack.mrcs`` of the images that RELION reads for each particle (collective).

    Args:
        source: as the request has it.
        folder: exported stacks go into its sub-folder ``images``.
        which: RelionSection.images.
        resume: stacks of the same particles that are there already are taken.
        reader: the program, for messages.

    Raises:
        InputError: "original" was asked for and an original image is not to be had.
    """
    source = relion_source(source)
    kept, why = on_root(comm, usable_originals, source, which, reader)
    if why and comm.rank == 0:
        logger.info("%s gets its own copy of the images: the originals will not do: %s", reader, why)
    rows = np.flatnonzero(~kept)
    names = np.empty(len(kept), dtype=object)
    particles = source.particles
    for row in np.flatnonzero(kept).tolist():
        names[row] = f"{int(particles.index[row]) + 1:06d}@{os.path.abspath(str(particles.stack[row]))}"
    if len(rows):
        exported = _export(source, rows, folder / "images", comm, resume, reader)
        for row, name in zip(rows.tolist(), exported, strict=True):
            names[row] = name
    return [str(name) for name in names]


def relion_source(source: ImageSource) -> ImageSource:
    """A source of images that one run of RELION can take for what they are.

    RELION reads from the STAR file which optics groups are premultiplied; that images are phase-flipped it is told by
    an option, for all of them. So where some are and others are not, those that are get flipped back.
    """
    if isinstance(source, SubtomogramSource) or all_flipped(source.particles):
        return source
    return as_recorded(source, source.particles, ("flipped",))[0]


def all_flipped(particles: Particles) -> bool:
    """Whether there are phase-flipped images, and no others but premultiplied ones, whose CTF RELION squares."""
    kinds = {particles.groups[k].ctf_applied for k in np.unique(particles.optics).tolist()}
    return "flipped" in kinds and "" not in kinds


def usable_originals(source: ImageSource, which: str, reader: str = "RELION") -> tuple[np.ndarray, str]:
    """Whose original image shows what the source gives, so that RELION may read it.

    Args:
        which: RelionSection.images.

    Returns:
        (n,) bool, and why it is none of them, where that was not asked for.

    Raises:
        InputError: "original" was asked for and an original image is not to be had.
    """
    source = relion_source(source)
    particles = source.particles
    if which == "export":
        return np.zeros(len(particles), bool), ""
    stacks, place = distinct(particles.stack)
    there = np.array([name.endswith(SUFFIXES) and os.path.isfile(name) for name in stacks.tolist()])
    kept = there[place] & (particles.group_values("box_px") == source.box_px)
    some = "some of them are not there"
    if isinstance(source, RestoredSource):
        kept &= ~source.changed
        some = "some of them are phase-flipped and others are not"
    why = "" if kept.any() else "they are not there, or of another box or file type"
    why = why or _difference(source, np.flatnonzero(kept))
    if which == "original":
        if why or not kept.all():
            raise InputError(
                f"{reader} cannot read the original images: {why or some}",
                expected=f"{SECTIONS.get(reader, 'command')}.images = 'auto' or 'export'",
                code="relion-images-unreadable",
            )
        return kept, ""
    if why:
        kept[:] = False
    return kept, why


def _difference(source: ImageSource, rows: np.ndarray) -> str:
    """Why the originals of these rows are no substitute for the source's images; empty if they are.

    RELION wants protein white and background of mean 0 and standard deviation 1; so does the source. A few hundredths
    of difference come from another choice of what is background.
    """
    particles = source.particles
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int))]
    images = source.read(some).reshape(len(some), -1).astype(np.float64)
    with StackReader() as reader:
        for row, image in zip(some.tolist(), images, strict=True):
            try:
                if not reader.header(str(particles.stack[row])).is_plain:
                    return "their axes or bytes are stored in a way that programs read differently"
                original = reader.read(str(particles.stack[row]), particles.index[row : row + 1])[0]
            except InputError as error:
                return str(error)
            if original.size != image.size:
                return "another box"
            slope, offset = np.polyfit(image, original.reshape(-1).astype(np.float64), 1)
            if slope < 0:
                return "protein is dark in them"
            if not (0.9 < slope < 1.1 and abs(offset) < 0.1):
                return "they are not normalised"
            if np.abs(original.reshape(-1) - slope * image - offset).max() > 0.05:
                return "they were changed"
    return ""


def images_a_stack(n: int, box_px: int) -> int:
    """How many of n images go into one exported stack."""
    return max(1, STACK_BYTES // (4 * box_px**2), -(-n // MOST_STACKS))


def _export(source: ImageSource, rows: np.ndarray, folder: Path, comm: Context, resume: bool, reader: str) -> list[str]:
    """Writes the source's images into stacks, ranks side by side, and returns their names (collective)."""
    bounds = chunk_bounds(len(rows), images_a_stack(len(rows), source.box_px))
    note = {"digest": _digest(source, rows), "stacks": len(bounds)}
    there = on_root(comm, _prepare_folder, folder, note, resume)
    if not there:
        chunks = owned_chunks(len(bounds), comm.rank, comm.size)
        own = sum(stop - start for start, stop in (bounds[k] for k in chunks))
        line = ProgressLine(f"images for {reader}", own, active=comm.rank == 0)
        error: CryoisoError | None = None
        try:
            for k in chunks:
                before = bounds[k][0] - bounds[chunks[0]][0]
                _write_stack(source, rows[slice(*bounds[k])], folder / _stack_name(k), line, before)
        except CryoisoError as caught:
            error = caught
        agree(comm, error)
        if comm.stop_requested():
            raise Interrupted(f"stopped by a signal while images were written for {reader}")
        line.close(f"{len(rows):,} images of {source.box_px} px")
        on_root(comm, write_text, folder / "images.json", json.dumps(note) + "\n")
    return [
        f"{i + 1:06d}@{folder.absolute() / _stack_name(k)}"
        for k, (start, stop) in enumerate(bounds)
        for i in range(stop - start)
    ]


def _stack_name(number: int) -> str:
    return f"particles-{number + 1:03d}.mrcs"


def _digest(source: ImageSource, rows: np.ndarray) -> str:
    h = hashlib.sha256(np.ascontiguousarray(source.particles.uid[rows]).tobytes())
    first = source.read(rows[:1])
    h.update(b"flipped back" if isinstance(source, RestoredSource) else b"")
    h.update(f"{source.box_px}".encode() + np.ascontiguousarray(first).tobytes())
    return h.hexdigest()


def _prepare_folder(folder: Path, note: dict[str, object], resume: bool) -> bool:
    """Whether the stacks are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "images.json"
    if resume and file.exists():
        try:
            return bool(json.loads(file.read_text()) == note)
        except ValueError:
            pass
    for old in folder.iterdir():
        old.unlink()
    return False


def _write_stack(source: ImageSource, rows: np.ndarray, path: Path, line: ProgressLine, before: int) -> None:
    pixel = float(source.particles.group_values("pixel_size_A")[rows[0]])
    with write_stack(path, source.box_px, pixel) as stack:
        for start, stop in chunk_bounds(len(rows), 256):
            stack.append(source.read(rows[start:stop]))
            line.update(before + stop, "of this rank's share")


def relion_particles(particles: Particles, *, with_poses: bool) -> Particles:
    """The particles as RELION should see them: nothing but what it needs.

    Old angles go unless the search is to start from them. Offsets that are known stay: RELION searches around them; the
    prior on its shifts has its centre where the columns rlnOrigin?PriorAngst say, which without them is zero.
    Optics groups without a particle go as well, and the others are counted from 1.
    """
    used = np.unique(particles.optics)
    place = np.searchsorted(used, particles.optics)
    groups = tuple(replace(particles.groups[k], number=i) for i, k in enumerate(used.tolist(), 1))
    results = {name: particles.results[name] for name in KEPT_RESULTS if name in particles.results}
    if "rlnMicrographName" not in results:
        results["rlnMicrographName"] = _micrographs(particles)
    shift_A = particles.shift_A
    if shift_A is not None and np.any(shift_A):
        results |= {f"rlnOrigin{axis}PriorAngst": shift_A[:, i] for i, axis in enumerate("XY")}
    elif not with_poses:
        shift_A = None
    return replace(
        particles,
        optics=place.astype(particles.optics.dtype),
        groups=groups,
        table=None,
        optics_table=None,
        rotation=particles.rotation if with_poses else None,
        shift_A=shift_A,
        results=results,
    )


def _micrographs(particles: Particles) -> np.ndarray:
    """Names by which RELION groups images for their scale: of the micrograph, else of the stack."""
    table = particles.table
    if table is not None and "rlnMicrographName" in table:
        return np.asarray(table["rlnMicrographName"], dtype=str)
    return np.array([os.path.basename(name) or "unknown" for name in particles.stack.tolist()], dtype=str)


def write_input(
    path: Path, particles: Particles, names: list[str], *, with_poses: bool, box_px: int | None = None
) -> None:
    """The STAR file that RELION starts from.

    Args:
        names: of the images that RELION reads.
        box_px: of those images: exported ones were brought to one box, whatever that of their optics group was.
    """
    seen = relion_particles(particles, with_poses=with_poses)
    if box_px:
        seen = replace(seen, groups=tuple(replace(group, box_px=box_px) for group in seen.groups))
    write_particles(path, seen, names)


def rows_of_names(image_names: list[str], names: list[str], file: object) -> np.ndarray:
    """(n,) position in ``found`` (what RELION wrote) of every particle.

    Raises:
        CryoisoError: RELION lost, added or doubled particles.
    """
    place = {_key(name): i for i, name in enumerate(image_names)}
    rows = np.array([place.get(_key(name), -1) for name in names], np.int64)
    if len(place) != len(image_names) or len(image_names) != len(names) or (rows < 0).any():
        raise CryoisoError(
            f"{file}: RELION did not return each particle exactly once ({len(names)} were given, {len(image_names)} "
            f"came back, {int((rows < 0).sum())} are missing)",
            code="relion-particles-lost",
        )
    return rows


def _key(name: str) -> tuple[int, str]:
    number, _, stack = name.rpartition("@")
    return int(number) if number.isdigit() else 0, stack
