"""Whether a run folder is what its run left: every input and every output against the hashes that were noted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import InputError, UsageError, with_code
from cryoiso.io.contained_path import require_contained
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.jobfile import read_job, require_run
from cryoiso.pipeline.records import versions
from cryoiso.pipeline.records.checksums import read_sums
from cryoiso.pipeline.records.hashing import Outputs, hash_shared, list_outputs, next_key
from cryoiso.pipeline.records.journal import read_journal
from cryoiso.pipeline.records.manifest import check_manifest, job_key, manifest_record, read_record, stage_key
from cryoiso.pipeline.records.manifest_record import Manifest
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.records.seal import digest_of_files
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import folder_stages

GONE, SIZE, CONTENT = "is gone", "has another size", "has another content"


@dataclass(frozen=True)
class Recorded:
    """A file as a run noted it."""

    name: str
    """relative to the run folder; of an input as the job names it"""
    sha256: str
    bytes: int
    by: str
    """what noted it: a stage's name, seal or input"""
    since: str
    """when it was noted"""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was noted."""

    file: str
    problem: str
    by: str
    since: str
    expected: str = ""
    found: str = ""
    modified: str = ""
    """when the file was changed last, as the file system says"""

    def __str__(self) -> str:
        facts = [f"expected {self.expected}"] if self.expected else []
        facts += [f"found {self.found}"] if self.found else []
        text = f"{self.file} {self.problem}" + (f" ({', '.join(facts)})" if facts else "")
        text += f"; noted by {self.by} at {self.since}" if self.since else f"; {self.by}"
        return text + (f", changed last at {self.modified}" if self.modified else "")


@dataclass
class VerifyReport:
    """What a run folder was found to be."""

    folder: str
    state: str = "finished"
    """finished or unfinished"""
    unfinished: str = ""
    """in words, what is missing"""
    sealed: bool = False
    digest: str = ""
    """the seal's, over everything"""
    checked: dict[str, int] = field(default_factory=dict)
    """number of outputs, inputs and bytes that were hashed"""
    made_by: str = ""
    """versions of the program and of packages"""
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.state == "finished" and not self.differences

    def as_dict(self) -> dict[str, Any]:
        return {"schema": 1, "good": self.good, **asdict(self)}


def verify_run(folder: Path, comm: Context, *, inputs: bool = True) -> VerifyReport:
    """Hashes a run's files again and compares; nothing in the folder is written to. Collective; ranks share the work.

    Args:
        folder: wherever it lies now.
        inputs: also look at the inputs; one that is not there is a note, not a difference.

    Raises:
        UsageError: there is no run.
        InputError: what the run keeps about itself cannot be read.
    """
    run = RunFolder(folder.absolute())
    verdict, recorded, input_entries = on_root(comm, _read, run, inputs)
    recorded_there, given_there = on_root(comm, lambda: (_there(run, recorded), _there(run, input_entries)))
    digests = hash_shared(run.path, recorded_there + given_there, comm, "verify")
    if comm.rank == 0:
        for entry in (*recorded, *input_entries):
            verdict.differences += _compare(run, entry, digests.get(entry.name), entry.by == "input", verdict)
        known = {difference.file for difference in verdict.differences}
        verdict.differences += _result_differences(run, {k: v for k, v in digests.items() if k not in known})
        verdict.checked = {
            "outputs": len(recorded_there), "inputs": len(given_there),
            "bytes": sum(facts["bytes"] for facts in digests.values()),
        }  # fmt: skip
    shared: VerifyReport = comm.bcast(verdict)
    return shared


# --- what was noted


def _read(run: RunFolder, inputs: bool) -> tuple[VerifyReport, list[Recorded], list[Recorded]]:
    """What is known before anything is hashed: the state, and the files with their hashes."""
    if not run.holds_a_run():
        raise UsageError(f"{run.path} holds no run to verify. 'cryoiso run' makes one.", code="run-missing")
    manifest, seal, lines = manifest_record(run.manifest), _read_seal(run), read_journal(run.journal)
    check_manifest(manifest, run.manifest)
    if manifest:
        versions.require_schema(manifest, run.manifest)
    verdict = VerifyReport(
        str(run.path), sealed=bool(seal), digest=seal.get("digest", ""), made_by=versions.made_by(manifest)
    )
    verdict.notes += versions.notes(manifest)
    recorded = {entry.name: entry for entry in _outputs(run, manifest, lines, verdict)}
    if seal:
        known = {name: facts["sha256"] for name, facts in seal["files"].items()}
        if digest_of_files(seal["files"]) != seal["digest"]:
            verdict.differences.append(Difference(products.SEAL, "does not agree with itself", "seal", seal["time"]))
        for name, facts in seal["files"].items():
            if name not in recorded:
                recorded[name] = Recorded(name, facts["sha256"], facts["bytes"], "seal", seal["time"])
            elif recorded[name].sha256 != known[name]:
                verdict.differences.append(
                    Difference(products.JOURNAL, f"names another hash for {name} than the seal", "seal", seal["time"])
                )
    input_entries = list(_inputs(manifest, verdict)) if inputs else []
    if not inputs:
        verdict.notes.append("inputs were not looked at")
    _note_strangers(run, recorded, verdict)
    return verdict, list(recorded.values()), input_entries


def _read_seal(run: RunFolder) -> dict[str, Any]:
    """The seal; empty if there is none.

    Raises:
        InputError: it is not as ``seal`` writes it, or names a file outside of the folder.
    """
    seal = read_record(run.seal)
    if not seal:
        return seal
    files = seal.get("files")
    texts = all(isinstance(seal.get(key), str) for key in ("digest", "time"))
    if not isinstance(files, dict) or not all(map(_is_noted, files.values())) or not texts:
        raise InputError("not a valid seal", file=run.seal,
                         expected="digest, time and files with bytes and sha256",
                         hint="Take the file from a copy of the run folder.", code="record-damaged")  # fmt: skip
    require_contained(run.path, files, run.seal)
    return seal


def _is_noted(facts: Any) -> bool:
    return isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)


def _outputs(
    run: RunFolder, manifest: Manifest, lines: list[dict[str, Any]], verdict: VerifyReport
) -> Iterator[Recorded]:
    """Outputs of the finished stages; says of the others that the run is unfinished."""
    if not run.resolved.exists():
        require_run(run)
    job = versions.understood(manifest, run.manifest, lambda: read_job(run.resolved)[1])
    named = RunFolder(run.path, folder_stages(job))
    key = manifest.get("job_key") or job_key(job)
    last = {(line["event"], line.get("stage")): line for line in lines}
    missing = []
    for stage in stages_of(job, named):
        end, key = last.get(("end", stage.name)), stage_key(stage.name, key, job)
        if end is None:
            missing.append(stage.name)
            continue
        if end["key"] != key:
            verdict.differences.append(
                Difference(products.JOURNAL, f"stage {stage.name} was done with another job, or after other results of "
                           "the stages before it, than are noted", stage.name, end["time"])
            )  # fmt: skip
        key = next_key(end["key"], stage.name, end["outputs"])
        for name, facts in end["outputs"].items():
            yield Recorded(name, facts["sha256"], facts["bytes"], stage.name, end["time"])
    if missing or not lines or not verdict.sealed:
        verdict.state = "unfinished"
        verdict.unfinished = _how_unfinished(run, lines, missing)


def _said(end: dict[str, Any]) -> str:
    """Message and code of the journal's line; earlier versions wrote no code."""
    message = str(end.get("message", ""))
    return with_code(message, end["code"]) if end.get("code") else message


def _how_unfinished(run: RunFolder, lines: list[dict[str, Any]], missing: list[str]) -> str:
    what = f"not done: {', '.join(missing)}" if missing else "all stages are done, but the run was not sealed"
    if run.lock.exists():
        return f"{what}; lock.json says that a run works in this folder, or was killed in it"
    end = lines[-1] if lines else {"event": "", "time": ""}
    how = {
        "stop": "stopped by a signal", "error": f"ended with an error ({_said(end)})", "done": "ended"
    }.get(end["event"], "broke off")  # fmt: skip
    return f"{what}; the run {how} at {end['time']}. 'cryoiso resume {run.path}' goes on"


def _inputs(manifest: Manifest, verdict: VerifyReport) -> Iterator[Recorded]:
    starts = manifest.get("starts") or [{}]
    unhashed = []
    for name, facts in (manifest.get("inputs") or {}).items():
        if "sha256" in facts:
            yield Recorded(name, facts["sha256"], facts["bytes"], "input", starts[0].get("time", ""))
        else:
            unhashed.append(name)
            if os.path.isfile(name) and os.stat(name).st_size != facts["bytes"]:
                size_text = f"{os.stat(name).st_size} bytes"
                verdict.differences.append(
                    Difference(name, SIZE, "input", starts[0].get("time", ""), f"{facts['bytes']} bytes", size_text)
                )
    if unhashed:
        verdict.notes.append(f"{len(unhashed)} input(s) were not hashed by the run; their sizes alone were compared")


def _note_strangers(run: RunFolder, recorded: dict[str, Recorded], verdict: VerifyReport) -> None:
    places = (*sorted(p.name for p in run.path.glob("[0-9][0-9]_*")), "result")
    done = {name.split("/")[0] for name in recorded}
    strange = [n for n in list_outputs(run.path, tuple(p for p in places if p in done)) if n not in recorded]
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        verdict.notes.append(f"not made by the run: {', '.join(strange[:5])}{more}")


# --- what is there


def _there(run: RunFolder, entries: list[Recorded]) -> list[str]:
    """The names of those that can be read, and have the size that they had; others need no hashing."""
    existing = []
    for entry in entries:
        path = run.path / entry.name
        if path.is_file() and path.stat().st_size == entry.bytes:
            existing.append(entry.name)
    return existing


def _compare(
    run: RunFolder, entry: Recorded, digest: dict[str, Any] | None, is_input: bool, verdict: VerifyReport
) -> list[Difference]:
    """What is wrong with one file; an input that is gone is noted instead."""
    path = run.path / entry.name
    if digest is not None and digest["sha256"] == entry.sha256:
        return []
    if not path.is_file():
        if is_input:
            verdict.notes.append(f"not there: input {entry.name}")
            return []
        return [Difference(entry.name, GONE, entry.by, entry.since)]
    stat = path.stat()
    modified = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
    if digest is None:
        size = (f"{entry.bytes} bytes", f"{stat.st_size} bytes")
        return [Difference(entry.name, SIZE, entry.by, entry.since, *size, modified)]
    sums = (f"sha256 {entry.sha256[:16]}...", f"{digest['sha256'][:16]}...")
    return [Difference(entry.name, CONTENT, entry.by, entry.since, *sums, modified)]


def _result_differences(run: RunFolder, digests: Outputs) -> list[Difference]:
    """Whether result/ agrees with its own list of checksums, and its half-maps with the reconstruction's.

    Args:
        digests: the files that are as they were noted; of the others enough has been said.
    """
    differences = []
    sums = f"result/{products.SUMS}"
    listed = read_sums(run.path / sums)
    for name, sha256 in listed.items():
        facts = digests.get(f"result/{name}")
        if facts is not None and facts["sha256"] != sha256:
            differences.append(Difference(f"result/{name}", f"is not what {products.SUMS} says", sums, ""))
    if listed:
        present = {name.removeprefix("result/") for name in list_outputs(run.path, ("result",))} - {products.SUMS}
        for name in sorted(present - set(listed)):
            if f"result/{name}" in digests:
                differences.append(Difference(f"result/{name}", f"is not listed in {products.SUMS}", sums, ""))
    for half_map in (p for name in products.HALF_MAPS for p in run.path.glob(f"[0-9][0-9]_reconstruct/{name}")):
        in_stage, in_result = (
            digests.get(f"{half_map.parent.name}/{half_map.name}"),
            digests.get(f"result/{half_map.name}"),
        )
        if in_stage is not None and in_result is not None and in_stage["sha256"] != in_result["sha256"]:
            name = f"result/{half_map.name}"
            differences.append(
                Difference(name, f"is not the half-map of {half_map.parent.name}", half_map.parent.name, "")
            )
    return differences
