"""The command ``simulate``: writes what a refinement gets, the truth, and what it was made with."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso import __version__
from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.log import ProgressLine
from cryoiso.core.types import CtfApplied, Particles
from cryoiso.io.atomic import make_folder, require_space, write_text
from cryoiso.io.mrc import write_map, write_stack
from cryoiso.io.star.text import StarBlock, write_blocks
from cryoiso.io.star.write import format_column, write_particles
from cryoiso.physics.ctf_applied import apply_ctf
from cryoiso.physics.nuisances.settings import PARTICLES_A_MICROGRAPH, Nuisances
from cryoiso.physics.nuisances.source import NuisanceSource
from cryoiso.physics.simulation import SimulatedSource
from cryoiso.physics.so3 import matrix_to_euler
from cryoiso.pipeline.commands.output import refuse_result

logger = logging.getLogger("cryoiso")

FILES = ("particles.mrcs", "truth_map.mrc", "truth.star", "particles.star", "simulation.json")
COPIES = "copies.star"


@dataclass(frozen=True)
class Writing:
    """How a set is written."""

    with_poses: bool = False
    halves: bool = False
    applied: CtfApplied = ""


def check_folder(out: Path, overwrite: bool) -> None:
    """Makes the folder of a set, and takes out what an earlier one left there.

    Raises:
        UsageError: it holds a set that is not to be replaced.
        InputError: it cannot be made.
    """
    present = refuse_result(out, FILES, overwrite)
    try:
        make_folder(out)
        for old in [out / COPIES, *out.glob("particles_[0-9]*.mrcs")] if present else []:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be cleared: {error.strerror}", file=out, code="not-writable") from None


def write_plain(source: SimulatedSource, out: Path, facts: dict[str, Any], how: Writing) -> None:
    """A set without nuisances."""
    n, box, pixel = len(source), source.box_px, source.volume.pixel_size_A
    require_space(out / FILES[0], 4 * n * box * box)
    progress = ProgressLine("simulating", n)
    particles = source.particles.with_ctf_applied(how.applied)
    with write_stack(out / "particles.mrcs", box, pixel) as stack:
        for images in source.blocks():
            stack.append(apply_ctf(images, particles, np.arange(stack.count, stack.count + len(images))))
            progress.update(stack.count)
    progress.close(f"{n:,} images of {box} px")
    write_map(out / "truth_map.mrc", source.volume.data, pixel)
    micrographs = np.array([f"micrograph{i // PARTICLES_A_MICROGRAPH + 1:05d}.mrc" for i in range(n)])
    truth = particles.with_results(rlnMicrographName=micrographs)
    _write_tables(truth, truth, out, how)
    measured = source.measured()
    _write_facts(out, {**facts, "box_px": box, "pixel_size_A": pixel, "measured": measured})


def write_nuisances(
    source: NuisanceSource, out: Path, facts: dict[str, Any], settings: Nuisances, how: Writing
) -> None:
    """A set with nuisances: a stack per image size, and the truth of every image.

    Raises:
        UsageError: images are to be multiplied by CTFs that are not known.
    """
    require_known_ctf(settings, how.applied)
    truth, pixel = source.truth, source.volume.pixel_size_A
    require_space(out / FILES[0], sum(4 * len(source.rows_of_grid(g)) * g[0] ** 2 for g in source.grids))
    stack, index = _write_stacks(source, out, how.applied)
    write_map(out / "truth_map.mrc", source.volume.data, pixel)
    true, with_errors = (
        replace(p.with_ctf_applied(how.applied), stack=stack, index=index) for p in (truth.particles, truth.given)
    )
    _write_tables(true.with_results(**truth.columns()), with_errors.with_results(**truth.shared_columns()), out, how)
    if len(truth.copies):
        _write_copies(source, out)
    m = truth.micrographs
    columns = {
        "name": m.names, "particles": np.bincount(m.of, minlength=len(m.names)), "ice_thickness_A": m.thickness_A,
        "bfactor_A2": m.bfactor_A2, "scale": m.scale, "tilt_axis_deg": m.tilt_axis_deg, "defocus_error_A": m.error_A,
    }  # fmt: skip
    rows = [dict(zip(columns, row)) for row in zip(*(v.tolist() for v in columns.values()))]
    _write_facts(
        out,
        {**facts, "box_px": source.box_px, "pixel_size_A": pixel, "measured": source.measured(),
         "nuisances": asdict(settings), "micrographs": rows},
    )  # fmt: skip


def require_known_ctf(settings: Nuisances, applied: CtfApplied) -> None:
    """Refuses images that were multiplied by a CTF other than the one that their file states.

    Raises:
        UsageError: see above.
    """
    if applied and settings.hides_ctf:
        raise UsageError(
            "--phase-flipped and --ctf-premultiplied need the CTF that the images have; give --known, or leave out "
            "errors of the CTF, ice, scales, B-factors and beam tilt",
            code="options-conflict",
        )


def _write_stacks(source: NuisanceSource, out: Path, applied: CtfApplied) -> tuple[np.ndarray, np.ndarray]:
    """Writes the images; returns stack and index of each particle."""
    n, done = len(source), 0
    stack, index = np.full(n, FILES[0], dtype="<U32"), np.empty(n, np.int64)
    progress = ProgressLine("simulating", n)
    with_errors = source.truth.given.with_ctf_applied(applied)
    for number, grid in enumerate(source.grids, 1):
        name = FILES[0] if number == 1 else f"particles_{number}.mrcs"
        rows = source.rows_of_grid(grid)
        stack[rows], index[rows] = name, np.arange(len(rows))
        with write_stack(out / name, *grid) as writer:
            for part, images in source.blocks(grid):
                writer.append(apply_ctf(images, with_errors, part))
                done += len(part)
                progress.update(done)
    progress.close(f"{n:,} images of {' and '.join(f'{box}' for box, _ in source.grids)} px")
    return stack, index


def _write_tables(truth: Particles, with_errors: Particles, out: Path, how: Writing) -> None:
    write_particles(out / "truth.star", truth)
    with_errors = with_errors if how.with_poses else replace(with_errors, rotation=None, shift_A=None)
    write_particles(out / "particles.star", with_errors if how.halves else replace(with_errors, half=None))


def _write_copies(source: NuisanceSource, out: Path) -> None:
    """copies.star: every other object in an image, by the image's particle."""
    copies = source.truth.copies
    numbers = np.concatenate([matrix_to_euler(copies.rotation), copies.position_A], 1)
    names = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "cryoisoXAngst", "cryoisoYAngst", "cryoisoZAngst")
    columns = {
        "cryoisoUid": list(map(str, source.particles.uid[copies.row].tolist())),
        "cryoisoKind": copies.kind.tolist(),
        **{name: format_column(values, "%.6f") for name, values in zip(names, numbers.T, strict=True)},
    }
    write_blocks(out / COPIES, [StarBlock("copies", True, columns)])


def _write_facts(out: Path, facts: dict[str, Any]) -> None:
    measured = facts["measured"]
    facts = {"program": f"cryoiso {__version__}", **facts}
    write_text(out / "simulation.json", json.dumps(facts, indent=1, default=str) + "\n")
    snr = f"signal-to-noise ratio {measured['snr_dB']:.2f} dB" if "snr_dB" in measured else "no noise"
    logger.info("%s in this set; written to %s", snr, out)
