"""The rows of views.py: names, what each runs, and how one is run and its cost measured.

A row is a command (`refine`, `realign`, or a workflow of `run`), the reference, settings of the engine and further
keys of the job file. Every row is run from a job file (job_process.py), which has all keys. ``FEATURES`` alone names
the engine's new settings and their old values; the row ``refine`` has all defaults; ``refine whole`` takes the
reference that was not changed, beside the controls ``omitted`` and ``added``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.particle_sets import ParticleSet

FEATURES: dict[str, dict[str, tuple[Any, Any]]] = {
    "regularisation": {"regularisation": ("mean-weight", "uneven")},
    "weighted fsc": {"weighted_fsc": (False, True)},
    "view polarity": {"view_density": (False, True)},
    "view density": {"view_density": (False, True), "view_axis_odds": (1.0, 4.0)},
    "later stop": {"stalled_iterations": (1, 3)},
}
"""What the engine does about uneven views: keys of [refine], with their values before and switched on."""
PROCESS = (sys.executable, "-m", "benchmarks.job_process")
BEFORE: dict[str, Any] = {key: values[0] for keys in FEATURES.values() for key, values in keys.items()}


def _on(*features: str) -> dict[str, Any]:
    """The engine before, with these switched on."""
    return {**BEFORE, **{key: values[1] for name in features for key, values in FEATURES[name].items()}}


@dataclass(frozen=True)
class Row:
    """One way to refine a set."""

    command: str = "refine"
    """refine, realign, a workflow of `run` (auxiliary, both), or reconstruct (with the true poses)."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Keys of [refine]; what is not named keeps its default."""
    job: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further keys of the job file, by section."""
    reference: str = "homologue.mrc"
    particles: str = "particles.star"
    """File of the set that is refined."""


def _auxiliary(generators: str, weight: float | str = "measured", **keys: Any) -> dict[str, dict[str, Any]]:
    # steps stand in the records of rows that train nothing; a generator takes those of its preset
    steps = {} if generators == "per-half" else {"steps": 300}
    return {"auxiliary": {"generators": generators, "preset": "small", **steps, "weight": weight, **keys}}


ROWS: dict[str, Row] = {
    "true poses": Row("reconstruct"),
    "before": Row(engine=BEFORE),
    **{name: Row(engine=_on(name)) for name in FEATURES},
    "regularisation + weighted fsc": Row(engine=_on("regularisation", "weighted fsc")),
    "regularisation + view polarity": Row(engine=_on("regularisation", "view polarity")),
    "regularisation + weighted fsc + view density": Row(engine=_on("regularisation", "weighted fsc", "view density")),
    "refine": Row(),
    "scale group": Row(engine={"scale": "group"}),
    "scale particle": Row(engine={"scale": "particle"}),
    "oracle before": Row(engine=BEFORE, reference="signal_map.mrc"),
    "oracle": Row(reference="signal_map.mrc"),
    "refine whole": Row(reference="full.mrc"),
    "auxiliary white": Row("auxiliary", job=_auxiliary("white-noise")),
    "auxiliary coloured": Row("auxiliary", job=_auxiliary("coloured-noise")),
    "auxiliary coloured balanced": Row("auxiliary", job=_auxiliary("coloured-noise", balance=True)),
    "auxiliary coloured weight 1": Row("auxiliary", job=_auxiliary("coloured-noise", 1.0, balance=True)),
    "auxiliary vae": Row("auxiliary", job=_auxiliary("per-half")),
    "auxiliary vae weight 1": Row("auxiliary", job=_auxiliary("per-half", 1.0, balance=True)),
    "auxiliary vae before": Row("auxiliary", engine=BEFORE, job=_auxiliary("per-half", 1.0, balance=True)),
    "realign": Row("realign"),
    "both": Row("both", job={**_auxiliary("per-half"), "correct": {"preset": "small"}}),
    "both weight 1": Row("both", job={**_auxiliary("per-half", 1.0, balance=True), "correct": {"preset": "small"}}),
}


def run_row(row: Row, one: ParticleSet, folder: Path, out: Path, guarded: bool = True) -> harness.Cost:
    """Runs a row of a prepared set into a folder that then holds particles.star, half1.mrc, half2.mrc and map.mrc.

    Args:
        folder: of the set. out: is emptied first.
        guarded: false switches the refusal of noise off.

    Returns:
        Cost of the refinement; the reconstruction of the scored maps is not counted.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run, log = out / "run", out / "log.txt"
    reconstruct = ("--symmetry", one.symmetry, "--invert", one.invert, "--project", folder)
    if row.command == "reconstruct":
        cost = harness.cryoiso("reconstruct", folder / "truth.star", "--out", run, *reconstruct, log=log)
        _keep(out, folder / "truth.star", run)
        return cost
    job = out / "job.toml"
    job.write_text(job_text(row, one, folder))
    command = row.command if row.command in ("refine", "realign") else "run"
    words = [*PROCESS, command, job, run, *(() if guarded else ("--unguarded",))]
    cost = harness.measure(words, log)
    if command == "run":
        poses = run / "result" / "particles.star"
        _keep(out, poses, run / "result", sorted(run.glob("[0-9][0-9]_*/**/refine.json"))[-1])
    else:
        poses, maps = run / "particles.star", run / "maps"
        harness.cryoiso("reconstruct", poses, "--out", maps, *reconstruct, log=out / "reconstruct.txt")
        _keep(out, poses, maps, run / "refine.json")
    return cost


def _keep(out: Path, poses: Path, maps: Path, record: Path | None = None) -> None:
    """Copies what is scored and removes the rest of the run."""
    shutil.copy(poses, out / "particles.star")
    for file in (record, *(maps / name for name in ("half1.mrc", "half2.mrc", "map.mrc", "map_weighted.mrc"))):
        if file is not None and file.exists():
            shutil.copy(file, out / file.name)
    shutil.rmtree(out / "run")


def job_text(row: Row, one: ParticleSet, folder: Path) -> str:
    """The job file of a row."""
    workflow = row.command if row.command in ("auxiliary", "both", "realign") else "refine"
    sections: dict[str, dict[str, Any]] = {
        "particles": {"file": str(folder / row.particles), "invert": one.invert},
        "reference": {"file": str(folder / row.reference)},
        "sample": {"symmetry": one.symmetry},
        "refine": dict(row.engine),
        "run": {"workflow": workflow, "device": "cpu"},
    }
    for name, keys in row.job.items():
        sections[name] = {**sections.get(name, {}), **keys}
    lines = [f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for name, s in sections.items()]
    return "\n".join(lines)


def engine_facts(out: Path) -> dict[str, Any]:
    """Iterations and the resolution in Å that the engine claims, from its record."""
    record = out / "refine.json"
    if not record.exists():
        return {}
    iterations = json.loads(record.read_text())["iterations"]
    last = iterations[-1]
    facts = {"claimed_A": "resolution_A", "claimed_weighted_A": "resolution_weighted_A", "cfar": "cfar"}
    return {"iterations": len(iterations), **{name: last.get(key) for name, key in facts.items()}}
