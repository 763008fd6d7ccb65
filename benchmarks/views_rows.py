"""The rows of views.py: names, what each runs, and how one is run and its cost measured.

A row is a command (`refine`, `realign`, or a workflow of `run`), the reference, settings of the engine and further
keys of the job file. ``FEATURES`` alone names the engine's new settings and their old values; the row ``refine`` has
all defaults.
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
    "view polarity": {"view_polarity": (0.0, 1.0)},
    "view density": {"view_polarity": (0.0, 1.0), "view_axial": (0.0, 1.0)},
    "later stop": {"stalled_iterations": (1, 3)},
    "reference uncertainty": {"reference_uncertainty": (False, True)},
    "prior mean": {"prior_mean": ("none", "reference")},
}
"""What the engine does about uneven views: keys of [refine], with their values before and switched on."""
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
    options: tuple[object, ...] = ()
    """Further options of `refine` or `realign`."""


def _auxiliary(generators: str) -> dict[str, dict[str, Any]]:
    return {"auxiliary": {"generators": generators, "preset": "small", "steps": 300}}


ROWS: dict[str, Row] = {
    "true poses": Row("reconstruct"),
    "before": Row(engine=BEFORE),
    **{name: Row(engine=_on(name)) for name in FEATURES},
    "regularisation + weighted fsc": Row(engine=_on("regularisation", "weighted fsc")),
    "regularisation + view polarity": Row(engine=_on("regularisation", "view polarity")),
    "regularisation + weighted fsc + view density": Row(engine=_on("regularisation", "weighted fsc", "view density")),
    "refine": Row(),
    "oracle before": Row(engine=BEFORE, reference="signal_map.mrc"),
    "oracle": Row(reference="signal_map.mrc"),
    "auxiliary white": Row("auxiliary", job=_auxiliary("white-noise")),
    "auxiliary coloured": Row("auxiliary", job=_auxiliary("coloured-noise")),
    "auxiliary vae": Row("auxiliary", job=_auxiliary("per-half")),
    "auxiliary vae before": Row("auxiliary", engine=BEFORE, job=_auxiliary("per-half")),
    "realign": Row("realign"),
    "both": Row("both", job={**_auxiliary("per-half"), "correct": {"preset": "small"}}),
}


def run_row(row: Row, one: ParticleSet, folder: Path, out: Path, program: tuple[str, ...] = harness.CRYOISO) -> Any:
    """Runs a row of a prepared set into a folder that then holds particles.star, half1.mrc, half2.mrc and map.mrc.

    Args:
        folder: of the set. out: is emptied first.
        program: the words that start cryoiso.

    Returns:
        ``harness.Cost`` of the refinement (the reconstruction of the scored maps is not counted), and the settings of
        the engine that this version has.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    engine = supported(row.engine)
    log, star = out / "log.txt", folder / "particles.star"
    common = ("--symmetry", one.symmetry, "--invert", one.invert)
    if row.command == "reconstruct":
        truth = folder / "truth.star"
        cost = harness.measure([*program, "reconstruct", truth, "--out", out, *common], log)
        shutil.copy(truth, out / "particles.star")
        return cost, engine
    if row.command in ("refine", "realign"):
        words = (*_options(engine), *row.options)
        run, reference = out / "run", folder / row.reference
        cost = harness.measure([*program, row.command, star, "--ref", reference, "--out", run, *common, *words], log)
        poses = run / "particles.star"
        made = out / "maps"
        harness.measure([*program, "reconstruct", poses, "--out", made, *common], out / "reconstruct.txt")
        records = run / "refine.json"
    else:
        run = out / "run"
        (out / "job.toml").write_text(_job(row, engine, one, folder))
        cost = harness.measure([*program, "run", out / "job.toml", "--out", run], log)
        made = run / "result"
        poses = made / "particles.star"
        records = sorted(run.glob("[0-9][0-9]_*/**/refine.json"))[-1]
    for file in (poses, records, *(made / name for name in ("half1.mrc", "half2.mrc", "map.mrc", "map_weighted.mrc"))):
        if file.exists():
            shutil.copy(file, out / file.name)
    shutil.rmtree(run)
    shutil.rmtree(out / "maps", ignore_errors=True)
    return cost, engine


def supported(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that this version of the engine has; old values of others are what it does anyway.

    Raises:
        ValueError: a setting that it lacks is switched on.
    """
    from cryoiso.core.config import RefineSection

    lacking = {key: value for key, value in engine.items() if key not in RefineSection.model_fields}
    new = [key for key, value in lacking.items() if key not in BEFORE or value != BEFORE[key]]
    if new:
        raise ValueError(f"this version of the engine has no {', '.join(new)}")
    return {key: value for key, value in engine.items() if key not in lacking}


def _options(engine: Mapping[str, Any]) -> list[object]:
    """Settings of the engine as options of a command."""
    words: list[object] = []
    for key, value in engine.items():
        name = key.removesuffix("_A").removesuffix("_deg").replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return words


def _job(row: Row, engine: Mapping[str, Any], one: ParticleSet, folder: Path) -> str:
    """The job file of a workflow."""
    sections: dict[str, dict[str, Any]] = {
        "particles": {"file": str(folder / "particles.star"), "invert": one.invert},
        "reference": {"file": str(folder / row.reference)},
        "sample": {"symmetry": one.symmetry},
        "refine": dict(engine),
        "run": {"workflow": row.command, "device": "cpu"},
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
    return {"iterations": len(iterations), "claimed_A": iterations[-1].get("resolution_A")}
