"""What ``doctor`` and a run's preflight find: facts of this machine, and the verdict on machines that are not here."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import pytest
from mpi_helper import run_mpi
from pipeline_helper import cryoiso, cryoiso_here, write_job

from cryoiso.core.config import Job
from cryoiso.core.errors import EXIT_DONE, EXIT_INPUT, EXIT_MISSING, EXIT_OTHER
from cryoiso.parallel.context import Context
from cryoiso.parallel.mpi_probe import family_of_launcher, probe_mpi
from cryoiso.pipeline.finding import ERROR, FINE, NOTE, WARNING, Needs, exit_code
from cryoiso.pipeline.site import filesystem, machine
from cryoiso.pipeline.site.checks import judge

GIB = 2**30
GPU = {"name": "NVIDIA A100", "total_bytes": 40 * GIB, "id": "gpu-0", "used_by_this_rank": True, "free_bytes": 39 * GIB}
RANK = {
    "rank": 0, "host": "n1", "threads": 4, "cores": [0, 1, 2, 3], "cores_of_host": 4, "gpus": [], "driver": False,
    "torch_gpu": "", "visible": None, "asked": False, "why_none": "",
    "memory_bytes": 64 * GIB, "memory_free_bytes": 60 * GIB, "memory_limit_bytes": None,
    "limits": {"open_files": 1024, "locked_memory_bytes": None}, "infiniband": False,
}  # fmt: skip
FOLDER = {
    "path": "/data/run", "folder": "/data", "type": "ext4", "mount": "/data", "free_bytes": 900 * GIB,
    "free_inodes": 10**7, "problem": "", "write_MBps": 900.0, "read_MBps": 2000.0, "small_file_s": 0.002,
    "server_clock_ahead_s": 0.0, "unseen_from": [],
}  # fmt: skip
MPI = {
    "library": "MPICH Version: 4.2", "path": "/venv/lib/libmpi.so.12", "mpi4py": "4.1", "family": "MPICH",
    "mpirun": "/venv/bin/mpirun", "mpirun_family": "MPICH", "launchers": {"/venv/bin/mpirun": "MPICH"},
    "first_on_path": "/venv/bin/mpirun",
}  # fmt: skip


def facts(*ranks: dict, folder: dict | None = None, **more) -> dict:
    """A machine on which all is well, but for the changes."""
    whole = [{**copy.deepcopy(RANK), "rank": i, **change} for i, change in enumerate(ranks or ({},))]
    found = {"ranks": whole, "clock_spread_s": 0.0, "launcher": "", "library": "", "folders": {}}
    return {**found, "folders": {"run folder": {**FOLDER, **(folder or {})}}, **more}


def needs(**changes) -> Needs:
    sections = {"refine": {}, "run": {}, "particles": {}}
    for name in ("engine", "device", "workflow", "shard_mib"):
        if name in changes:
            where = {"engine": "refine", "shard_mib": "particles"}.get(name, "run")
            sections[where][name] = changes.pop(name)
    job = Job.model_validate(
        {"reference": {"file": "r.mrc"}, **sections, "particles": {"file": "p.star", **sections["particles"]}}
    )
    return Needs(job, **{"memory_bytes": GIB, "disk_bytes": 100 * GIB, "files": 500, **changes})


def told(found: list, severity: str) -> str:
    return "\n".join(f"{f.check}: {f.line()}" for f in found if f.severity == severity)


def test_a_good_machine_has_nothing_but_fine_findings():
    found = judge(facts({}, {"host": "n2"}, mpi=MPI, relion={}), needs())
    assert {f.severity for f in found} == {FINE} and exit_code(found) == EXIT_DONE


def test_the_library_of_the_standard_abi_is_named(monkeypatch):
    there = sorted((Path(sys.prefix) / "lib").glob("libmpi_abi.so.*"))
    if not there:
        pytest.skip("no libmpi_abi in this environment (pip install 'mpich>=5')")
    monkeypatch.setenv("MPI4PY_LIBMPI", str(there[0]))
    found = probe_mpi()
    assert found["abi"] and found["path"] == str(there[0])
    assert "standard MPI ABI" in found["error"] if "error" in found else "MPI" in found["library"]


CASES = {
    "more threads than cores": (dict(ranks=[{}, {}]), {}, WARNING, "8 threads share 4 cores", "set it to 2"),
    "bound to few cores": (
        dict(ranks=[{"cores": [0], "threads": 1}], launcher="Open MPI"),
        {},
        NOTE,
        "1 of 4 cores",
        "--bind-to none",
    ),
    "foreign mpirun": (
        dict(mpi={**MPI, "first_on_path": "/usr/bin/mpirun", "launchers": {"/usr/bin/mpirun": "Open MPI"}}),
        {},
        WARNING,
        "would not see each other",
        "use /venv/bin/mpirun",
    ),
    "MPI ABI without a module": (
        dict(mpi={**MPI, "abi": True, "error": "mpi4py 4.1.2 has no module for the standard MPI ABI"}),
        {},
        NOTE,
        "standard MPI ABI",
        "MPI4PY_LIBMPI",
    ),
    "no MPI": (dict(mpi={**MPI, "error": "cannot load"}), {}, NOTE, "cannot load", "pip install"),
    "GPUs on some": (
        dict(ranks=[{"gpus": [GPU]}, {"host": "n2"}]),
        {},
        WARNING,
        "1 of 2 ranks see no GPU",
        "GPU per rank",
    ),
    "two on one GPU": (
        dict(ranks=[{"gpus": [GPU], "cores": [0], "threads": 1}, {"gpus": [GPU], "cores": [1], "threads": 1}]),
        {},
        NOTE,
        "2 ranks share a GPU",
        "one rank a GPU",
    ),
    "idle GPU": (
        dict(ranks=[{"gpus": [GPU, {"name": "x", "total_bytes": GIB, "id": "gpu-1"}]}]),
        {},
        WARNING,
        "1 GPU(s) are seen but used by no rank",
        "one rank for each",
    ),
    "GPU in use": (
        dict(ranks=[{"gpus": [{**GPU, "free_bytes": GIB}]}]),
        {},
        WARNING,
        "1.0 GiB of 40.0 GiB are free",
        "nvidia-smi",
    ),
    "GPU too small": (
        dict(ranks=[{"gpus": [GPU]}]),
        dict(gpu_bytes=50 * GIB),
        WARNING,
        "50.0 GiB of GPU memory",
        "fewer",
    ),
    "old driver": (
        dict(ranks=[{"driver": True, "torch_gpu": "13.0", "why_none": "driver is too old"}]),
        {},
        WARNING,
        "driver is too old",
        "older CUDA",
    ),
    "torch for CPUs": (dict(ranks=[{"driver": True}]), {}, WARNING, "built for CPUs only", "pytorch.org"),
    "GPUs left alone": (dict(ranks=[{"asked": True}]), dict(device="cpu"), NOTE, "leaves them alone", ""),
    "hidden GPUs": (
        dict(ranks=[{"driver": True, "torch_gpu": "13.0", "visible": ""}]),
        {},
        NOTE,
        "hidden",
        "batch system",
    ),
    "few open files": (
        dict(ranks=[{"limits": {"open_files": 64, "locked_memory_bytes": None}}]),
        {},
        WARNING,
        "only 64 files",
        "ulimit -n",
    ),
    "clocks apart": (dict(clock_spread_s=30.0), {}, WARNING, "differ by 30 s", "NTP"),
    "server clock": (dict(folder={"server_clock_ahead_s": -40.0}), {}, WARNING, "40 s behind", "NTP"),
    "slow disk": (dict(folder={"write_MBps": 12.0}), {}, WARNING, "only 12 MB/s", "faster"),
    "slow small files": (dict(folder={"small_file_s": 1.5}), {}, WARNING, "takes 1.50 s", "another file system"),
    "memory disk": (dict(folder={"type": "tmpfs"}), {}, WARNING, "gone when the node", "stays"),
    "network": (dict(folder={"type": "nfs4"}), {}, NOTE, "network file system (nfs4)", "large blocks"),
    "tight memory": (dict(ranks=[{}]), dict(memory_bytes=70 * GIB), WARNING, "70.0 GiB", "fewer ranks"),
    "few stripes": (
        dict(folder={"type": "lustre", "stripes": 1}),
        dict(shard_mib=2048),
        NOTE,
        "1 stripe",
        "lfs setstripe -c 4",
    ),
    "many stripes": (dict(folder={"type": "lustre", "stripes": -1}), {}, NOTE, "all stripes", "-c 1"),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_every_trouble_is_named_with_its_remedy_and_lets_the_run_go_on(case):
    changes, wanted, severity, words, remedy = CASES[case]
    changes = dict(changes)
    found = judge(facts(*changes.pop("ranks", ()), **changes), needs(**wanted))
    line = told(found, severity)
    assert words in line and remedy in line and exit_code(found) == EXIT_DONE


ERRORS = {
    "no RELION": (dict(relion={}), dict(engine="relion"), EXIT_MISSING, "refine.engine = 'relion'"),
    "no GPU": (dict(), dict(device="cuda"), EXIT_MISSING, "sees no GPU"),
    "GPUs asked for": (
        dict(ranks=[{"asked": True, "gpus": [GPU]}, {"asked": True}]),
        {},
        EXIT_MISSING,
        "asked for GPUs, and rank 1",
    ),
    "no memory": (dict(), dict(memory_bytes=400 * GIB), EXIT_MISSING, "400.0 GiB"),
    "no room": (dict(folder={"free_bytes": 99 * GIB}), {}, EXIT_OTHER, "the run will need 100.0 GiB"),
    "no inodes": (dict(folder={"free_inodes": 3}), {}, EXIT_OTHER, "no more than 3 files"),
    "not writable": (dict(folder={"problem": "Permission denied"}), {}, EXIT_INPUT, "Permission denied"),
    "not shared": (dict(folder={"unseen_from": ["n2"]}), {}, EXIT_INPUT, "not the same folder on n2"),
}


@pytest.mark.parametrize("case", ERRORS, ids=list(ERRORS))
def test_what_no_run_can_do_with_is_an_error_with_its_exit_code(case):
    changes, wanted, code, words = ERRORS[case]
    changes = dict(changes)
    found = judge(facts(*changes.pop("ranks", ()), **changes), needs(**wanted))
    assert exit_code(found) == code and words in told(found, ERROR)


def test_memory_limit_of_a_batch_job_counts(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "job/step").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n")
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (groups / "job/memory.max").write_text("134217728\n")
    (groups / "job/step/memory.max").write_text("max\n")
    found = machine.memory(proc, groups)
    assert found == {"memory_bytes": GIB, "memory_free_bytes": GIB // 2, "memory_limit_bytes": 128 << 20}
    share = judge(facts({"memory_limit_bytes": 8 * GIB}, {"memory_limit_bytes": 8 * GIB, "cores": [5] * 4}))
    assert "4.0 GiB a rank on n1 (8.0 GiB allowed to this job" in told(share, FINE)


def test_file_system_is_that_of_the_longest_mount_point(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/big\\040disk lustre rw 0 0\n")
    (tmp_path / "big disk/run").mkdir(parents=True)
    assert filesystem.filesystem_of(tmp_path / "big disk/run", mounts)["type"] == "lustre"
    assert filesystem.filesystem_of(tmp_path, mounts) == {"type": "ext4", "mount": "/"}


def test_lustre_is_asked_for_its_stripes(tmp_path, monkeypatch):
    lfs = tmp_path / "lfs"
    lfs.write_text("#!/bin/sh\necho 4\n")
    lfs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert filesystem.stripe_count(tmp_path) == 4
    lfs.write_text("#!/bin/sh\necho not lustre >&2; exit 1\n")
    assert filesystem.stripe_count(tmp_path) is None


def test_writing_is_tried_and_nothing_stays(tmp_path):
    found = filesystem.look_at_folder(Context(), tmp_path / "not/yet", thorough=True)
    assert found["folder"] == str(tmp_path) and found["problem"] == "" and found["write_MBps"] > 0
    assert found["small_file_s"] > 0 and abs(found["server_clock_ahead_s"]) < 60 and found["unseen_from"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_loses_what_was_written_is_found(tmp_path, monkeypatch):
    whole = filesystem._write

    def torn(name: Path, block: bytes, size: int) -> float:
        seconds = whole(name, block, size)
        name.write_bytes(name.read_bytes()[:-1] + b"?")
        return seconds

    monkeypatch.setattr(filesystem, "_write", torn)
    assert "not what was written" in filesystem.look_at_folder(Context(), tmp_path, thorough=False)["problem"]
    assert list(tmp_path.iterdir()) == []


def test_launchers_are_told_apart_by_what_they_say(tmp_path):
    for text, family in (("mpirun (Open MPI) 4.1.4", "Open MPI"), ("HYDRA build details:", "MPICH"), ("srun", "")):
        program = tmp_path / "mpirun"
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        assert family_of_launcher(str(program)) == family


# --- the commands


def test_metadata_of_rank_0_counts_once_on_its_host():
    """60 GiB for 32 ranks: 1 GiB each and 10 GiB more once are room enough, 40 GiB more are not."""
    host = facts(*({} for _ in range(32)))
    assert "memory" not in told(judge(host, needs(first_rank_bytes=10 * GIB)), WARNING)
    assert "memory" in told(judge(host, needs(first_rank_bytes=40 * GIB)), WARNING)
    elsewhere = facts(*({"host": f"n{i // 16}", "memory_free_bytes": (60 if i < 16 else 17) * GIB} for i in range(32)))
    assert "memory" not in told(judge(elsewhere, needs(first_rank_bytes=40 * GIB)), WARNING)


def test_doctor_for_a_job_tells_what_it_needs(data, tmp_path):
    done = cryoiso("doctor", tmp_path, "--job", data / "job.toml", "--json")
    found = json.loads(done.stdout)
    checks = {f["check"]: f for f in found["findings"]}
    assert done.returncode == EXIT_DONE and "will need about" in checks["memory"]["found"]
    assert {"check", "severity", "found", "remedy", "exit_code", "code"} == set(found["findings"][0])
    assert list(tmp_path.iterdir()) == []


def test_doctor_for_a_job_without_its_program_exits_69(data, tmp_path):
    job = write_job(data, "cuda.toml", run_device="cuda")
    done = cryoiso("doctor", tmp_path, "--job", job, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == EXIT_MISSING and "ERROR" in done.stdout and "sees no GPU" in done.stdout
    assert "1 error" in done.stdout.splitlines()[-1]


def test_a_run_stops_before_it_writes_and_warns_in_one_line(data, tmp_path, monkeypatch):
    from cryoiso.pipeline.site import doctor

    seen = facts({}, {}, folder={"free_inodes": 2})
    monkeypatch.setattr(doctor, "look", lambda *args, **options: seen)
    done = cryoiso_here("run", data / "job.toml", "--out", tmp_path / "run")
    assert done.returncode == EXIT_OTHER and "no more than 2 files" in done.stderr and "Remove files" in done.stderr
    assert sum("8 threads share 4 cores" in line for line in done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.mpi
def test_ranks_look_together_and_one_speaks(tmp_path):
    done = run_mpi(2, ["-m", "cryoiso.cli.main", "doctor", str(tmp_path), "--json"])
    found = json.loads(done.stdout)
    assert (
        len(found["ranks"]) == 2 and found["clock_spread_s"] < 1 and found["folders"]["run folder"]["unseen_from"] == []
    )
    assert found["mpi"]["family"] in ("MPICH", "Open MPI") and sys.version.split()[0] == found["cryoiso"]["python"]
