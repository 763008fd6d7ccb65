"""Refinement of sets with uneven views: every way to refine them, against the truth, over several seeds.

Sets are in particle_sets.py and nuisance_sets.py (one folder for each set and seed under --work, prepared once), rows
in views_rows.py, controls (pure noise, a changed reference) in views_controls.py. A run adds records to --out and
leaves out those that are there already with the same settings. Shares are pooled over the seeds, with Wilson's 95 %
interval.

    python benchmarks/views.py --work sets --jobs 2 --sets one_pole_-13,noise_white --rows before,refine --seeds 3,4
    python benchmarks/views.py --tables [--pairs before:refine,refine:auxiliary vae]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import forked, harness, nuisance_sets, particle_sets, views_controls, views_tables
from benchmarks.particle_sets import SETS, ParticleSet
from benchmarks.score import scale_scores, score, truth_scores
from benchmarks.views_controls import CONTROLS
from benchmarks.views_rows import ROWS, Row, engine_facts, run_row

DEFAULT_SETS = tuple(name for name in SETS if name not in ("middle", "paper"))
KINDS: dict[str, ParticleSet] = {**SETS, **nuisance_sets.SETS, **CONTROLS}
SEEDS = (3, 4, 5, 6, 7)
UNNAMED = (("particles", "particles.star"),)
"""Keys of a row that records do not have where they have these values."""


Scorer = Callable[[Path, Path, ParticleSet], dict[str, Any]]
"""Further scores of a set in a folder (truth.star) and of what a row left in another (particles.star, maps)."""


@dataclass(frozen=True)
class Benchmark:
    """Which rows are measured on which sets: those of this file, or of nuisances.py."""

    description: str
    rows: Mapping[str, Row]
    sets: tuple[str, ...]
    """Of KINDS, if none are asked for."""
    out: Path
    pairs: str
    scorers: tuple[Scorer, ...] = ()
    runner: Callable[..., harness.Cost] = run_row
    """Runs a row; arguments and result as those of `run_row`."""
    plan: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows of each set where none are asked for; all where a set is not named."""
    tables: Callable[..., list[str]] = views_tables.tables
    """Of records, sets, rows, pairs and names of controls."""


@dataclass(frozen=True)
class Task:
    """One row of one set and seed."""

    name: str
    seed: int
    row: str
    definition: Row

    @property
    def key(self) -> tuple[str, int, str]:
        return self.name, self.seed, self.row

    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON; a record with other settings is made again."""
        one = KINDS[self.name]
        facts = {k: getattr(one, k) for k in ("views", "snr_db", "target", "homologue", "box", "pixel_A", "particles")}
        if one.nuisances:
            facts["nuisances"] = dict(one.nuisances)
        row = {k: v for k, v in asdict(self.definition).items() if (k, v) not in UNNAMED}
        return json.loads(json.dumps({"set": facts, "row": row}))


def tasks(
    sets: list[str], rows: list[str], seeds: list[int] | None, definitions: Mapping[str, Row] = ROWS
) -> Iterator[Task]:
    """Seed by seed, so that every set has its first seed soon."""
    known = {name: seeds or KINDS[name].seeds for name in sets}
    for seed in sorted({s for some in known.values() for s in some}):
        for name in sets:
            for row in rows:
                if seed in known[name] and views_controls.applies(name, row):
                    yield Task(name, seed, row, definitions[row])


def prepare(name: str, seed: int, data: Path, work: Path) -> Path:
    """The folder of a set and seed, made if it is not there."""
    folder = work / f"{name}_{seed}"
    with harness.locked(work / f".{name}_{seed}.lock"):
        if name in CONTROLS:
            if not views_controls.prepared(name, seed, folder):
                views_controls.prepare(name, seed, data, folder)
        elif not particle_sets.prepared(KINDS[name], seed, folder):
            particle_sets.prepare(KINDS[name], seed, data / "models", folder)
    return folder


def measure(
    task: Task, data: Path, work: Path, scorers: tuple[Scorer, ...] = (), runner: Callable[..., harness.Cost] = run_row
) -> dict[str, Any]:
    """The record of a task."""
    one, folder = KINDS[task.name], prepare(task.name, task.seed, data, work)
    out = folder / "rows" / task.row.replace(" ", "_")
    cost = runner(task.definition, one, folder, out, views_controls.guarded(task.name))
    if task.name in CONTROLS:
        scores = views_controls.scores(task.name, folder, out)
    else:
        halves = (out / f"half{h}.mrc" for h in (1, 2))
        scores = score(folder, out / "particles.star", *halves, one.symmetry, one.preferred)
        scores |= {**_final_map(folder, out, one), **engine_facts(out), **scale_scores(folder, out / "particles.star")}
        for scorer in scorers:
            scores |= scorer(folder, out, one)
    return {
        "set": task.name, "seed": task.seed, "row": task.row, **scores, **cost.as_dict(), "settings": task.settings(),
        "date": time.strftime("%Y-%m-%d %H:%M"), "version": version(), "machine": _machine(),
    }  # fmt: skip


def _final_map(folder: Path, out: Path, one: ParticleSet) -> dict[str, Any]:
    """Area under the FSC to the truth of the final, weighted map, where there is one."""
    from cryoiso.io.mrc import read_map

    path = next((out / name for name in ("map_weighted.mrc", "map.mrc") if (out / name).exists()), None)
    if path is None:
        return {}
    made, truth = (read_map(p, one.pixel_A).data for p in (path, folder / "signal_map.mrc"))
    return {"final_map": path.name, "final_area": truth_scores(made, truth, one.pixel_A, one.symmetry)["truth_area"]}


def version() -> str:
    """Version of cryoiso and the commit, with a plus sign where files were changed."""
    from cryoiso import __version__

    git = ["git", "-C", str(harness.REPO)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "cryoiso"], capture_output=True, text=True)
    return f"{__version__} {commit.stdout.strip()}{'+' if changed.stdout.strip() else ''}".strip()


def _machine() -> str:
    facts = harness.machine()
    return f"{facts['processor']}, {facts['cores']} cores, load {facts['load_average']}"


def read_records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["records"] if path.exists() else []


def add_record(path: Path, record: dict[str, Any], row_names: Mapping[str, Row] = ROWS) -> None:
    """Adds a record, in place of one of the same set, seed and row; several runs may write one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with harness.locked(path.parent):
        key = ("set", "seed", "row")
        kept = [r for r in read_records(path) if any(r[k] != record[k] for k in key)]
        order = {name: i for i, name in enumerate(KINDS)}
        rows = {name: i for i, name in enumerate(row_names)}
        kept = sorted([*kept, record], key=lambda r: (order.get(r["set"], 99), rows.get(r["row"], 99), r["seed"]))
        part = path.with_suffix(".part")
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in kept)
        part.write_text('{"records": [\n' + lines + "\n]}\n")
        part.replace(path)


def run(todo: list[Task], data: Path, work: Path, out: Path, jobs: int, bench: Benchmark) -> list[str]:
    """Measures tasks side by side, one thread each; returns what failed."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        future_of = {pool.submit(measure, task, data, work, bench.scorers, bench.runner): task for task in todo}
        for future in as_completed(future_of):
            task = future_of[future]
            try:
                record = future.result()
            except (harness.Failed, ValueError) as error:
                failed.append(f"{task.name} {task.seed} {task.row}: {error}")
                harness.skip(failed[-1])
                continue
            add_record(out, record, bench.rows)
            print(views_tables.line(record), flush=True)
    return failed


def chosen(text: str | None, known: Mapping[str, Any], what: str) -> list[str]:
    """Names in a list with commas."""
    names = [n.strip() for n in text.split(",")] if text else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"no {what} '{name}'; known: {', '.join(known)}")
    return names


VIEWS = Benchmark(str(__doc__), ROWS, DEFAULT_SETS, harness.RESULTS / "views.json", "before:refine")


def main(bench: Benchmark = VIEWS) -> None:
    parser = argparse.ArgumentParser(
        description=bench.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/ (default ../shared)")
    parser.add_argument("--sets", help=f"of {', '.join(KINDS)} (default: {', '.join(bench.sets)})")
    parser.add_argument("--rows", help=f"of {', '.join(bench.rows)} (default: all)")
    parser.add_argument("--seeds", help="default: those of each set")
    parser.add_argument("--jobs", type=int, default=2, help="rows side by side, one thread each")
    parser.add_argument("--forks", action="store_true", help="without the start-up of each program (forked.py)")
    parser.add_argument("--again", action="store_true", help="measure what is there already again")
    parser.add_argument("--tables", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--pairs", default=bench.pairs, help="rows that are compared seed by seed, one:other,...")
    parser.add_argument("--out", type=Path, default=bench.out)
    parser.add_argument("--work", type=Path, help="keep the sets and runs here")
    a = parser.parse_args()
    sets = chosen(a.sets, KINDS, "set") if a.sets else list(KINDS if a.tables else bench.sets)
    rows = chosen(a.rows, bench.rows, "row")
    pairs = [tuple(pair.split(":")) for pair in a.pairs.split(",") if pair]
    seeds = [int(s) for s in a.seeds.split(",")] if a.seeds else None
    data = (a.shared / "data").resolve()
    if not a.tables and not (data / "models" / "ha").is_dir():
        harness.skip(f"no models in {data}; give --shared")
        return
    failed = []
    if not a.tables:
        there = {(r["set"], r["seed"], r["row"]): r["settings"] for r in read_records(a.out)}
        todo = [t for t in tasks(sets, rows, seeds, bench.rows) if a.again or there.get(t.key) != t.settings()]
        todo = [t for t in todo if a.rows or t.row in bench.plan.get(t.name, bench.rows)]
        if a.forks and todo:
            forked.prepare()
        with harness.work_folder(a.work) as work:
            failed = run(todo, data, work, a.out, a.jobs, bench)
    records = [r for r in read_records(a.out) if not seeds or r["seed"] in seeds]
    print("\n\n".join(bench.tables(records, sets, rows, pairs, set(CONTROLS))))
    if failed:
        raise SystemExit("\nfailed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
