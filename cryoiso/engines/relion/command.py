"""The command lines of relion_refine and of the launcher that starts it. Pure: nothing is started here."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from typing import Any

from cryoiso.core.commands import split_command
from cryoiso.core.config import RefineSection, RelionSection
from cryoiso.core.errors import MissingError, UsageError
from cryoiso.engines.relion.extra import extra_words
from cryoiso.engines.relion.install import Relion
from cryoiso.parallel.mpi_probe import MPICH, OPEN_MPI

OUTPUT = "run"
"""Root of the output names, in the folder where RELION runs; it is given as ./run, without a folder RELION stops."""
LARGEST_READ_AT_ONCE = 2**31
"""Bytes of images that RELION may keep in memory (--preread_images)."""
SIGMAS = 3.0
"""RELION's local search reaches this many standard deviations of its prior."""

Options = dict[str, str | None]
"""Option -> its value; None: it takes none."""


@dataclass(frozen=True)
class Search:
    """What a refinement is, in RELION's terms; lengths in Å unless named otherwise."""

    particles: str
    reference: str
    pixel_size_A: float
    box_px: int
    count: int
    symmetry: str
    diameter_A: float
    lowpass_A: float
    seed: int
    mask: str = ""
    local_deg: float | None = None
    on_scale: bool = False
    """the reference has the grey scale of the images"""
    callback: bool = False
    three_dimensional: bool = False
    """the particles are subtomograms"""
    ctf: bool = True
    """there are CTFs to correct for"""
    phase_flipped: bool = False
    """the images are; RELION asks for it on the command line, not in the STAR file"""
    premultiplied: bool = False
    """some images are, so that their background's standard deviation is not 1, which RELION would object to"""


def first_command(search: Search, settings: RefineSection, section: RelionSection, relion: Relion) -> list[str]:
    """relion_refine's arguments for a new refinement.

    An option that the user gives in ``section.extra`` takes the place of ours.
    """
    options: Options = {
        "--o": f"./{OUTPUT}",
        "--i": search.particles,
        "--ref": search.reference,
        "--auto_refine": None,
        "--split_random_halves": None,
        "--ini_high": _number(search.lowpass_A),
        "--particle_diameter": _number(search.diameter_A),
        "--sym": search.symmetry,
        "--low_resol_join_halves": _number(settings.join_halves_A or -1),
        "--auto_iter_max": str(settings.max_iterations),
        "--norm": None,
        "--scale": None,
        "--oversampling": "1",
        "--random_seed": str(search.seed),
        "--pad": str(settings.padding),
        "--zero_mask": None,
    }
    if search.ctf:
        options["--ctf"] = None
    if search.phase_flipped and not search.three_dimensional:
        options["--ctf_phase_flipped"] = None
    if search.premultiplied:
        options["--dont_check_norm"] = None
    if not search.on_scale:
        options["--firstiter_cc"] = None
    if settings.solvent_mask:
        options["--flatten_solvent"] = None
    if search.mask:
        options["--solvent_mask"] = search.mask
    if settings.max_resolution_A:
        options["--strict_highres_exp"] = _number(settings.max_resolution_A)
    options |= _angles(search, settings, section) | _shifts(search, settings, section)
    if relion.major < 4:
        options["--ctf_corrected_ref"] = None
    return _words(options | _running(search, section, relion), search, section)


def next_command(
    optimiser: str,
    search: Search,
    section: RelionSection,
    relion: Relion,
    last_iteration: int,
    *,
    finish: bool = False,
) -> list[str]:
    """relion_refine's arguments for going on after an iteration.

    Args:
        optimiser: its ``_optimiser.star``.
        last_iteration: stop after it (--auto_iter_max).
        finish: do one last iteration with both halves joined, as at convergence.
    """
    options: Options = {"--continue": optimiser, "--o": f"./{OUTPUT}", "--auto_iter_max": str(last_iteration)}
    if finish:
        options["--force_converge"] = None
    return _words(options | _running(search, section, relion), search, section)


def _running(search: Search, section: RelionSection, relion: Relion) -> Options:
    """What a continued run needs as well as a new one.

    RELION 3.1.3 to 4.0.1 keep --external_reconstruct from the optimiser file (3.1.3 warns that it does not know the
    option here, and obeys); from 4.0.2 on a continued run without it reconstructs by itself.

    Version 3 is told to divide directly, as later ones do by themselves: its iterated weights are no better with
    padding, and without it, or with few particles, they spoil the maps (docs/relion.md).
    """
    options: Options = {"--j": str(section.threads), "--pool": "10", "--dont_combine_weights_via_disc": None}
    dimensions = 3 if search.three_dimensional else 2
    if 4 * search.count * search.box_px**dimensions <= LARGEST_READ_AT_ONCE:
        options["--preread_images"] = None
    if relion.major < 4:
        options["--skip_gridding"] = None
    if search.callback:
        options["--external_reconstruct"] = None
    return options


def _angles(search: Search, settings: RefineSection, section: RelionSection) -> Options:
    """Global search down to auto_local_order; or a local one from the start."""
    if search.local_deg is None:
        return {
            "--healpix_order": str(settings.healpix_order),
            "--auto_local_healpix_order": str(section.auto_local_order),
        }
    order = max(settings.healpix_order, math.ceil(math.log2(60.0 / (search.local_deg / 2))))
    return {
        "--healpix_order": str(order),
        "--auto_local_healpix_order": str(min(order, section.auto_local_order)),
        "--sigma_ang": _number(search.local_deg / SIGMAS),
    }


def _shifts(search: Search, settings: RefineSection, section: RelionSection) -> Options:
    reach = section.offset_range_px
    if reach is None and settings.shift_range_A is not None:
        reach = settings.shift_range_A / search.pixel_size_A
    if reach is None:
        reach = 5.0 if search.local_deg is None else 3.0
    step = section.offset_step_px
    if settings.shift_step_A is not None:
        step = settings.shift_step_A / search.pixel_size_A
    return {"--offset_range": _number(reach), "--offset_step": _number(step)}


def _words(options: Options, search: Search, section: RelionSection) -> list[str]:
    """Arguments; options that ``relion.extra`` names come from there alone."""
    more = extra_words(section.extra, correction=search.callback)
    own = [word for k, v in options.items() if k not in more for word in ([k] if v is None else [k, v])]
    return own + more


def _number(value: float) -> str:
    return f"{value:.6g}"


def launch(section: RelionSection, relion: Relion, exported: tuple[str, ...] = ()) -> list[str]:
    """How RELION is started: the launcher's words and the program's name.

    Args:
        exported: names of environment variables that ranks on other hosts need.

    Raises:
        MissingError: no mpirun that belongs to RELION's MPI.
        UsageError: an even number of ranks: RELION wants a leader and as many followers for one half as for the other.
    """
    if section.ranks % 2 == 0:
        raise UsageError(
            f"relion.ranks: a leader and an even number of followers are needed (found {section.ranks})",
            code="option-out-of-range",
        )
    if section.launcher.strip() != "auto":
        words = split_command(section.launcher, "relion.launcher")
        if not any("{ranks}" in word for word in words):
            raise UsageError(
                "relion.launcher: the placeholder {ranks} for the number of processes is missing",
                code="placeholder-missing",
            )
        return [*(word.replace("{ranks}", str(section.ranks)) for word in words), relion.program]
    if not relion.mpirun:
        raise MissingError(
            f"no mpirun found that belongs to {relion.family or 'the MPI'} of {relion.program}"
            f"{f' ({relion.library})' if relion.library else ''}. Give the site's launcher in relion.launcher, for "
            "example 'srun -n {ranks}' or '/opt/openmpi/bin/mpirun -n {ranks}'.",
            code="mpi-launcher-missing",
        )
    words = [relion.mpirun]
    if relion.family == OPEN_MPI:
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        words += ["--oversubscribe", "--bind-to", "none"]
        words += [word for name in exported for word in ("-x", name)]
    elif relion.family == MPICH and section.ranks > 1:
        words += ["-bind-to", "none"]
    return [*words, "-n", str(section.ranks), relion.program]


def uses_site_launcher(section: RelionSection) -> bool:
    return section.launcher.strip() != "auto"


def shown(command: list[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(command)


def summary(command: list[str], relion: Relion) -> dict[str, Any]:
    """What the record says of how RELION was run."""
    return {"program": relion.program, "version": relion.version, "mpi": relion.family, "command": shown(command)}
