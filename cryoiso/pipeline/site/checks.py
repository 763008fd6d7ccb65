"""What is to be said of a machine, and of a machine for a job: each finding with its severity and its remedy.

Pure functions of the facts that ``machine.look`` gathers, so that every case can be told without such a machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from cryoiso.core.errors import EXIT_DONE, EXIT_MISSING
from cryoiso.pipeline.finding import ERROR, FINE, NOTE, WARNING, Finding, Needs, gib
from cryoiso.pipeline.site.folder_checks import folder_findings
from cryoiso.pipeline.site.scratch_checks import SCRATCH, scratch_findings
from cryoiso.pipeline.site.shared_memory import shared_memory_findings

CLOCKS_APART_S = 5.0
FEW_OPEN_FILES = 256


def judge(facts: dict[str, Any], needs: Needs | None = None) -> list[Finding]:
    """All findings, in the order a person would look."""
    findings: list[Finding] = []
    for check in (_packages, _mpi):
        findings += check(facts)
    findings += _gpus(facts, needs)
    for check in (_torch, _threads, _limits, _clocks):
        findings += check(facts)
    findings += _relion(facts, needs)
    findings += _memory(facts, needs)
    findings += shared_memory_findings(facts)
    for name, folder in facts["folders"].items():
        if name == SCRATCH:
            continue  # last, as it is of the job alone
        findings += folder_findings(name, folder, facts, needs if name == "run folder" else None)
    if needs is not None and needs.job.run.device != "cpu":
        findings += _device(facts, needs)
    findings += scratch_findings(facts["folders"].get(SCRATCH, {}))
    return findings


# --- the program and its MPI


def _packages(facts: dict[str, Any]) -> Iterator[Finding]:
    if "cryoiso" not in facts:
        return
    own = facts["cryoiso"]
    missing = [name for name, version in own["packages"].items() if not version and name != "mpi4py"]
    if missing:
        yield Finding(
            "packages",
            ERROR,
            f"not installed: {', '.join(missing)}",
            "Install cryoiso again with pip, into an environment of its own.",
            EXIT_MISSING,
            code="program-missing",
        )
    listed = ", ".join(f"{name} {version}" for name, version in own["packages"].items() if version)
    yield Finding("packages", FINE, f"cryoiso {own['version']} on Python {own['python']}; {listed}")


def _mpi(facts: dict[str, Any]) -> Iterator[Finding]:
    ranks = facts["ranks"]
    hosts: dict[str, int] = defaultdict(int)
    for rank in ranks:
        hosts[rank["host"]] += 1
    spread = ", ".join(f"{host} x {count}" for host, count in hosts.items())
    by = f", started by {facts['launcher']}" if facts["launcher"] else ""
    yield Finding("ranks", FINE, f"{len(ranks)} on {spread}{by}")
    mpi = facts.get("mpi")
    if mpi is None:
        return
    if mpi.get("error"):
        remedy = "For several ranks: pip install 'cryoiso[mpich]'."
        if mpi.get("abi"):
            remedy = (
                "For several ranks set MPI4PY_LIBMPI to the libmpi.so beside it, or install an mpi4py with that module."
            )
        yield Finding("MPI", NOTE, f"none: {mpi['error']}", remedy)
        return
    where = mpi["path"] or "path unknown"
    abi = ", the standard MPI ABI" if mpi.get("abi") else ""
    yield Finding("MPI", FINE, f"{mpi['library']} ({where}{abi}), mpi4py {mpi['mpi4py']}")
    if not mpi["mpirun"]:
        yield Finding("mpirun", NOTE, "no mpirun found", "srun, or a module of the site, must start several ranks.")
    first = mpi["first_on_path"]
    if not first:
        return
    theirs, ours = mpi["launchers"].get(first, ""), mpi["family"]
    if theirs and ours and theirs != ours and len(ranks) == 1:
        right = f"use {mpi['mpirun']}" if mpi["mpirun_family"] == ours else f"load a module with {ours}"
        yield Finding(
            "mpirun",
            WARNING,
            f"the mpirun on the PATH ({first}) is {theirs}, but mpi4py loads {ours} ({where}): ranks "
            "started by it would not see each other",
            f"To start several ranks {right}, or set MPI4PY_LIBMPI to the libmpi.so of {theirs}.",
        )
    else:
        yield Finding("mpirun", FINE, f"{mpi['mpirun'] or first} ({mpi['mpirun_family'] or theirs or 'unknown MPI'})")


# --- processors


def _promised(rank: dict[str, Any], needs: Needs | None) -> Finding:
    """A job that asked for GPUs and has none."""
    if needs is not None and needs.job.run.device == "cpu":
        return Finding("GPU", NOTE, "the batch script asked for GPUs, run.device = 'cpu' leaves them alone")
    return Finding(
        "GPU",
        ERROR,
        f"the batch script asked for GPUs, and rank {rank['rank']} on {rank['host']} sees none",
        "Look for what is said of torch and the driver; in a container give --nv; or set run.device = 'cpu'.",
        EXIT_MISSING,
        code="gpu-missing",
    )


def _gpus(facts: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    ranks = facts["ranks"]
    sees = [rank for rank in ranks if rank["gpus"]]
    without = [rank for rank in ranks if not rank["gpus"]]
    if any(rank["asked"] for rank in without):
        yield _promised(next(rank for rank in without if rank["asked"]), needs)
    elif not sees:
        yield Finding("GPU", FINE, "none: the CPU is used")
    if not sees:
        return
    if without:
        first = without[0]
        yield Finding(
            "GPU",
            WARNING,
            f"{len(without)} of {len(ranks)} ranks see no GPU (first: rank {first['rank']} on "
            f"{first['host']}), the others do: they all would wait for the slow ones",
            "Ask the batch system for a GPU per rank on every node, or set run.device = 'cpu'.",
        )
    shared: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for rank in sees:
        for gpu in rank["gpus"]:
            if gpu.get("used_by_this_rank"):
                shared[rank["host"], gpu["id"]].append({**gpu, "rank": rank["rank"]})
    used = [users[0] for users in shared.values()]
    kinds = sorted({f"{gpu['name']}, {gib(gpu['total_bytes'])}" for rank in sees for gpu in rank["gpus"]})
    free = f", {gib(min(gpu['free_bytes'] for gpu in used))} free at least" if used else ""
    yield Finding("GPU", FINE, f"{'; '.join(kinds)}{free}")
    crowd = max(map(len, shared.values()), default=1)
    if crowd > 1:
        yield Finding(
            "GPU",
            NOTE,
            f"{crowd} ranks share a GPU",
            "That is meant to be so only where one rank does not fill it; one rank a GPU is the rule.",
        )
    idle = _idle_gpus(sees, shared)
    if idle:
        yield Finding("GPU", WARNING, f"{idle} GPU(s) are seen but used by no rank", "Start one rank for each GPU.")
    for gpu in used:
        if gpu["free_bytes"] < 0.5 * gpu["total_bytes"]:
            yield Finding(
                "GPU",
                WARNING,
                f"of the GPU of rank {gpu['rank']} only {gib(gpu['free_bytes'])} of {gib(gpu['total_bytes'])} are free",
                "Somebody else works on it: look with nvidia-smi.",
            )


def _idle_gpus(sees: list[dict[str, Any]], shared: dict[tuple[str, str], Any]) -> int:
    seen = {(rank["host"], gpu["id"]) for rank in sees for gpu in rank["gpus"]}
    return len(seen - set(shared)) if shared else 0


def _torch(facts: dict[str, Any]) -> Iterator[Finding]:
    for rank in facts["ranks"]:
        if rank["gpus"] or not rank["driver"]:
            continue
        here = f"{rank['host']} has a GPU driver, but "
        if not rank["torch_gpu"]:
            yield Finding(
                "torch",
                WARNING,
                f"{here}this torch is built for CPUs only",
                "Install a torch that is built for the driver's CUDA (pytorch.org).",
            )
        elif rank["visible"] == "":
            yield Finding(
                "torch",
                NOTE,
                f"{here}CUDA_VISIBLE_DEVICES is empty: GPUs are hidden from rank {rank['rank']}",
                "Ask the batch system for GPUs if the job should use them.",
            )
        else:
            why = f" ({rank['why_none']})" if rank["why_none"] else ""
            yield Finding(
                "torch",
                WARNING,
                f"{here}torch (built for {rank['torch_gpu']}) cannot use it{why}",
                "The driver may be too old for this torch: install one built for an older CUDA, or, in a container, "
                "give --nv; nvidia-smi shows the driver's version.",
            )
        return


def _threads(facts: dict[str, Any]) -> Iterator[Finding]:
    by_host: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rank in facts["ranks"]:
        by_host[rank["host"]].append(rank)
    counts = sorted({rank["threads"] for rank in facts["ranks"]})
    yield Finding("threads", FINE, f"{', '.join(map(str, counts))} a rank")
    for host, ranks in by_host.items():
        cores = {core for rank in ranks for core in rank["cores"]}
        threads = sum(rank["threads"] for rank in ranks)
        if threads > len(cores):
            yield Finding(
                "threads",
                WARNING,
                f"{len(ranks)} ranks with {threads} threads share {len(cores)} cores of {host}: they "
                "get in each other's way",
                f"Unset OMP_NUM_THREADS, or set it to {max(1, len(cores) // len(ranks))}.",
            )
            return
        if facts["launcher"] == "Open MPI" and len(cores) <= ranks[0]["cores_of_host"] // 2:
            yield Finding(
                "threads",
                NOTE,
                f"mpirun has bound the ranks to {len(cores)} of {ranks[0]['cores_of_host']} cores of {host}",
                "If the whole node is yours: mpirun --bind-to none, or --map-by with PE=cores.",
            )
            return


def _limits(facts: dict[str, Any]) -> Iterator[Finding]:
    for rank in facts["ranks"]:
        files, locked = rank["limits"]["open_files"], rank["limits"]["locked_memory_bytes"]
        if files is not None and files < FEW_OPEN_FILES:
            yield Finding(
                "limits",
                WARNING,
                f"only {files} files may be open at once on {rank['host']}",
                "Raise it before the start: ulimit -n 4096.",
            )
            return
        if rank["infiniband"] and locked is not None and locked < 64 << 20 and len(facts["ranks"]) > 1:
            yield Finding(
                "limits",
                NOTE,
                f"only {gib(locked)} of memory may be locked on {rank['host']}, which has InfiniBand",
                "MPI may fall back to slow transport: ask the site, or ulimit -l unlimited.",
            )
            return


def _clocks(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["clock_spread_s"] > CLOCKS_APART_S:
        yield Finding(
            "clocks",
            WARNING,
            f"the clocks of the hosts differ by {facts['clock_spread_s']:.0f} s",
            "Tell the site (NTP); log lines and the prediction of the end are off by as much.",
        )


# --- programs and memory


def _relion(facts: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    wanted = needs is not None and needs.job.refine.engine == "relion"
    relion = facts.get("relion")
    if relion is None:
        return
    if not relion:
        if wanted:
            yield Finding(
                "RELION",
                ERROR,
                "not found, and the job has refine.engine = 'relion'",
                "Load RELION's module, or name its program with relion.program.",
                EXIT_MISSING,
                code="program-missing",
            )
        else:
            yield Finding("RELION", FINE, "not found (only needed for refine.engine = 'relion')")
        return
    words = f"{relion['version'] or 'version unknown'} ({relion['program']})"
    if not relion["family"]:
        level, exit_code, code = (ERROR, EXIT_MISSING, "program-missing") if wanted else (NOTE, EXIT_DONE, "")
        yield Finding(
            "RELION",
            level,
            f"{words}, no relion_refine_mpi that is linked to an MPI",
            "refine.engine = 'relion' needs one.",
            exit_code,
            code=code,
        )
    elif not relion["mpirun"]:
        yield Finding(
            "RELION",
            WARNING if wanted else NOTE,
            f"{words}, {relion['family']}, but no mpirun of it",
            "Set relion.launcher.",
        )
    else:
        yield Finding(
            "RELION", FINE, f"{words}, {relion['family']} ({relion['library']}), started by {relion['mpirun']}"
        )


def _memory(facts: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    by_host: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rank in facts["ranks"]:
        by_host[rank["host"]].append(rank)
    least, share_text, wanted = math.inf, "", 0
    for host, ranks in by_host.items():
        first = ranks[0]
        limit = first["memory_limit_bytes"]
        allowed_bytes = limit or first["memory_bytes"]
        share = min(limit or math.inf, max(first["memory_free_bytes"], 0)) / len(ranks)
        need = 0 if needs is None else needs.memory_bytes
        if needs is not None and any(rank["rank"] == 0 for rank in ranks):
            need += needs.first_rank_bytes // len(ranks)
        if share - need < least:
            kind = "allowed to this job" if limit else "in all"
            least, wanted = share - need, need
            share_text = (
                f"{gib(share)} a rank on {host} ({gib(allowed_bytes)} {kind}, {gib(first['memory_free_bytes'])} free)"
            )
    if least < 0:
        severity = ERROR if wanted > 1.5 * (least + wanted) else WARNING
        yield Finding(
            "memory",
            severity,
            f"{share_text}, but a rank will need about {gib(wanted)}",
            "Start fewer ranks on a node, or ask for more memory.",
            EXIT_MISSING,
            code="memory-short" if severity == ERROR else "",
        )
    else:
        words = f"; a rank will need about {gib(wanted)}" if needs is not None else ""
        yield Finding("memory", FINE, share_text + words)


def _device(facts: dict[str, Any], needs: Needs) -> Iterator[Finding]:
    without = [rank for rank in facts["ranks"] if not rank["gpus"]]
    if needs.job.run.device == "cuda" and without:
        yield Finding(
            "GPU",
            ERROR,
            f"the job has run.device = 'cuda', and rank {without[0]['rank']} on {without[0]['host']} sees no GPU",
            "Ask the batch system for a GPU per rank, or set run.device = 'auto'.",
            EXIT_MISSING,
            code="gpu-missing",
        )
    crowd: dict[tuple[str, str], int] = defaultdict(int)
    for rank in facts["ranks"]:
        for gpu in rank["gpus"]:
            if gpu.get("used_by_this_rank"):
                crowd[rank["host"], gpu["id"]] += 1
    for rank in facts["ranks"]:
        for gpu in rank["gpus"]:
            share = gpu.get("free_bytes", math.inf) / max(crowd[rank["host"], gpu["id"]], 1)
            if needs.gpu_bytes > share:
                yield Finding(
                    "GPU",
                    WARNING,
                    f"a rank will need about {gib(needs.gpu_bytes)} of GPU memory, rank "
                    f"{rank['rank']} has {gib(share)}",
                    "Start fewer ranks a GPU.",
                )
                return
