"""Templates of sites: CryoSPARC's and RELION's own, copies of ours, and what cannot be filled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from errors_helper import raises_code
from launch_helper import check_bash, make_job, script
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_INPUT, UsageError
from cryoiso.pipeline.batch.fill_template import OWN

SCHEDULERS = ("slurm", "pbs", "lsf", "mpirun")


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path / "my data")


CRYOSPARC = """#!/usr/bin/env bash
#SBATCH --job-name=cryosparc_{{ project_uid }}_{{ job_uid }}
#SBATCH --cpus-per-task={{ num_cpu }}
#SBATCH --gres=gpu:{{ num_gpu }}
#SBATCH --mem={{ (ram_gb*1000)|int }}M
#SBATCH --output={{ job_log_path_abs }}
{%- if num_gpu == 0 %}
#SBATCH --partition=cpu
{%- else %}
#SBATCH --partition={{ lane | default("gpu") }}
{%- endif %}
echo {{ cryosparc_username }} {{ job_creator }} {{ job_type }}
echo {{ job_dir_abs }} {{ project_dir_abs }} {{ script_path_abs }}
{{ run_cmd }}
"""


RELION = """#!/bin/bash
#SBATCH --ntasks=XXXmpinodesXXX
#SBATCH --nodes=XXXnodesXXX --cpus-per-task=XXXthreadsXXX
#SBATCH --partition=XXXqueueXXX
#SBATCH --error=XXXerrfileXXX --output=XXXoutfileXXX
#SBATCH --job-name=XXXnameXXX
#SBATCH --mem=XXXextra1XXX
echo XXXcoresXXX XXXdedicatedXXX
mpirun -n XXXmpinodesXXX XXXcommandXXX
"""


def site(job: Path, text: str, **given) -> str:
    job.with_name("site.sh").write_text(text)
    return script(job, template="site.sh", **given)


def test_a_cryosparc_script_is_filled(job):
    text = site(job, CRYOSPARC, gpus=2, ram_gb=24, cpus_per_rank=3)
    check_bash(text)
    assert "--mem=24000M" in text and "--cpus-per-task=6" in text and "gpu:2" in text and "--partition=gpu" in text
    assert re.search(r"^mpirun -n 2 \S+ run '.*' --out '.*' --continue$", text, flags=re.MULTILINE)
    assert "--partition=cpu" in site(job, CRYOSPARC, ram_gb=1)
    assert "--partition=big" in site(job, CRYOSPARC, ram_gb=1, gpus=1, variables={"lane": "big"})
    text = site(job, "#!/bin/bash\n{{ worker_bin_path }} run {{ run_args }} > {{ job_log_path_abs }} 2>&1\n")
    assert re.search(r"^mpirun -n 4 \S+ run '.*job.toml' --out", text, flags=re.MULTILINE)


def test_a_relion_script_is_filled(job):
    text = site(job, RELION, nodes=2, ranks_per_node=3, cpus_per_rank=2, queue="big", variables={"extra1": "8gb"})
    check_bash(text)
    for part in ("--ntasks=6", "--nodes=2 --cpus-per-task=2", "--partition=big", "--mem=8gb", "echo 12 6"):
        assert part in text
    assert re.search(r"^mpirun -n 6 \S+ run ", text, flags=re.MULTILINE) and text.count("mpirun") == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_copy_of_our_template_is_a_site_template(scheduler, job):
    text = site(job, (OWN / f"{scheduler}.sh").read_text() + "# ours\n", scheduler=scheduler, gpus=2)
    check_bash(text)
    assert "--continue" in text and text.endswith("# ours\n")


@pytest.mark.parametrize(
    "text, given, words",
    [
        ("#!/bin/bash\n# x\necho {{ run_comd }}\n{{ run_cmd }}\n", {}, ["row 3", "{{ run_comd }}", "'run_cmd'"]),
        ("#!/bin/bash\nXXXcommandXXX XXXextra2XXX\n", {}, ["row 2", "XXXextra2XXX", "--set extra2=", "mpinodes"]),
        ("{{ run_cmd }}\n#SBATCH --mem={{ ram_gb }}\n", {}, ["row 2", "launch.ram_gb"]),
        ("{{ run_cmd }}\n{{ (ram_gb*1000)|int }}\n", {}, ["row 2", "launch.ram_gb"]),
        ("{{ run_cmd }}\n{% if %}\n", {}, ["row 2", "cannot be filled"]),
        ("{{ run_cmd }}\n{{ ''.__class__.__mro__ }}\n", {}, ["cannot be filled", "unsafe"]),
        ("#!/bin/bash\necho {{ num_gpu }}\n", {}, ["no placeholder for the cryoiso command"]),
        ("#!/bin/bash\necho hello\n", {}, ["no placeholder for the cryoiso command"]),
        ("{{ run_cmd }} XXXcommandXXX\n", {}, ["two kinds"]),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_clear_error(text, given, words, job):
    job.with_name("site.sh").write_text(text)
    done = cryoiso_here("launch", job, "--mpi", "mpirun", "--template", job.with_name("site.sh"))
    assert done.returncode == EXIT_INPUT and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for word in ["site.sh", *words]:
        assert word in done.stderr, done.stderr


def test_a_one_node_template_refuses_two_nodes(job):
    with raises_code("placeholder-missing", UsageError, match="one node"):
        site(job, "{{ run_cmd }}\n", nodes=2)
