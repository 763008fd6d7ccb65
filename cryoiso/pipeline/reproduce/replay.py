"""One stage of a finished run once more, in another folder, and whether it makes the same again."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_resolved
from cryoiso.pipeline.records import versions
from cryoiso.pipeline.records.hashing import Outputs, verify_outputs
from cryoiso.pipeline.records.journal import read_journal
from cryoiso.pipeline.records.manifest import check_manifest, given_shards, manifest_record
from cryoiso.pipeline.records.manifest_record import Manifest
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.records.seal import REPORTS
from cryoiso.pipeline.records.trust import require_recorded_job, require_trust
from cryoiso.pipeline.reproduce.compare import FileDifference, compare_files
from cryoiso.pipeline.run import do_stage, prepare_device
from cryoiso.pipeline.stages.input_hashes import require_unchanged
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import folder_stages, record_of

logger = logging.getLogger("cryoiso")
RECORD = "replay.json"


@dataclass(frozen=True)
class Replay:
    """What came of doing a stage again."""

    stage: str
    run: str
    out: str
    same: int
    """files with the bits that were recorded"""
    different: list[FileDifference] = field(default_factory=list)
    made_by: str = ""
    """versions of the program and of packages that the run was made with"""

    @property
    def identical(self) -> bool:
        return not self.different

    @property
    def verdict(self) -> str:
        """In words."""
        if self.identical:
            return f"{self.stage}: identical, all {self.same} files have the bits that the run recorded"
        rounding = all(difference.rounding for difference in self.different)
        text = f"{self.stage}: {len(self.different)} of {self.same + len(self.different)} files differ"
        return text + (", by no more than rounding" if rounding else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": 1, "stage": self.stage, "run": self.run, "out": self.out, "made_by": self.made_by,
            "replayed_by": f"cryoiso {__version__}", "identical": self.identical,
            "verdict": self.verdict, "same": self.same,
            "different": [difference.as_dict() for difference in self.different],
        }  # fmt: skip


def replay_stage(
    name: str,
    folder: Path,
    out: Path,
    comm: Context,
    report: Callable[[Path], object] | None = None,
    trust: bool = False,
) -> Replay:
    """Does a stage of a run again, from the recorded outputs of the stages before it. Collective.

    The files of the earlier stages are linked into ``out``, never changed; they must have the hashes that were
    recorded. Job and seed are those of the run. Writes replay.json.

    Args:
        name: of the stage.
        folder: the run, wherever it lies now.
        out: a new folder.
        report: makes the report and the texts of result/, for the stage ``report``.
        trust: start the programs that the run names, though somebody else did it.

    Raises:
        UsageError: no such stage, the folder to write into is not empty, or it is not this user's run and wants to be
            trusted.
        InputError: resolved.toml is not the job that was done, an earlier stage's files are not what was recorded, or
            an input is gone.
    """
    run, target = RunFolder(folder.absolute()), out.absolute()
    manifest = on_root(comm, _read_manifest, run)
    job = on_root(comm, lambda: versions.understood(manifest, run.manifest, lambda: read_resolved(run)[1]))
    on_root(comm, require_recorded_job, run, job)
    on_root(comm, require_trust, run, job, trust)
    run = RunFolder(run.path, folder_stages(job))
    again = RunContext(job, RunFolder(target, run.stages), comm, report=report)
    stages = stages_of(job, again.folder)
    stage, before, recorded = on_root(comm, _recorded, run, name, [s.name for s in stages])
    prepare_device(again)
    if wrong := verify_outputs(run.path, before, comm):
        raise InputError(
            f"{wrong} since the run; a replay would start from other files", file=run.path, code="run-inputs-changed"
        )
    if record_of(stage).reads_images:
        require_unchanged(comm, on_root(comm, lambda: given_shards(manifest_record(run.manifest))))
    on_root(comm, _link, run, target, list(before))
    comm.install_signal_handlers()
    if comm.rank == 0:
        logger.info("%s of %s again, in %s", name, run.path, target)
    again_inputs = Inputs(job, again.folder, comm)
    outputs = do_stage(again, again_inputs, next(s for s in stages if s.name == stage), "", resume=False)
    return on_root(comm, _judge, again, run, stage, recorded, outputs, versions.made_by(manifest))


def _read_manifest(run: RunFolder) -> Manifest:
    """The manifest; the log says what of program and packages is not as in the run."""
    manifest = manifest_record(run.manifest)
    check_manifest(manifest, run.manifest)
    if manifest:
        versions.require_schema(manifest, run.manifest)
    for note in versions.notes(manifest):
        logger.warning("this run was %s", note)
    return manifest


def _recorded(run: RunFolder, name: str, stages: list[str]) -> tuple[str, Outputs, Outputs]:
    """The stage's name, the outputs of the stages before it, and its own."""
    if name not in stages:
        raise UsageError(f"{run.path} has no stage '{name}' (its stages: {', '.join(stages)})", code="stage-unknown")
    ends = {line.get("stage"): line["outputs"] for line in read_journal(run.journal) if line["event"] == "end"}
    before: Outputs = {}
    for stage in stages[: stages.index(name) + 1]:
        if stage not in ends:
            raise UsageError(
                f"{run.path}: the stage '{stage}' is not finished. Continue it with 'cryoiso resume'.",
                code="stage-unfinished",
            )
        if stage != name:
            before.update(ends[stage])
    return name, before, ends[name]


def _link(run: RunFolder, target: Path, names: list[str]) -> None:
    """A folder in which the earlier stages seem to lie: links to their files, one by one, so that nothing that is
    renamed or removed in it can reach the run."""
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty. Give a new folder with --out.", code="file-exists")
    if target == run.path or run.path in target.parents:
        raise UsageError(
            f"{target} is inside the run. Give a folder outside of it with --out.", code="option-out-of-range"
        )
    make_folder(target)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(run.path / name, target / name)
    for path in (run.resolved, run.manifest, run.job):
        shutil.copyfile(path, target / path.name)


def _judge(again: RunContext, run: RunFolder, stage: str, recorded: Outputs, outputs: Outputs, made_by: str) -> Replay:
    target, different, same = again.folder.path, [], 0
    # a run that was moved: its files name the folder in which they were made
    old = manifest_record(run.manifest).get("folder", str(run.path))
    for name in sorted(set(recorded) | set(outputs)):
        if name in REPORTS:
            continue
        was, now = recorded.get(name), outputs.get(name)
        if was is not None and now is not None and was["sha256"] == now["sha256"]:
            same += 1
            continue
        difference = compare_files(
            name, run.path / name if was else None, target / name if now else None, again.job.sample.symmetry,
            names={old: str(target), str(run.path): str(target)},
        )  # fmt: skip
        if difference is None:
            same += 1
        else:
            different.append(difference)
    result = Replay(stage, str(run.path), str(target), same, different, made_by)
    write_json(target / RECORD, result.as_dict())
    return result
