"""``cryoiso launch``: what a batch script needs to know, from the job file's [launch] section, and the scripts.

The templates are in ``fill_template``; sending scripts to the batch system is ``submit``'s.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.commands import split_command
from cryoiso.core.config import Job, LaunchSection, parse_job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.atomic import write_text
from cryoiso.pipeline.batch.container import started_in, words_for_script
from cryoiso.pipeline.batch.expedite import require_expedited_requeue
from cryoiso.pipeline.batch.fill_template import fill_own, fill_site, read_template, words_of
from cryoiso.pipeline.batch.mpi_launcher import RankLauncher, how_to_start
from cryoiso.pipeline.batch.script_safety import require_name, require_one_line, require_plain
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.records.manifest import input_files
from cryoiso.pipeline.workflow import WITHOUT_GPU

CARRIED = ("MPI4PY_LIBMPI",)
"""Variables that belong to the installation; a script sets them as they are here."""
_DIRECTIVE = re.compile(r"^#(SBATCH|PBS|BSUB)\s+")


@dataclass(frozen=True)
class Script:
    """A batch script."""

    path: Path
    """where it is, or would be, written"""
    text: str
    what: str
    """the part of the run that it does, for people"""
    start: str
    """how its ranks are started, for people"""


def read_launch(job_file: Path, changes: dict[str, Any], options: Mapping[str, str] | None = None) -> Job:
    """A job file with absolute paths, its section ``launch`` amended by ``given``.

    Args:
        options: SECTION.KEY -> name of the option behind a value of ``given``, for messages.

    Raises:
        UsageError: a bad job file, or a bad value in ``given``.
    """
    _, job = read_job(job_file)
    facts = job.model_dump()
    variables = {**facts["launch"]["variables"], **changes.get("variables", {})}
    facts["launch"].update(changes, variables=variables)
    return parse_job(facts, "options", options)


def write_scripts(scripts: list[Script], overwrite: bool) -> None:
    """Writes all scripts, or none.

    Raises:
        UsageError: one is there already, and ``overwrite`` is not set.
    """
    for script in scripts:
        if script.path.exists() and not overwrite:
            raise UsageError(
                f"{script.path} already exists; give --overwrite, or another name with --out", code="file-exists"
            )
    for script in scripts:
        write_text(script.path, script.text)


def scripts_of(job: Job, job_file: Path, run: Path, script: Path, chain: bool = False) -> list[Script]:
    """The batch scripts of a job, in the order in which they run: one, or two with ``chain``.

    Args:
        job: as read by ``jobfile.read_job``; its section ``launch`` as amended by options.
        job_file: the file it was read from.
        run: the run folder.
        script: where the script will lie; PBS jobs may have to submit it again.
        chain: the stages that need no GPU in a job of their own before it.

    Raises:
        UsageError: settings that contradict each other.
        InputError: an input that is not there; a site's template that cannot be filled.
        MissingError: the MPI library cannot be found out.
    """
    for path in input_files(job):
        if not path.exists():
            raise InputError("no such file", file=path, hint=f"{job_file} names it.", code="file-not-found")
    section, job_file, run = job.launch, job_file.absolute(), run.absolute()
    if not chain:
        return [_script(section, job, job_file, run, script.absolute(), "the whole run")]
    if section.scheduler == "mpirun":
        raise UsageError("--chain needs a batch system: launch.scheduler is mpirun", code="options-conflict")
    last = WITHOUT_GPU[-1]
    first = section.model_copy(
        update={
            "nodes": 1, "gpus": 0, "gpu_type": "", "ranks_per_node": section.cpu_ranks,
            "queue": section.cpu_queue or section.queue, "time": section.cpu_time or section.time,
            "ram_gb": section.cpu_ram_gb, "extra": section.cpu_extra,
            "name": f"{_name(section, job_file)}-{WITHOUT_GPU[0]}",
        }
    )  # fmt: skip
    before = script.with_name(f"{script.stem}-{WITHOUT_GPU[0]}{script.suffix}").absolute()
    return [
        _script(
            first, job, job_file, run, before, f"the stages without a GPU, up to {last}", until=last,
            then=str(script.absolute()),
        ),
        _script(section, job, job_file, run, script.absolute(), "the rest of the run"),
    ]  # fmt: skip


def _script(
    section: LaunchSection, job: Job, job_file: Path, run: Path, path: Path, what: str, until: str = "", then: str = ""
) -> Script:  # fmt: skip
    facts = {**facts_of(section, job, job_file, run, path, until), "then": then}
    require_one_line(facts)
    if not section.template:
        return Script(path, fill_own(section.scheduler, facts), what, facts["start"])
    template = job_file.parent / Path(section.template).expanduser()
    text = read_template(template)
    words = words_of(text)
    require_plain(template, text, {**relion_words(section, facts), **facts}, set(section.variables))
    if section.nodes > 1 and not words & {"nodes", "mpinodes"}:
        raise UsageError(
            f"{template} asks for one node: it has no placeholder for launch.nodes = {section.nodes}",
            code="placeholder-missing",
        )
    return Script(path, fill_site(template, facts, relion_words(section, facts)), what, facts["start"])


def facts_of(section: LaunchSection, job: Job, job_file: Path, run: Path, script: Path, until: str) -> dict[str, Any]:
    """Every placeholder of the templates and its value; None where it has none."""
    per_node = section.ranks_per_node or section.gpus or 4
    ranks, seconds = section.nodes * per_node, seconds_of(section.time)
    if section.grace_s >= seconds:
        raise UsageError(
            f"launch.grace_s = {section.grace_s}: no time for work is left of the wall time, {seconds} s",
            code="option-out-of-range",
        )
    if section.expedite:
        require_expedited_requeue(section)
    for key in ("account", "queue", "gpu_type"):
        require_name(f"launch.{key}", getattr(section, key))
    start = how_to_start(section, ranks, per_node)
    program = _program(section, job, job_file, run)
    words = ["run", str(job_file), "--out", str(run), "--continue", *(["--until", until] if until else [])]
    own_bin = "" if section.image or section.program else str(Path(sys.prefix) / "bin")
    facts = {
        "name": _name(section, job_file), "job": str(job_file), "run": str(run), "script": str(script),
        "folder": str(run.parent), "log": str(run), "journal": str(run / products.JOURNAL),
        "lock": str(run / products.LOCK),
        "nodes": section.nodes, "ranks": ranks, "ranks_per_node": per_node, "cpus_per_rank": section.cpus_per_rank,
        "cpus_per_node": per_node * section.cpus_per_rank, "cpus_total": ranks * section.cpus_per_rank,
        "gpus": section.gpus, "gpu_type": section.gpu_type,
        "ram_gb": section.ram_gb, "ram_mb": None if section.ram_gb is None else math.ceil(1000 * section.ram_gb),
        "seconds": seconds, "time": _clock(seconds), "time_hm": _clock(60 * math.ceil(seconds / 60))[:-3],
        "grace_s": section.grace_s, "grace_min": math.ceil(section.grace_s / 60), "requeue": section.requeue,
        "expedite": section.expedite,
        "account": section.account, "queue": section.queue, "modules": section.modules, "setup": section.setup,
        "extra": [_DIRECTIVE.sub("", line) for line in section.extra],
        "bin": own_bin, "srun": start.srun, "start": start.why,
        **words_for_script(section, job, job_file, start.flavour),
        "environment": {} if section.image else {key: os.environ[key] for key in CARRIED if os.environ.get(key)},
        "command": shlex.join([*start.prefix, *program, *words]), "bare_command": shlex.join([*program, *words]),
    }  # fmt: skip
    return {**_cryosparc_words(facts, start, program, words), **facts, **section.variables}


def _cryosparc_words(
    facts: dict[str, Any], start: RankLauncher, program: list[str], words: list[str]
) -> dict[str, Any]:
    """What cryoSPARC's cluster scripts call these things; its counts are those of one node."""
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "user"
    return {
        "run_cmd": facts["command"], "num_cpu": facts["cpus_per_node"], "num_gpu": facts["gpus"],
        "job_dir_abs": facts["run"], "project_dir_abs": facts["folder"], "job_log_path_abs": f"{facts['log']}.log",
        "script_path_abs": facts["script"], "project_uid": Path(facts["folder"]).name, "job_uid": facts["name"],
        "job_creator": user, "cryosparc_username": user, "job_type": "cryoiso",
        "worker_bin_path": shlex.join([*start.prefix, *program]), "run_args": shlex.join(words[1:]),
    }  # fmt: skip


def relion_words(section: LaunchSection, facts: dict[str, Any]) -> dict[str, Any]:
    """What RELION's submission scripts call these things; their command is what every rank runs, without mpirun."""
    words = {
        "command": facts["bare_command"], "name": facts["name"], "queue": section.queue,
        "nodes": facts["nodes"], "mpinodes": facts["ranks"], "threads": facts["cpus_per_rank"],
        "cores": facts["cpus_total"], "dedicated": facts["cpus_per_node"],
        "outfile": f"{facts['log']}.out", "errfile": f"{facts['log']}.err",
    }  # fmt: skip
    return {**words, **section.variables}


# --- parts of the facts


def seconds_of(text: str, what: str = "launch.time") -> int:
    """Seconds of a wall-time: D-HH:MM:SS, HH:MM:SS or HH:MM.

    Two numbers are hours and minutes, as for PBS and LSF; to Slurm itself they would be minutes and seconds.

    Args:
        what: names it in messages.

    Raises:
        UsageError: it is none of these.

    >>> seconds_of("1-02:00:00"), seconds_of("00:30:00"), seconds_of("48:00")
    (93600, 1800, 172800)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text.strip())
    if match is None or not any(map(int, filter(None, match.groups()))):
        raise UsageError(
            f"{what}: a wall-time as HH:MM:SS or D-HH:MM:SS is expected (found '{text}')", code="option-malformed"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


def _name(section: LaunchSection, job_file: Path) -> str:
    """A name that every batch system takes: it starts with a letter and has no blanks."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", section.name or job_file.stem)
    return name if name[:1].isalpha() else f"cryoiso-{name}"


def _program(section: LaunchSection, job: Job, job_file: Path, run: Path) -> list[str]:
    """The words that start cryoiso on a node."""
    if section.image:
        return started_in(section, job, job_file, run)
    if section.program:
        return split_command(section.program, "launch.program")
    beside = Path(sys.prefix) / "bin" / "cryoiso"
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "cryoiso.cli.main"]
