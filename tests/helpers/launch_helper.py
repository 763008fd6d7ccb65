"""Job files for batch scripts, the scripts themselves, and what they do in bash with stand-ins for the batch system."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from cryoiso.pipeline.batch import launch

STAR = """data_optics

loop_
_rlnOpticsGroup #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnImagePixelSize #5
_rlnImageSize #6
1 300 2.7 0.1 1.5 32

data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
"""


def make_job(folder: Path, stacks: tuple[str, ...] = ("stack.mrcs",), **keys: str) -> Path:
    """A job file whose inputs are there, but for what is in them.

    Args:
        stacks: image stacks that the STAR file names; those without a folder are made.
        keys: further lines of the job file, as section -> text.
    """
    folder.mkdir(parents=True)
    (folder / "ref.mrc").write_text("")
    for stack in stacks:
        if "/" not in stack:
            (folder / stack).write_text("")
    (folder / "particles.star").write_text(STAR + "".join(f"1@{stack} 1\n" for stack in stacks))
    path = folder / "job.toml"
    path.write_text('[particles]\nfile = "particles.star"\n[reference]\nfile = "ref.mrc"\n'
                    + "".join(f"[{section}]\n{text}\n" for section, text in keys.items()))  # fmt: skip
    return path


def script(job: Path, chain: bool = False, first: bool = False, **given) -> str:
    known = launch.read_launch(job, {"mpi": "mpirun", **given})
    made = launch.scripts_of(known, job, job.with_name("run"), job.with_name("go.sh"), chain or first)
    return made[0 if first else -1].text


def check_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\{\{|\{%|XXX\w+XXX|None|Undefined", text), text


PROGRAM = """#!/bin/bash
echo "$*" >> calls
read -r code rest < plan; sed -i 1d plan; mkdir -p run
[ -n "$rest" ] && echo "{\\"event\\": \\"$rest\\"}" >> run/journal.jsonl
if [ "$code" = wait ]; then trap 'exit 75' USR1; touch ready; while :; do sleep 0.1; done; fi
exit "$code"
"""


def in_bash(job: Path, scheduler: str, plan: str, first_of_chain: bool = False, **given) -> subprocess.Popen:
    """Starts a script whose program follows a plan: a line of exit status and journal event for every start.

    The stand-ins of scontrol and qrerun end the script that calls them, as a requeue does.
    """
    folder = job.parent
    (folder / "plan").write_text(plan)
    (folder / "prog").write_text(PROGRAM)
    for name in ("scontrol", "qrerun", "qsub"):
        tool = folder / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        number = "echo 7.host" if name == "qsub" else ""
        end = "(sleep 0.5; kill -TERM -- -$PPID) > /dev/null 2>&1 &" if name != "qsub" else ""
        tool.write_text(f'#!/bin/bash\necho "{name} $*" >> asked\n[ -e "{name}.fails" ] && exit 1\n{end}\n{number}\n')
        tool.chmod(0o755)
    ranks = {"cpu_ranks" if first_of_chain else "ranks_per_node": 1}
    program = f"bash {shlex.quote(f'{folder}/prog')}"
    text = script(job, first=first_of_chain, scheduler=scheduler, program=program, **ranks, **given)
    for name in ("go.sh", *["go-ingest.sh"] * first_of_chain):
        (folder / name).write_text(text)
    env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "5", "PBS_JOBID": "5.host", "PBS_NODEFILE": "plan"}
    return subprocess.Popen(["bash", "go.sh"], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def asked(job: Path) -> list[str]:
    file = job.with_name("asked")
    return file.read_text().splitlines() if file.exists() else []
