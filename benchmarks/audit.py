"""Verdicts of `cryoiso audit` on runs whose truth is known: false alarms and misses of every control.

good              simulated particles of an invented protein and a relative of it as the reference: all should pass
good_few          fewer and coarser ones, as the networks below have them: what these sets show without a network
wrong_reference   the same particles refined against another protein; `reference` should fail
noise             images of noise refined against the relative, the refusal of noise switched off; `reference` and
                  `null` should fail
auxiliary_*       the workflow `auxiliary`, with projections and coloured noise, with a generator for each half-set, and
                  with one generator for both: `leak` should fail for the last only
full_weight       the same workflow with projections and coloured noise, at full weight (`auxiliary.weight = 1`): `null`
                  should fail
realign_*         the workflow `realign` with a network for each half-set, and with one for both, likewise
workflow_*        good sets with the other workflows, networks of the small preset; the dearest controls are left out of
                  the dearest workflows: all should pass
files             the good set with the controls that need a file: another relative as the second reference (should
                  pass), and patches of real background instead of Gaussian noise

    python benchmarks/audit.py [--scenarios good,noise] [--seeds 1,2,3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.bias import make_noise


@dataclass(frozen=True)
class Size:
    """Of the simulated particles."""

    particles: int = 800
    box: int = 36
    pixel_A: float = 5.4
    snr_db: float = -10
    fraction: float = 0.9
    """of views from one end"""


FEW = Size(300, 32, 6.0, -5)


@dataclass(frozen=True)
class Scenario:
    """A run of known truth, and what its audit should say."""

    run: dict[str, object] = field(default_factory=dict)
    """keys of its job as SECTION.KEY"""
    reference: str = "phantom-homologue"
    noise: bool = False
    unguarded: bool = False
    controls: tuple[str, ...] = ()
    """() all"""
    size: Size = Size()
    fails: tuple[str, ...] = ()
    """controls that should fail; the others should not"""
    needs_files: bool = False
    """whether the audit is given a second reference and patches of background"""


AUXILIARY = {"run.workflow": "auxiliary", "auxiliary.preset": "small", "auxiliary.steps": 100, "auxiliary.rounds": 1,
             "auxiliary.balance": False}  # fmt: skip
SMALL_NETWORK = {"run.workflow": "realign", "correct.preset": "small", "correct.sub_maps": 32, "correct.cube_px": 24,
                 "correct.epochs": 2, "realign.epochs": 2}  # fmt: skip
WITH_LEAK = ("reference", "leak")
BACKGROUND = harness.SHARED / "data" / "particles" / "betagal_real_384" / "background.mrcs"
SECOND = "second.mrc"
SCENARIOS: dict[str, Scenario] = {
    "good": Scenario(),
    "wrong_reference": Scenario(reference="other", unguarded=True, fails=("reference",)),
    "noise": Scenario(noise=True, unguarded=True, fails=("reference", "null")),
    "auxiliary_coloured": Scenario(
        {**AUXILIARY, "auxiliary.generators": "coloured-noise"}, controls=("null", "leak"), size=FEW
    ),
    "full_weight": Scenario(
        {**AUXILIARY, "auxiliary.generators": "coloured-noise", "auxiliary.weight": 1}, controls=("null",), size=FEW,
        fails=("null",),
    ),
    "auxiliary_per_half": Scenario({**AUXILIARY, "auxiliary.generators": "per-half"}, controls=WITH_LEAK, size=FEW),
    "auxiliary_shared": Scenario(
        {**AUXILIARY, "auxiliary.generators": "shared"}, controls=WITH_LEAK, size=FEW, fails=("leak",)
    ),
    "realign_independent": Scenario({**SMALL_NETWORK, "realign.mode": "independent"}, controls=WITH_LEAK, size=FEW),
    "realign_paired": Scenario(
        {**SMALL_NETWORK, "realign.mode": "paired"}, controls=WITH_LEAK, size=FEW, fails=("leak",)
    ),
    "good_few": Scenario(controls=("reference", "decoy"), size=FEW),
    "workflow_auxiliary": Scenario(AUXILIARY, size=FEW),
    "workflow_realign": Scenario(SMALL_NETWORK, controls=("reference", "null", "omitted", "added", "leak"), size=FEW),
    "workflow_both": Scenario(
        {**AUXILIARY, **SMALL_NETWORK, "run.workflow": "both", "auxiliary.generators": "coloured-noise"},
        controls=("reference", "null", "omitted", "added", "leak"), size=FEW,
    ),
    "files": Scenario(controls=("null", "other-reference"), needs_files=True),
}  # fmt: skip


def prepare(scenario: Scenario, seed: int, folder: Path) -> Path:
    """Particles, reference and job file."""
    size = scenario.size
    grid = ("--box", size.box, "--pixel-size", size.pixel_A)
    harness.cryoiso(
        "simulate", "phantom", folder, *grid, "--n", size.particles, "--mode", "preferred", "--fraction", size.fraction,
        "--noise", "coloured", "--snr-db", size.snr_db, "--seed", seed, "--overwrite", log=folder.with_suffix(".log"),
    )  # fmt: skip
    source, more = scenario.reference, ()
    if source == "other":
        source, more = harness.SHARED / "data" / "models" / "ha" / "1ti8.pdb.gz", ()
    harness.cryoiso(
        "reference", source, folder / "reference.mrc", *grid, "--symmetry", "C3", "--lowpass", 0, *more,
        log=folder / "reference.log",
    )  # fmt: skip
    if scenario.needs_files:
        from cryoiso.io.mrc import write_map
        from cryoiso.physics.phantom import phantom_map

        write_map(folder / SECOND, phantom_map(size.box, size.pixel_A, variant=2).data, size.pixel_A)
    if scenario.noise:
        given = folder / "given"
        given.mkdir(exist_ok=True)
        for name in ("particles.star", "particles.mrcs"):
            shutil.copy(folder / name, given)
        make_noise(given, folder, seed, "coloured", size.box, size.pixel_A)
    keys: dict[str, dict[str, object]] = {
        "particles": {"file": "particles.star", "invert": "no"}, "reference": {"file": "reference.mrc"},
        "sample": {"symmetry": "C3"}, "run": {"device": "cpu"},
    }  # fmt: skip
    for name, value in scenario.run.items():
        section, key = name.split(".")
        keys.setdefault(section, {})[key] = value
    lines = [line for s, of in keys.items() for line in (f"[{s}]", *(f"{k} = {json.dumps(v)}" for k, v in of.items()))]
    (folder / "job.toml").write_text("\n".join(lines) + "\n")
    return folder / "job.toml"


def judge(name: str, seed: int, work: Path) -> dict[str, Any]:
    """A run and its audit; the verdict of each control and what both cost."""
    scenario = SCENARIOS[name]
    folder = work / f"{name}-{seed}"
    job, run = prepare(scenario, seed, folder), folder / "run"
    if scenario.unguarded:
        words = [sys.executable, "-m", "benchmarks.job_process", "run", job, run, "--unguarded"]
        cost = harness.measure(words, folder / "run.log", harness.REPO)
    else:
        cost = harness.cryoiso("run", job, "--out", run, log=folder / "run.log")
    only = [word for control in scenario.controls for word in ("--control", control)]
    if scenario.needs_files:
        only += ["--other-reference", folder / SECOND, "--background", BACKGROUND]
    # status 1: a control fails
    either = ["sh", "-c", '"$@"; [ $? -le 1 ]', "sh", *harness.CRYOISO]
    audit = harness.measure([*either, "audit", run, *only], folder / "audit.log")
    found = json.loads((run / "audit" / "audit.json").read_text())
    kept = ("verdict", "number", "interval", "sentence", "details")
    controls = {c["name"]: {k: c[k] for k in kept} for c in found["controls"]}
    return {
        "scenario": name, "seed": seed, "size": vars(scenario.size), "verdict": found["verdict"],
        "resolution_A": found["resolution_A"],
        "particles": found["particles"], "run_cpu_s": cost.cpu_s,
        "audit_cpu_s": audit.cpu_s,
        "should_fail": list(scenario.fails), "controls": controls,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Verdicts, one row for each run."""
    names = ("reference", "null", "omitted", "added", "decoy", "other-reference", "stability", "leak")
    short = {"pass": "pass", "fail": "FAIL", "inconclusive": "?", "not applicable": "-"}
    lines = [
        (r["scenario"], r["seed"], f"{r['resolution_A']:.1f} Å",
         *(short[r["controls"].get(n, {"verdict": "not applicable"})["verdict"]]
           + (" (should)" if n in r["should_fail"] else "") for n in names))
        for r in rows
    ]  # fmt: skip
    return harness.markdown(("run", "seed", "half-maps", *names), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "audit.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"rows": []}
    with harness.work_folder(a.work) as work:
        for name in a.scenarios.split(","):
            for seed in map(int, a.seeds.split(",")):
                row = judge(name, seed, work)
                kept = [r for r in result["rows"] if (r["scenario"], r["seed"]) != (name, seed)]
                result = {"rows": [*kept, row], "machine": harness.machine()}
                harness.write_json(a.out, result)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
