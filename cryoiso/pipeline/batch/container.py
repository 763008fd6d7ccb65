"""A container image in a batch job: the words that start it, and the folders that it must see."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from cryoiso.core.commands import split_command
from cryoiso.core.config import Job, LaunchSection
from cryoiso.core.log import ProgressLine, logger
from cryoiso.io import read_particle_file
from cryoiso.io.staging import VARIABLES
from cryoiso.pipeline.records.hashing import sha256_of
from cryoiso.pipeline.records.manifest import input_files


def started_in(section: LaunchSection, job: Job, job_file: Path, run: Path) -> list[str]:
    """The words that start cryoiso in the image of a job."""
    folders = ",".join(map(str, folders_of(job, job_file, run)))
    program = split_command(section.program or "cryoiso", "launch.program")
    return [*_how(section), "--bind", folders, _image(section, job_file), *program]


def folders_of(job: Job, job_file: Path, run: Path) -> list[Path]:
    """What the image must see of a job: the folders of the job file, of its inputs with their image stacks, and of the
    run; none inside another. Where a name is a symbolic link, or lies behind one, also where it leads to."""
    files = {job_file, run, *input_files(job), *_stacks(job)}
    if job.particles.project:
        files.add(Path(job.particles.project) / "project")
    files |= {Path(os.path.realpath(path)) for path in files}
    folders = {path.parent for path in files}
    return sorted(path for path in folders if not folders & set(path.parents))


def _stacks(job: Job) -> set[Path]:
    """The image stacks that a particle file names; a folder of shards needs none."""
    file = Path(job.particles.file)
    if file.is_dir():
        return {file / "shards"}
    section = job.particles
    return _stacks_of(file, section.project, tuple(section.passthrough), file.stat().st_mtime_ns)


@cache
def _stacks_of(file: Path, project: str, passthrough: tuple[str, ...], modified_ns: int) -> set[Path]:
    """Read once for all scripts."""
    names = sorted(set(read_particle_file(file, project, ("image",), passthrough).stack.tolist()))
    stacks = {Path(os.path.abspath(name)) for name in names if name}
    lost = sorted(path for path in stacks if not path.exists())
    if lost:
        logger.warning("%d of %d stacks of %s are not there, e.g. %s", len(lost), len(stacks), file, lost[0])
    return stacks - set(lost)


def words_for_script(section: LaunchSection, job: Job, job_file: Path, flavour: str) -> dict[str, object]:
    """What the script binds when it runs: only a node knows its own disk, and where its Slurm meets with MPI.

    Args:
        flavour: what srun gets as --mpi; anything else: mpirun.
    """
    wanted, folders = job.run.scratch, []
    if wanted == "auto":
        folders = [f"${{{name}:-}}" for name in VARIABLES]
    elif wanted:
        folders = [_in_double_quotes(wanted)]
    program = Path(_how(section)[0]).name
    return {
        **_image_words(section, job_file), "image": section.image, "node_folders": [f'"{name}"' for name in folders],
        "slurm_folders": section.scheduler == "slurm" and flavour.startswith("pmix"),
        "bind": "SINGULARITY_BIND" if program == "singularity" else "APPTAINER_BIND",
    }  # fmt: skip


def _image(section: LaunchSection, job_file: Path) -> str:
    """The container image as the program that starts it is told."""
    return section.image if "://" in section.image else str(job_file.parent / Path(section.image).expanduser())


def _image_words(section: LaunchSection, job_file: Path) -> dict[str, str | None]:
    """What a script needs to tell the run its image's digest: the run may be unable to see the file from within. Size
    and time stand beside it, so that an image that is put in its place later does not get its digest."""
    file = Path(_image(section, job_file)) if section.image else None
    if file is None or not file.is_file():
        return {"image_file": None, "image_stat": None, "image_digest": None}
    stat = file.stat()
    digest = _digest_of_image(file, stat.st_size, stat.st_mtime_ns)
    return {"image_file": str(file), "image_stat": f"{stat.st_size} {int(stat.st_mtime)}", "image_digest": digest}


@cache
def _digest_of_image(file: Path, size: int, modified_ns: int) -> str:
    """Read once for all scripts."""
    line, done = ProgressLine("hashing the image, MiB", size >> 20), 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        line.update(done >> 20)

    digest = sha256_of(file, seen)
    line.close(f"{file}, sha256 {digest[:16]}...")
    return f"sha256:{digest}"


def _how(section: LaunchSection) -> list[str]:
    default = ["apptainer", "exec", *(["--nv"] if section.gpus else [])]
    return split_command(section.image_command, "launch.image_command") or default


def _in_double_quotes(folder: str) -> str:
    """run.scratch for a shell, which replaces in it what the run would: $VARIABLES, {host} and a leading ~."""
    for special in ("\\", '"', "`", "$("):
        folder = folder.replace(special, "\\" + special)
    folder = "$HOME" + folder[1:] if folder.startswith("~/") else folder
    return folder.replace("{host}", "$(hostname)")
